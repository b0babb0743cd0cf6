"""The step of each unit, compiled once per signature: on a mesh every device does its own part of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from moe_online.loading import quantizer
from moe_online.loading.parts import CHILDREN
from moe_online.loading.quantizer import PartLayout, Stats, row_major
from pallas_kernels import Format, QuantizedArray

E8M0_NAN = 255

Step = Callable[..., tuple[Any, Stats]]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step ready to run."""

    call: Step
    temporary_bytes: int  # on each device; 0 where the backend does not tell


class StepCache:
    """Compiles each step once per signature: formats, layouts, shapes, dtypes, shardings. Several threads may ask."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Future[Compiled]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._compiled)

    def get(self, *arguments: Any, **options: Any) -> Compiled:
        """The step that `begin` with the same arguments promises."""
        return self.begin(*arguments, **options).result()

    def begin(
        self,
        stored: Any,
        layouts: tuple[PartLayout, ...],
        parts: Sequence[jax.ShapeDtypeStruct],
        *,
        source: Format | None = None,
        is_stacked: bool = False,
        is_turned: bool = False,
        compilers: Executor | None = None,
    ) -> Future[Compiled]:
        """Begins to make the step for a finished leaf like `stored` and parts like these, if it is not there.

        Args:
          stored: A `ShapeDtypeStruct`, or a QuantizedArray of them.
          layouts: Of each part.
          parts: Of one unit.
          source: The format of the parts, where they are codes and scales.
          is_stacked: Whether the leaf is `[L, E, ...]`; a unit is of one layer.
          is_turned: Whether the leaf is `[K, N]` and the codes are `[N, K]`.
          compilers: Who compiles what is traced and lowered here, so that the next step can be meanwhile; None: this
            thread.
        """
        key = (
            tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(stored)),
            stored.format if isinstance(stored, QuantizedArray) else None,
            layouts,
            tuple((part.shape, part.dtype, part.sharding) for part in parts),
            source,
            is_stacked,
            is_turned,
        )
        with self._lock:
            found, is_mine = self._compiled.get(key), key not in self._compiled
            if found is None:
                found = self._compiled[key] = Future()
        if not is_mine:
            return found

        @contextlib.contextmanager
        def failing() -> Iterator[None]:
            try:
                yield
            except BaseException as error:
                del self._compiled[key]
                found.set_exception(error)

        def finish(lowered: jax.stages.Lowered) -> None:
            with failing():
                compiled = lowered.compile()
                analysis = compiled.memory_analysis()
                found.set_result(Compiled(compiled, 0 if analysis is None else analysis.temp_size_in_bytes))

        with failing():
            lowered = _lowered(stored, layouts, parts, source, is_stacked, is_turned)
            if compilers is None:
                finish(lowered)
            else:
                compilers.submit(finish, lowered)
        return found


def _lowered(
    stored: Any,
    layouts: tuple[PartLayout, ...],
    parts: Sequence[jax.ShapeDtypeStruct],
    source: Format | None,
    is_stacked: bool,
    is_turned: bool,
) -> jax.stages.Lowered:
    devices = {device for leaf in jax.tree.leaves(stored) for device in leaf.sharding.device_set}
    axes = _MeshAxes.of(stored, is_stacked) if len(devices) > 1 else _MeshAxes()
    step = _step(_local(stored, is_stacked), layouts, source, axes, is_turned)
    if is_stacked:
        step = _stacked(step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, stored)
    if len(devices) > 1:
        step = _on_each_device(step, stored, parts, axes)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    with jax.default_device(min(devices, key=lambda device: device.id)):  # kernels are chosen for where they will run
        return jitted.lower(stored, list(parts), jax.ShapeDtypeStruct((), np.int32))


def _step(
    stored: Any, layouts: tuple[PartLayout, ...], source: Format | None, axes: _MeshAxes, is_turned: bool
) -> Step:
    """What one device does."""
    if isinstance(stored, QuantizedArray) and source == stored.format:
        return _taken_over(stored, layouts)

    def make(layouts: tuple[PartLayout, ...]) -> Step:
        if not isinstance(stored, QuantizedArray):
            return quantizer.copy_step(stored, layouts)
        kind = quantizer.matrix_step if stored.ndim == 2 else quantizer.quantize_step
        return kind(stored.format, layouts, axis_names=(axes.n, axes.k))

    return make(layouts) if source is None else _decoded(make, source, layouts, is_turned)


def _taken_over(stored: QuantizedArray, layouts: tuple[PartLayout, ...]) -> Step:
    """The step of a leaf whose codes and scales are those of the source."""

    def step(out: QuantizedArray, parts: Sequence[Array], start: Array) -> tuple[QuantizedArray, Stats]:
        children: dict[str, Any] = {}
        finite = []
        for child in CHILDREN:
            chosen = [i for i, layout in enumerate(layouts) if layout.child == child]
            if not chosen:
                continue
            copy = quantizer.copy_step(getattr(stored, child), [layouts[i] for i in chosen])
            children[child], stats = copy(getattr(out, child), [parts[i] for i in chosen], start)
            found = stats.finite
            if child == "scales" and stored.format.arithmetic == "power_of_two":
                found &= jnp.stack([_no_nan_exponent(parts[i], layouts[i]) for i in chosen])
            finite.append(jnp.all(found, axis=1, keepdims=True) if stored.ndim == 2 else found)
        by_part = jnp.concatenate(finite)
        zeros = jnp.zeros(by_part.shape[1:], jnp.float32)
        return dataclasses.replace(out, **children), Stats(finite=by_part, error=zeros, norm=zeros)

    return step


def _no_nan_exponent(part: Array, layout: PartLayout) -> Array:
    rows = layout.permutation[0]
    return jnp.all(part != E8M0_NAN, axis=tuple(axis for axis in range(part.ndim) if axis != rows))


def _decoded(
    make: Callable[[tuple[PartLayout, ...]], Step], fmt: Format, layouts: tuple[PartLayout, ...], is_turned: bool
) -> Step:
    """The step of a leaf that is stored otherwise than its source: codes and scales become f32 first."""
    halves = sorted({layout.half for layout in layouts}, key=lambda half: half or 0)

    def step(out: Any, parts: Sequence[Array], start: Array) -> tuple[Any, Stats]:
        real = []
        for half in halves:
            children = {
                layout.child: row_major(jnp.transpose(part, layout.permutation))
                for layout, part in zip(layouts, parts, strict=True)
                if layout.half == half
            }
            children["scales"] = children["scales"].astype(fmt.scale_dtype)
            real.append(QuantizedArray(**children, format=fmt).dequantize(jnp.float32))
        order = (1, 0) if is_turned else tuple(range(real[0].ndim))
        out, stats = make(tuple(PartLayout(permutation=order, half=half) for half in halves))(out, real, start)
        of_half = jnp.asarray([halves.index(layout.half) for layout in layouts], jnp.int32)
        return out, dataclasses.replace(stats, finite=stats.finite[of_half])

    return step


def _stacked(step: Step) -> Step:
    """The step of a leaf `[L, E, ...]` from that of `[L * E, ...]`; on a device the one is the other."""

    def flat(out: Any, parts: Sequence[Array], start: Array) -> tuple[Any, Stats]:
        found, stats = step(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out), parts, start)
        return jax.tree.map(lambda x, like: x.reshape(like.shape), found, out), stats

    return flat


@dataclasses.dataclass(frozen=True)
class _MeshAxes:
    """The mesh axes that shard a leaf's rows, N and K."""

    rows: tuple[str, ...] = ()
    n: tuple[str, ...] = ()
    k: tuple[str, ...] = ()

    @classmethod
    def of(cls, stored: Any, is_stacked: bool) -> _MeshAxes:
        """Those of a finished leaf."""
        values = stored.values if isinstance(stored, QuantizedArray) else stored
        if not isinstance(values.sharding, NamedSharding):
            return cls()
        spec = (*values.sharding.spec, *(None,) * (len(values.shape) - len(values.sharding.spec)))
        names = [() if each is None else (each,) if isinstance(each, str) else tuple(each) for each in spec]
        if isinstance(stored, QuantizedArray):
            rows = () if len(names) == 2 else names[is_stacked]  # a matrix counts as one row
            return cls(rows=rows, n=names[-2], k=names[-1])
        return cls(rows=names[is_stacked] if names else ())


