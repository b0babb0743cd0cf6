"""Rows that a kernel has taken from tokens: it has no gradient of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fused_moe.rows import sum_of_rows
from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.routing import ExpertOrder


@jax.custom_vjp
def taken(x: Float[Array, "T H"], rows: Float[Array, "M H"], order: ExpertOrder) -> Float[Array, "M H"]:
    """`rows`, which are those of `x` in this order, with the gradient that `take_tokens` has."""
    return rows


def _forward(x: jax.Array, rows: jax.Array, order: ExpertOrder) -> tuple[jax.Array, ExpertOrder]:
    return _from(rows, x), order


def _backward(order: ExpertOrder, by_rows: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    return sum_of_rows(by_rows, order, None), jnp.zeros_like(by_rows), None


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
