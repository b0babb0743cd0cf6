"""Reads units from a source: for each device what becomes its own, in parallel, and no byte twice."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_online.errors import CorruptCheckpoint
from moe_online.loading.parts import Part, Read
from moe_online.loading.source import CheckpointSource, Index, InPlaceSource
from moe_online.loading.units import Unit
from pallas_kernels import Format, quantize

THREADS = 16
PIECE = 16 * 2**20  # bytes that one thread reads at a time
WAITING = 3  # units on the host that are there already: while a step is compiled, reading goes on
AHEAD = 3 + WAITING  # beside those that are prefetched: one goes to the device, two are read and decoded

_Box = tuple[tuple[int, int], ...]
_Key = tuple[str, _Box]  # a tensor and a region of it


@dataclasses.dataclass(frozen=True)
class _Region:
    """A region of a part that is read as one, and what of it goes where."""

    index: Index
    reads: tuple[Read, ...]
    cuts: Mapping[jax.Device, Index | None]  # None: all of it


def regions(unit: Unit, part: Part) -> Iterator[_Region]:
    """What to read of a part: what devices share once, and what lies in chunks that they share as one."""
    by_rows: dict[Any, dict[_Key, list[jax.Device]]] = collections.defaultdict(dict)
    indices: dict[_Key, Index] = {}
    row_axes = set(unit.target.permutation(part)[: 1 + unit.target.is_stacked])
    for device, index in unit.regions(part).items():
        key = ("", _bounds(index))
        if any(start == stop for start, stop in key[1]) and unit.target.is_padded:
            continue  # padding alone
        indices[key] = index
        rows = tuple(bounds for axis, bounds in enumerate(key[1]) if axis in row_axes)
        by_rows[rows].setdefault(key, []).append(device)
    for group in by_rows.values():
        each = {key: tuple(part.reads(indices[key])) for key in group}
        if _are_apart(list(each.values())):
            for key, devices in group.items():
                yield _Region(indices[key], each[key], dict.fromkeys(devices))
            continue
        begins, ends = (
            [edge(bounds[axis][side] for _, bounds in group) for axis in range(len(part.stored.shape))]
            for side, edge in ((0, min), (1, max))
        )
        whole = tuple(slice(*each) for each in zip(begins, ends, strict=True))
        cuts = {
            device: tuple(slice(a - b, c - b) for (a, c), b in zip(key[1], begins, strict=True))
            for key, devices in group.items()
            for device in devices
        }
        yield _Region(whole, tuple(part.reads(whole)), cuts)


def _are_apart(regions: Sequence[Sequence[Read]]) -> bool:
    """Whether no two of them need a part of the same chunk; they are of the same rows, so of the same tensors."""
    if len(regions) == 1 or all(_is_alone(read) for reads in regions for read in reads):
        return True
    boxes = [[_bounds(_aligned(read)) for read in reads] for reads in regions]
    pairs = itertools.combinations(boxes, 2)
    return not any(_overlap(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def _is_alone(read: Read) -> bool:
    """Whether nothing else is in the chunks that are read."""
    return read.cut is None and _aligned(read) == read.index


def _overlap(a: _Box, b: _Box) -> bool:
    return all(x[0] < y[1] and y[0] < x[1] for x, y in zip(a, b, strict=True))


def _aligned(read: Read) -> Index:
    """The stored chunks that hold a region."""
    return tuple(
        slice(s.start // max(chunk, 1) * max(chunk, 1), min(size, -(-s.stop // max(chunk, 1)) * max(chunk, 1)))
        for s, chunk, size in zip(read.index, read.tensor.chunk, read.tensor.shape, strict=True)
    )


def _bounds(index: Index) -> _Box:
    return tuple((s.start, s.stop) for s in index)


class Reader:
    """Reads the units of a plan in order. What a chunk holds beside the present unit is kept for those that follow.

    Args:
      source: Where from. One with `read_into` is asked by several threads at once.
      units: All that will be read, in order.
    """

    def __init__(self, source: CheckpointSource, units: Sequence[Unit]):
        self._source = source
        self._in_place = source if isinstance(source, InPlaceSource) else None
        self._shared = Shared(units)
        self._kept: dict[_Key, Any] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="moe-online-read")

    def close(self) -> None:
        """Lets go of the threads and of what is kept."""
        self._pool.shutdown(cancel_futures=True)
        self._kept.clear()

    def read(self, unit: Unit) -> list[dict[jax.Device, Any]]:
        """What `begin` promises."""
        return self.begin(unit)()

    def begin(self, unit: Unit) -> Callable[[], list[dict[jax.Device, Any]]]:
        """Begins to read a unit; so the next one can be begun before this one is there.

        Returns:
          A function that waits, and returns for each part what each device gets: numpy arrays, or those of a source on
          devices. Both raise CorruptCheckpoint for tensors of the unit that cannot be read, the function for all.
        """
        jobs: list[Future[None]] = []
        finish = [
            [self._begin(unit, part, region, jobs) for region in regions(unit, part)] for part in unit.target.parts
        ]
        return lambda: self._finish(unit, jobs, finish)

    @staticmethod
    def _finish(
        unit: Unit, jobs: Sequence[Future[None]], finish: Sequence[Sequence[Callable[[], dict[jax.Device, Any]]]]
    ) -> list[dict[jax.Device, Any]]:
        errors = [error for job in jobs if (error := job.exception()) is not None]
        corrupt = [error for error in errors if isinstance(error, CorruptCheckpoint)]
        for error in errors:
            if error not in corrupt:
                raise error
        if corrupt:
            raise CorruptCheckpoint(str(corrupt[0]), names=dict.fromkeys(n for e in corrupt for n in e.names))
        found = [{device: array for each in part for device, array in each().items()} for part in finish]
        return _with_padding(unit, found) if unit.target.is_padded else found

    def _begin(
        self, unit: Unit, part: Part, region: _Region, jobs: list[Future[None]]
    ) -> Callable[[], dict[jax.Device, Any]]:
        """Starts reading a region; what is returned gives each device its array once all jobs are done."""
        shape = tuple(s.stop - s.start for s in region.index)
        outer = shape[: len(part.outer)]
        if self._in_place is not None:
            out = np.empty(shape, part.stored.dtype)
            places = out.reshape(math.prod(outer), *shape[len(outer) :]) if outer else [out]
            for place, read in zip(places, region.reads, strict=True):
                self._read_into(place, read, jobs)
            whole: Any = out
        else:
            found = [self._read(read) for read in region.reads]
            if outer:
                library: Any = np if isinstance(found[0], np.ndarray) else jnp
                whole = library.stack(found).reshape(shape)
            else:
                whole = found[0]
        layer = unit.target.permutation(part)[0] if unit.target.is_stacked else None

        def finish() -> dict[jax.Device, Any]:
            arrays = {device: whole if cut is None else whole[cut] for device, cut in region.cuts.items()}
            return arrays if layer is None else {device: array.squeeze(layer) for device, array in arrays.items()}

        return finish

    def _read(self, read: Read) -> Any:
        """A region, by the source's own `read`."""
        array = self._kept_part(read)
        if array is None:
            array = self._source.read(read.tensor.name, read.index)
        array = array.reshape(read.shape)
        return array if read.cut is None else array[read.cut]

    def _read_into(self, out: np.ndarray, read: Read, jobs: list[Future[None]]) -> None:
        """The same into an array that is there."""
        array = self._kept_part(read)
        if array is not None:
            array = array.reshape(read.shape)
            out[...] = array if read.cut is None else array[read.cut]
        elif read.cut is not None:
            jobs.append(self._pool.submit(self._read_and_cut, out, read))
        else:
            into = out.reshape(tuple(s.stop - s.start for s in read.index))
            for piece, index in _pieces(into, read):
                assert self._in_place is not None
                jobs.append(self._pool.submit(self._in_place.read_into, read.tensor.name, index, piece))

    def _read_and_cut(self, out: np.ndarray, read: Read) -> None:
        array = np.asarray(self._source.read(read.tensor.name, read.index)).reshape(read.shape)
        out[...] = array[read.cut]

    def _kept_part(self, read: Read) -> Any:
        """A region of chunks that others use too, each read once; None where nobody else needs them."""
        key = self._shared.find(read)
        if key is None:
            return None
        name, box = key
        if key not in self._kept:
            self._kept[key] = self._source.read(name, tuple(slice(*bounds) for bounds in box))
        kept = self._kept[key]
        self._shared.uses[key] -= 1
        if not self._shared.uses[key]:
            del self._kept[key]
        return kept[tuple(slice(s.start - a, s.stop - a) for s, (a, _) in zip(read.index, box, strict=True))]


