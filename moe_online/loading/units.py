"""What a plan is made of: leaves of the model with their sources (`Target`), cut into pieces (`Unit`).

Rows are those of one device: on a mesh a unit takes the same rows of every shard, so each device gets what becomes its
own, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moe_online.loading.memory import bytes_on_devices
from moe_online.loading.parts import Child, Part
from moe_online.loading.rules import AXES, CONTRACTION, EXPERT, HALF, LAYER, OUTPUT
from moe_online.loading.source import Index
from moe_online.loading.tree import Leaf
from moe_online.schemes import QuantSpec
from pallas_kernels import Format, QuantizedArray

ALLOCATION = 256  # bytes: what XLA's GPU allocator rounds up to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One leaf of the model: where it comes from, what is stored of it, and where."""

    leaf: Leaf
    parts: tuple[Part, ...]
    sharding: Sharding
    spec: QuantSpec | None  # None: stored as it is declared
    rule: str  # what chose the spec
    source_format: Format | None = None  # where the source has codes and scales
    may_stay: bool = False  # whether a source that lies on the devices may be worked on where it is

    @property
    def name(self) -> str:
        """The leaf's name."""
        return self.leaf.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.leaf.aval.shape)

    @property
    def format(self) -> Format | None:
        """Of the stored weight."""
        return None if self.spec is None else self.spec.weight

    @property
    def is_taken_over(self) -> bool:
        """Whether the source's codes and scales are kept."""
        return self.source_format is not None and self.source_format == self.format

    @property
    def is_decoded(self) -> bool:
        """Whether the source's codes and scales are turned into numbers first."""
        return self.source_format is not None and not self.is_taken_over

    @property
    def is_matrix(self) -> bool:
        """Whether it is quantized as one matrix `[N, K]`, and so comes as a whole: scales may span all of it."""
        return (self.format is not None or self.source_format is not None) and len(self.shape) == 2

    @property
    def is_padded(self) -> bool:
        """Whether it is larger than what the checkpoint has of it, on any axis but that of its rows."""
        return self.leaf.unpadded is not None

    @property
    def is_stacked(self) -> bool:
        """Whether it holds the experts of several layers: `[L, E, ...]`."""
        return (self.leaf.axes or "")[:2] == LAYER + EXPERT

    @functools.cached_property
    def is_on_devices(self) -> bool:
        """Whether all of its source lies on the devices as it is needed there: nothing is copied, nothing freed."""
        if not self.may_stay or self.is_padded or self.is_stacked or self.is_decoded:
            return False
        return all(map(_is_on_devices, self.parts, self.whole.parts))

    @functools.cached_property
    def whole(self) -> Unit:
        """All of it as one unit."""
        return Unit(target=self, start=0, stop=self.local_rows)

    @functools.cached_property
    def stored_bytes(self) -> int:
        """Bytes of the finished leaf on all devices, replicas counted."""
        return sum(map(bytes_on_devices, jax.tree.leaves(self.stored)))

    @property
    def scheme(self) -> str:
        """For people: the formats, or the dtype."""
        return np.dtype(self.leaf.aval.dtype).name if self.spec is None else str(self.spec)

    @functools.cached_property
    def stored(self) -> Any:
        """The finished leaf, abstract and sharded: a `ShapeDtypeStruct`, or a QuantizedArray of them."""
        return self._as(self.format)

    @functools.cached_property
    def source(self) -> Any:
        """The same of what the source holds, where that is quantized: `[..., N, K]`, also of a kernel `[K, N]`."""
        if not self.is_turned:
            return self._as(self.source_format)
        aval = jax.ShapeDtypeStruct(self.shape, self.leaf.aval.dtype, sharding=self.sharding)
        leaf = dataclasses.replace(self.leaf, aval=aval).transposed()
        return dataclasses.replace(self, leaf=leaf, sharding=leaf.aval.sharding)._as(self.source_format)

    @property
    def is_turned(self) -> bool:
        """Whether it stays a kernel `[K, N]`, while what the source has is `[N, K]`."""
        return self.source_format is not None and self.leaf.axes == CONTRACTION + OUTPUT

    def _as(self, fmt: Format | None) -> Any:
        if fmt is None:
            return jax.ShapeDtypeStruct(self.shape, self.leaf.aval.dtype, sharding=self.sharding)
        second = fmt.global_shape(self.shape)
        array: Any = QuantizedArray(
            values=jax.ShapeDtypeStruct(fmt.values_shape(self.shape), fmt.storage),  # type: ignore[arg-type]
            scales=jax.ShapeDtypeStruct(fmt.scales_shape(self.shape), fmt.scale_dtype),  # type: ignore[arg-type]
            global_scale=None if second is None else jax.ShapeDtypeStruct(second, np.float32),  # type: ignore[arg-type]
            format=fmt,
        )
        by_child = (
            array.shardings(self.sharding)
            if isinstance(self.sharding, NamedSharding)
            else jax.tree.map(lambda _: self.sharding, array)
        )
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), array, by_child)

    def filled_by(self, part: Part) -> jax.ShapeDtypeStruct:
        """The array that a part is of: the leaf, or its codes or scales as the source has them."""
        if not part.child:
            return jax.ShapeDtypeStruct(self.shape, self.leaf.aval.dtype, sharding=self.sharding)
        found: jax.ShapeDtypeStruct = getattr(self.source, part.child)
        return found

    def source_shape(self, part: Part) -> tuple[int, ...]:
        """What the checkpoint has of that array; the rest is zeros."""
        shape, fmt = self.leaf.source_shape, self.source_format
        if not self.is_padded or not part.child or fmt is None:
            return tuple(self.filled_by(part).shape) if not self.is_padded else shape
        if part.child == "values":
            return fmt.values_shape(shape)
        return fmt.scales_shape(shape) if part.child == "scales" else fmt.global_shape(shape) or ()

    def axes_of(self, child: Child) -> str | None:
        """Letters of the leaf, or of its codes or scales."""
        axes = self.leaf.axes
        if axes is None or not child:
            return axes
        lead = "".join(letter for letter in axes if letter not in (OUTPUT, CONTRACTION))
        return lead + {"values": OUTPUT + CONTRACTION, "scales": CONTRACTION + OUTPUT}.get(child, "")

    def stored_axes(self, part: Part) -> str | None:
        """Letters of a part's axes as they are stored; None for a leaf of unknown axes."""
        axes = self.axes_of(part.child)
        if part.axes is not None or axes is None:
            return part.axes
        return axes if part.half is None else axes.replace(HALF, "")

    def has_axes(self, axes: str, part: Part) -> bool:
        """Whether a part with these axes can become the leaf: exactly its own, or as many where those are unknown."""
        own = self.axes_of(part.child)
        if own is None:
            return len(axes) == len(self.shape)
        return set(axes) == set(own if part.half is None else own.replace(HALF, ""))

    def permutation(self, part: Part) -> tuple[int, ...]:
        """For each axis of the leaf (less S, for a half) the stored axis."""
        axes = self.stored_axes(part)
        if axes is None:
            return tuple(range(len(part.stored.shape)))
        return tuple(axes.index(letter) for letter in self.axes_of(part.child) or AXES if letter in axes)

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape that a part must be stored with."""
        shape = self._without_halves(part, self.source_shape(part))
        order = self.permutation(part)
        return tuple(shape[order.index(axis)] for axis in range(len(shape))) if len(order) == len(shape) else shape

    def _without_halves(self, part: Part, of_axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is said of each axis of the leaf, less that of gate and up for a half."""
        if part.half is None:
            return of_axes
        at = (self.axes_of(part.child) or "ES").index(HALF)
        return (*of_axes[:at], *of_axes[at + 1 :])

    @functools.cached_property
    def local_rows(self) -> int:
        """Rows of each device: along axis 0, or of L and E together; 1 for a scalar."""
        shard = self.sharding.shard_shape(self.shape)
        return math.prod(shard[: 2 if self.is_stacked else 1])

    def source_bytes(self, rows: int) -> int:
        """Bytes of all parts of `rows` of each device, on all devices together that hold different ones."""
        total = sum(part.stored.nbytes for part in self.parts)
        return total * rows // max(self.local_rows, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What is read, put on the device, quantized and freed at once: rows of one leaf, the same of every shard."""

    target: Target
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return self.target.source_bytes(self.stop - self.start)

    @functools.cached_property
    def parts(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Its parts as they lie on the devices, each axis sharded like its axis of the leaf."""
        return tuple(self._part(part) for part in self.target.parts)

    def _part(self, part: Part) -> jax.ShapeDtypeStruct:
        target, filled = self.target, self.target.filled_by(part)
        order = target.permutation(part)
        dtype = jax.dtypes.canonicalize_dtype(part.stored.dtype)  # JAX holds 64 bits only where it is told to
        sharding = filled.sharding
        shard = list(sharding.shard_shape(filled.shape))
        shards = [size // max(each, 1) for size, each in zip(filled.shape, shard, strict=True)]
        if shard and not target.is_matrix:
            shard[1 if target.is_stacked else 0] = self.stop - self.start
        sizes = target._without_halves(part, tuple(each * n for each, n in zip(shard, shards, strict=True)))
        spec: tuple[Any, ...] = ()
        if isinstance(sharding, NamedSharding):
            spec = (*sharding.spec, *(None,) * (len(filled.shape) - len(sharding.spec)))
            spec = target._without_halves(part, spec)
        if target.is_stacked:  # rows of one layer: its axis is gone
            sizes, spec = sizes[1:], spec[1:]
            order = tuple(axis - (axis > order[0]) for axis in order[1:])
        stored = [order.index(axis) for axis in range(len(order))]
        if isinstance(sharding, NamedSharding):
            stored_spec = PartitionSpec(*(spec[axis] for axis in stored))
            sharding = NamedSharding(sharding.mesh, stored_spec, memory_kind=sharding.memory_kind)
        return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in stored), dtype, sharding=sharding)

    def regions(self, part: Part) -> dict[jax.Device, Index]:
        """The stored region of a part that each device here gets; an empty one where all that it gets is padding."""
        target, filled = self.target, self.target.filled_by(part)
        order, stored = target.permutation(part), target.source_shape(part)
        found = {}
        for device, where in filled.sharding.addressable_devices_indices_map(filled.shape).items():
            ends = (s.indices(size)[:2] for s, size in zip(where, filled.shape, strict=True))
            index = [slice(*each) for each in ends]
            if target.is_stacked:
                layer, row = divmod(self.start, index[1].stop - index[1].start)
                index[0] = slice(layer, layer + 1)
                index[1] = slice(index[1].start + row, index[1].start + row + self.stop - self.start)
            elif index and not target.is_matrix:
                index[0] = slice(index[0].start + self.start, index[0].start + self.stop)
            index = [slice(min(s.start, size), min(s.stop, size)) for s, size in zip(index, stored, strict=True)]
            of_leaf = target._without_halves(part, tuple(index))
            found[device] = tuple(of_leaf[order.index(axis)] for axis in range(len(order)))
        return found

    @functools.cached_property
    def stored(self) -> Any:
        """These rows of the finished leaf, abstract and sharded like it; of one layer, where it has several."""
        target = self.target
        if target.is_matrix or not target.shape:
            return target.stored

        def rows(leaf: Any) -> jax.ShapeDtypeStruct:
            of_layer, row = target.is_stacked, target.is_stacked
            shards = leaf.shape[row] // max(leaf.sharding.shard_shape(leaf.shape)[row], 1)
            sharding = leaf.sharding
            if isinstance(sharding, NamedSharding):
                spec = PartitionSpec(*sharding.spec[of_layer:])
                sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
            shape = (shards * (self.stop - self.start), *leaf.shape[row + 1 :])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(rows, target.stored)

    def write(self, whole: np.ndarray, rows: np.ndarray) -> None:
        """Puts these rows, those of all shards in order, into a finished leaf or child of one on the host."""
        if self.target.is_matrix or not self.target.shape or not rows.size:
            whole[...] = rows
            return
        if self.target.is_stacked:
            whole = whole[self.start // (self.target.local_rows // self.target.shape[0])]
        experts = self.experts
        first, last = int(experts[0]), int(experts[-1])
        whole[slice(first, last + 1) if last - first + 1 == len(experts) else experts] = rows

    @property
    def device_bytes(self) -> int:
        """Bytes of its parts on all devices together, where they do not lie there anyway."""
        return 0 if self.target.is_on_devices else sum(bytes_on_devices(part) for part in self.parts)

    @property
    def host_bytes(self) -> int:
        """Bytes of its parts on the host: what devices here share is there once, and beside it what is padded."""
        if self.target.is_on_devices:
            return 0
        read = sum(_region_bytes(self, part) for part in self.target.parts)
        return read + self.device_bytes if self.target.is_padded else read

    @property
    def experts(self) -> np.ndarray:
        """Of each row of all shards in order: its index along axis 0 of the leaf, or along E of a stacked one."""
        shards = self.target.shape[self.target.is_stacked] if self.target.shape else 1
        each = self.target.local_rows // (self.target.shape[0] if self.target.is_stacked else 1)
        first = self.start % each if self.target.is_stacked else self.start
        rows = np.arange(first, first + self.stop - self.start)
        return (np.arange(0, shards, max(each, 1))[:, None] + rows[None]).reshape(-1)


def _is_on_devices(part: Part, needed: jax.ShapeDtypeStruct) -> bool:
    """Whether a part is one array on the devices, all of it, that is exactly what they need."""
    found, *others = part.fragments
    tensor = found.tensor
    if others or part.outer or tensor.sharding is None or (tensor.shape, tensor.dtype) != (needed.shape, needed.dtype):
        return False
    whole = tuple(slice(0, size) for size in tensor.shape)
    read = found.read(whole)
    is_same = (read.index, read.shape, read.cut) == (whole, tensor.shape, None)
    return is_same and tensor.sharding.is_equivalent_to(needed.sharding, len(tensor.shape))


def _region_bytes(unit: Unit, part: Part) -> int:
    distinct = {tuple((s.start, s.stop) for s in region) for region in unit.regions(part).values()}
    elements: int = sum(math.prod(b - a for a, b in region) for region in distinct)
    return elements * part.stored.dtype.itemsize


def cut_units(target: Target, unit_bytes: int) -> Iterator[Unit]:
    """Cuts a leaf into units of at least one row, or one matrix; where they can they end where stored chunks do."""
    rows = target.local_rows
    if rows == 0 or target.is_matrix or target.is_on_devices:
        yield target.whole
        return
    chunk = math.lcm(*(_chunk_rows(target, part) for part in target.parts)) if target.shape else 1
    per_unit = max(1, unit_bytes // max(1, target.source_bytes(1)))
    per_unit = per_unit // chunk * chunk or per_unit
    each = rows // target.shape[0] if target.is_stacked else rows
    for layer in range(0, rows, max(each, 1)):
        # A chunk that no unit can hold is cut: then a new one begins with each chunk.
        for begin in range(0, each, chunk if per_unit < chunk else each):
            end = min(each, begin + chunk) if per_unit < chunk else each
            for first in range(begin, end, per_unit):
                yield Unit(target=target, start=layer + first, stop=layer + min(end, first + per_unit))


def _chunk_rows(target: Target, part: Part) -> int:
    """Rows in one stored chunk."""
    axis = target.permutation(part)[1 if target.is_stacked else 0]
    return max(1, min(part.stored.chunk[axis], part.stored.shape[axis]))


def allocated_bytes(target: Target) -> int:
    """Bytes of the finished leaf as a GPU's allocator rounds them."""
    return sum(-(-bytes_on_devices(leaf) // ALLOCATION) * ALLOCATION for leaf in jax.tree.leaves(target.stored))
