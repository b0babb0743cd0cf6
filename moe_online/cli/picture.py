"""The comparison of schemes as a picture."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_online.cli import output
from moe_online.cli.comparison import NAME_WIDTH, Row
from moe_online.errors import ConfigError
from moe_online.loading.messages import human_bytes

PEAK, STORED, LOSS, SPEED, OTHER = "#c9d8ee", "#2f6db5", "#d8833b", "#4f9d69", "#9a6fb0"
BAR = 0.62  # of the distance between rows
INK = "#222222"


def can_draw() -> bool:
    """Whether matplotlib, of the extra `plot`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check(path: Path) -> None:
    """Finds out before the work starts that the picture cannot be drawn.

    Raises:
      ConfigError: matplotlib is missing, or writes no such pictures.
      OSError: the file cannot be written.
    """
    if not can_draw():
        raise ConfigError(f"cannot draw {path} without matplotlib: pip install 'moe-online[plot]'")
    output.check_writable(path)
    from matplotlib.backend_bases import FigureCanvasBase  # optional

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"cannot draw {path}: its name must end in one of {', '.join(known)}")


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draws one row of bars per scheme: memory, loss of quality, and speed or else agreement."""
    from matplotlib.figure import Figure  # optional

    figure = Figure(figsize=(11, 1.5 + 0.42 * len(rows)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    memory, loss, last = figure.subplots(1, 3, sharey=True, width_ratios=[1.3, 1.1, 0.9])
    _memory(memory, rows)
    _loss(loss, rows)
    speeds = [row.tokens_per_second for row in rows if row.tokens_per_second is not None]
    if len(speeds) == len(rows):
        _bars(last, speeds, [f"{speed:.0f}" for speed in speeds], SPEED)
        last.set_title("Tokens per second, one sequence", loc="left", fontsize=10, color=INK)
    else:
        _disagreement(last, rows)
    names = ["\n".join(textwrap.wrap(row.scheme, NAME_WIDTH)) for row in rows]
    memory.set_yticks(range(len(rows)), names, color=INK)
    memory.invert_yaxis()  # shared: the first scheme on top
    for axes in (memory, loss, last):
        axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([])
    figure.savefig(path, dpi=150)


def _memory(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, [row.peak_bytes for row in rows], [human_bytes(row.peak_bytes) for row in rows], PEAK)
    drawn = axes.barh(range(len(rows)), [row.stored_bytes for row in rows], BAR, color=STORED)
    axes.bar_label(
        drawn, [human_bytes(row.stored_bytes) for row in rows], label_type="center", color="white", fontsize=9
    )
    axes.set_title("Memory: stored (dark), peak while loading (light)", loc="left", fontsize=10, color=INK)


def _loss(axes: Any, rows: Sequence[Row]) -> None:
    """KL rather than the change of bits per byte, which is small, of either sign and mostly chance."""
    first = rows[0]
    labels = [f"{row.kl:.4f}  (bits/byte {row.percent_more_bits(first):+.2f} %)" for row in rows[1:]]
    _bars(axes, [row.kl for row in rows], [f"{first.bits_per_byte:.4f} bits/byte", *labels], LOSS)
    axes.set_title(f"KL to {first.scheme}, bits per byte", loc="left", fontsize=10, color=INK)
    axes.margins(x=1.0)  # for the long labels


def _disagreement(axes: Any, rows: Sequence[Row]) -> None:
    """The complement of the agreement, which is nearly 1 for each."""
    other = [100 * (1 - row.top1_agreement) for row in rows]
    _bars(axes, other, ["", *(f"{percent:.1f} %" for percent in other[1:])], OTHER)
    axes.set_title(f"Top-1 other than that of {rows[0].scheme}", loc="left", fontsize=10, color=INK)


def _bars(axes: Any, values: Sequence[float], labels: Sequence[str], color: str) -> None:
    drawn = axes.barh(range(len(values)), values, BAR, color=color)
    axes.bar_label(drawn, labels, padding=4, fontsize=9, color=INK)
    axes.margins(x=0.28)
