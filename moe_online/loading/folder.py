"""Output folders that appear whole or not at all.

A folder is written under a hidden name beside its destination and renamed when it is complete and on the disk. Where
it replaces another, that one first steps aside by a rename of its own; a run that is killed between the two leaves
nothing at the destination, and the next run puts the old folder back before it begins.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from moe_online.errors import CheckpointError
from moe_online.loading.messages import human_bytes

INFIX = ".moe-online-"  # between the destination's name and the process that writes
NEW, OLD = "new", "old"
CLOCK_STEP = 2  # seconds by which the system may tell the start of a process otherwise after its clock was set
REMEDIES = {
    errno.ENOSPC: "Free space there",
    getattr(errno, "EDQUOT", errno.ENOSPC): "Free space there",  # Windows has no quotas of this kind
    errno.ENOENT: "The folder that it was to be in is gone: create it",
    errno.EACCES: "Get leave to write there",
    errno.EPERM: "Get leave to write there",
    errno.EROFS: "Make that file system writable",
    errno.ENOTEMPTY: "Something else has appeared there: remove it",
}


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool, marks: Sequence[str]) -> Iterator[Path]:
    """Yields an empty folder that is at `path` once the body is done; where the body fails nothing has changed.

    What runs that were killed have left for the same destination is removed. One run at a time may write there.

    Args:
      path: The destination, on a local file system; its parent exists.
      overwrite: Whether to replace what is there, which stays until the new folder is complete.
      marks: Files in a folder of which one must be there for it to be replaced.

    Raises:
      CheckpointError: the destination exists or is something else, or it cannot be written.
    """
    target = _destination(path)
    with write_errors(target):
        _tidy(target)
        _check(target, overwrite=overwrite, marks=marks)
        folder = _sibling(target, NEW)
        folder.mkdir()
    try:
        yield folder
        with write_errors(target):
            for inner, _, _ in os.walk(folder, topdown=False):
                _sync_folder(inner)
            _put(folder, target, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the system says of a failed write into a CheckpointError about `path`, the destination."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        remedy = REMEDIES.get(error.errno or 0, "Look after the disk")
        raise CheckpointError(
            f"{os.fspath(path)} cannot be written: {error.strerror or error}. {remedy} or give another destination. "
            "What was there before is unchanged."
        ) from error


def write_file(file: Path, *pieces: bytes | memoryview) -> None:
    """Writes a new file through to the disk."""
    with file.open("xb", buffering=0) as opened:
        for piece in pieces:
            left = memoryview(piece).cast("B")
            while left:  # one call writes 2 GiB at most
                left = left[opened.write(left) :]
        os.fsync(opened.fileno())


def check_space(folder: Path, size: int, path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError where the disk of `folder` has no room for `size` bytes; `path` is the destination."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"{os.fspath(path)} needs {human_bytes(size)} and its disk has {human_bytes(free)} left. Free space there "
            "or give another destination. What was there before is unchanged."
        )


def _destination(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if "://" in text:
        raise CheckpointError(
            f"{text} is no local folder, and only there a folder appears at once: write to a local path and copy it"
        )
    target = Path(os.path.realpath(os.path.expanduser(text)))  # a link stays, what it leads to is replaced
    if not target.name:
        raise CheckpointError(f"{text} is the root of a file system: give a folder in it")
    return target


def _check(target: Path, *, overwrite: bool, marks: Sequence[str]) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"there is no folder {target.parent} for {target.name}: create it")
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} exists: give overwrite=True (--overwrite on the command line) to replace it, or another path"
        )
    if not target.is_dir() or (any(target.iterdir()) and not any((target / mark).exists() for mark in marks)):
        raise CheckpointError(
            f"{target} is not replaced: it has no {' or '.join(marks)}, so it is something else than this would "
            "write. Remove it yourself or give another path"
        )


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}{INFIX}{_writer(os.getpid())}.{kind}")


def _writer(pid: int) -> str:
    """A process, told from others that have the same number before or after it: containers give small ones again."""
    return f"{pid}-{psutil.Process(pid).create_time():.0f}"


def _is_running(writer: str) -> bool:
    pid, _, started = writer.partition("-")
    if not (pid.isdigit() and started.isdigit()):
        return False
    try:
        began: float = psutil.Process(int(pid)).create_time()
    except psutil.Error:
        return False
    return abs(began - int(started)) <= CLOCK_STEP


def _tidy(target: Path) -> None:
    """Clears what killed runs left; an output that had stepped aside for one of them comes back."""
    for left in target.parent.glob(glob.escape(f".{target.name}{INFIX}") + "*"):
        writer, _, kind = left.name.rpartition(INFIX)[2].partition(".")
        if writer != _writer(os.getpid()) and _is_running(writer):
            continue
        if kind == OLD and not target.exists():
            os.rename(left, target)
        else:
            shutil.rmtree(left)


def _put(folder: Path, target: Path, *, overwrite: bool) -> None:
    """Renames `folder` to `target`."""
    old = _sibling(target, OLD)
    try:
        if overwrite and target.exists():
            os.rename(target, old)
        os.rename(folder, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    _sync_folder(target.parent)
    if old.exists():
        os.rename(old, folder)  # while it is deleted it must not come back
        shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in a folder last; Windows has no such call."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
