"""Where files lie: paths, opened through etils.epath, and URLs, read through tensorstore.

A place is a file or a folder, whether or not something is there. Errors of reading are tried again where they may
pass (see `moe_online.loading.retry`; of URLs by tensorstore itself), and are OSErrors after that.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import tensorstore as ts
from etils import epath

from moe_online.errors import CheckpointError
from moe_online.loading.retry import FIRST_PAUSE, RETRIES, TENSORSTORE_ERRORS, ShortRead, first_line, retried

URLS = ("http", "https", "memory", "gs", "s3")  # what tensorstore reads without a package of its own for each
_AGAIN = {"max_retries": RETRIES, "initial_delay": f"{FIRST_PAUSE * 1000:.0f}ms"}
CONTEXT = ts.Context(  # of everything that is read; what `memory://` holds is in here
    {
        "file_io_concurrency": {"limit": 32},  # reads at a time; of URLs tensorstore's own limit is 32
        "http_request_retries": _AGAIN,
        "gcs_request_retries": _AGAIN,
        "s3_request_retries": _AGAIN,
    }
)
Result = TypeVar("Result")


class Reader(abc.ABC):
    """Reads byte ranges of one file; several threads may."""

    @abc.abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer (of bytes) with what the file has from `offset` on.

        Raises:
          OSError: the file is gone, has changed since the first read, ends before that, or cannot be read.
        """

    def read(self, size: int, offset: int) -> bytes:
        """That many bytes."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)


class Place(abc.ABC):
    """A file or a folder."""

    @property
    @abc.abstractmethod
    def can_list(self) -> bool:
        """Whether it can tell what is in a folder, and whether there is one: a web server cannot."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The last part of its path."""

    @abc.abstractmethod
    def __truediv__(self, name: str) -> Place: ...

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether there is such a file or, where folders can be listed, such a folder."""

    @abc.abstractmethod
    def is_dir(self) -> bool:
        """Whether it is a folder; never where folders cannot be listed."""

    @abc.abstractmethod
    def folders(self) -> list[Place]:
        """The folders in it."""

    @abc.abstractmethod
    def files(self) -> list[Place]:
        """The files in it."""

    @abc.abstractmethod
    def read_bytes(self) -> bytes:
        """A whole small file."""

    @abc.abstractmethod
    def reader(self) -> Reader:
        """For byte ranges of the file, which may be opened only when it is read."""

    @property
    @abc.abstractmethod
    def kvstore(self) -> dict[str, Any]:
        """What tensorstore calls it, as a folder: "path" ends in a slash."""


def open_place(path: str | os.PathLike[str]) -> Place:
    """The place that a user means by a path or a URL.

    Raises:
      CheckpointError: a URL that cannot be understood or that nothing here can open.
    """
    text = os.fspath(path)
    scheme, mark, _ = text.partition("://")
    try:
        if mark and scheme in URLS:
            return UrlPlace(ts.KvStore.Spec(text if text.endswith(mark) else text.rstrip("/")))
        return PathPlace(epath.Path(text).expanduser())
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        # Of etils: a scheme that it does not know, a package that it needs for one, a user who has no home.
        raise CheckpointError(
            f"{text} cannot be reached: {first_line(error)}. Give a path, or a URL with one of {', '.join(URLS)}."
        ) from error


@dataclasses.dataclass(frozen=True)
class PathPlace(Place):
    """A path: of a disk, or of whatever else etils opens."""

    path: epath.Path

    def __str__(self) -> str:
        return str(os.fspath(self.path))

    @property
    def can_list(self) -> bool:
        """Always."""
        return True

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self.path.name)

    def __truediv__(self, name: str) -> PathPlace:
        return PathPlace(self.path / name)

    def exists(self) -> bool:
        """Whether something is there."""
        return retried(lambda: bool(self.path.exists()))

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return retried(lambda: bool(self.path.is_dir()))

    def folders(self) -> list[Place]:
        """The folders in it."""
        return retried(lambda: [PathPlace(path) for path in self.path.iterdir() if path.is_dir()])

    def files(self) -> list[Place]:
        """The files in it."""
        return retried(lambda: [PathPlace(path) for path in self.path.iterdir() if path.is_file()])

    def read_bytes(self) -> bytes:
        """A whole small file."""
        return retried(lambda: bytes(self.path.read_bytes()))

    def reader(self) -> Reader:
        """For byte ranges."""
        is_plain = "://" not in str(self) and hasattr(os, "preadv")  # Windows has no reads at a position
        return PlainReader(str(self)) if is_plain else StreamReader(self.path)

    @property
    def kvstore(self) -> dict[str, Any]:
        """tensorstore's name of the folder."""
        if "://" in str(self):
            raise CheckpointError(
                f"{self} cannot be reached: tensorstore, which reads Orbax checkpoints, has no driver for it; copy the "
                f"checkpoint to a disk or to one of {', '.join(URLS)}"
            )
        return {"driver": "file", "path": f"{self.path.resolve().as_posix()}/"}


