"""The whole layer as one differentiable function; rounding to an activation format counts as the identity."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import Activation
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.fused_moe.config import FusedMoeConfig
from pallas_kernels.fused_moe.experts import ExpertsCall
from pallas_kernels.fused_moe.pipeline import (
    Prepared,
    finalize,
    first_call,
    prepare,
    prepare_all,
    run_experts,
)
from pallas_kernels.grouped_matmul.call import dispatch
from pallas_kernels.grouped_matmul.product import no_gradient
from pallas_kernels.grouped_matmul.reference import zero_rows_of_none
from pallas_kernels.implementations import Implementation
from pallas_kernels.quantize import fake_quantize


class Static(NamedTuple):
    """What a call of `fused_moe` says besides arrays."""

    activation: Activation
    activation_format: Format | None
    implementation: Implementation | None
    out_dtype: np.dtype[Any]
    apply_router_weight_on_input: bool = False
    config: FusedMoeConfig | None = None


class Arrays(NamedTuple):
    """The arrays of a call of `fused_moe`."""

    x: jax.Array
    w13: jax.Array | QuantizedArray
    w2: jax.Array | QuantizedArray
    topk_weights: jax.Array | None = None  # neither: all tokens go to the one expert
    topk_ids: jax.Array | None = None
    w13_bias: jax.Array | None = None
    w2_bias: jax.Array | None = None
    expert_map: jax.Array | None = None


def run(static: Static, arrays: Arrays) -> jax.Array:
    """The layer, rounded once; differentiable by all that is real."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    if 0 in (arrays.x.shape[0], 1 if arrays.topk_ids is None else arrays.topk_ids.size):
        return jnp.zeros((arrays.x.shape[0], arrays.w2.shape[1]), static.out_dtype)
    if static.activation_format is None:
        return _run(static, arrays)
    w13, w2 = (jax.tree.map(no_gradient, w) if isinstance(w, QuantizedArray) else w for w in (arrays.w13, arrays.w2))
    return _run_quantized(static, arrays._replace(w13=w13, w2=w2))


def _run(static: Static, arrays: Arrays) -> jax.Array:
    prepared = _prepare(static, arrays, static.activation_format)
    outputs = run_experts(
        prepared,
        arrays.w13,
        arrays.w2,
        activation=static.activation,
        w13_bias=arrays.w13_bias,
        w2_bias=arrays.w2_bias,
        implementation=static.implementation,
        config=static.config,
    )
    return _finalize(static, outputs, prepared, arrays)


def _prepare(static: Static, arrays: Arrays, activation_format: Format | None) -> Prepared:
    if arrays.topk_ids is None or arrays.topk_weights is None:
        return prepare_all(arrays.x, activation_format, static.implementation)
    return prepare(
        arrays.x,
        arrays.topk_weights,
        arrays.topk_ids,
        arrays.w2.shape[0],
        activation_format=activation_format,
        expert_map=arrays.expert_map,
        apply_router_weight_on_input=static.apply_router_weight_on_input,
        implementation=static.implementation,
    )


def _finalize(static: Static, outputs: jax.Array, prepared: Prepared, arrays: Arrays) -> jax.Array:
    if arrays.topk_ids is None:
        return outputs.astype(static.out_dtype)
    return finalize(outputs, prepared, dtype=static.out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_quantized(static: Static, arrays: Arrays) -> jax.Array:
    return _run(static, arrays)


def _forward(static: Static, arrays: Arrays) -> tuple[jax.Array, Arrays]:
    return _run_quantized(static, arrays), arrays


def _backward(static: Static, arrays: Arrays, by_out: jax.Array) -> tuple[Arrays]:
    real = {
        name: value
        for name, value in arrays._asdict().items()
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    }

    def straight_through(real: dict[str, jax.Array]) -> jax.Array:
        return _run_straight_through(static, arrays._replace(**real))

    (gradients,) = jax.vjp(straight_through, real)[1](by_out)
    return (Arrays(*(gradients.get(name) for name in Arrays._fields)),)


_run_quantized.defvjp(_forward, _backward)


def _run_straight_through(static: Static, arrays: Arrays) -> jax.Array:
    """What `_run_quantized` computes, on dequantized codes in the dtype of `x`: there to be differentiated.

    These are other matmuls than those that `static.config` is of.
    """
    fmt = static.activation_format
    assert fmt is not None
    prepared = _prepare(static, arrays, None)
    assert isinstance(prepared.rows, jax.Array)
    rows = zero_rows_of_none(prepared.rows, prepared.order.group_sizes) if fmt.whole_matrix else prepared.rows
    prepared = dataclasses.replace(prepared, rows=fake_quantize(rows, fmt))
    first = first_call(prepared, arrays.w13, arrays.w13_bias, static.activation, None)
    hidden = dispatch(first, static.implementation)
    assert isinstance(hidden, jax.Array)  # no out_format was given
    call = ExpertsCall(first=first, w2=arrays.w2, bias=arrays.w2_bias, dtype=prepared.dtype)
    outputs = dispatch(call.second(fake_quantize(hidden, fmt), static.implementation), static.implementation)
    assert isinstance(outputs, jax.Array)  # no out_format was given
    return _finalize(static, outputs, prepared, arrays)
