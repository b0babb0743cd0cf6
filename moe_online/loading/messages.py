"""How messages speak of many tensors and of bytes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence

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


@contextlib.contextmanager
def progress_bar(visible: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Bytes done of a total, rate and time left, on stderr; yields a function to be told of each that is done."""
    console = Console(stderr=True) if visible else None
    if console is None or not (console.is_terminal or console.is_jupyter):  # elsewhere an empty line would stay
        yield lambda size: None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
