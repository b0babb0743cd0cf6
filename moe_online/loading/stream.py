"""Carries out a plan: read the next units while the present one is quantized, free each source at once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_online.errors import CorruptCheckpoint, NonFiniteWeight
from moe_online.loading.memory import PeakMeter
from moe_online.loading.messages import listed, progress_bar
from moe_online.loading.parts import Part
from moe_online.loading.plan import LoadPlan
from moe_online.loading.quantizer import PartLayout
from moe_online.loading.reader import WAITING, Reader
from moe_online.loading.report import LoadReport, TensorReport
from moe_online.loading.rules import EXPERT, LAYER
from moe_online.loading.sinks import Sink
from moe_online.loading.source import CheckpointSource, InPlaceSource
from moe_online.loading.steps import StepCache
from moe_online.loading.units import Target, Unit

logger = logging.getLogger("moe_online")

COMPILERS = 2  # threads: a model of experts has two steps that take long, of w13 and of w2
LEAST_SQUARE = 2.0**-100  # in the mean: then f32 also holds the square of an error that is 2**13 times smaller


@dataclasses.dataclass
class _Progressing:
    """What is found out about a leaf while its units come in."""

    error: list[np.ndarray] = dataclasses.field(default_factory=list)  # per unit [rows]
    norm: list[np.ndarray] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0


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


def run(
    plan: LoadPlan,
    source: CheckpointSource,
    sink: Sink,
    *,
    progress: bool,
    steps: StepCache | None = None,
    collect: bool = True,
) -> LoadReport:
    """Loads all units of a plan.

    Args:
      plan: What to do.
      source: Where from.
      sink: Where to; it drops everything where there is an error.
      progress: Shows a progress bar.
      steps: Compiled steps to use and to add to; None: they go when the load is done.
      collect: As `PeakMeter` has it.

    Raises:
      CorruptCheckpoint: stored bytes cannot be decoded.
      NonFiniteWeight: a weight holds NaN or an infinity.
    """
    begin = time.perf_counter()
    devices = {device: None for target in plan.targets for device in target.sharding.addressable_devices}
    meter, failures = PeakMeter(devices, collect=collect), _Failures()
    steps = StepCache() if steps is None else steps
    known = len(steps)
    leaves = {target.name: _Progressing() for target in plan.targets}
    try:
        later: list[Callable[[], None]] = []
        all_there = all(unit.target.is_on_devices for unit in plan.units)
        compiling = contextlib.nullcontext() if all_there and known else _compiling(plan, sink, steps)
        fetching = _on_devices(plan, source) if all_there else _fetched(plan, source, meter, failures)
        showing = progress_bar(progress, "loading", plan.read_bytes)
        with showing as advance, compiling, contextlib.closing(fetching) as fetched:
            for unit, parts in fetched:
                if parts is not None:
                    later += _store(unit, parts, leaves[unit.target.name], sink, steps, meter, failures)
                advance(unit.nbytes)
            meter.sample()  # of those that were only begun nothing is freed
            for note in later:
                note()
        failures.raise_if_any(plan.source)
    except BaseException:
        sink.drop()
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
        compiled_steps=len(steps) - known,
        compile_seconds=sum(leaf.compile_seconds for leaf in leaves.values()),
        seconds=time.perf_counter() - begin,
    )
    logger.info(report.summary)
    return report


@contextlib.contextmanager
def _compiling(plan: LoadPlan, sink: Sink, steps: StepCache) -> Iterator[None]:
    """Compiles the steps in the order of their use, while the first units are read."""
    done = threading.Event()

    def compile_all() -> None:
        for unit in plan.units:
            if done.is_set():
                return
            with contextlib.suppress(Exception):  # whoever needs this step will see it
                arguments, options = _kind(unit, sink)
                steps.begin(*arguments, **options, compilers=compilers)

    # One traces and lowers, which Python does, the other compiles, which XLA does.
    with (
        ThreadPoolExecutor(COMPILERS, "moe-online-compiler") as compilers,
        ThreadPoolExecutor(1, "moe-online-tracer") as tracer,
    ):
        tracer.submit(compile_all)
        try:
            yield
        finally:
            done.set()


def _on_devices(plan: LoadPlan, source: Any) -> Generator[tuple[Unit, list[jax.Array] | None], None, None]:
    """Yields the units in order where all of them lie on the devices already."""
    for unit in plan.units:
        yield unit, _arrays(unit, source)


def _arrays(unit: Unit, source: Any) -> list[jax.Array]:
    """The parts of a unit as they lie on the devices; on the same mesh by another name it is no copy."""
    arrays = [source.array(name) for part in unit.target.parts for name in part.names]
    return [
        array if array.sharding == aval.sharding else jax.device_put(array, aval.sharding)
        for array, aval in zip(arrays, unit.parts, strict=True)
    ]


def _fetched(
    plan: LoadPlan, source: CheckpointSource, meter: PeakMeter, failures: _Failures
) -> Generator[tuple[Unit, list[jax.Array] | None], None, None]:
    """Yields the units in order with their parts on the devices; at most 1 + prefetch of them exist there at a time.

    One thread reads a unit further ahead into the host's memory, another hands over to the devices.
    """
    reader = Reader(source, plan.units)
    # What any other source gives may be on a device already, and would count there.
    ahead = 1 + WAITING if isinstance(source, InPlaceSource) else 0

    begun: collections.deque[Callable[[], list[dict[jax.Device, Any]]]] = collections.deque()
    to_begin = iter(plan.units)

    def begin(unit: Unit) -> Callable[[], list[dict[jax.Device, Any]]]:
        if unit.target.is_on_devices:
            return list  # there is nothing to be read
        try:
            return reader.begin(unit)
        except CorruptCheckpoint as error:
            return functools.partial(_raise, error)

    def read() -> list[dict[jax.Device, Any]] | None:
        # While the last pieces of one unit are waited for, the first of the next are read.
        begun.extend(map(begin, itertools.islice(to_begin, (2 if ahead else 1) - len(begun))))
        try:
            return begun.popleft()()
        except CorruptCheckpoint as error:
            failures.corrupt.append(error)
            return None
        finally:
            meter.sample_host()

    def put(unit: Unit, waiting: Future[Any]) -> list[jax.Array] | None:
        arrays = waiting.result()
        if arrays is None:
            return None
        if unit.target.is_on_devices:
            return _arrays(unit, source)
        return [_put(of_part, aval) for of_part, aval in zip(arrays, unit.parts, strict=True)]

    with ThreadPoolExecutor(1, "moe-online-reader") as readers, ThreadPoolExecutor(1, "moe-online-copier") as copiers:
        to_read, to_put = iter(plan.units), iter(plan.units)
        on_host = collections.deque(readers.submit(read) for _ in itertools.islice(to_read, ahead))
        on_device: collections.deque[tuple[Unit, Future[Any]]] = collections.deque()

        def put_next(count: int) -> None:
            for unit in itertools.islice(to_put, count):
                on_host.extend(readers.submit(read) for _ in itertools.islice(to_read, 1))
                on_device.append((unit, copiers.submit(put, unit, on_host.popleft())))

        try:
            put_next(plan.prefetch)
            while True:
                put_next(1)  # asked for only now that the consumer has freed the unit before: the bound depends on it
                if not on_device:
                    return
                unit, future = on_device.popleft()
                yield unit, future.result()
        finally:
            reader.close()
            for pool in (readers, copiers):
                pool.shutdown(cancel_futures=True)
            for unit, future in on_device:  # of a load that failed
                if not unit.target.is_on_devices and not future.cancelled() and future.exception() is None:
                    _delete(future.result() or [])


def _raise(error: BaseException) -> NoReturn:
    raise error


def _put(by_device: Mapping[jax.Device, Any], aval: jax.ShapeDtypeStruct) -> jax.Array:
    """One part on the devices, each of which gets its own region."""
    if len(by_device) == 1 and isinstance(aval.sharding, SingleDeviceSharding):
        array: jax.Array = jax.device_put(next(iter(by_device.values())), aval.sharding)
        return array
    arrays = [jax.device_put(array, device) for device, array in by_device.items()]
    return jax.make_array_from_single_device_arrays(aval.shape, aval.sharding, arrays)


def _store(
    unit: Unit,
    parts: list[jax.Array],
    leaf: _Progressing,
    sink: Sink,
    steps: StepCache,
    meter: PeakMeter,
    failures: _Failures,
) -> Iterator[Callable[[], None]]:
    """Writes one unit to its place and frees its source.

    One that lies on an accelerator is only begun, for nothing is to be freed: what is yielded then waits for it.
    """
    begin = time.perf_counter()
    target = unit.target
    # A CPU would run several at once, each with its own temporaries.
    is_begun_only = target.is_on_devices and next(iter(parts[0].devices())).platform != "cpu"
    try:
        arguments, options = _kind(unit, sink)
        step = steps.get(*arguments, **options)
        compiled = time.perf_counter()
        leaf.compile_seconds += compiled - begin
        out, start = sink.begin(unit)
        array, stats = step.call(out, parts, np.int32(start))
        if not is_begun_only:
            jax.block_until_ready((array, stats))
            meter.sample(step.temporary_bytes * len(target.sharding.device_set))
        sink.finish(unit, array)
    finally:
        if not target.is_on_devices:
            _delete(parts)
    leaf.seconds += time.perf_counter() - compiled
    note = functools.partial(_note, unit, stats, leaf, failures)
    if is_begun_only:
        yield note
    else:
        note()


def _note(unit: Unit, stats: Any, leaf: _Progressing, failures: _Failures) -> None:
    """Waits for a unit, and notes what was found out about it."""
    begin = time.perf_counter()
    target = unit.target
    stats = jax.device_get(stats)
    for source, finite in zip(target.parts, stats.finite, strict=True):
        if not finite.all():
            has_experts = EXPERT in (source.axes or target.leaf.axes or "") and not target.is_matrix
            first = int(unit.experts[np.argmin(finite)]) if has_experts else None
            failures.not_finite.setdefault(source.name_at(_place(unit, source, first or 0)), first)
    leaf.error.append(stats.error)
    leaf.norm.append(stats.norm)
    leaf.seconds += time.perf_counter() - begin


def _place(unit: Unit, part: Part, expert: int) -> int:
    """Which of a part's tensors holds this expert."""
    if not part.outer:
        return 0
    layer = unit.start // max(unit.target.local_rows // unit.target.shape[0], 1) if unit.target.is_stacked else 0
    counted = {LAYER: layer, EXPERT: expert}
    of_axis = [counted[letter] for letter in (part.axes or "")[: len(part.outer)]]
    return int(np.ravel_multi_index(of_axis, part.outer))


