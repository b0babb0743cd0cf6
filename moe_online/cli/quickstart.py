"""`moe-online quickstart`: the shipped model under several schemes, in one table and one picture."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_online.cli import output

if TYPE_CHECKING:
    from rich.console import Console

    from moe_online.cli.comparison import Measured

PICTURE = Path("moe-online-quickstart.png")
TEXT_BYTES = 16 * 1024
PROMPT = 'def read_config(path):\n    """'
SPEAKER = "fp8_per_block"  # the scheme whose completion is shown
COLUMNS = ("stored", "peak", "bits/byte", "vs {first}", "KL", "tok/s", "load")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "quickstart",
        help="load the shipped model under several schemes and compare them",
        description="Loads the shipped model (7 million parameters, trained on Python source) under several schemes, "
        "compares memory, quality and speed in one table, and lets it write some code. Takes about a minute.",
    )
    parser.add_argument("--all", action="store_true", help="every scheme, not only the usual ones")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows of the table as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, default=PICTURE, help="the picture (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table and a completion, draws the picture."""
    from moe_online.cli import comparison, picture, table

    output.check_writable(args.json)
    if picture.can_draw():
        picture.check(args.plot)
    measured = _measure(comparison.schemes(everything=args.all))
    rows = [each.row for each in measured]
    output.write_json(args.json, [dataclasses.asdict(row) for row in rows])
    console = output.stdout()
    console.print(table.table(rows, COLUMNS, text=f"{TEXT_BYTES:,} bytes of held-out text"))
    _print_completion(console, measured)
    if picture.can_draw():
        picture.draw(rows, args.plot, title="moe-online quickstart: a 7 M parameter MoE, quantized while it loads")
        console.print(f"Picture of the table: {args.plot.resolve()}", markup=False, soft_wrap=True)
    else:
        console.print("No picture without matplotlib: pip install 'moe-online[plot]'", markup=False)


def _measure(schemes: Sequence[str]) -> list[Measured]:
    from moe_online.assets import HELDOUT_TEXT, PYTHON_MOE_7M
    from moe_online.cli import comparison

    text = HELDOUT_TEXT.read_bytes()[: TEXT_BYTES + 1]  # the first byte is not predicted
    return comparison.compare(PYTHON_MOE_7M, text, schemes, prompt=PROMPT)


def _print_completion(console: Console, measured: Sequence[Measured]) -> None:
    from rich.text import Text

    completion = next(each.completion for each in measured if each.row.scheme == SPEAKER)
    whole_lines = completion.rpartition("\n")[0].rstrip() or completion
    console.print(f"\nThe {SPEAKER} model continues the bold text:\n")
    console.print(Text(PROMPT, style="bold") + Text(whole_lines), soft_wrap=True)
    console.print()
