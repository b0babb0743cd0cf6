"""What a load will do, decided from metadata alone: whatever can be found wrong before a byte is read is found here."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from moe_online.errors import ConfigError, DtypeMismatch, MemoryBudgetError, ShapeMismatch
from moe_online.loading.memory import bytes_on_devices
from moe_online.loading.messages import human_bytes, listed, rendered
from moe_online.loading.quantizer import temporary_bytes
from moe_online.loading.reader import Shared, host_peak
from moe_online.loading.rules import HALF, LAYER
from moe_online.loading.units import ALLOCATION, Target, Unit, allocated_bytes, cut_units

WIDE = 100  # columns of a terminal from which on tables show everything


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
        shared = zip(self.units, Shared(self.units).by_unit, strict=True)
        chunks = (chunk for unit, needed in shared if not unit.target.is_matrix for chunk in needed.items())
        return tuple(dict.fromkeys(name for (name, _), size in chunks if size > self.unit_bytes))

    def __str__(self) -> str:
        return rendered(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"{self.source}", title_justify="left", caption_justify="left", caption=self._summary())
        wide = options.max_width >= WIDE
        table.add_column("tensors", overflow="fold")
        for column in ("read", "stored"):
            table.add_column(column, justify="right", no_wrap=True)
        for column in ("scheme", "shape", "chosen by")[: 3 if wide else 1]:
            table.add_column(column)
        for name, group in group_by_pattern(self.targets):
            first = group[0]
            read, stored = sum(t.source_bytes(t.local_rows) for t in group), sum(t.stored_bytes for t in group)
            shape = "x".join(map(str, first.shape)) or "scalar"
            more = (shape, first.rule) if wide else ()
            table.add_row(name, human_bytes(read), human_bytes(stored), first.scheme, *more)
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
                f"{listed(self.coarse_tensors, 'tensor')}; Orbax saves smaller chunks with "
                "StorageOptions(chunk_byte_size=..., shard_axes=(0,))"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same facts for machines."""
        totals = ("read_bytes", "resident_bytes", "largest_unit_bytes", "peak_bytes", "host_peak_bytes", "prefetch")
        tensors = [
            {
                "name": target.name,
                "sources": [name for part in target.parts for name in part.names],
                "shape": list(target.shape),
                "scheme": target.scheme,
                "rule": target.rule,
                "source_bytes": target.source_bytes(target.local_rows),
                "stored_bytes": target.stored_bytes,
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
      ConfigError: a mesh that does not fit, or a leaf that cannot be stored in its format.
      MemoryBudgetError: the peak is above `memory_limit`.
    """
    _check_shapes(source, targets)
    _check_dtypes(source, targets)
    _check_blocks(targets)
    if memory_limit is not None:
        unit_bytes = _fitting(source, targets, unit_bytes, memory_limit, prefetch)
    units = _units(targets, unit_bytes)
    return LoadPlan(
        source=source,
        targets=tuple(targets),
        units=units,
        read_bytes=sum(target.source_bytes(target.local_rows) for target in targets),
        resident_bytes=sum(target.stored_bytes for target in targets),
        largest_unit_bytes=max((unit.device_bytes for unit in units), default=0),
        peak_bytes=_peak(units, prefetch),
        host_peak_bytes=host_peak(units, prefetch),
        prefetch=prefetch,
        unit_bytes=unit_bytes,
    )


def _units(targets: Sequence[Target], unit_bytes: int) -> tuple[Unit, ...]:
    """All units in the order of their work: leaves that share a stored tensor follow one another."""
    first: dict[str, int] = {}
    places = [min(first.setdefault(name, i) for part in t.parts for name in part.names) for i, t in enumerate(targets)]
    ordered = sorted(range(len(targets)), key=lambda i: (places[i], i))
    return tuple(unit for i in ordered for unit in cut_units(targets[i], unit_bytes))


def _fitting(source: str, targets: Sequence[Target], unit_bytes: int, memory_limit: int, prefetch: int) -> int:
    """The largest size of a unit with which the peak stays below the limit, in halves of what was asked for."""
    while True:
        units = _units(targets, unit_bytes)
        peak = _peak(units, prefetch)
        if peak <= memory_limit:
            return unit_bytes
        largest = max((unit.nbytes for unit in units if not unit.target.is_on_devices), default=0)
        if unit_bytes == 1 or not units:
            break
        unit_bytes = max(1, min(unit_bytes, largest) // 2) if largest < unit_bytes * 2 else 1
    alone = _peak(units, 0)
    resident = sum(target.stored_bytes for target in targets)
    remedy = "quantize more, or give more devices"
    if alone <= memory_limit:
        remedy = f"prefetch=0 would fit with {human_bytes(alone)}; or quantize more, or give more devices"
    unit = max((unit.device_bytes for unit in units), default=0)
    raise MemoryBudgetError(
        f"loading {source} needs {human_bytes(peak)} at its peak, also in the smallest units "
        f"({human_bytes(resident)} of parameters, {1 + prefetch} x {human_bytes(unit)} on their way), above "
        f"memory_limit={human_bytes(memory_limit)}: {remedy}",
        names=[target.name for target in targets],
    )


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
    wrong: dict[str, str] = {}
    for target in targets:
        for part in target.parts:
            axes = target.stored_axes(part)
            needed = target.part_shape(part)
            if part.stored.shape != needed or (axes is not None and not target.has_axes(axes, part)):
                as_axes = "" if axes is None else f" (axes {' '.join(axes)})"
                wrong |= {name: f"{name} {part.stored.shape}{as_axes}, needed {needed}" for name in part.names}
    if wrong:
        raise ShapeMismatch(
            f"{source} has another shape than the model in {listed(list(wrong.values()), 'tensor')}. Change the config "
            "of the model, or state the stored axes in mapping={...}: leaves of experts are [E, N, K] (N output, K "
            "contraction); a rule '-> NAME' without axes takes a tensor as it is.",
            names=wrong,
        )
    _check_shards(targets)


def _check_shards(targets: Sequence[Target]) -> None:
    """Raises ConfigError where devices would get uneven parts, or a part of a block of scales."""
    wrong = []
    for target in targets:
        try:
            shard = target.sharding.shard_shape(target.shape)
            if any(
                letter in (LAYER, HALF) and n != size
                for letter, n, size in zip(target.leaf.axes or "", shard, target.shape, strict=False)
            ):
                raise ValueError(
                    f"layers, and gate and up, must be together on each device; {target.sharding} cuts them"
                )
            *_, n, k = (1, 1, *shard)
            for fmt in filter(None, (target.format, target.source_format)):
                fmt.check_shard(n, k, n_sharded=n != target.shape[-2], k_sharded=k != target.shape[-1])
        except ValueError as error:
            wrong.append(f"{target.name} {target.shape}: {str(error).splitlines()[0]}")
    if wrong:
        raise ConfigError(f"the mesh does not fit. {'; '.join(wrong)}. Use another mesh or sharding")


def _check_dtypes(source: str, targets: Sequence[Target]) -> None:
    wrong: dict[str, str] = {}
    for target in targets:
        for part in target.parts:
            found, needed = part.stored.dtype, np.dtype(target.filled_by(part).dtype)
            real = found.itemsize >= 2 and all(jnp.issubdtype(dtype, jnp.floating) for dtype in (found, needed))
            if not (real if target.format is not None and not part.child else real or found == needed):
                wrong |= {name: f"{name} is {found}, needed {needed}" for name in part.names}
    if wrong:
        raise DtypeMismatch(
            f"{source} has a dtype that cannot become the model's in {listed(list(wrong.values()), 'tensor')}. Real "
            "dtypes of 16 bits and more become one another; for any other, declare the leaf with the stored dtype.",
            names=wrong,
        )


def _check_blocks(targets: Sequence[Target]) -> None:
    """Raises ConfigError where a weight, or the inputs that it meets, has no whole number of a block along K."""
    wrong = []
    for target in targets:
        formats = () if target.spec is None else (("", target.spec.weight), ("inputs: ", target.spec.activation))
        for inputs, fmt in formats:
            try:
                if fmt is not None:
                    fmt.check_shape(target.leaf.source_shape)  # of which only K counts, which the inputs have too
            except ValueError as error:
                wrong.append(f"{target.name} ({inputs}{error})")
                break
    if wrong:
        raise ConfigError(
            f"quantization does not fit {listed(wrong, 'tensor')}. Choose another format for these layers, or list "
            "them in `ignore`"
        )


def _peak(units: Sequence[Unit], prefetch: int) -> int:
    """Largest sum of finished leaves, units in flight and temporaries at any time."""
    peak, resident = 0, 0 if not units else allocated_bytes(units[0].target)
    for i, unit in enumerate(units):
        # The leaf of the next unit is allocated while a GPU may still count the source that was just freed.
        resident += sum(allocated_bytes(following.target) for following in units[i + 1 : i + 2] if following.start == 0)
        ahead = itertools.islice(units, i, i + 1 + prefetch)
        in_flight = sum(other.device_bytes for other in ahead)
        in_flight += step_bytes(unit) * len(unit.target.sharding.device_set)
        peak = max(peak, resident + in_flight)
    return peak


def staged_peak(units: Sequence[Unit], prefetch: int) -> int:
    """Largest sum of units in flight, what one of them becomes, and temporaries, where that goes to the host."""
    peak = 0
    for i, unit in enumerate(units):
        rows = sum(-(-bytes_on_devices(leaf) // ALLOCATION) * ALLOCATION for leaf in jax.tree.leaves(unit.stored))
        in_flight = sum(other.device_bytes for other in itertools.islice(units, i, i + 1 + prefetch))
        peak = max(peak, in_flight + rows + step_bytes(unit) * len(unit.target.sharding.device_set))
    return peak


def step_bytes(unit: Unit) -> int:
    """Memory that the step of a unit may take on each device beside its source and its output."""
    target = unit.target
    shape = target.sharding.shard_shape(target.shape)[target.is_stacked :]
    if target.is_taken_over:
        shards = (
            child.sharding.shard_shape(child.shape)[target.is_stacked :] for child in jax.tree.leaves(target.stored)
        )
        return max(temporary_bytes(shard, None) for shard in shards)
    decoded = 0
    if target.is_decoded:
        rows = unit.stop - unit.start
        decoded = math.prod((rows, *shape[1:])) * np.dtype(np.float32).itemsize
        decoded += sum(  # codes in another order of axes are put in ours first
            bytes_on_devices(stored) // len(stored.sharding.device_set)
            for part, stored in zip(target.parts, unit.parts, strict=True)
            if list(target.permutation(part)) != sorted(target.permutation(part))
        )
    return temporary_bytes(shape, target.format) + decoded
