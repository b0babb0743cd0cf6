"""`moe-online quantize`: a model folder, quantized once and stored for every later start."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from moe_online.cli import output


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "quantize",
        help="quantize a model folder and store the result, which loads faster",
        description="Quantizes a model folder while it loads and writes the result as a model folder, with checksums. "
        "DST appears when it is complete; until then, and after any error, what was there stays.",
    )
    parser.add_argument("source", metavar="SRC", help="a model folder: config.json and checkpoint/")
    parser.add_argument("destination", metavar="DST", help="the folder to write")
    parser.add_argument("--scheme", metavar="S", required=True, help="fp8_per_block, int8_w8a16, ...")
    parser.add_argument("--requantize", action="store_true", help="also what SRC has quantized in another format")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is at DST")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same facts as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    """Writes the quantized model and says how large it is and how long it took."""
    from etils import epath

    from moe_online import models
    from moe_online.loading.export import CHECKPOINT_METADATA, collect
    from moe_online.loading.folder import check_space, new_folder, write_errors, write_file
    from moe_online.loading.messages import human_bytes
    from moe_online.models.pretrained import CHECKPOINT_FOLDER, CONFIG_FILE

    output.check_writable(args.json)
    _check_apart(args.source, args.destination)
    begin = time.perf_counter()
    asked = {"quantization": args.scheme, "requantize": args.requantize}
    plan = models.plan(args.source, **asked)  # refuses what it can before anything is written
    config = (epath.Path(args.source) / CONFIG_FILE).read_bytes()
    marks = (f"{CHECKPOINT_FOLDER}/{CHECKPOINT_METADATA}",)
    with new_folder(args.destination, overwrite=args.overwrite, marks=marks) as folder:
        check_space(folder, plan.resident_bytes, args.destination)
        lm = models.load(args.source, **asked)
        export = collect(lm.model)
        with write_errors(args.destination):
            write_file(folder / CONFIG_FILE, config)
            (folder / CHECKPOINT_FOLDER).mkdir()
        export.write(folder / CHECKPOINT_FOLDER, destination=args.destination, progress=True)
    seconds = time.perf_counter() - begin
    output.stdout().print(
        f"{args.destination}: {human_bytes(export.nbytes)} as {args.scheme}, from {human_bytes(plan.read_bytes)}, in "
        f"{seconds:.1f} s",
        markup=False,
        soft_wrap=True,
    )
    output.write_json(
        args.json,
        {
            "source": args.source,
            "destination": args.destination,
            "scheme": args.scheme,
            "read_bytes": plan.read_bytes,
            "stored_bytes": export.nbytes,
            "seconds": seconds,
            "load": lm.report.to_json(),
        },
    )


def _check_apart(source: str, destination: str) -> None:
    """Refuses to put the result in the place of what it is made from."""
    from moe_online.errors import ConfigError

    read, written = (Path(os.path.realpath(path)) for path in (source, destination))
    if written == read or written in read.parents:
        raise ConfigError(f"writing {destination} would replace {source}, from which it is made: give another DST")
