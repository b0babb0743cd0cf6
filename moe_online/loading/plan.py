"""What a load will do, decided from metadata alone: whatever can be found wrong before a byte is read is found here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from moe_online.config import OnlineQuantConfig
from moe_online.errors import ConfigError, DtypeMismatch, MemoryBudgetError, ShapeMismatch
from moe_online.loading.mapping import Part
from moe_online.loading.memory import bytes_on_devices
from moe_online.loading.messages import human_bytes, listed, rendered
from moe_online.loading.quantizer import temporary_bytes
from moe_online.loading.source import Index
from moe_online.loading.tree import WEIGHTS, Leaf
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
    def scheme(self) -> str:
        """For people: the formats, or the dtype."""
        return np.dtype(self.leaf.aval.dtype).name if self.spec is None else str(self.spec)

    @functools.cached_property
    def stored(self) -> Any:
        """The finished leaf, abstract and sharded: a `ShapeDtypeStruct`, or a QuantizedArray of them."""
        fmt = self.format
        if fmt is None:
            return jax.ShapeDtypeStruct(self.shape, self.leaf.aval.dtype, sharding=self.sharding)
        array: Any = QuantizedArray(
            values=jax.ShapeDtypeStruct(fmt.values_shape(self.shape), fmt.storage),  # type: ignore[arg-type]
            scales=jax.ShapeDtypeStruct(fmt.scales_shape(self.shape), fmt.scale_dtype),  # type: ignore[arg-type]
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
        return tuple(axes.index(letter) for letter in "ESNK" if letter in axes)

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

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its leaf."""
        return self.stop - self.start == (self.target.shape[0] if self.target.shape else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Everything that a load will do. Prints as a table.

    Bytes on devices count each replica and are those of all devices together.
    """

    source: str
    targets: tuple[Target, ...]
    units: tuple[Unit, ...]
    read_bytes: int  # decoded
    resident_bytes: int  # of the finished parameters
    largest_unit_bytes: int
    peak_bytes: int  # on the device: parameters so far, 1 + prefetch units, one chunk of f32
    host_peak_bytes: int  # beside what the device holds (on a CPU the two add up)
    prefetch: int
    unit_bytes: int

    @property
    def coarse_tensors(self) -> tuple[str, ...]:
        """Stored tensors whose chunks are larger than a unit may be, so that the host holds more than that."""
        large = {id(unit.target): unit.target for unit in self.units if _block_bytes(unit) > self.unit_bytes}
        return tuple(part.stored.name for target in large.values() for part in target.parts)

    def __str__(self) -> str:
        return rendered(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"{self.source}", title_justify="left", caption_justify="left", caption=self._summary())
        for column, justify in (("tensors", "left"), ("shape", "left"), ("read", "right"), ("stored", "right")):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        table.add_column("scheme")
        table.add_column("chosen by")
        for name, group in group_by_pattern(self.targets):
            first = group[0]
            read, stored = sum(t.source_bytes(_rows(t)) for t in group), sum(stored_bytes(t) for t in group)
            shape = "x".join(map(str, first.shape)) or "scalar"
            table.add_row(name, shape, human_bytes(read), human_bytes(stored), first.scheme, first.rule)
        yield table

    def _summary(self) -> str:
        lines = [
            f"read {human_bytes(self.read_bytes)}, keep {human_bytes(self.resident_bytes)}; "
            f"peak on the device {human_bytes(self.peak_bytes)}, on the host {human_bytes(self.host_peak_bytes)}; "
            f"{len(self.units)} units of at most {human_bytes(self.largest_unit_bytes)}"
        ]
        if self.coarse_tensors:
            lines.append(
                f"stored in chunks whose rows take more than {human_bytes(self.unit_bytes)}, so the host holds more: "
                f"{listed(self.coarse_tensors, 'tensor')}; save with StorageOptions(chunk_byte_size=..., "
                "shard_axes=(0,)) to avoid it"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same facts for machines."""
        totals = ("read_bytes", "resident_bytes", "largest_unit_bytes", "peak_bytes", "host_peak_bytes", "prefetch")
        tensors = [
            {
                "name": target.name,
                "sources": [part.stored.name for part in target.parts],
                "shape": list(target.shape),
                "scheme": target.scheme,
                "rule": target.rule,
                "source_bytes": target.source_bytes(_rows(target)),
                "stored_bytes": stored_bytes(target),
            }
            for target in self.targets
        ]
        return {"source": self.source, "units": len(self.units), **{key: getattr(self, key) for key in totals}} | {
            "tensors": tensors
        }


def make_plan(
    source: str,
    targets: Sequence[Target],
    *,
    unit_bytes: int,
    memory_limit: int | None,
    prefetch: int,
) -> LoadPlan:
    """Checks shapes and dtypes, cuts the units and predicts the peaks.

    Raises:
      ShapeMismatch: a stored tensor has another shape than its leaf.
      DtypeMismatch: a stored tensor cannot become its leaf's dtype.
      MemoryBudgetError: the peak is above `memory_limit`.
    """
    _check_shapes(source, targets)
    _check_dtypes(source, targets)
    units = tuple(unit for target in targets for unit in _units(target, unit_bytes))
    largest = max((unit.device_bytes for unit in units), default=0)
    block = max((_block_bytes(unit) for unit in units), default=0)
    plan = LoadPlan(
        source=source,
        targets=tuple(targets),
        units=units,
        read_bytes=sum(target.source_bytes(_rows(target)) for target in targets),
        resident_bytes=sum(stored_bytes(target) for target in targets),
        largest_unit_bytes=largest,
        peak_bytes=_peak(units, prefetch),
        host_peak_bytes=2 * block + (1 + prefetch) * largest,  # decoding holds a chunk twice
        prefetch=prefetch,
        unit_bytes=unit_bytes,
    )
    if memory_limit is not None and plan.peak_bytes > memory_limit:
        raise MemoryBudgetError(
            f"loading {source} needs {human_bytes(plan.peak_bytes)} at its peak ({human_bytes(plan.resident_bytes)} of "
            f"parameters), above memory_limit={human_bytes(memory_limit)}: quantize more, give a smaller unit_bytes, "
            "prefetch=0, or more devices",
            names=[target.name for target in targets],
        )
    return plan


def choose_specs(
    leaves: Sequence[Leaf], parts: Mapping[str, tuple[Part, ...]], config: OnlineQuantConfig | None
) -> dict[str, tuple[QuantSpec | None, str]]:
    """The scheme of each leaf and the rule that chose it.

    Raises:
      ConfigError: the config reaches no leaf.
    """
    chosen: dict[str, tuple[QuantSpec | None, str]] = {}
    for leaf in leaves:
        if config is None:
            chosen[leaf.name] = None, "no quantization asked for"
        elif leaf.field in WEIGHTS:
            assert leaf.layer is not None  # it has a field
            chosen[leaf.name] = config.resolve_with_rule(leaf.layer, "moe")
        elif leaf.field is None and any(set("ENK") <= set(part.axes or "") for part in parts[leaf.name]):
            chosen[leaf.name] = config.resolve_with_rule(leaf.name, "moe")
        else:
            chosen[leaf.name] = None, "not an expert weight"
    if config is not None and all(spec is None for spec, _ in chosen.values()):
        deep = [f"{leaf.name} {tuple(leaf.aval.shape)}" for leaf in leaves if leaf.aval.ndim >= 3]
        raise ConfigError(
            f"quantization reaches no leaf. Of rank 3 and more there are {listed(deep, 'tensor')}. Experts are the "
            'weights of moe_online.flax.MoE, or leaves whose mapping rule states their axes: {"*.w_in": "E K N"}'
        )
    return chosen


def stored_bytes(target: Target) -> int:
    """Bytes of the finished leaf on all devices, replicas counted."""
    return sum(bytes_on_devices(leaf) for leaf in jax.tree.leaves(target.stored))


def group_by_pattern(items: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Groups things that differ only in the numbers of their names, scheme and shape apart: one row of a table."""

    def key(item: Any) -> tuple[Any, ...]:
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", item.name), item.scheme, tuple(item.shape), item.rule

    groups: dict[tuple[Any, ...], list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for (name, *_), group in groups.items():
        yield (name if len(group) > 1 else group[0].name), group


def _check_shapes(source: str, targets: Sequence[Target]) -> None:
    wrong = {}
    for target in targets:
        for part in target.parts:
            axes = target.stored_axes(part)
            needed = target.part_shape(part)
            if part.stored.shape != needed or (axes is not None and not target.has_axes(axes, part)):
                as_axes = "" if axes is None else f" (axes {' '.join(axes)})"
                wrong[part.stored.name] = f"{part.stored.name} {part.stored.shape}{as_axes}, needed {needed}"
    if wrong:
        raise ShapeMismatch(
            f"{source} has another shape than the model in {listed(list(wrong.values()), 'tensor')}. Change the config "
            "of the model, or state the stored axes in mapping={...}.",
            names=wrong,
        )
    _check_shards(targets)


def _devices_along(sharding: NamedSharding, names: Any) -> int:
    """How many devices share an axis whose entry in the spec is this."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def _check_shards(targets: Sequence[Target]) -> None:
    """Raises ConfigError where devices would get uneven parts, or a part of a block of scales."""
    wrong = []
    for target in targets:
        try:
            *_, n, k = (1, 1, *target.sharding.shard_shape(target.shape))
            if target.format is not None:
                n_sharded, k_sharded = n != target.shape[-2], k != target.shape[-1]
                target.format.check_shard(n, k, n_sharded=n_sharded, k_sharded=k_sharded)
        except ValueError as error:
            wrong.append(f"{target.name} {target.shape}: {str(error).splitlines()[0]}")
    if wrong:
        raise ConfigError(f"the mesh does not fit. {'; '.join(wrong)}. Use another mesh or sharding")


def _check_dtypes(source: str, targets: Sequence[Target]) -> None:
    wrong = {}
    for target in targets:
        needed = np.dtype(target.leaf.aval.dtype)
        for part in target.parts:
            found = part.stored.dtype
            real = found.itemsize >= 2 and all(jnp.issubdtype(dtype, jnp.floating) for dtype in (found, needed))
            if not (real if target.format is not None else real or found == needed):
                wrong[part.stored.name] = f"{part.stored.name} is {found}, needed {needed}"
    if wrong:
        raise DtypeMismatch(
            f"{source} has a dtype that cannot become the model's in {listed(list(wrong.values()), 'tensor')}. Real "
            "dtypes of 16 bits and more become one another; for any other, declare the leaf with the stored dtype.",
            names=wrong,
        )


def _rows(target: Target) -> int:
    return target.shape[0] if target.shape else 1


def _block_bytes(unit: Unit) -> int:
    return unit.target.source_bytes(unit.block[1] - unit.block[0])


def _units(target: Target, unit_bytes: int) -> Iterator[Unit]:
    """Cuts a leaf: blocks of whole stored chunks, and units of at least one row within each."""
    rows = _rows(target)
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


def _peak(units: Sequence[Unit], prefetch: int) -> int:
    """Largest sum of finished leaves, units in flight and temporaries at any time."""
    peak = resident = 0
    for i, unit in enumerate(units):
        if unit.start == 0:
            resident += _allocated(unit.target)  # before its first unit is quantized
        ahead = itertools.islice(units, i, i + 1 + prefetch)
        in_flight = sum(other.device_bytes for other in ahead)
        in_flight += temporary_bytes(unit.target.shape, unit.target.format) * len(unit.target.sharding.device_set)
        peak = max(peak, resident + in_flight)
    return peak


def _allocated(target: Target) -> int:
    """Bytes of the finished leaf as a GPU's allocator rounds them."""
    return sum(-(-bytes_on_devices(leaf) // ALLOCATION) * ALLOCATION for leaf in jax.tree.leaves(target.stored))