def _kind(unit: Unit, sink: Sink) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the step of a unit depends on, as `StepCache` wants it."""
    target = unit.target
    layouts = tuple(_layout(target, part) for part in target.parts)
    stored = sink.stored(unit)
    return (stored, layouts, unit.parts), {
        "source": target.source_format,
        "is_stacked": target.is_stacked and stored is target.stored,
        "is_turned": target.is_turned,
    }


def _layout(target: Target, part: Part) -> PartLayout:
    order = target.permutation(part)
    if target.is_stacked:  # a unit is of one layer
        order = tuple(axis - (axis > order[0]) for axis in order[1:])
    return PartLayout(permutation=order, half=part.half, child=part.child)


def _delete(arrays: Any) -> None:
    for array in jax.tree.leaves(arrays):
        array.delete()


def _tensor_report(target: Target, leaf: _Progressing) -> TensorReport:
    error, norm = np.concatenate(leaf.error), np.concatenate(leaf.norm)
    quantized, size = target.format is not None and not target.is_taken_over, math.prod(target.shape)
    sums = error.sum(dtype=np.float64, keepdims=True), norm.sum(dtype=np.float64, keepdims=True)
    worst = None
    if quantized and not target.is_matrix:
        worst = max(_relative_l2(error, norm, size // max(len(error), 1)), default=None)
    return TensorReport(
        name=target.name,
        layer=target.leaf.layer,
        kind=target.leaf.kind,
        sources=tuple(name for part in target.parts for name in part.names),
        shape=target.shape,
        scheme=target.scheme,
        rule=target.rule,
        source_bytes=target.source_bytes(target.local_rows),
        stored_bytes=target.stored_bytes,
        is_quantized=target.format is not None,
        quantized=quantized,
        error=next(iter(_relative_l2(*sums, size)), None) if quantized else None,
        worst_expert_error=worst,
        seconds=leaf.seconds,
    )


def _relative_l2(error: np.ndarray, norm: np.ndarray, size: int) -> list[float]:
    """From sums of `size` squares each, without those that f32 lost: of numbers too large, too small, or all zero."""
    kept = np.isfinite(error) & np.isfinite(norm) & (norm > size * LEAST_SQUARE)
    found: list[float] = np.sqrt(error[kept].astype(np.float64) / norm[kept]).tolist()
    return found
