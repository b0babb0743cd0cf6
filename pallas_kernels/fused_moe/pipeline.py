"""The routed experts: sort once, two grouped matmuls (kernels where there are), one combine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation
from pallas_kernels.bits import storage_bits
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul.call import Call, dispatch
from pallas_kernels.grouped_matmul.product import no_gradient
from pallas_kernels.quantize import quantize
from pallas_kernels.routing import ExpertOrder, sort_by_expert


def fused_moe(
    x: Float[Array, "T H"],
    w13: jax.Array | QuantizedArray,
    w2: jax.Array | QuantizedArray,
    topk_weights: Float[Array, "T top_k"],
    topk_ids: Int32[Array, "T top_k"],
    *,
    activation: Activation,
    activation_format: Format | None,
    w13_bias: jax.Array | None,
    w2_bias: jax.Array | None,
    expert_map: Int32[Array, " global_E"] | None,
    apply_router_weight_on_input: bool,
    implementation: str | None,
) -> Float[Array, "T H"]:
    """See `pallas_kernels.fused_moe`."""
    if topk_ids.size == 0:
        return jnp.zeros_like(x)
    order = sort_by_expert(topk_ids, w2.shape[0], expert_map=expert_map)
    weights = topk_weights.astype(jnp.float32)
    dtype = x.dtype
    if apply_router_weight_on_input:
        x = (x.astype(jnp.float32) * weights).astype(dtype)
        weights = jnp.ones_like(weights)
    first = Call(
        lhs=_gather(x, order, activation_format),
        rhs=w13,
        group_sizes=order.group_sizes,
        metadata=order.metadata,
        bias=w13_bias,
        epilogue=activation,
        out_dtype=dtype,
        out_format=activation_format,
    )
    second = Call(
        lhs=dispatch(first, implementation),
        rhs=w2,
        group_sizes=order.group_sizes,
        metadata=order.metadata,
        bias=w2_bias,
        out_dtype=np.dtype(np.float32),
    )
    out = dispatch(second, implementation)
    assert not isinstance(out, QuantizedArray)  # no out_format was given
    return _combine(out, weights, order).astype(dtype)


def _gather(x: jax.Array, order: ExpertOrder, fmt: Format | None) -> jax.Array | QuantizedArray:
    """The rows of all pairs, each token quantized once however many experts it has."""
    x, tokens = no_gradient(x), order.tokens
    if fmt is None:
        return _take_rows(x, tokens)
    if fmt.whole_matrix:  # tokens of no expert are padding: their magnitude has no say
        x = jnp.where(jnp.any(order.routed, axis=1, keepdims=True), x, jnp.zeros_like(x))
    q = quantize(x, fmt)
    scales = q.scales if fmt.block[0] is None else _take_rows(q.scales.T, tokens).T
    second = None if q.global_scale is None else q.global_scale[tokens]
    return QuantizedArray(values=_take_rows(q.values, tokens), scales=scales, global_scale=second, format=fmt)


def _take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """`x[rows]`, moved as bits: XLA:CPU would gather small floats as f32."""
    bits = lax.bitcast_convert_type(x, storage_bits(x.dtype))
    return lax.bitcast_convert_type(bits[rows], x.dtype)


def _combine(out: Float[Array, "M H"], weights: Float[Array, "T top_k"], order: ExpertOrder) -> Float[Array, "T H"]:
    """The weighted sum over the experts of each token, in f32 and in the order of the slots."""
    weights = jnp.where(order.routed, weights, jnp.zeros_like(weights))  # also where the weight is no number
    total = jnp.zeros((weights.shape[0], out.shape[1]), jnp.float32)
    for slot in range(weights.shape[1]):
        total = total + weights[:, slot, None] * out[order.rows[:, slot]]
    return total
