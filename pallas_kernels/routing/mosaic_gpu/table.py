"""What a block knows of each expert, and behind them of no expert: in shared memory, for all its warpgroups."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT, EXPERT, FIRST, IS_EXPERT, LAST, NUM_TILES, ROW
from pallas_kernels.routing.mosaic_gpu.keys import Keys, first_key
from pallas_kernels.routing.mosaic_gpu.squares import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    SIDE,
    SQUARE,
    WARPGROUPS,
    chosen,
    in_turn,
    load,
    numbers,
    share_of,
    side_of,
    square_of,
    total,
    whole_sides,
    zeros,
)

# Rows of a table. What each warpgroup has found, one row each: how many pairs there are up to and with an expert, of
# all and of those before a chunk.
ENDS, EARLIER = 0, WARPGROUPS
# What they tell of an expert: those that a tile has to know, one for each warpgroup to look up, and how many tiles.
EXPERTS, STARTS, SIZES, BEFORE, TILES = range(2 * WARPGROUPS, 2 * WARPGROUPS + 5)
ROWS = TILES + 1


def table_shape(num_experts: int) -> tuple[int, int]:
    """Of the shared memory: a side is before the first expert, so that each has one before it."""
    return ROWS, SIDE + whole_sides(num_experts + 1)


class Table(NamedTuple):
    """Filled in step by step; between the steps the warpgroups meet."""

    smem: Any  # int32, of `table_shape`
    found_smem: Any  # int32 [WARPGROUPS, SIDE], what each has found of 64 things
    ready: Any  # barrier of all warpgroups
    warpgroup: Any
    num_experts: int
    num_pairs: int

    @property
    def sides(self) -> int:
        """How many there are."""
        return whole_sides(self.num_experts + 1) // SIDE

    def meet(self) -> None:
        """Afterwards each warpgroup sees what the others have put there."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ready)
        plgpu.barrier_wait(self.ready)

    def count_all(self, keys: Keys) -> None:
        """ENDS, from all pairs."""
        self._each_expert(lambda expert: self._put(ENDS + self.warpgroup, expert, keys.less(_bounds(expert))))

    def add_up(self, counts_gmem: Any, chunk: Any) -> None:
        """ENDS from those of all chunks, and EARLIER from the chunks before this one."""

        def of_experts(expert: Any) -> None:
            def add(i: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                begin = (self.warpgroup + i * WARPGROUPS) * SIDE
                counts = load(counts_gmem.at[pl.ds(expert, SIDE), pl.ds(begin, SIDE)], SQUARE)
                return found[0] + counts, found[1] + chosen(begin + numbers(1) < chunk, counts)

            mine = share_of(counts_gmem.shape[1] // SIDE, self.warpgroup)
            found = lax.fori_loop(0, mine, add, (zeros(), zeros()))
            for row, each in zip((ENDS, EARLIER), found, strict=True):
                self._put(row + self.warpgroup, expert, total(each))

        self._each_expert(of_experts)

    def store_ends(self, counts_gmem: Any, chunk: Any) -> None:
        """ENDS of a chunk."""

        def store(expert: Any) -> None:
            counts_gmem[pl.ds(expert, SIDE), chunk] = self._sum(ENDS, expert)

        in_turn(store, counts_gmem.shape[0] // SIDE, self.warpgroup)

    def find_groups(self, store: Callable[[Any, jax.Array, jax.Array], None], block_m: int) -> None:
        """From ENDS what tiles have to know of each expert, but which is its first."""

        def of_experts(expert: Any) -> None:
            start, end = self._bounds_of(ENDS, expert, self.num_pairs)
            size = end - start
            above = start - start // ALIGNMENT * ALIGNMENT + size + (block_m - 1)
            tiles = jnp.where(size > 0, above // block_m, jnp.zeros_like(size))
            found = {EXPERTS: side_of(expert), STARTS: start, SIZES: size, TILES: tiles}
            for row, each in found.items():
                self._put(row, expert, each)
            store(expert, start, size)

        in_turn(of_experts, self.sides, self.warpgroup)

    def find_firsts(self, earlier: Any) -> None:
        """From ENDS and EARLIER where each expert's first pair of a chunk goes; `earlier` pairs are before it."""

        def of_experts(expert: Any) -> None:
            start, _ = self._bounds_of(ENDS, expert, self.num_pairs)
            begin, end = self._bounds_of(EARLIER, expert, earlier)
            self._put(BEFORE, expert, start + (end - begin))

        in_turn(of_experts, self.sides, self.warpgroup)

    def first_of(self, expert: Any) -> Any:
        """What `find_firsts` found."""
        return self.smem[BEFORE, SIDE + expert]

    def sum_tiles(self) -> None:
        """BEFORE, of each expert the tiles of those before it in its side."""

        def of_experts(expert: Any) -> None:
            tiles = self._columns(TILES, expert // SIDE)
            self._put(BEFORE, expert, total(chosen(numbers(1) < numbers(0), tiles)))

        in_turn(of_experts, self.sides, self.warpgroup)

    def store_tiles(self, tiles_gmem: Any, counters_gmem: Any, tile: Any, block_m: int) -> None:
        """The tiles `[tile, tile + SIDE)`, as `plan_work` has them, and a counter at zero for each."""
        lasts = [(side + 2) * SIDE - 1 for side in range(self.sides)]
        of_sides = [self.smem[BEFORE, last] + self.smem[TILES, last] for last in lasts]
        ends = list(itertools.accumulate(of_sides))
        first, last = (sum(jnp.int32(end <= at) for end in ends[:-1]) for at in (tile, tile + (SIDE - 1)))
        row = EXPERTS + self.warpgroup

        def add(side: Any, found: jax.Array) -> jax.Array:
            earlier = sum(jnp.where(side > i, each, jnp.int32(0)) for i, each in enumerate(of_sides[:-1]))
            behind = (tile - earlier + numbers(0)) - self._columns(BEFORE, side)
            inside = behind.astype(jnp.uint32) < self._columns(TILES, side).astype(jnp.uint32)  # nor before it
            return found + chosen(inside, self._columns(row, side))

        self.found_smem[self.warpgroup, pl.ds(0, SIDE)] = total(lax.fori_loop(first, last + 1, add, zeros()))
        self.meet()

        @pl.when(self.warpgroup == 0)
        def _store() -> None:
            found = [load(self.found_smem.at[i, pl.ds(0, SIDE)], ALONG_ROWS) for i in range(WARPGROUPS)]
            expert, start, size, before = found
            for i, each in enumerate(of_sides[:-1]):
                before = before + jnp.where(expert >= (i + 1) * SIDE, each, jnp.zeros_like(expert))
            index = side_of(tile)
            row = start // ALIGNMENT * ALIGNMENT + (index - before) * block_m
            most = max(-(-self.num_pairs // ALIGNMENT) * ALIGNMENT - block_m, 0)
            zero, is_expert = expert - expert, expert < self.num_experts  # as it lies in registers
            fields = {
                EXPERT: jnp.where(is_expert, expert, zero - 1),
                ROW: jnp.minimum(row, most),
                FIRST: jnp.maximum(row, start),
                LAST: jnp.minimum(row + block_m, start + size),
                IS_EXPERT: jnp.where(is_expert, zero + 1, zero),
                NUM_TILES: zero + ends[-1],
            }
            for field, value in fields.items():
                tiles_gmem[field, pl.ds(tile, SIDE)] = value
            counters_gmem[pl.ds(tile, SIDE)] = zero

    def _bounds_of(self, row: int, expert: Any, most: Any) -> tuple[jax.Array, jax.Array]:
        """Of each expert the sum up to it, and with it; `most` is that of all, those of no expert included."""
        index = side_of(expert)
        end = jnp.where(index < self.num_experts, self._sum(row, expert), jnp.full_like(index, most))
        start = jnp.where(index <= self.num_experts, self._sum(row, expert - 1), jnp.full_like(index, most))
        return jnp.where(index > 0, start, jnp.zeros_like(index)), end

    def _sum(self, row: int, expert: Any) -> jax.Array:
        """What all warpgroups have found together."""
        found = [load(self.smem.at[row + i, pl.ds(SIDE + expert, SIDE)], ALONG_ROWS) for i in range(WARPGROUPS)]
        whole: jax.Array = functools.reduce(jnp.add, found)
        return whole

    def _columns(self, row: Any, side: Any) -> jax.Array:
        return square_of(load(self.smem.at[row, pl.ds((side + 1) * SIDE, SIDE)], ALONG_COLUMNS), 1)

    def _put(self, row: Any, expert: Any, values: jax.Array) -> None:
        self.smem[row, pl.ds(SIDE + expert, SIDE)] = values

    def _each_expert(self, body: Callable[[Any], None]) -> None:
        lax.fori_loop(0, whole_sides(self.num_experts) // SIDE, lambda side, _: body(side * SIDE), None)


def _bounds(expert: Any) -> jax.Array:
    """What the keys of each of these experts are less than."""
    bounds: jax.Array = first_key(side_of(expert + 1))
    return bounds
