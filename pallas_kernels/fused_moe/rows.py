"""Tokens to rows and back: each is the other's gradient, and neither adds in an order that could change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.bits import storage_bits
from pallas_kernels.routing import ExpertOrder


@jax.custom_vjp
def take_tokens(x: Float[Array, "T H"], order: ExpertOrder) -> Float[Array, "M H"]:
    """The rows of all (token, slot) pairs, in their order."""
    return take_rows(x, order.tokens)


def _take_tokens_forward(x: jax.Array, order: ExpertOrder) -> tuple[jax.Array, ExpertOrder]:
    return take_tokens(x, order), order


def _take_tokens_backward(order: ExpertOrder, by_rows: jax.Array) -> tuple[jax.Array, None]:
    return combine(by_rows, jnp.ones(order.rows.shape, jnp.float32), order).astype(by_rows.dtype), None


take_tokens.defvjp(_take_tokens_forward, _take_tokens_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "M H"], weights: Float[Array, "T top_k"], order: ExpertOrder) -> Float[Array, "T H"]:
    """The weighted sum over the rows of each token, in f32 and in the order of the slots."""
    weights = jnp.where(order.routed, weights, jnp.zeros_like(weights))  # also where the weight is no number
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for slot in range(weights.shape[1]):
        total = total + weights[:, slot, None] * rows[order.rows[:, slot]].astype(jnp.float32)
    return total


Residuals = tuple[jax.Array, jax.Array, ExpertOrder]


def _combine_forward(rows: jax.Array, weights: jax.Array, order: ExpertOrder) -> tuple[jax.Array, Residuals]:
    return combine(rows, weights, order), (rows, weights, order)


def _combine_backward(residuals: Residuals, by_total: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, order = residuals
    weights = jnp.where(order.routed, weights, jnp.zeros_like(weights))
    of_row = jnp.zeros(rows.shape[:1], jnp.float32).at[order.rows.reshape(-1)].set(weights.reshape(-1))
    by_rows = of_row[:, None] * by_total[order.tokens]
    by_weights = [
        jnp.sum(by_total * rows[order.rows[:, slot]].astype(jnp.float32), axis=1) for slot in range(weights.shape[1])
    ]
    by_weight = jnp.where(order.routed, jnp.stack(by_weights, axis=1), jnp.zeros_like(weights))
    return by_rows.astype(rows.dtype), by_weight, None


combine.defvjp(_combine_forward, _combine_backward)


def take_rows(x: jax.Array, rows: Int32[Array, " M"]) -> jax.Array:
    """`x[rows]`, moved as bits: XLA:CPU would gather small floats as f32."""
    bits = lax.bitcast_convert_type(x, storage_bits(x.dtype))
    return lax.bitcast_convert_type(bits[rows], x.dtype)