class PlainReader(Reader):
    """A file of a disk, opened once, when it is first read, and closed with this object."""

    def __init__(self, path: str):
        self._path = path
        self._lock = threading.Lock()
        self._opened: tuple[int, tuple[int, int]] | None = None  # the descriptor, size and time at that moment

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer, without a copy on the way."""
        retried(lambda: self._read_into(buffer, offset))

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        descriptor, version = self._open()
        if _version(os.stat(self._path)) != version:  # also where another file has taken its place
            raise OSError(f"{self._path} has changed while it was read")
        done = 0
        while done < len(buffer):  # one call gives 2 GiB at most
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise OSError(f"{self._path} ends {len(buffer) - done} bytes early")
            done += count

    def _open(self) -> tuple[int, tuple[int, int]]:
        with self._lock:
            if self._opened is None:
                descriptor = os.open(self._path, os.O_RDONLY)
                weakref.finalize(self, os.close, descriptor)
                self._opened = descriptor, _version(os.fstat(descriptor))
            return self._opened


def _version(stat: os.stat_result) -> tuple[int, int]:
    """Differs between versions of a file; an inode would, too, but some network file systems give new ones at will."""
    return stat.st_size, stat.st_mtime_ns


class StreamReader(Reader):
    """A file that etils opens: anew for each read, as a stream has one position for all threads."""

    def __init__(self, path: epath.Path):
        self._path = path

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer."""
        retried(lambda: self._read_into(buffer, offset))

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        with self._path.open("rb") as stream:
            stream.seek(offset)
            done = 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:])
                if not count:
                    raise ShortRead(f"{self._path} ends {len(buffer) - done} bytes early")
                done += count


@dataclasses.dataclass(frozen=True)
class UrlPlace(Place):
    """A URL that tensorstore reads."""

    spec: ts.KvStore.Spec

    def __str__(self) -> str:
        return str(self.spec.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPlace) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def can_list(self) -> bool:
        """Whether folders can be listed."""
        return bool(self.spec.to_json()["driver"] != "http")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self.spec.path.rpartition("/")[2])

    def __truediv__(self, name: str) -> UrlPlace:
        return UrlPlace(self.spec / name if self.spec.path else self.spec + name)

    def exists(self) -> bool:
        """Whether there is such a file or, where that can be told, such a folder."""
        return _is_there(self._store()) or self.is_dir()

    def is_dir(self) -> bool:
        """Whether something is in it."""
        return self.can_list and bool(self._keys())

    def folders(self) -> list[Place]:
        """The folders in it: all that is below it is listed for that."""
        return [self / name for name in sorted({key.partition("/")[0] for key in self._keys() if "/" in key})]

    def files(self) -> list[Place]:
        """The files in it."""
        return [self / key for key in self._keys() if "/" not in key]

    def read_bytes(self) -> bytes:
        """A whole small file."""
        return _value(self._store(), None)

    def reader(self) -> Reader:
        """For byte ranges."""
        return UrlReader(self._store())

    @property
    def kvstore(self) -> dict[str, Any]:
        """tensorstore's name of the folder."""
        spec: dict[str, Any] = self.spec.to_json()
        return spec | {"path": f"{self.spec.path}/" if self.spec.path else ""}

    def _store(self) -> ts.KvStore:
        return ts.KvStore.open(self.spec, context=CONTEXT).result()

    def _keys(self) -> list[str]:
        store = ts.KvStore.open(self.kvstore, context=CONTEXT).result()
        return [os.fsdecode(key) for key in _asked(lambda: store.list().result())]


class UrlReader(Reader):
    """A value of a store of tensorstore."""

    def __init__(self, store: ts.KvStore):
        self._store = store

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer."""
        if buffer:
            buffer[:] = _value(self._store, slice(offset, offset + len(buffer)))


def _is_there(store: ts.KvStore) -> bool:
    try:
        _value(store, slice(0, 1))
    except FileNotFoundError:
        return False
    except OSError as error:
        if "OUT_OF_RANGE" not in str(error) and "was ignored by server" not in str(error):
            raise
    return True  # if empty, or on a server that sends whole files only


def _value(store: ts.KvStore, byte_range: slice | None) -> bytes:
    found = _asked(lambda: store.read("", byte_range=byte_range).result())
    if found.state != "value":
        raise FileNotFoundError(f"there is nothing at {store.url}")
    return bytes(found.value)


def _asked(action: Callable[[], Result]) -> Result:
    """What tensorstore gives; its errors as OSErrors."""
    try:
        return retried(action)
    except TENSORSTORE_ERRORS as error:
        raise OSError(str(error)) from error
