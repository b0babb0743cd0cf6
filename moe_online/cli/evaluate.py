"""`moe-online evaluate`: what each scheme costs and loses, for a byte-level model and a text of your choice."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from moe_online.cli import output
from moe_online.errors import ConfigError

ALL = "all"
NUM_BYTES = 256  # tokens of a byte-level model
COLUMNS = ("weight", "activation", "stored", "peak", "bits/byte", "vs {first}", "KL", "top-1", "load")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="compare schemes on a model and a text: memory, bits per byte, KL to bf16, top-1 agreement",
        description="Loads a byte-level model in bf16 and under each scheme, lets it predict a text, and prints "
        "memory, bits per byte, and the distance of its predictions from those of bf16. Schemes quantize the experts "
        "only; with --dense also attention's projections, where the name does so when a model is loaded by it.",
    )
    parser.add_argument("path", metavar="PATH", help="a model folder: config.json with vocab_size 256, and checkpoint/")
    parser.add_argument(
        "--schemes",
        metavar="S",
        default=ALL,
        help=f"names, with commas between; bf16 is always there. {ALL} (the default): each, those with "
        "several names once, without those that do not fit the sizes of the model",
    )
    parser.add_argument("--dense", action="store_true", help="quantize dense layers as well, as models.load does")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="what to predict (default: the shipped held-out text)"
    )
    parser.add_argument("--bytes", metavar="N", type=_positive, help="predict the first N bytes only")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows of the table as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the table (needs the extra 'plot')")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes and draws what was asked for."""
    from moe_online.cli import comparison, picture, table

    output.check_writable(args.json)
    if args.plot is not None:
        picture.check(args.plot)
    text, description = _text(args.text, args.bytes)
    schemes, left_out = _schemes(args.schemes, args.path, dense=args.dense)
    rows = [each.row for each in comparison.compare(args.path, text, schemes, dense=args.dense)]
    output.write_json(args.json, [dataclasses.asdict(row) for row in rows])
    console = output.stdout()
    console.print(table.table(rows, COLUMNS, text=description))
    for line in left_out:
        console.print(f"Left out {line}", markup=False, soft_wrap=True)
    if args.plot is not None:
        picture.draw(rows, args.plot, title=f"{Path(args.path).name}: {description}, predicted under each scheme")


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return number


def _text(file: Path | None, num_bytes: int | None) -> tuple[bytes, str]:
    """The bytes to predict, after one that is not, and how to call them."""
    from moe_online.assets import HELDOUT_TEXT

    with (file or HELDOUT_TEXT).open("rb") as opened:
        text = opened.read(-1 if num_bytes is None else num_bytes + 1)
    if len(text) < 2:
        raise ConfigError(f"{file} holds {len(text)} bytes; give a text of at least 2: the first is not predicted")
    return text, f"{len(text) - 1:,} bytes of {'held-out text' if file is None else file.name}"


def _schemes(names: str, path: str, *, dense: bool) -> tuple[list[str], list[str]]:
    """What to measure, and of `all` what cannot be, with the reason; finds out from metadata alone.

    Raises:
      CheckpointError: no model folder.
      ConfigError: a model of other tokens than bytes, an unknown name, or named schemes that do not fit the model.
    """
    from moe_online import models
    from moe_online.cli import comparison
    from moe_online.models.pretrained import read_config

    chosen = [name.strip() for name in names.split(",")]
    if chosen == [ALL]:
        chosen = comparison.schemes(everything=True)
    comparison.check_names(chosen)
    vocab_size = read_config(path).vocab_size
    if vocab_size != NUM_BYTES:
        raise ConfigError(
            f"the model in {path} has vocab_size {vocab_size}; evaluate feeds bytes, so it needs {NUM_BYTES}. For "
            "other tokens call moe_online.evaluate.evaluate with yours"
        )
    wanted, refused = list(dict.fromkeys([comparison.UNQUANTIZED, *chosen])), {}
    for name in wanted:
        try:
            models.plan(path, quantization=comparison.quantization(name, dense=dense))
        except ConfigError as error:
            refused[name] = f"{name}: {error}"
    if refused and (names.strip() != ALL or comparison.UNQUANTIZED in refused):
        raise ConfigError("; ".join(refused.values()))
    return [name for name in wanted if name not in refused], list(refused.values())
