"""What a load will do, decided from metadata alone: whatever can be found wrong before a byte is read is found here."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from moe_online.errors import ConfigError, DtypeMismatch, MemoryBudgetError, ShapeMismatch
from moe_online.loading.messages import human_bytes, listed, rendered
from moe_online.loading.quantizer import temporary_bytes
from moe_online.loading.units import Target, Unit, allocated_bytes, block_bytes, cut_units, num_rows, stored_bytes

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
        units = (unit for unit in self.units if block_bytes(unit) > self.unit_bytes and not unit.target.is_matrix)
        large = {id(unit.target): unit.target for unit in units}
        return tuple(part.stored.name for target in large.values() for part in target.parts)

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
            read, stored = sum(t.source_bytes(num_rows(t)) for t in group), sum(stored_bytes(t) for t in group)
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
                "source_bytes": target.source_bytes(num_rows(target)),
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
      ConfigError: a mesh that does not fit, or a leaf that cannot be stored in its format.
      MemoryBudgetError: the peak is above `memory_limit`.
    """
    _check_shapes(source, targets)
    _check_dtypes(source, targets)
    _check_blocks(targets)
    units = tuple(unit for target in targets for unit in cut_units(target, unit_bytes))
    largest = max((unit.device_bytes for unit in units), default=0)
    block = max((block_bytes(unit) for unit in units), default=0)
    plan = LoadPlan(
        source=source,
        targets=tuple(targets),
        units=units,
        read_bytes=sum(target.source_bytes(num_rows(target)) for target in targets),
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


def _check_blocks(targets: Sequence[Target]) -> None:
    """Raises ConfigError where a weight, or the inputs that it meets, has no whole number of a block along K."""
    wrong = []
    for target in targets:
        formats = () if target.spec is None else (("", target.spec.weight), ("inputs: ", target.spec.activation))
        for inputs, fmt in formats:
            try:
                if fmt is not None:
                    fmt.check_shape(target.shape)  # of which only K counts: that of the weight is that of its inputs
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
        in_flight += temporary_bytes(unit.target.shape, unit.target.format) * len(unit.target.sharding.device_set)
        peak = max(peak, resident + in_flight)
    return peak
