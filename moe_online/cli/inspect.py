"""`moe-online inspect`: what loading a checkpoint would do, from its metadata alone."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_online.cli import output

if TYPE_CHECKING:
    from rich.table import Table

    from moe_online.loading import StoredTensor
    from pallas_kernels import Format

EXPORT = "An export of save_quantized: moe_online.load takes it for the same model, with no mapping and no scheme."
HINT = """\

Experts have rank 3 or more. Nothing guesses their axes: mapping={...} of moe_online.load says them (E expert,
N output, K contraction) and which leaf of your model each tensor becomes; quantization= then reaches it. For example:
    "*.GATE": "E K N -> *.experts.w13_weight.gate",    into a moe_online.flax.MoE, whose leaves are [E, N, K],
    "*.UP": "E K N -> *.experts.w13_weight.up",        for stored tensors [E, K, N] named ...GATE, ...UP, ...DOWN
    "*.DOWN": "E K N -> *.experts.w2_weight",
    "*.ROUTER": "-> *.router.kernel",                  another name, nothing else"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="print what loading a checkpoint would do, without reading weights",
        description="Prints what loading a checkpoint would do, from its metadata alone. A folder with config.json and "
        "checkpoint/ is planned as a model; of any other Orbax checkpoint the tensors are listed.",
    )
    parser.add_argument("path", metavar="PATH", help="a model folder or an Orbax checkpoint")
    parser.add_argument("--prefix", metavar="P", help="only what is below this name of a checkpoint, such as params")
    parser.add_argument(
        "--scheme",
        metavar="S",
        help="fp8_per_block, int8_w8a16, ...: quantizes the experts of a model folder and, as most schemes do, its "
        "attention projections; of another checkpoint it says about how large the experts become",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same facts as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    """Prints the plan of a model folder, or the tensors of a checkpoint."""
    from etils import epath

    from moe_online import models
    from moe_online.errors import ConfigError
    from moe_online.models.pretrained import CHECKPOINT_FOLDER, CONFIG_FILE

    output.check_writable(args.json)
    if not (epath.Path(args.path) / CONFIG_FILE).exists():
        _list(args)
        return
    if args.prefix is not None:
        raise ConfigError(
            f"{args.path} is a model folder, whose layout is known: leave --prefix out, or inspect "
            f"{epath.Path(args.path) / CHECKPOINT_FOLDER}"
        )
    plan = models.plan(args.path, quantization=args.scheme)
    output.stdout().print(plan)
    output.write_json(args.json, plan.to_json())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """A stored tensor; the fields are those by which `group_by_pattern` groups."""

    name: str
    shape: tuple[int, ...]
    scheme: str  # the dtype
    rule: str  # what can be read alone
    stored_bytes: int
    estimated_bytes: int | None  # None: no expert, or no scheme given

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        facts = {"name": self.name, "shape": list(self.shape), "dtype": self.scheme, "stored_bytes": self.stored_bytes}
        return facts if self.estimated_bytes is None else {**facts, "estimated_bytes": self.estimated_bytes}


def _list(args: argparse.Namespace) -> None:
    """Prints every tensor of a checkpoint that does not say what model it belongs to."""
    from moe_online.config import OnlineQuantConfig
    from moe_online.loading import open_source
    from moe_online.loading.exported import ExportSource

    spec = None if args.scheme is None else OnlineQuantConfig.parse(args.scheme).moe
    fmt = None if spec is None else spec.weight
    source = open_source(args.path, prefix=args.prefix)
    rows = [_row(tensor, fmt) for tensor in source.tensors.values()]
    console = output.stdout()
    console.print(_table(source.description, rows, args.scheme))
    if isinstance(source, ExportSource):
        console.print(f"\n{EXPORT}", markup=False, soft_wrap=True)
    elif any(len(row.shape) >= 3 for row in rows):
        console.print(HINT, markup=False, soft_wrap=True)
    output.write_json(
        args.json,
        {
            "source": source.description,
            "stored_bytes": sum(row.stored_bytes for row in rows),
            "tensors": [row.to_json() for row in rows],
        },
    )


def _row(tensor: StoredTensor, fmt: Format | None) -> _Row:
    import jax.numpy as jnp

    is_expert = len(tensor.shape) >= 3 and jnp.issubdtype(tensor.dtype, jnp.floating)
    return _Row(
        name=tensor.name,
        shape=tensor.shape,
        scheme=tensor.dtype.name,
        rule="whole" if tensor.chunk == tensor.shape else _shape(tensor.chunk),
        stored_bytes=tensor.nbytes,
        estimated_bytes=fmt.stored_bytes(tensor.shape) if fmt is not None and is_expert else None,
    )


def _table(source: str, rows: Sequence[_Row], scheme: str | None) -> Table:
    from rich.table import Table

    from moe_online.loading.messages import human_bytes
    from moe_online.loading.plan import group_by_pattern

    total = sum(row.stored_bytes for row in rows)
    caption = f"{len(rows)} tensor{'s' * (len(rows) != 1)}, {human_bytes(total)}"
    if scheme is not None:
        kept = sum(row.stored_bytes if row.estimated_bytes is None else row.estimated_bytes for row in rows)
        caption += f"; about {human_bytes(kept)} if all of rank 3 and more are experts loaded as {scheme}"
    table = Table(title=source, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("tensors", overflow="fold")
    for column in ("number", "shape", "dtype", "bytes", "stored chunk"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    if scheme is not None:
        table.add_column(f"as {scheme}", justify="right")
    for name, group in group_by_pattern(rows):
        first, estimates = group[0], [row.estimated_bytes for row in group if row.estimated_bytes is not None]
        size = human_bytes(sum(row.stored_bytes for row in group))
        estimate = [human_bytes(sum(estimates)) if estimates else ""] if scheme is not None else []
        table.add_row(name, str(len(group)), _shape(first.shape), first.scheme, size, first.rule, *estimate)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
