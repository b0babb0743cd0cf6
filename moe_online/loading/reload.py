"""New weights for a model that is loaded, such as those of a trainer: all of them, or none.

First they are staged: read, checked, and quantized with the formats that the parameters carry, aside from these. Then
they are committed: copied into the buffers of the old ones. Until then any error leaves the old ones as they were.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moe_online.dense import DenseKernel
from moe_online.errors import ConfigError
from moe_online.experts import ExpertWeights
from moe_online.loading import stream
from moe_online.loading.api import UNIT_BYTES, LoadResult, Source, check_limits, make_target, open_source
from moe_online.loading.choose import Choice, of_stored
from moe_online.loading.mapping import Assigned, assign
from moe_online.loading.messages import listed
from moe_online.loading.plan import LoadPlan, make_plan, staged_peak
from moe_online.loading.sinks import OnDevices, OnHost
from moe_online.loading.source import OnDeviceSource, StoredTensor
from moe_online.loading.steps import StepCache
from moe_online.loading.tree import (
    FIELD_AXES,
    KERNEL,
    KERNEL_AXES,
    SHARED,
    SHARED_AXES,
    Leaf,
    flatten,
    join,
    path_name,
)
from moe_online.quant_config import matches
from moe_online.schemes import QuantSpec
from pallas_kernels import Format, QuantizedArray

Staging = Literal["host", "device"]

_STEPS = StepCache()  # of all reloads: the next one needs the same


def reload(
    params: Any,
    source: Source,
    *,
    names: str | Sequence[str] | None = None,
    staging: Staging = "host",
    mapping: Mapping[str, str] | None = None,
    prefix: str | None = None,
    unexpected: str | Sequence[str] = "error",
    requantize: bool = False,
    unit_bytes: int = UNIT_BYTES,
    prefetch: int = 1,
    progress: bool = True,
) -> LoadResult:
    """Puts other weights in the place of loaded ones, in the formats, dtypes and shardings that these have.

    An error while new weights are read, checked or quantized leaves `params` as they were. With `staging="host"` the
    devices hold `1 + prefetch` units beside them, and what one unit becomes; afterwards the buffers of the old arrays
    hold the new ones, and the old arrays, donated, are gone: go on with those that are returned (an nnx module is
    updated, and returned). Ctrl-C during this last copy may leave some of the old arrays gone: load anew then. With
    `staging="device"` the new arrays come beside the old ones, which stay usable: more memory, less time. (They are
    committed to their devices, as loaded ones are; for others, such as those of `jnp.zeros`, compiled functions are
    compiled once more.)

    Args:
      params: What `moe_online.load` returned, or any tree like it.
      source: As `load` takes it: a path, a tree such as a trainer's live weights, or a `CheckpointSource`.
      names: Names or patterns (as in a config: `"layers.3.*"`, `"re:..."`) of the leaves, or of the layers that they
        belong to, which are to be reloaded; None: all. Tensors of others are then not read.
      staging: Where new weights wait until all are there: `"host"` or `"device"`.
      mapping: As in `load`.
      prefix: As in `load`.
      unexpected: As in `load`, of tensors that belong to no leaf of `params`.
      requantize: As in `load`.
      unit_bytes: As in `load`.
      prefetch: As in `load`.
      progress: Shows a progress bar.

    Returns:
      The parameters, a tree like `params`, and the report of this reload.

    Raises:
      ConfigError: a name that matches nothing, an unknown `staging`, parameters that are not loaded.
      CheckpointError: as `load` raises them.
    """
    if staging not in get_args(Staging):
        raise ConfigError(f"{staging=} must be one of {', '.join(map(repr, get_args(Staging)))}")
    check_limits(unit_bytes=unit_bytes, prefetch=prefetch)
    loaded, opened = _Loaded.of(params), open_source(source, prefix=prefix)
    chosen = _chosen(loaded.leaves, names)
    surplus = unexpected if names is None else "ignore"
    plan = _plan_for(
        _Wish(
            held=tuple((leaf, loaded.held(leaf)) for leaf in chosen),
            description=opened.description,
            tensors=tuple(opened.tensors.values()),
            formats=tuple(getattr(opened, "stored_formats", {}).items()),
            mapping=tuple((mapping or {}).items()),
            unexpected=surplus if isinstance(surplus, str) else tuple(surplus),
            staging=staging,
            # What waits on the host is quantized in units: a whole leaf would take as much again on the devices.
            may_stay=staging == "device" and isinstance(opened, OnDeviceSource),
            requantize=requantize,
            unit_bytes=unit_bytes,
            prefetch=prefetch,
            has_64_bits=jax.dtypes.canonicalize_dtype(np.float64) == np.float64,
        )
    )
    sink = OnHost() if staging == "host" else OnDevices()
    report = stream.run(plan, opened, sink, progress=progress, steps=_STEPS, collect=False)
    commit = functools.partial(_copied_into, unit_bytes=unit_bytes) if staging == "host" else _placed_like
    fresh = {name: jax.tree.map(commit, loaded.arrays[name], sink.arrays.pop(name)) for name in list(sink.arrays)}
    return LoadResult(loaded.rebuild({**loaded.arrays, **fresh}), report)


_Held = QuantSpec | np.dtype[Any]  # what a loaded leaf is, and goes on being


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wish:
    """All that a plan depends on."""

    held: tuple[tuple[Leaf, _Held], ...]  # the leaves that are to be reloaded
    description: str
    tensors: tuple[StoredTensor, ...]  # of the source
    formats: tuple[tuple[str, Format], ...]  # in which it has some
    mapping: tuple[tuple[str, str], ...]
    unexpected: str | tuple[str, ...]
    staging: Staging
    may_stay: bool
    requantize: bool
    unit_bytes: int
    prefetch: int
    has_64_bits: bool


def _plan_for(wish: _Wish) -> LoadPlan:
    """The plan, kept where the source describes its tensors in what can be a key."""
    try:
        hash(wish)
    except TypeError:
        return _planned.__wrapped__(wish)
    return _planned(wish)


@functools.lru_cache(maxsize=64)  # as many layers may be reloaded one by one
def _planned(wish: _Wish) -> LoadPlan:
    """The plan; a trainer wishes for the same again and again, and would wait for it longer than for some kernels."""
    held = {leaf.name: kind for leaf, kind in wish.held}
    assigned = assign(
        [leaf for leaf, _ in wish.held],
        {tensor.name: tensor for tensor in wish.tensors},
        dict(wish.mapping),
        wish.unexpected,
        wish.description,
        dict(wish.formats),
    )
    targets = [
        make_target(each, None, *_choice(each, held[each.leaf.name], wish.requantize), may_stay=wish.may_stay)
        for each in assigned
    ]
    plan = make_plan(wish.description, targets, unit_bytes=wish.unit_bytes, memory_limit=None, prefetch=wish.prefetch)
    return staged_on_host(plan) if wish.staging == "host" else plan


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """Loaded parameters taken apart."""

    params: Any
    nodes: Sequence[tuple[str, Any]]  # what they consist of, by name
    treedef: Any
    leaves: Sequence[Leaf]  # as they were declared before
    arrays: Mapping[str, Any]  # what each leaf has become
    activations: Mapping[str, Format | None]  # by layer

    @classmethod
    def of(cls, params: Any) -> _Loaded:
        """Takes parameters apart.

        Raises:
          ConfigError: leaves that are no arrays, or that are gone.
        """
        is_module = isinstance(params, nnx.Module)
        state = nnx.state(params) if is_module else params
        flat, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_node)
        nodes = [(path_name(path), node) for path, node in flat]
        found = _Found({}, {}, set())
        declared = jax.tree.unflatten(treedef, [found.declare(name, node) for name, node in nodes])
        _check_arrays(found.arrays)
        if is_module:
            declared = nnx.merge(nnx.graphdef(params), declared)
        leaves = [_as_kernel(leaf) if leaf.name in found.kernels else leaf for leaf in flatten(declared).leaves]
        return cls(params, nodes, treedef, leaves, found.arrays, found.activations)

    def held(self, leaf: Leaf) -> _Held:
        """The scheme that a leaf has, or the dtype where it is not quantized."""
        array = self.arrays[leaf.name]
        if isinstance(array, QuantizedArray):
            return QuantSpec(array.format, self.activations.get(leaf.layer or ""))
        dtype: np.dtype[Any] = np.dtype(array.dtype)
        return dtype

    def rebuild(self, arrays: Mapping[str, Any]) -> Any:
        """The same with these arrays; of a module itself, so that whoever holds it has them."""
        filled = jax.tree.unflatten(self.treedef, [_filled(name, node, arrays) for name, node in self.nodes])
        if not isinstance(self.params, nnx.Module):
            return filled
        nnx.update(self.params, filled)
        return self.params


class _Found(NamedTuple):
    """What is in parameters, by name."""

    arrays: dict[str, Any]
    activations: dict[str, Format | None]
    kernels: set[str]  # of quantized dense layers

    def declare(self, name: str, node: Any) -> Any:
        """Notes a node, and returns how it was declared."""
        if isinstance(node, ExpertWeights):
            shared = node.shared and self._declare_fields(join(name, SHARED), node.shared, SHARED_AXES, node.orig_dtype)
            return dataclasses.replace(self._declare_fields(name, node, FIELD_AXES, node.orig_dtype), shared=shared)
        if isinstance(node, DenseKernel):
            self.kernels.add(name)
            self.activations[name.rpartition(".")[0]] = node.activation_format
            self.arrays[name] = node.weight
            turned = Leaf(name=name, aval=declared_as(node.weight, jnp.bfloat16), axes=KERNEL_AXES[::-1])
            return turned.transposed().aval
        self.arrays[name] = node
        return declared_as(node, jnp.bfloat16)

    def _declare_fields(self, name: str, node: Any, axes: Mapping[str, str], dtype: np.dtype[Any]) -> Any:
        fields = _fields(node, axes)
        self.activations[name] = node.activation_format
        self.arrays.update({join(name, field): value for field, value in fields.items()})
        return dataclasses.replace(node, **{field: declared_as(value, dtype) for field, value in fields.items()})


def _is_node(x: Any) -> bool:
    return isinstance(x, ExpertWeights | DenseKernel | QuantizedArray)


def _fields(node: Any, axes: Mapping[str, str]) -> dict[str, Any]:
    """The tensors that experts, or shared ones, have."""
    return {field: value for field in axes if (value := getattr(node, field)) is not None}


def _filled(name: str, node: Any, arrays: Mapping[str, Any]) -> Any:
    """A node with other arrays."""
    if isinstance(node, DenseKernel):
        return dataclasses.replace(node, weight=arrays[name])
    if not isinstance(node, ExpertWeights):
        return arrays[name]
    shared = node.shared and _with_fields(join(name, SHARED), node.shared, SHARED_AXES, arrays)
    return dataclasses.replace(_with_fields(name, node, FIELD_AXES, arrays), shared=shared)


def _with_fields(name: str, node: Any, axes: Mapping[str, str], arrays: Mapping[str, Any]) -> Any:
    return dataclasses.replace(node, **{field: arrays[join(name, field)] for field in _fields(node, axes)})


def _check_arrays(arrays: Mapping[str, Any]) -> None:
    """Raises ConfigError for leaves that hold nothing."""
    children = {name: jax.tree.leaves(array) for name, array in arrays.items()}
    wrong = [name for name, found in children.items() if not all(isinstance(array, jax.Array) for array in found)]
    if wrong:
        raise ConfigError(
            f"these leaves are no loaded arrays: {listed(wrong, 'leaf')}; the order is reload(params, source)"
        )
    gone = [name for name, found in children.items() if any(array.is_deleted() for array in found)]
    if gone:
        raise ConfigError(
            f"these leaves are deleted: {listed(gone, 'leaf')}; go on with the parameters that the last reload "
            'returned, or keep older ones with staging="device"'
        )


def declared_as(value: Any, dtype: Any) -> Any:
    """How a loaded leaf was declared; `dtype` is that of what is quantized now."""
    if isinstance(value, QuantizedArray):
        return jax.ShapeDtypeStruct(value.shape, dtype, sharding=value.values.sharding)
    if isinstance(value, jax.Array):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
    return value


def _as_kernel(leaf: Leaf) -> Leaf:
    """A quantized dense kernel of a tree that has no modules to say so."""
    layer = leaf.name.rpartition(".")[0]
    return dataclasses.replace(leaf, layer=layer, kind="linear", field=KERNEL, axes=KERNEL_AXES)


def _chosen(leaves: Sequence[Leaf], names: str | Sequence[str] | None) -> list[Leaf]:
    """The leaves that are to be reloaded."""
    if names is None:
        return list(leaves)
    patterns = [names] if isinstance(names, str) else list(names)
    hits = {p: [leaf for leaf in leaves if any(matches(p, name) for name in _names(leaf))] for p in patterns}
    idle = [pattern for pattern, found in hits.items() if not found]
    if idle or not patterns:
        raise ConfigError(
            f"names={idle or patterns} match no leaf and no layer of the parameters; they have "
            f"{listed([leaf.name for leaf in leaves], 'leaf')}"
        )
    wanted = {leaf.name for found in hits.values() for leaf in found}
    return [leaf for leaf in leaves if leaf.name in wanted]


def _names(leaf: Leaf) -> set[str]:
    """Its own, and that of the layer or module that it belongs to."""
    return {name for name in (leaf.name, leaf.layer, *leaf.names) if name}


def _choice(assigned: Assigned, held: _Held, requantize: bool) -> Choice:
    """The scheme that a leaf has, and goes on having."""
    leaf, parts, stored = assigned
    spec = held if isinstance(held, QuantSpec) else None
    if stored is None:
        return spec, "as loaded"
    if spec is None:
        if not requantize:
            raise ConfigError(
                f"{leaf.name} is loaded as {held} and stored as {stored}: give requantize=True to decode it"
            )
        return None, f"as loaded, requantized from {stored}"
    return of_stored(leaf, parts, (spec, "as loaded"), stored, requantize=requantize)


def staged_on_host(plan: LoadPlan) -> LoadPlan:
    """The same with the peaks that it has where finished leaves wait on the host."""
    leaves = (leaf for target in plan.targets for leaf in jax.tree.leaves(target.stored))
    waiting = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    peak = staged_peak(plan.units, plan.prefetch)
    return dataclasses.replace(plan, peak_bytes=peak, host_peak_bytes=plan.host_peak_bytes + waiting)


def _placed_like(old: jax.Array, staged: jax.Array) -> jax.Array:
    """The same buffers; the mesh of the load is one of XLA's, that of the old array may be one of types."""
    placed: jax.Array = staged if staged.sharding == old.sharding else jax.device_put(staged, old.sharding)
    return placed


