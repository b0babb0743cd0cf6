"""The command `moe-online`: one module per subcommand, with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from moe_online.cli import evaluate, inspect, quantize, quickstart
from moe_online.errors import CheckpointError, ConfigError

COMMANDS = (quickstart, inspect, quantize, evaluate)
INTERRUPTED = 130  # what shells report after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: Arguments; None takes those of the process.

    Returns:
      The exit status: 0, 1 after an error that the user can do something about (its message is on stderr), 130 after
      Ctrl-C. Usage errors leave through `SystemExit` with status 2.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"moe-online: error: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-online", description="Quantize Mixture-of-Experts checkpoints while they load, and run them."
    )
    version = importlib.metadata.version("moe-online")
    parser.add_argument("--version", action="version", version=f"moe-online {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return parser


def _message(error: Exception) -> str:
    """The system's own errors say first what file they are about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