def _on_each_device(step: Step, stored: Any, parts: Sequence[jax.ShapeDtypeStruct], axes: _MeshAxes) -> Step:
    """The step under `shard_map`: nothing but maxima and statistics crosses from device to device."""
    mesh = jax.tree.leaves(stored)[0].sharding.mesh
    others = tuple(name for name in mesh.axis_names if name not in axes.rows)

    def local(out: Any, parts: Sequence[Array], start: Array) -> tuple[Any, Stats]:
        out, stats = step(out, parts, start)
        finite = lax.pmin(stats.finite.astype(jnp.int32), others) if others else stats.finite.astype(jnp.int32)
        sums = (*axes.n, *axes.k)
        error, norm = (lax.psum(x, sums) if sums else x for x in (stats.error, stats.norm))
        return out, Stats(finite=finite > 0, error=error, norm=norm)

    def spec(leaf: Any) -> PartitionSpec:
        found: PartitionSpec = leaf.sharding.spec
        return found

    rows = axes.rows or None
    stats = Stats(finite=PartitionSpec(None, rows), error=PartitionSpec(rows), norm=PartitionSpec(rows))
    specs = jax.tree.map(spec, stored)
    mapped: Step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, [spec(part) for part in parts], PartitionSpec()),
        out_specs=(specs, stats),
        check_vma=False,  # kernels say nothing of what varies
    )
    return mapped


def _local(stored: Any, is_stacked: bool) -> Any:
    """The finished leaf as each device has it, layers and experts in one axis."""

    def local(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = leaf.sharding.shard_shape(leaf.shape)
        shape = (math.prod(shape[:2]), *shape[2:]) if is_stacked else shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(local, stored)


def allocate(stored: Any) -> Any:
    """Memory for a leaf, or for some rows of it; what is in it is unknown."""
    leaves, structure = jax.tree.flatten(stored)
    config: Any = jax.config
    fill = jnp.zeros if config.jax_debug_nans else lax.empty  # NaN is looked for before all is written
    return jax.tree.unflatten(
        structure, _made(fill, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))()
    )


@functools.cache
def _made(
    fill: Callable[..., Array], kinds: tuple[tuple[tuple[int, ...], Any, Sharding], ...]
) -> Callable[[], list[Array]]:
    """One program for all children: each of its own takes a millisecond, and a model has many leaves."""
    make: Callable[[], list[Array]] = jax.jit(
        lambda: [fill(shape, dtype) for shape, dtype, _ in kinds],
        out_shardings=[sharding for _, _, sharding in kinds],
    )
    return make