def _copied_into(old: jax.Array, staged: np.ndarray, *, unit_bytes: int) -> jax.Array:
    """A leaf, or child of one, copied into the buffers of the old one, so many bytes at a time."""
    sharding = old.sharding
    if not old.shape or not old.size or old.is_deleted():  # it was another leaf too, which has its buffers now
        return _on_devices(staged, old)
    local = sharding.shard_shape(old.shape)[0]
    shards = old.shape[0] // local
    rows = max(1, unit_bytes * local // staged.nbytes)
    write = _writer(sharding, old.ndim)
    for first in range(0, local, rows):
        count = min(rows, local - first)
        piece = _on_devices(_rows(staged, shards, first, count), old)
        old = write(old, piece, np.int32(first))
        jax.block_until_ready(old)
        piece.delete()
    return old


def _rows(staged: np.ndarray, shards: int, first: int, count: int) -> np.ndarray:
    """So many rows of each shard, from its row `first` on: a view where there is one shard."""
    each = staged.reshape(shards, -1, *staged.shape[1:])[:, first : first + count]
    return each.reshape(-1, *staged.shape[1:])


def _on_devices(array: np.ndarray, like: jax.Array) -> jax.Array:
    """Placed as another is, which functions may have been compiled for."""
    placed: jax.Array = jax.device_put(array, like.sharding if like.committed else None)
    return placed


@functools.cache
def _writer(sharding: Sharding, ndim: int) -> Callable[..., jax.Array]:
    """Writes rows of every shard into a donated array."""

    def write(old: jax.Array, piece: jax.Array, first: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(old, piece, first, axis=0)

    if not isinstance(sharding, NamedSharding):
        single: Callable[..., jax.Array] = jax.jit(write, donate_argnums=0)
        return single
    spec = sharding.spec
    mapped = jax.shard_map(
        write, mesh=sharding.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec, check_vma=False
    )
    writer: Callable[..., jax.Array] = jax.jit(mapped, donate_argnums=0, out_shardings=sharding)
    return writer
