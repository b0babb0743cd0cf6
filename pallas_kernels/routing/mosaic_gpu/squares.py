"""Integers of a warpgroup that are compared 64 with 64 others: a square has one number of each kind to a side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

SIDE = 64
WARPGROUPS = 4  # of a block
SQUARE, ALONG_ROWS, ALONG_COLUMNS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_SIGN = np.int32(31)


def whole_sides(size: int) -> int:
    """A size, filled up."""
    return -(-size // SIDE) * SIDE


def load(ref: Any, layout: Any) -> jax.Array:
    """A side or a square from memory."""
    loaded: jax.Array = plgpu.load(ref, layout=layout, optimized=False)
    return loaded


def numbers(dimension: int) -> jax.Array:
    """Of a square's rows (0) or columns (1): 0, 1, ..."""
    found: jax.Array = plgpu.broadcasted_iota(jnp.int32, (SIDE, SIDE), dimension, layout=SQUARE)
    return found


def side_of(begin: Any) -> jax.Array:
    """`begin`, `begin + 1`, ..., along rows."""
    found: jax.Array = begin + plgpu.broadcasted_iota(jnp.int32, (SIDE,), 0, layout=ALONG_ROWS)
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


def one_where_less(x: jax.Array, y: jax.Array) -> jax.Array:
    """1 where `x < y`, of numbers that are not negative: the sign of a difference takes fewer instructions."""
    return lax.shift_right_logical(x - y, jnp.full_like(x, _SIGN))


def total(square: jax.Array) -> jax.Array:
    """The sum of each row."""
    return jnp.sum(square, axis=1, dtype=jnp.int32)


def share_of(count: Any, warpgroup: Any) -> Any:
    """How many of so many things a warpgroup has that takes every fourth."""
    return (count - warpgroup + WARPGROUPS - 1) // WARPGROUPS


def in_turn(body: Callable[[Any], None], num_sides: Any, warpgroup: Any) -> None:
    """Calls `body` with where each side begins that is this warpgroup's."""
    mine = share_of(num_sides, warpgroup)
    lax.fori_loop(0, mine, lambda i, _: body((warpgroup + i * WARPGROUPS) * SIDE), None)
