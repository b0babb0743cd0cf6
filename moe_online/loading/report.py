"""What a load did: a table for people, JSON for machines, a picture."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from moe_online.loading.messages import human_bytes, rendered
from moe_online.loading.plan import WIDE, group_by_pattern

COLORS = ("#999999", "#3b7dd8", "#d8833b", "#e8c9a8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One loaded leaf."""

    name: str
    layer: str | None  # of experts, or dense, that it belongs to
    kind: str | None  # of that: "moe", "linear"
    sources: tuple[str, ...]
    shape: tuple[int, ...]  # logical
    scheme: str
    rule: str  # what chose the scheme
    source_bytes: int
    stored_bytes: int
    is_quantized: bool  # as it is stored; of what came quantized nothing was lost
    quantized: bool  # by this load
    # Relative L2 of what quantization changed. None: not quantized, or numbers whose squares f32 cannot hold, or zeros.
    error: float | None
    worst_expert_error: float | None  # of the experts of which it can be told
    seconds: float  # device time of its units, reading left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was read, what is kept, and the peak between. Prints as a table."""

    source: str
    tensors: tuple[TensorReport, ...]
    read_bytes: int
    resident_bytes: int
    planned_peak_bytes: int
    peak_bytes: int  # measured
    planned_host_peak_bytes: int
    host_peak_bytes: int  # measured: growth of the process's resident memory
    compiled_steps: int  # distinct functions; all layers of one shape share theirs
    compile_seconds: float  # of `seconds`: for which units had to wait
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The same facts for machines."""
        return dataclasses.asdict(self)

    @property
    def summary(self) -> str:
        """One line for a log: how many layers of which kind under which scheme; bytes, seconds, peak."""
        layers = dict.fromkeys((t.layer or t.name, t.kind, t.scheme) for t in self.tensors if t.is_quantized)
        found = collections.Counter((kind, scheme) for _, kind, scheme in layers)
        kinds = ", ".join(
            f"{n} {kind or 'other'} {'layer' if n == 1 else 'layers'} as {scheme}"
            for (kind, scheme), n in found.items()
        )
        return (
            f"loaded {self.source}: {kinds or 'nothing quantized'}; read {human_bytes(self.read_bytes)}, kept "
            f"{human_bytes(self.resident_bytes)} in {self.seconds:.1f} s; peak on the device "
            f"{human_bytes(self.peak_bytes)} (planned {human_bytes(self.planned_peak_bytes)})"
        )

    def __str__(self) -> str:
        return rendered(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        caption = (
            f"read {human_bytes(self.read_bytes)}, kept {human_bytes(self.resident_bytes)} in {self.seconds:.2f} s; "
            f"peak on the device {human_bytes(self.peak_bytes)} (planned {human_bytes(self.planned_peak_bytes)})"
        )
        table = Table(title=self.source, title_justify="left", caption=caption, caption_justify="left")
        table.add_column("tensors", overflow="fold")
        for column in ("read", "stored"):
            table.add_column(column, justify="right")
        table.add_column("scheme")
        for column in ("error", "worst expert"):
            table.add_column(column, justify="right")
        if options.max_width >= WIDE:
            table.add_column("chosen by")
        for name, group in group_by_pattern(self.tensors):
            read, stored = sum(t.source_bytes for t in group), sum(t.stored_bytes for t in group)
            first = group[0]
            keys = ("error", "worst_expert_error") if first.quantized else ()
            errors = [_worst(getattr(t, key) for t in group) for key in keys] or ["", ""]
            rule = [first.rule] if options.max_width >= WIDE else []
            table.add_row(name, human_bytes(read), human_bytes(stored), first.scheme, *errors, *rule)
        yield table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws bytes read, kept and at the peak into an image file; needs the extra `plot`."""
        from matplotlib.figure import Figure  # optional

        bars = {
            "read": self.read_bytes,
            "kept": self.resident_bytes,
            "peak": self.peak_bytes,
            "planned peak": self.planned_peak_bytes,
        }
        figure = Figure(figsize=(6, 2.4), layout="constrained")
        axes = figure.subplots()
        drawn = axes.barh(list(bars), [size / 1e6 for size in bars.values()], color=COLORS)
        axes.bar_label(drawn, labels=[human_bytes(size) for size in bars.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(xlabel="MB", title=f"Loading {os.path.basename(self.source) or self.source}")
        figure.savefig(path, dpi=110)


def _worst(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{100 * max(known):.2f} %" if known else "-"