def _with_padding(unit: Unit, found: Sequence[dict[jax.Device, Any]]) -> list[dict[jax.Device, Any]]:
    """What was read for each device, filled up with zeros to what it is to have."""
    padded = []
    for part, aval, arrays in zip(unit.target.parts, unit.parts, found, strict=True):
        fmt = unit.target.source_format
        fill = zero_block_scale(fmt) if fmt is not None and part.child == "scales" else 0
        shape, devices = aval.sharding.shard_shape(aval.shape), aval.sharding.addressable_devices
        padded.append({device: _filled_up(arrays.pop(device, None), shape, aval.dtype, fill) for device in devices})
    return padded


@functools.cache
def zero_block_scale(fmt: Format) -> Any:
    """What a format stores as the scale of a block of zeros."""
    n, k = (size or fmt.codes_per_element for size in fmt.block)
    return np.asarray(quantize(jnp.zeros((1, n, k)), fmt).scales).flat[0]


def _filled_up(array: Any, shape: tuple[int, ...], dtype: Any, fill: Any) -> Any:
    if isinstance(array, jax.Array):
        widths = [(0, size - own) for size, own in zip(shape, array.shape, strict=True)]
        return jnp.pad(array, widths, constant_values=jnp.asarray(fill, array.dtype))
    out = np.full(shape, fill, dtype)
    if array is not None:
        out[tuple(map(slice, array.shape))] = array
    return out


