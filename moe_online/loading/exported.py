"""Exports of ours as sources: every byte is checked against the manifest, and none is quantized again."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from moe_online.errors import CorruptCheckpoint
from moe_online.loading.manifest import AGAIN, Manifest, StoredArray, num_rows, raw
from moe_online.loading.orbax import OrbaxSource
from moe_online.loading.retry import read_error, retried
from moe_online.loading.source import Index, StoredTensor
from pallas_kernels import Format

Span = tuple[str, int, int]  # a file, the first byte that is wanted, and the number of them
EXPERT_MAP = "expert_map"  # places of experts on devices: the model that is loaded brings its own


class ExportSource:
    """What `save_quantized` wrote.

    Args:
      source: The checkpoint, for whatever cannot be read from files of this machine.
      manifest: What it says of itself.
    """

    def __init__(self, source: OrbaxSource, manifest: Manifest):
        self._source, self._manifest = source, manifest
        self._subtree = subtree = source.subtree
        self.description = source.description
        folder = str(source.item)
        self._folder = None if "://" in folder else Path(folder)
        self._arrays = {
            name.removeprefix(subtree): array
            for name, array in manifest.arrays.items()
            if name.startswith(subtree) and name.rpartition(".")[2] != EXPERT_MAP
        }
        lost = [name for name in self._arrays if name not in source.tensors]
        if lost:
            raise CorruptCheckpoint(f"{self.description} lacks {', '.join(lost)}, which it had. {AGAIN}", names=lost)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every array; the smallest part is what shares a checksum."""
        return {
            name: StoredTensor(
                name=name,
                shape=array.shape,
                dtype=array.dtype,
                chunk=(array.step, *array.shape[1:]) if array.shape else (),
            )
            for name, array in self._arrays.items()
        }

    @property
    def stored_formats(self) -> Mapping[str, Format]:
        """Of each quantized leaf."""
        return {name: leaf for name, (leaf, _) in self._formats().items() if leaf is not None}

    @property
    def activations(self) -> Mapping[str, Format | None]:
        """Formats of the inputs of each leaf's layer."""
        return {name: activation for name, (_, activation) in self._formats().items()}

    def _formats(self) -> dict[str, tuple[Format | None, Format | None]]:
        subtree = self._subtree
        return {
            name.removeprefix(subtree): (leaf.format, leaf.activation)
            for name, leaf in self._manifest.leaves.items()
            if name.startswith(subtree)
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor; `CorruptCheckpoint` where its bytes are missing or not those that were exported."""
        out = np.empty([s.stop - s.start for s in index], self._arrays[name].dtype)
        self.read_into(name, index, out)
        return out

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """The same into an array that is there; whatever is not whole steps of the manifest is read with them."""
        array = self._arrays[name]
        rows = index[0] if index else slice(0, 1)
        step = array.step
        whole = slice(rows.start // step * step, min(num_rows(array.shape), -(-rows.stop // step) * step))
        if (whole.start, whole.stop) == (rows.start, rows.stop) and out.shape[1:] == array.shape[1:]:
            self._read_rows(name, array, whole, out)
            return
        checked = np.empty((whole.stop - whole.start, *array.shape[1:]), array.dtype)
        self._read_rows(name, array, whole, checked)
        out[...] = checked[(slice(rows.start - whole.start, rows.stop - whole.start), *index[1:])]

    def _read_rows(self, name: str, array: StoredArray, rows: slice, out: np.ndarray) -> None:
        chunk = self._source.tensors[name].chunk
        if not out.size:
            return
        if self._folder is None or not _is_contiguous(chunk, array.shape):
            out[...] = self._source.read(name, (rows, *(slice(0, n) for n in array.shape[1:])) if array.shape else ())
        else:
            self._read_files(name, chunk_spans(array, chunk, rows), memoryview(raw_view(out).data))
        self._manifest.verify(self._subtree + name, rows.start, out)

    def _read_files(self, name: str, spans: Iterable[Span], out: memoryview) -> None:
        """Fills `out`, bytes, from the files of the chunks."""
        assert self._folder is not None
        folder, done = self._folder / (self._subtree + name), 0
        for file, skip, size in spans:
            read = functools.partial(_read_file, folder / file, skip, out[done : done + size])
            try:
                retried(read)
            except OSError as error:
                raise read_error(f"{name} in {self.description}", error, names=[name]) from error
            done += size


def _read_file(file: Path, skip: int, out: memoryview) -> None:
    with file.open("rb", buffering=0) as opened:
        opened.seek(skip)
        while out:
            count = opened.readinto(out)
            if not count:
                raise OSError(f"{file.name} ends {len(out)} bytes early")
            out = out[count:]


def raw_view(array: np.ndarray) -> np.ndarray:
    """The bytes of a row-major array, uint8 `[n]`, not a copy."""
    view = raw(array)
    assert array.size == 0 or np.shares_memory(view, array)
    return view


def _is_contiguous(chunk: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether each chunk is one piece of the array in row-major order."""
    axis = _cut_axis(chunk, shape)
    return chunk[axis + 1 :] == shape[axis + 1 :] and math.prod(chunk[:axis]) == 1


def _cut_axis(chunk: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The axis along which chunks follow one another, before those of which each chunk has all."""
    return next((i for i, size in enumerate(chunk) if size > 1), len(shape) - 1)


def chunk_spans(array: StoredArray, chunk: tuple[int, ...], rows: slice) -> Iterator[Span]:
    """Files of the chunks that hold rows of axis 0, in order, each with the first byte and the number of them."""
    shape, itemsize = array.shape, array.dtype.itemsize
    if not shape:
        yield "0", 0, itemsize
        return
    axis = _cut_axis(chunk, shape)
    inner = math.prod(shape[axis + 1 :]) * itemsize
    outer = [range(size) for size in shape[:axis]]
    if outer:
        outer[0] = range(rows.start, rows.stop)
    for at in itertools.product(*outer):
        first, last = (rows.start, rows.stop) if axis == 0 else (0, shape[axis])
        for place in range(first // chunk[axis], -(-last // chunk[axis])):
            begin, end = max(first, place * chunk[axis]), min(last, (place + 1) * chunk[axis])
            name = ".".join(map(str, (*at, place, *(0 for _ in shape[axis + 1 :]))))
            yield name, (begin - place * chunk[axis]) * inner, (end - begin) * inner
