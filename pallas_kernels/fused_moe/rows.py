"""Tokens to rows and back: each is the other's gradient, and neither adds in an order that could change."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.fused_moe.combine_call import CombineCall, kernel_for
from pallas_kernels.implementations import Implementation
from pallas_kernels.quantize.tokens import send_tokens
from pallas_kernels.routing import ExpertOrder


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_tokens(
    x: Float[Array, "T H"], order: ExpertOrder, implementation: Implementation | None
) -> Float[Array, "M H"]:
    """The rows of all (token, slot) pairs, in their order."""
    rows = send_tokens(x, order, None, implementation)
    assert isinstance(rows, jax.Array)  # no format was given
    return rows


def _take_tokens_forward(
    x: jax.Array, order: ExpertOrder, implementation: Implementation | None
) -> tuple[jax.Array, ExpertOrder]:
    return take_tokens(x, order, implementation), order


def _take_tokens_backward(
    implementation: Implementation | None, order: ExpertOrder, by_rows: jax.Array
) -> tuple[jax.Array, None]:
    return sum_of_rows(by_rows, order, implementation), None


take_tokens.defvjp(_take_tokens_forward, _take_tokens_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def combine(
    rows: Float[Array, "M H"],
    weights: Float[Array, "T top_k"],
    order: ExpertOrder,
    dtype: np.dtype[Any],
    implementation: Implementation | None,
) -> Float[Array, "T H"]:
    """The weighted sum over the rows of each token, in f32 and in the order of the slots; rounded once."""
    call = CombineCall(rows=rows, weights=weights, order=order, dtype=dtype)
    if (kernel := kernel_for(call, implementation)) is not None:
        served: jax.Array = kernel.run(call)
        return served
    end: jax.Array | int = 0  # rows of no expert come last
    if order.group_sizes.shape[0]:
        end = order.metadata.group_starts[-1] + order.group_sizes[-1]
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for slot in range(weights.shape[1]):
        row = order.rows[:, slot]
        # Masked as late as can be, since a mask of the slots is a launch of its own; also where a weight is no number.
        mine = jnp.broadcast_to(row[:, None] < end, total.shape)
        weighted = weights[:, slot, None] * rows[row].astype(jnp.float32)
        total = total + jnp.where(mine, weighted, jnp.zeros_like(weighted))
    return total.astype(dtype)


def sum_of_rows(
    by_rows: Float[Array, "M H"], order: ExpertOrder, implementation: Implementation | None
) -> Float[Array, "T H"]:
    """Of each token's rows, all alike: the gradient by tokens, from that by the rows taken from them."""
    return combine(by_rows, jnp.ones(order.rows.shape, jnp.float32), order, np.dtype(by_rows.dtype), implementation)


Residuals = tuple[jax.Array, jax.Array, ExpertOrder]


def _combine_forward(
    rows: jax.Array,
    weights: jax.Array,
    order: ExpertOrder,
    dtype: np.dtype[Any],
    implementation: Implementation | None,
) -> tuple[jax.Array, Residuals]:
    return combine(rows, weights, order, dtype, implementation), (rows, weights, order)


def _combine_backward(
    dtype: np.dtype[Any], implementation: Implementation | None, residuals: Residuals, by_total: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    (rows, weights, order), by_total = residuals, by_total.astype(jnp.float32)
    weights = jnp.where(order.routed, weights, jnp.zeros_like(weights))
    of_row = jnp.zeros(rows.shape[:1], jnp.float32).at[order.rows.reshape(-1)].set(weights.reshape(-1))
    by_rows = of_row[:, None] * by_total[order.tokens]
    by_weights = [
        jnp.sum(by_total * rows[order.rows[:, slot]].astype(jnp.float32), axis=1) for slot in range(weights.shape[1])
    ]
    by_weight = jnp.where(order.routed, jnp.stack(by_weights, axis=1), jnp.zeros_like(weights))
    return by_rows.astype(rows.dtype), by_weight, None


combine.defvjp(_combine_forward, _combine_backward)
