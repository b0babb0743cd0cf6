"""Rows that a kernel has taken from tokens: it has no gradient of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.fused_moe.rows import combine
from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.routing import ExpertOrder


@jax.custom_vjp
def taken(x: Float[Array, "T H"], rows: Float[Array, "M H"], order: ExpertOrder) -> Float[Array, "M H"]:
    """`rows`, which are those of `x` in this order, with the gradient that `take_tokens` has."""
    return rows


def _forward(x: jax.Array, rows: jax.Array, order: ExpertOrder) -> tuple[jax.Array, ExpertOrder]:
    return _from(rows, x), order


def _backward(order: ExpertOrder, by_rows: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    by_tokens = combine(by_rows, jnp.ones(order.rows.shape, jnp.float32), order, np.dtype(by_rows.dtype), None)
    return by_tokens, jnp.zeros_like(by_rows), None


taken.defvjp(_forward, _backward)


@jax.custom_jvp
def _from(rows: jax.Array, x: jax.Array) -> jax.Array:
    """`rows`, in a gradient; that of the gradient is an error rather than a silent zero."""
    return rows


@_from.defjvp
def _from_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    raise UnsupportedError("fused_moe has no second derivative; differentiate it once")
