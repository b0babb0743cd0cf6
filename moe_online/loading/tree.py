"""Abstract models as flat lists of named leaves, and back."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_online.dense import DenseKernel
from moe_online.errors import ConfigError
from moe_online.experts import SHARED_SIZES, SIZES, ExpertWeights
from moe_online.flax.linear import Linear
from moe_online.flax.nnx import MoE
from moe_online.schemes import LayerKind
from pallas_kernels import QuantizedArray

KERNEL, KERNEL_AXES = "kernel", "KN"  # of a `moe_online.flax.Linear`, as it is declared
WEIGHTS = ("w13_weight", "w2_weight", KERNEL)  # what a scheme quantizes
HALVES = ("gate", "up")  # of the tensors with a gate/up axis
STACK = "L"  # an axis of layers before all others
FIELD_AXES = {  # of the tensors of ExpertWeights: E expert, S gate or up, N output, K contraction
    "w13_weight": "ESNK",
    "w2_weight": "ENK",
    "w13_bias": "ESN",
    "w2_bias": "EN",
    "e_score_correction_bias": "E",
}
SHARED_AXES = {"w13_weight": "ESNK", "w2_weight": "ENK", "gate_weight": "K"}  # of its shared experts: E is 1
SHARED = "shared"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array that the model asks for."""

    name: str
    aval: Any  # ShapeDtypeStruct
    layer: str | None = None  # what it belongs to, if that can be quantized: an ExpertWeights, a Linear
    kind: LayerKind | None = None  # of that
    field: str | None = None  # its name there
    axes: str | None = None  # letters of the axes, where they are known
    unpadded: tuple[int, ...] | None = None  # the shape that is in the checkpoint, where the rest is to be zeros
    names: tuple[str, ...] = ()  # by which patterns of a config mean it, where it belongs to no such layer
    what: str | None = None  # for people, where no scheme can reach it, what it is of, if that is known: "RMSNorm"

    @property
    def source_shape(self) -> tuple[int, ...]:
        """What the checkpoint has of it."""
        return tuple(self.aval.shape) if self.unpadded is None else self.unpadded

    @property
    def intermediate_axis(self) -> int | None:
        """Where the intermediate size of experts is among its axes."""
        sizes = (SHARED_SIZES if self.kind == "linear" else SIZES).get(self.field or "", "")
        return sizes.index("I") - len(sizes) if "I" in sizes else None

    def with_intermediate_size(self, size: int) -> Leaf:
        """The same, declared with another intermediate size, of which the checkpoint has what it has now."""
        axis, shape = self.intermediate_axis, list(self.aval.shape)
        if axis is None or shape[axis] == size:
            return self
        shape[axis] = size
        aval = jax.ShapeDtypeStruct(tuple(shape), self.aval.dtype, sharding=self.aval.sharding)
        return dataclasses.replace(self, aval=aval, unpadded=self.source_shape)

    def transposed(self) -> Leaf:
        """The kernel `[K, N]` of a dense layer as `[N, K]`, sharded alike: what it is once it is quantized."""
        k, n = self.aval.shape
        sharding = self.aval.sharding
        if isinstance(sharding, NamedSharding):
            spec = PartitionSpec(*reversed((*sharding.spec, None, None)[:2]))
            sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        aval = jax.ShapeDtypeStruct((n, k), self.aval.dtype, sharding=sharding)
        return dataclasses.replace(self, aval=aval, axes=KERNEL_AXES[::-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractTree:
    """The leaves of an abstract model, and how the loaded ones become a model again."""

    leaves: tuple[Leaf, ...]
    rebuild: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]  # arrays by name, activation formats by layer


def flatten(abstract: Any) -> AbstractTree:
    """Lists the leaves of a pytree of `ShapeDtypeStruct`s, an abstract nnx module or linen variables.

    Raises:
      ConfigError: no leaf, or one that is no `ShapeDtypeStruct`; `expert_map` alone may be an array, and is kept.
    """
    if not isinstance(abstract, nnx.Module):
        return _flatten(abstract, {})
    graph, state = nnx.split(abstract)
    modules = {
        ".".join(map(str, path)): node for path, node in nnx.iter_graph(abstract) if isinstance(node, nnx.Module)
    }
    inner = _flatten(state, modules)
    return AbstractTree(
        leaves=inner.leaves, rebuild=lambda arrays, formats: nnx.merge(graph, inner.rebuild(arrays, formats))
    )


def _flatten(abstract: Any, modules: Mapping[str, nnx.Module]) -> AbstractTree:
    """Of a pytree; `modules` are those that it is the state of, by name."""
    nodes, treedef = jax.tree_util.tree_flatten_with_path(
        abstract, is_leaf=lambda x: isinstance(x, ExpertWeights | DenseKernel)
    )
    named = [(path_name(path), node) for path, node in nodes]
    leaves = [leaf for name, node in named for leaf in _leaves(name, node, modules)]
    _check(leaves)

    def rebuild(arrays: Mapping[str, Any], formats: Mapping[str, Any]) -> Any:
        return jax.tree.unflatten(treedef, [_filled(name, node, arrays, formats) for name, node in named])

    return AbstractTree(leaves=tuple(leaves), rebuild=rebuild)


def path_name(path: tuple[Any, ...]) -> str:
    """`layers.0.attention.q_proj.kernel` for a path of jax.tree_util; the `value` of an nnx variable is no name."""
    keys = []
    for key in path:
        match key:
            case jax.tree_util.DictKey() | jax.tree_util.FlattenedIndexKey():
                keys.append(str(key.key))
            case jax.tree_util.SequenceKey():
                keys.append(str(key.idx))
            case jax.tree_util.GetAttrKey() if key.name not in ("value", "raw_value"):
                keys.append(key.name)
    return ".".join(keys)


def _leaves(name: str, node: Any, modules: Mapping[str, nnx.Module]) -> list[Leaf]:
    if isinstance(node, DenseKernel):
        raise ConfigError(_declared_as_quantized(name))
    if not isinstance(node, ExpertWeights):
        return [_single(name, node, modules)]
    own = [_of_experts(name, field, value) for field, value in _fields(name, node, FIELD_AXES)]
    leaves = [_unpadded(leaf, node.intermediate_size_unpadded) for leaf in own]
    if node.shared is not None:
        layer, size = join(name, SHARED), node.shared.intermediate_size_unpadded
        shared = [_of_shared_experts(layer, field, value) for field, value in _fields(layer, node.shared, SHARED_AXES)]
        leaves += [_unpadded(leaf, size) for leaf in shared]
    return leaves


def _unpadded(leaf: Leaf, size: int | None) -> Leaf:
    """A leaf of experts that are declared with their padding."""
    axis = leaf.intermediate_axis
    if size is None or axis is None:
        return leaf
    shape = list(leaf.aval.shape)
    if not 0 < size <= shape[axis]:
        raise ConfigError(f"{leaf.name} {tuple(shape)} has intermediate_size_unpadded={size}, which is no part of it")
    shape[axis] = size
    return dataclasses.replace(leaf, unpadded=tuple(shape))


def _fields(name: str, node: Any, axes: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The tensors that the node of this name has."""
    for field in axes:
        value = getattr(node, field)
        if isinstance(value, QuantizedArray):
            raise ConfigError(_declared_as_quantized(join(name, field)))
        if value is not None:
            yield field, value


def _of_experts(layer: str, field: str, aval: Any) -> Leaf:
    name, axes = join(layer, field), FIELD_AXES[field]
    ndim = getattr(aval, "ndim", None)
    if ndim == len(axes) + 1:  # of several layers in one, as nnx.vmap makes them
        axes = STACK + axes
    elif ndim != len(axes):
        return Leaf(name=name, aval=aval, names=(layer or name,), what="stacked experts")
    return Leaf(name=name, aval=aval, layer=layer, kind="moe", field=field, axes=axes, what="bias of experts")


def _of_shared_experts(layer: str, field: str, aval: Any) -> Leaf:
    """They are a dense layer, quantized as one."""
    name, axes = join(layer, field), SHARED_AXES[field]
    if getattr(aval, "ndim", None) != len(axes):
        return Leaf(name=name, aval=aval, names=(layer,), what="stacked shared experts")
    return Leaf(name=name, aval=aval, layer=layer, kind="linear", field=field, axes=axes, what="gate of shared experts")


def _single(name: str, aval: Any, modules: Mapping[str, nnx.Module]) -> Leaf:
    """A leaf that is no part of ExpertWeights."""
    layer, _, field = name.rpartition(".")
    if layer not in modules:
        return Leaf(name=name, aval=aval, names=(name, layer) if layer else (name,))
    module = modules[layer]
    if not isinstance(module, Linear) or _is_stacked(module):
        return Leaf(name=name, aval=aval, names=(layer or name,), what=_owner(layer, modules))
    axes = KERNEL_AXES if field == KERNEL else None
    return Leaf(name=name, aval=aval, layer=layer, kind="linear", field=field, axes=axes, what="bias of Linear")


def _owner(layer: str, modules: Mapping[str, nnx.Module]) -> str:
    """For people, what kind of module this is."""
    module, (parent, _, attribute) = modules[layer], layer.rpartition(".")
    if isinstance(modules.get(parent), MoE) and attribute == "router":
        return "router"
    if isinstance(module, Linear):
        return "stacked Linear"
    name = type(module).__name__
    return f"nnx.{name}" if type(module).__module__.startswith("flax.") else name


def _is_stacked(linear: Linear) -> bool:
    """Whether it stands for several layers, as nnx.vmap makes them: `[L, K, N]` is no matrix to be quantized."""
    return getattr(linear.kernel.get_value(), "ndim", 2) != 2  # what is quantized already has no rank


def _declared_as_quantized(name: str) -> str:
    return f"{name} is declared as quantized; declare it as it is in the checkpoint"


def _filled(name: str, node: Any, arrays: Mapping[str, Any], formats: Mapping[str, Any]) -> Any:
    layer, _, field = name.rpartition(".")
    if field == KERNEL and layer in formats:
        return DenseKernel(weight=arrays[name], activation_format=formats[layer])
    if not isinstance(node, ExpertWeights):
        return arrays[name]
    filled = _with_arrays(name, node, FIELD_AXES, arrays, formats)
    if node.shared is None:
        return filled
    shared = _with_arrays(join(name, SHARED), node.shared, SHARED_AXES, arrays, formats)
    return dataclasses.replace(filled, shared=shared)


def _with_arrays(
    name: str, node: Any, axes: Mapping[str, str], arrays: Mapping[str, Any], formats: Mapping[str, Any]
) -> Any:
    values = {field: arrays[join(name, field)] for field in axes if getattr(node, field) is not None}
    changes: dict[str, Any] = {"activation_format": formats.get(name)}
    declared, loaded = node.w2_weight.shape[-1], values["w2_weight"].shape[-1]
    if declared != loaded and node.intermediate_size_unpadded is None:
        changes["intermediate_size_unpadded"] = declared
    return dataclasses.replace(node, **values, **changes)


def join(layer: str, field: str) -> str:
    """The name of a field of this layer, which may have no name."""
    return f"{layer}.{field}" if layer else field


def _check(leaves: list[Leaf]) -> None:
    if not leaves:
        raise ConfigError("the abstract model has no leaf: there is nothing to load")
    names = collections.Counter(leaf.name for leaf in leaves)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise ConfigError(f"several leaves of the model have the same name: {', '.join(repeated)}; rename them")
    concrete = [leaf.name for leaf in leaves if not isinstance(leaf.aval, jax.ShapeDtypeStruct)]
    if concrete == [""]:
        raise ConfigError(
            f"the model is a {type(leaves[0].aval).__name__}, no declared one; the order is load(model, source)"
        )
    if concrete:
        raise ConfigError(
            f"these leaves are not abstract: {', '.join(concrete)}; declare the model with nnx.eval_shape or "
            "jax.eval_shape, so that nothing is allocated before it is loaded"
        )
