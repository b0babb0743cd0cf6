"""Pairs by expert, and of one expert by their order: numbers in shared memory, compared a square at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.routing.mosaic_gpu.squares import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    SIDE,
    WARPGROUPS,
    load,
    one_where_less,
    share_of,
    side_of,
    square_of,
    total,
    zeros,
)

INDEX_BITS = 20  # of a key: which pair it is; those above say the expert, and behind all experts none
PAD = -2  # the id of a pair that there is not
_FAR = np.int32(2**31 - 1)  # and its key


def first_key(expert: Any) -> Any:
    """All keys of an expert, or along a side of each, are at least this, and those of experts before it less."""
    return expert << INDEX_BITS


class Keys(NamedTuple):
    """Of some of the pairs, from the pair `base` on."""

    ids_gmem: Any  # [n], whole sides
    smem: Any  # int32, as many as there may be, and a side behind them that means nothing
    base: Any
    num_experts: int
    padded: bool  # whether the last ids may be PAD
    warpgroup: Any

    @property
    def sides(self) -> Any:
        """How many there are of these pairs."""
        return jnp.clip(self.ids_gmem.shape[0] // SIDE - self.base // SIDE, 0, self.most)

    @property
    def most(self) -> int:
        """How many there may be."""
        most: int = self.smem.shape[0] // SIDE - 1
        return most

    def fetch(self) -> list[jax.Array]:
        """The ids of this warpgroup's sides, on their way: nothing waits for one before all are asked for."""
        last = self.ids_gmem.shape[0] - SIDE
        begins = [jnp.minimum(self.base + each, last) for each in self._mine()]
        return [load(self.ids_gmem.at[pl.ds(begin, SIDE)], ALONG_ROWS) for begin in begins]

    def put(self, fetched: list[jax.Array]) -> None:
        """Makes keys of them, for all warpgroups: they see them once they have met."""
        for begin, ids in zip(self._mine(), fetched, strict=True):

            @pl.when(begin < self.sides * SIDE)
            def _put(begin: Any = begin, ids: jax.Array = ids) -> None:
                known = (ids >= 0) & (ids < self.num_experts)
                expert = jnp.where(known, ids, jnp.full_like(ids, self.num_experts))
                keys = first_key(expert) + side_of(begin)
                if self.padded:
                    keys = jnp.where(ids == PAD, jnp.full_like(ids, _FAR), keys)
                self.smem[pl.ds(begin, SIDE)] = keys

    def own_of(self, first: Any, number: int) -> Any:
        """The expert of the pair `first + number`."""
        return self.smem[first - self.base + number] >> INDEX_BITS

    def less(self, bounds: jax.Array) -> jax.Array:
        """How many keys of this warpgroup's sides are less than each of 64 numbers."""
        bounds = square_of(bounds, 0)

        def add(i: Any, found: jax.Array) -> jax.Array:
            return found + one_where_less(self._columns(self.warpgroup + i * WARPGROUPS), bounds)

        return total(lax.fori_loop(0, share_of(self.sides, self.warpgroup), add, zeros()))

    def places(self, first: Any) -> jax.Array:
        """This warpgroup's part of how many pairs come before each of `[first, first + SIDE)`."""
        return self.less(load(self.smem.at[pl.ds(first - self.base, SIDE)], ALONG_ROWS))

    def ranks(self, first: Any) -> jax.Array:
        """How many pairs of its expert come before each of `[first, first + SIDE)`."""
        own = load(self.smem.at[pl.ds(first - self.base, SIDE)], ALONG_ROWS)
        begin, own = (square_of(each, 0) for each in (first_key(own >> INDEX_BITS), own))

        def add(side: Any, found: jax.Array) -> jax.Array:
            others = self._columns(side)
            return found + one_where_less(others, own) - one_where_less(others, begin)

        end = jnp.minimum((first - self.base) // SIDE + 2, self.sides)
        return total(lax.fori_loop(0, end, add, zeros()))

    def _columns(self, side: Any) -> jax.Array:
        return square_of(load(self.smem.at[pl.ds(side * SIDE, SIDE)], ALONG_COLUMNS), 1)

    def _mine(self) -> list[Any]:
        """Where this warpgroup's sides begin, seen from `base`."""
        return [(self.warpgroup + i * WARPGROUPS) * SIDE for i in range(-(-self.most // WARPGROUPS))]