def _pieces(out: np.ndarray, read: Read) -> Iterable[tuple[np.ndarray, Index]]:
    """A region in pieces along axis 0 that several threads may read, each of whole chunks."""
    if not read.index or out.nbytes <= PIECE:
        return [(out, read.index)]
    first, *rest = read.index
    chunk = max(1, read.tensor.chunk[0])
    each = max(1, PIECE * (first.stop - first.start) // out.nbytes // chunk) * chunk
    edges = [first.start, *range(first.start // chunk * chunk + each, first.stop, each), first.stop]
    return [
        (out[begin - first.start : end - first.start], (slice(begin, end), *rest))
        for begin, end in itertools.pairwise(edges)
    ]


class Shared:
    """Regions of which several reads need a part: each is to be read once, and kept until the last of them.

    Args:
      units: All that will be read, in order.
    """

    def __init__(self, units: Sequence[Unit]):
        parted = [[(read.tensor, _bounds(_aligned(read))) for read in _parted(unit)] for unit in units]
        boxes: dict[str, dict[_Box, None]] = collections.defaultdict(dict)
        for tensor, box in itertools.chain.from_iterable(parted):
            boxes[tensor.name][box] = None
        hulls = {(name, box): (name, hull) for name, every in boxes.items() for box, hull in _hulls(every).items()}
        self.uses = collections.Counter(hulls[t.name, box] for of_unit in parted for t, box in of_unit)
        self._hulls = {key: hull for key, hull in hulls.items() if self.uses[hull] > 1}
        self.by_unit = [
            {
                hull: math.prod(stop - start for start, stop in hull[1]) * tensor.dtype.itemsize
                for tensor, box in of_unit
                if (hull := self._hulls.get((tensor.name, box))) is not None
            }
            for of_unit in parted
        ]  # with their bytes

    def find(self, read: Read) -> _Key | None:
        """The region of which a read is a part; None where no other read needs it."""
        return self._hulls.get((read.tensor.name, _bounds(_aligned(read)))) if self._hulls else None


def _parted(unit: Unit) -> Iterator[Read]:
    """The reads of a unit that need only a part of what has to be read."""
    if unit.target.is_on_devices:
        return
    for part in unit.target.parts:
        for region in regions(unit, part):
            yield from (read for read in region.reads if not _is_alone(read))


def _hulls(boxes: Iterable[_Box]) -> dict[_Box, _Box]:
    """For each box the one to read in its place: those that overlap are put together until none do."""
    apart = {box: [box] for box in boxes}  # and what is in each
    while len(joined := _joined(apart)) < len(apart):
        apart = joined
    return {box: hull for hull, within in apart.items() for box in within}


def _joined(apart: Mapping[_Box, list[_Box]]) -> dict[_Box, list[_Box]]:
    """Puts together what overlaps, in one sweep along the axis that tells most of them apart."""
    if len(apart) < 2:
        return dict(apart)
    axis = max(range(len(next(iter(apart)))), key=lambda axis: len({box[axis][0] for box in apart}))
    passed: dict[_Box, list[_Box]] = {}
    near: dict[_Box, list[_Box]] = {}
    for hull, within in sorted(apart.items(), key=lambda item: item[0][axis][0]):
        for other in [other for other in near if other[axis][1] <= hull[axis][0]]:
            passed[other] = near.pop(other)
        while touching := [other for other in near if _overlap(other, hull)]:
            within = [*within, *itertools.chain.from_iterable(near.pop(other) for other in touching)]
            hull = tuple(
                (min(begin for begin, _ in each), max(end for _, end in each))
                for each in zip(hull, *touching, strict=True)
            )
        near[hull] = within
    return passed | near


def host_peak(units: Sequence[Unit], prefetch: int) -> int:
    """Most bytes that reading holds on the host: regions that several units need, and units on their way."""
    needs = Shared(units).by_unit
    last = {key: i for i, need in enumerate(needs) for key in need}
    kept: dict[_Key, int] = {}
    most = 0
    for i, need in enumerate(needs):
        decoding = max((size for key, size in need.items() if key not in kept), default=0)  # it is there twice then
        kept |= need
        most = max(most, sum(kept.values()) + decoding)
        kept = {key: size for key, size in kept.items() if last[key] > i}
    largest = max((unit.host_bytes for unit in units), default=0)
    return most + (AHEAD + prefetch) * largest
