"""The command: `python -m pallas_kernels.bench grouped_matmul`, `... quantize`, and `... table FILE.jsonl` for what
they wrote."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench import cases, table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit status: 1 where no row has a time, 2 for arguments that mean nothing."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "table":
        print(table.markdown(table.read(args.file)))
        return 0
    try:
        return _grouped_matmul(args) if args.command == "grouped_matmul" else _quantize(args)
    except ValueError as error:
        parser.error(str(error))


def _grouped_matmul(args: argparse.Namespace) -> int:
    from pallas_kernels.bench import peers

    names = {"default": cases.DEFAULT, "all": cases.ALL}.get(args.cases) or args.cases.split(",")
    chosen = cases.select(names, _integers(args.tokens), routing=args.routing, seed=args.seed)
    configs, peer_names = read_configs(args.configs), peers.choose(args.peers)
    if peers.TORCH in peer_names:  # jax, not started yet, would take the memory that torch needs
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

    def bench(log: Callable[[str], None]) -> Any:
        from pallas_kernels.bench.grouped_matmul import Bench

        return Bench(configs, peer_names, log=log, commit=args.commit)

    return _run(chosen, bench, f"{len(chosen)} cases, {len(configs)} configs", args)


def _quantize(args: argparse.Namespace) -> int:
    from pallas_kernels.bench import quantize

    formats = quantize.WEIGHT_FORMATS if args.formats == "all" else args.formats.split(",")
    chosen = quantize.select(args.models.split(","), formats)
    peer_names = list(quantize.PEERS) if args.peers == "all" else args.peers.replace("none", "").split(",")
    peer_names = [name for name in peer_names if name]
    unknown = [name for name in peer_names if name not in quantize.PEERS]
    if unknown:
        raise ValueError(f"unknown peers {', '.join(unknown)}; there are {', '.join(quantize.PEERS)}")

    def bench(log: Callable[[str], None]) -> Any:
        return quantize.QuantizeBench(peer_names, log=log, commit=args.commit)

    return _run(chosen, bench, f"{len(chosen)} cases", args)


def _run(
    chosen: Sequence[Any], bench: Callable[[Callable[[str], None]], Any], what: str, args: argparse.Namespace
) -> int:
    import jax

    start, any_time = time.monotonic(), False

    def log(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    device = jax.devices()[0]
    log(f"{what}, on {device.device_kind} (jax {jax.__version__})")
    if device.platform == "cpu":
        log("NO ACCELERATOR: times are the host's clock on a CPU, say nothing of a device, and stand in `wall_us` only")
    with args.out.open("a") as out:
        for rows in bench(log).run(chosen):
            for row in rows:
                any_time = any_time or row.best
                out.write(row.to_json() + "\n")
            out.flush()
    log(f"done: {args.out}")
    print(table.markdown(table.read(args.out)))
    return 0 if any_time else 1


def read_configs(text: str | None) -> list[dict[str, Any] | None]:
    """A JSON list of configs, given as it is or as the path of a file; null stands for the heuristic's choice.

    Raises:
      ValueError: anything else.
    """
    if text is None:
        return [None]
    configs = json.loads(text if text.lstrip().startswith("[") else Path(text).read_text())
    if not isinstance(configs, list) or not configs or not all(c is None or isinstance(c, dict) for c in configs):
        raise ValueError(f"--configs must be a JSON list of objects or null, not {text}")
    return configs


def _integers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"--tokens {text} must be positive")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("grouped_matmul", help="measure it beside its peers")
    run.add_argument("--cases", default="default", help="default, all, or names with commas: mixtral, mixtral_w2, ...")
    run.add_argument("--tokens", default="64,512,4096", help="batch sizes of the models' cases")
    run.add_argument("--routing", default="uniform", choices=cases.ROUTINGS, help="how tokens choose experts")
    run.add_argument("--seed", type=int, default=0, help="of routing and data")
    run.add_argument("--peers", default="all", help="all, none, or names with commas")
    run.add_argument("--configs", help="JSON list of kernel configs, or a file of it; null is the heuristic's choice")
    into = commands.add_parser("quantize", help="measure the quantization of whole leaves")
    into.add_argument("--models", default="mixtral", help="names with commas: " + ", ".join(cases.MODELS))
    into.add_argument("--formats", default="all", help="all, or names of weight formats with commas")
    into.add_argument("--peers", default="all", help="all, none, or names with commas")
    for each in (run, into):
        each.add_argument("--commit", help="for the rows, where this is no git checkout")
        each.add_argument("--out", type=Path, required=True, help="JSON lines; rows are appended")
    show = commands.add_parser("table", help="print rows as markdown")
    show.add_argument("file", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
