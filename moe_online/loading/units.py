"""What a plan is made of: leaves of the model with their sources (`Target`), cut into pieces (`Unit`)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moe_online.loading.mapping import AXES, Part
from moe_online.loading.memory import bytes_on_devices
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
    def is_matrix(self) -> bool:
        """Whether it is quantized as one matrix `[N, K]`, and so comes as a whole: scales may span all of it."""
        return self.format is not None and len(self.shape) == 2

    @property
    def scheme(self) -> str:
        """For people: the formats, or the dtype."""
        return np.dtype(self.leaf.aval.dtype).name if self.spec is None else str(self.spec)

    @functools.cached_property
    def stored(self) -> Any:
        """The finished leaf, abstract and sharded: a `ShapeDtypeStruct`, or a QuantizedArray of them."""
        fmt = self.format
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

    def stored_axes(self, part: Part) -> str | None:
        """Letters of a part's axes as they are stored; None for a leaf of unknown axes."""
        if part.axes is not None or self.leaf.axes is None:
            return part.axes
        return self.leaf.axes if part.half is None else self.leaf.axes.replace("S", "")

    def has_axes(self, axes: str, part: Part) -> bool:
        """Whether a part with these axes can become the leaf: exactly its own, or as many where those are unknown."""
        if self.leaf.axes is None:
            return len(axes) == len(self.shape)
        return set(axes) == set(self.leaf.axes if part.half is None else self.leaf.axes.replace("S", ""))

    def permutation(self, part: Part) -> tuple[int, ...]:
        """For each axis of the leaf (less S, for a half) the stored axis."""
        axes = self.stored_axes(part)
        if axes is None:
            return tuple(range(len(part.stored.shape)))
        return tuple(axes.index(letter) for letter in self.leaf.axes or AXES if letter in axes)

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape that a part must be stored with."""
        shape = self.shape if part.half is None else (self.shape[0], *self.shape[2:])
        order = self.permutation(part)
        return tuple(shape[order.index(axis)] for axis in range(len(shape))) if len(order) == len(shape) else shape

    def index(self, part: Part, start: int, stop: int) -> Index:
        """The stored region of the rows `[start, stop)` of the leaf's axis 0."""
        whole = [slice(0, size) for size in part.stored.shape]
        if whole:
            whole[self.permutation(part)[0]] = slice(start, stop)
        return tuple(whole)

    def on_device(self, part: Part, rows: int) -> jax.ShapeDtypeStruct:
        """`rows` of a part, sharded: each stored axis like its axis of the leaf, or whole where it does not divide."""
        order, shape = self.permutation(part), list(part.stored.shape)
        if shape:
            shape[order[0]] = rows
        sharding = self.sharding
        if isinstance(sharding, NamedSharding):
            spec = (*sharding.spec, *(None,) * (len(self.shape) - len(sharding.spec)))
            stored: list[Any] = [None] * len(shape)
            for axis, names in zip(order, spec if part.half is None else (spec[0], *spec[2:]), strict=True):
                stored[axis] = names if shape[axis] % _devices_along(sharding, names) == 0 else None
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*stored))
        dtype = jax.dtypes.canonicalize_dtype(part.stored.dtype)  # JAX holds 64 bits only where it is told to
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    def source_bytes(self, rows: int) -> int:
        """Bytes of all parts of `rows` of axis 0."""
        total = self.shape[0] if self.shape else 1
        return sum(part.stored.nbytes for part in self.parts) * rows // max(total, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What is read, put on the device, quantized and freed at once: rows of axis 0 of one leaf."""

    target: Target
    start: int
    stop: int
    block: tuple[int, int]  # rows that are read and decoded together, whole stored chunks; this unit is cut from them

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return self.target.source_bytes(self.stop - self.start)

    @functools.cached_property
    def parts(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Its parts as they lie on the devices."""
        return tuple(self.target.on_device(part, self.stop - self.start) for part in self.target.parts)

    @property
    def device_bytes(self) -> int:
        """Bytes of its parts on all devices together."""
        return sum(bytes_on_devices(part) for part in self.parts)


def stored_bytes(target: Target) -> int:
    """Bytes of the finished leaf on all devices, replicas counted."""
    return sum(bytes_on_devices(leaf) for leaf in jax.tree.leaves(target.stored))


def cut_units(target: Target, unit_bytes: int) -> Iterator[Unit]:
    """Cuts a leaf: blocks of whole stored chunks, and units of at least one row, or one matrix, within each."""
    rows = num_rows(target)
    if rows == 0 or target.is_matrix:
        yield Unit(target=target, start=0, stop=rows, block=(0, rows))
        return
    row_bytes = max(1, target.source_bytes(1))
    chunk = math.lcm(*(_chunk_rows(target, part) for part in target.parts)) if target.shape else 1
    per_unit = max(1, unit_bytes // row_bytes)
    per_block = min(rows, max(1, per_unit // chunk) * chunk)
    for start in range(0, rows, max(per_block, 1)):
        stop = min(rows, start + per_block)
        for first in range(start, stop, per_unit):
            yield Unit(target=target, start=first, stop=min(stop, first + per_unit), block=(start, stop))


def _chunk_rows(target: Target, part: Part) -> int:
    """Rows of the leaf's axis 0 in one stored chunk."""
    axis = target.permutation(part)[0]
    return max(1, min(part.stored.chunk[axis], part.stored.shape[axis]))


def _devices_along(sharding: NamedSharding, names: Any) -> int:
    """How many devices share an axis whose entry in the spec is this."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def num_rows(target: Target) -> int:
    """Length of the leaf's axis 0; 1 for a scalar."""
    return target.shape[0] if target.shape else 1


def block_bytes(unit: Unit) -> int:
    """Bytes of the block that a unit is cut from."""
    return unit.target.source_bytes(unit.block[1] - unit.block[0])


def allocated_bytes(target: Target) -> int:
    """Bytes of the finished leaf as a GPU's allocator rounds them."""
    return sum(-(-bytes_on_devices(leaf) // ALLOCATION) * ALLOCATION for leaf in jax.tree.leaves(target.stored))
