"""Integers of a warpgroup that are compared 64 with 64 others: a square has one number of each kind to a side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

SIDE = 64
WARPGROUPS = 4  # of a block
SQUARE, ALONG_ROWS, ALONG_COLUMNS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def load(ref: Any, layout: Any) -> jax.Array:
    """A side or a square from memory."""
    loaded: jax.Array = plgpu.load(ref, layout=layout, optimized=False)
    return loaded


def numbers(dimension: int) -> jax.Array:
    """Of a square's rows (0) or columns (1): 0, 1, ..."""
    found: jax.Array = plgpu.broadcasted_iota(jnp.int32, (SIDE, SIDE), dimension, layout=SQUARE)
    return found


def square_of(side: jax.Array, dimension: int) -> jax.Array:
    """One number for each row (0) or column (1)."""
    return lax.broadcast_in_dim(side, (SIDE, SIDE), (dimension,))


def zeros() -> jax.Array:
    """What sums begin with."""
    found: jax.Array = plgpu.layout_cast(jnp.zeros((SIDE, SIDE), jnp.int32), SQUARE)
    return found


def chosen(where: jax.Array, square: jax.Array) -> jax.Array:
    """The square, with zeros elsewhere."""
    return jnp.where(where, square, zeros())


def ones(where: jax.Array) -> jax.Array:
    """1 there, 0 elsewhere."""
    return chosen(where, plgpu.layout_cast(jnp.ones((SIDE, SIDE), jnp.int32), SQUARE))


def total(square: jax.Array) -> jax.Array:
    """The sum of each row."""
    return jnp.sum(square, axis=1, dtype=jnp.int32)


def in_turn(body: Callable[[Any], None], num_sides: Any, warpgroup: Any) -> None:
    """Calls `body` with where each side begins that is this warpgroup's."""
    mine = (num_sides - warpgroup + WARPGROUPS - 1) // WARPGROUPS
    lax.fori_loop(0, mine, lambda i, _: body((warpgroup + i * WARPGROUPS) * SIDE), None)
