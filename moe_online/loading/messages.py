"""How messages speak of many tensors and of bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SHOWN = 20  # names in a message; an error's `names` holds all


def listed(names: Sequence[str], noun: str) -> str:
    """`"2 tensors (a, b)"`; long lists are cut, with the number of those left out."""
    left_out = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {noun}{'s' * (len(names) != 1)} ({', '.join(names[:SHOWN])}{left_out})"


def rendered(table: RenderableType) -> str:
    """What rich would print, as text."""
    console = Console(file=io.StringIO(), width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def human_bytes(size: float) -> str:
    """`"14.4 MB"`: powers of ten, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def progress_bar(visible: bool) -> Progress:
    """Bytes done, rate and time left, on stderr."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (visible and (console.is_terminal or console.is_jupyter)),  # elsewhere an empty line would stay
        transient=True,
    )
