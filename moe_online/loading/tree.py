"""Abstract models as flat lists of named leaves, and back."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_online.dense import DenseKernel
from moe_online.errors import ConfigError
from moe_online.experts import ExpertWeights
from moe_online.flax.linear import Linear
from moe_online.schemes import LayerKind
from pallas_kernels import QuantizedArray

KERNEL, KERNEL_AXES = "kernel", "KN"  # of a `moe_online.flax.Linear`, as it is declared
WEIGHTS = ("w13_weight", "w2_weight", KERNEL)  # what a scheme quantizes
HALVES = ("gate", "up")  # of the tensors with a gate/up axis
FIELD_AXES = {  # of the tensors of ExpertWeights: E expert, S gate or up, N output, K contraction
    "w13_weight": "ESNK",
    "w2_weight": "ENK",
    "w13_bias": "ESN",
    "w2_bias": "EN",
    "e_score_correction_bias": "E",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array that the model asks for."""

    name: str
    aval: Any  # ShapeDtypeStruct
    layer: str | None = None  # what it belongs to, if that can be quantized: an ExpertWeights, a Linear
    kind: LayerKind | None = None  # of that
    field: str | None = None  # its name there
    axes: str | None = None  # letters of the axes, where they are known

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
        return _flatten(abstract, frozenset())
    graph, state = nnx.split(abstract)
    linear = {".".join(map(str, path)) for path, node in nnx.iter_graph(abstract) if isinstance(node, Linear)}
    inner = _flatten(state, linear)
    return AbstractTree(
        leaves=inner.leaves, rebuild=lambda arrays, formats: nnx.merge(graph, inner.rebuild(arrays, formats))
    )


def _flatten(abstract: Any, linear: Collection[str]) -> AbstractTree:
    """Of a pytree; `linear` names the dense layers in it that can be quantized."""
    nodes, treedef = jax.tree_util.tree_flatten_with_path(
        abstract, is_leaf=lambda x: isinstance(x, ExpertWeights | DenseKernel)
    )
    named = [(path_name(path), node) for path, node in nodes]
    leaves = [leaf for name, node in named for leaf in _leaves(name, node, linear)]
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


def _leaves(name: str, node: Any, linear: Collection[str]) -> list[Leaf]:
    if isinstance(node, DenseKernel):
        raise ConfigError(_declared_as_quantized(name))
    layer, _, field = name.rpartition(".")
    if field == KERNEL and layer in linear:
        return [Leaf(name=name, aval=node, layer=layer, kind="linear", field=field, axes=KERNEL_AXES)]
    if not isinstance(node, ExpertWeights):
        return [Leaf(name=name, aval=node)]
    leaves = []
    for field in FIELD_AXES:
        value = getattr(node, field)
        if isinstance(value, QuantizedArray):
            raise ConfigError(_declared_as_quantized(_join(name, field)))
        if value is not None:
            axes = FIELD_AXES[field]
            leaves.append(Leaf(name=_join(name, field), aval=value, layer=name, kind="moe", field=field, axes=axes))
    return leaves


def _declared_as_quantized(name: str) -> str:
    return f"{name} is declared as quantized; declare it as it is in the checkpoint"


def _filled(name: str, node: Any, arrays: Mapping[str, Any], formats: Mapping[str, Any]) -> Any:
    layer, _, field = name.rpartition(".")
    if field == KERNEL and layer in formats:
        return DenseKernel(weight=arrays[name], activation_format=formats[layer])
    if not isinstance(node, ExpertWeights):
        return arrays[name]
    values = {field: arrays[_join(name, field)] for field in FIELD_AXES if getattr(node, field) is not None}
    return dataclasses.replace(node, **values, activation_format=formats.get(name))


def _join(layer: str, field: str) -> str:
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
