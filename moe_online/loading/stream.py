"""Carries out a plan: read the next units while the present one is quantized, free each source at once."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moe_online.errors import CorruptCheckpoint, NonFiniteWeight
from moe_online.loading.memory import PeakMeter
from moe_online.loading.messages import listed
from moe_online.loading.plan import LoadPlan
from moe_online.loading.quantizer import Compiled, PartLayout, StepCache, allocate
from moe_online.loading.report import LoadReport, TensorReport
from moe_online.loading.source import CheckpointSource
from moe_online.loading.units import Target, Unit, stored_bytes

LEAST_SQUARE = 2.0**-100  # in the mean: then f32 also holds the square of an error that is 2**13 times smaller


@dataclasses.dataclass
class _Progressing:
    """A leaf while its units come in."""

    array: Any
    error: list[np.ndarray] = dataclasses.field(default_factory=list)  # per unit [rows]
    norm: list[np.ndarray] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


@dataclasses.dataclass
class _Failures:
    """What went wrong; a load goes on to the end, so that one error names every tensor."""

    corrupt: list[CorruptCheckpoint] = dataclasses.field(default_factory=list)
    not_finite: dict[str, int | None] = dataclasses.field(
        default_factory=dict
    )  # the first expert, where there are some

    def raise_if_any(self, source: str) -> None:
        """Raises CorruptCheckpoint or NonFiniteWeight for all tensors together."""
        names = dict.fromkeys(name for error in self.corrupt for name in error.names)
        if names:
            raise CorruptCheckpoint(
                f"{source} is damaged: {listed(list(names), 'tensor')} cannot be read. First: {self.corrupt[0]}",
                names=names,
            ) from self.corrupt[0]
        if self.not_finite:
            experts = (f" (first in expert {at})" if at is not None else "" for at in self.not_finite.values())
            where = [name + expert for name, expert in zip(self.not_finite, experts, strict=True)]
            raise NonFiniteWeight(
                f"{source} has NaN or infinite elements in {listed(where, 'tensor')}; no scale can "
                "represent them. The training run has diverged or the file is damaged: load an earlier checkpoint.",
                names=self.not_finite,
            )


def run(plan: LoadPlan, source: CheckpointSource, *, progress: bool) -> tuple[dict[str, Any], LoadReport]:
    """Loads all units of a plan.

    Returns:
      The finished leaves by name, and the report.

    Raises:
      CorruptCheckpoint: stored bytes cannot be decoded.
      NonFiniteWeight: a weight holds NaN or an infinity.
    """
    begin = time.perf_counter()
    devices = {device: None for target in plan.targets for device in target.sharding.addressable_devices}
    meter, steps, failures = PeakMeter(devices), StepCache(), _Failures()
    leaves: dict[str, _Progressing] = {}
    try:
        with _bar(progress) as bar:
            task = bar.add_task("compiling", total=plan.read_bytes)
            for unit in plan.units:  # all before the first is read: XLA's autotuning takes memory of its own
                _step(unit, steps)
            bar.update(task, description="loading")
            for unit, parts in _fetched(plan, source, meter, failures):
                if parts is not None:
                    _store(unit, parts, leaves, steps, meter, failures)
                bar.update(task, advance=unit.nbytes)
        failures.raise_if_any(plan.source)
    except BaseException:
        _delete([leaf.array for leaf in leaves.values()])  # a traceback would keep them on the device
        raise
    report = LoadReport(
        source=plan.source,
        tensors=tuple(_tensor_report(target, leaves[target.name]) for target in plan.targets),
        read_bytes=plan.read_bytes,
        resident_bytes=plan.resident_bytes,
        planned_peak_bytes=plan.peak_bytes,
        peak_bytes=meter.device_bytes,
        planned_host_peak_bytes=plan.host_peak_bytes,
        host_peak_bytes=meter.host_bytes,
        compiled_steps=len(steps),
        seconds=time.perf_counter() - begin,
    )
    return {name: leaf.array for name, leaf in leaves.items()}, report


def _fetched(
    plan: LoadPlan, source: CheckpointSource, meter: PeakMeter, failures: _Failures
) -> Iterator[tuple[Unit, list[jax.Array] | None]]:
    """Yields the units in order with their parts on the device; at most 1 + prefetch of them exist at a time."""
    reader = _Reader(source)

    def fetch(unit: Unit) -> list[jax.Array] | None:
        try:
            parts = [
                jax.device_put(host, aval.sharding) for host, aval in zip(reader.read(unit), unit.parts, strict=True)
            ]
        except CorruptCheckpoint as error:
            failures.corrupt.append(error)
            return None
        meter.sample_host()
        return parts

    with ThreadPoolExecutor(1, thread_name_prefix="moe-online-reader") as pool:
        units = iter(plan.units)
        waiting = collections.deque((unit, pool.submit(fetch, unit)) for unit in itertools.islice(units, plan.prefetch))
        try:
            while True:
                # Asked for only now that the consumer has freed the unit before: the bound depends on it.
                waiting.extend((unit, pool.submit(fetch, unit)) for unit in itertools.islice(units, 1))
                if not waiting:
                    return
                unit, future = waiting.popleft()
                yield unit, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Reader:
    """Cuts units from blocks, of which it keeps the present one."""

    def __init__(self, source: CheckpointSource):
        self._source = source
        self._key: Any = None
        self._block: list[Any] = []

    def read(self, unit: Unit) -> list[Any]:
        """The parts of a unit on the host (or, of a source on devices, there)."""
        key = (unit.target.name, unit.block)
        if key != self._key:
            self._key, self._block = None, []  # the old block goes before the new one comes
            self._block = [part.read(self._source, unit.target.index(part, *unit.block)) for part in unit.target.parts]
            self._key = key
        block, (start, stop) = self._block, unit.block
        if unit.stop == stop:
            self._key, self._block = None, []
        if (unit.start, unit.stop) == (start, stop):
            return block
        return [
            array[unit.target.index(part, unit.start - start, unit.stop - start)]
            for part, array in zip(unit.target.parts, block, strict=True)
        ]


def _store(
    unit: Unit,
    parts: list[jax.Array],
    leaves: dict[str, _Progressing],
    steps: StepCache,
    meter: PeakMeter,
    failures: _Failures,
) -> None:
    """Writes one unit into its leaf and frees its source."""
    begin = time.perf_counter()
    target = unit.target
    step = _step(unit, steps)
    try:
        if target.name not in leaves:
            leaves[target.name] = _Progressing(allocate(target.stored))
        leaf = leaves[target.name]
        leaf.array, stats = step.call(leaf.array, parts, np.int32(unit.start))
        jax.block_until_ready((leaf.array, stats))
        meter.sample(step.temporary_bytes * len(target.sharding.device_set))
    finally:
        _delete(parts)
    stats = jax.device_get(stats)
    for source, finite in zip(target.parts, stats.finite, strict=True):
        if not finite.all():
            first = int(unit.start + np.argmin(finite)) if "E" in (source.axes or target.leaf.axes or "") else None
            failures.not_finite.setdefault(source.stored.name, first)
    leaf.error.append(stats.error)
    leaf.norm.append(stats.norm)
    leaf.seconds += time.perf_counter() - begin


def _step(unit: Unit, steps: StepCache) -> Compiled:
    """The function that stores a unit, compiled if no unit like it came before."""
    target = unit.target
    layouts = tuple(PartLayout(permutation=target.permutation(part), half=part.half) for part in target.parts)
    return steps.get(target.stored, layouts, unit.parts)


def _delete(arrays: Any) -> None:
    for array in jax.tree.leaves(arrays):
        array.delete()


def _tensor_report(target: Target, leaf: _Progressing) -> TensorReport:
    error, norm = np.concatenate(leaf.error), np.concatenate(leaf.norm)
    quantized, size = target.format is not None, math.prod(target.shape)
    worst = None
    if quantized and not target.is_matrix:
        each = (_relative_l2(*sums, size // max(len(error), 1)) for sums in zip(error, norm, strict=True))
        worst = max((found for found in each if found is not None), default=None)
    return TensorReport(
        name=target.name,
        sources=tuple(part.stored.name for part in target.parts),
        shape=target.shape,
        scheme=target.scheme,
        rule=target.rule,
        source_bytes=target.source_bytes(target.shape[0] if target.shape else 1),
        stored_bytes=stored_bytes(target),
        quantized=quantized,
        error=_relative_l2(error.sum(dtype=np.float64), norm.sum(dtype=np.float64), size) if quantized else None,
        worst_expert_error=worst,
        seconds=leaf.seconds,
    )


def _relative_l2(error: float, norm: float, size: int) -> float | None:
    """From sums of `size` squares; None where f32 lost them: of numbers too large, too small, or all zero."""
    if not math.isfinite(error) or not math.isfinite(norm) or norm <= size * LEAST_SQUARE:
        return None
    return math.sqrt(error / norm)


def _bar(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
        transient=True,
    )
