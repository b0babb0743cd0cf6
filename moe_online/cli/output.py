"""What the commands share to write their results."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 122  # columns where there is no terminal to ask: what the widest table needs


def stdout() -> Console:
    """The console for results; progress goes to stderr."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr that goes when the work is done; what it yields is called with what each step does."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda description: bar.update(task, advance=1, description=description)


def check_writable(path: Path | None) -> None:
    """Finds out before the work starts, not after, that its result cannot be stored.

    Raises:
      OSError: `path` is a folder, or none of its folder's files can be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder, give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission; give another file")


def write_json(path: Path | None, value: Any) -> None:
    """Writes the same facts for machines, where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n")
