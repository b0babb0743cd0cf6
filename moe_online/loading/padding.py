"""Intermediate sizes that do not divide among the devices of a mesh, filled up with zeros to whole blocks of scales."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, SingleDeviceSharding

from moe_online.experts import default_sharding, expert_spec
from moe_online.loading.choose import Choice
from moe_online.loading.mapping import Assigned


def padded(assigned: Sequence[Assigned], specs: Mapping[str, Choice], mesh: Mesh | None) -> list[Assigned]:
    """Declares experts that `mesh` is to place with an intermediate size of which each device has whole blocks.

    All tensors of a layer get the same size: w13 counts it along N, w2 along K, biases as they come. Where it divides
    already nothing changes, and so does nothing where a declaration has a sharding of its own.
    """
    by_layer: dict[str, list[Assigned]] = collections.defaultdict(list)
    for each in assigned:
        if each.leaf.intermediate_axis is not None and each.leaf.layer is not None:
            by_layer[each.leaf.layer].append(each)
    sizes = {} if mesh is None else {layer: _size(own, specs, mesh) for layer, own in by_layer.items()}
    return [
        each._replace(leaf=each.leaf.with_intermediate_size(size))
        if each.leaf.intermediate_axis is not None and (size := sizes.get(each.leaf.layer or "")) is not None
        else each
        for each in assigned
    ]


def _size(layer: Sequence[Assigned], specs: Mapping[str, Choice], mesh: Mesh) -> int | None:
    """The intermediate size of a layer on a mesh; None where it stays."""
    block, size, devices = 1, 0, 1
    for leaf, _, stored_format in layer:
        axis, spec = leaf.intermediate_axis, specs[leaf.name][0]
        if axis is None or not isinstance(default_sharding(leaf.aval), SingleDeviceSharding):
            return None
        size = leaf.aval.shape[axis]
        name = expert_spec(str(leaf.field), mesh, shared=leaf.kind == "linear")[axis]
        devices = 1 if name is None else mesh.shape[name]
        along = {"w13_weight": 0, "w2_weight": 1}.get(str(leaf.field))
        formats = () if along is None else (stored_format, None if spec is None else spec.weight)
        block = math.lcm(block, *(fmt.block[along or 0] or 1 for fmt in formats if fmt is not None))
        if along == 1 and spec is not None and spec.activation is not None:
            block = math.lcm(block, spec.activation.block[1] or 1)
    return size if devices == 1 else -(-size // (block * devices)) * block * devices
