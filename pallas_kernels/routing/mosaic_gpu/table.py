"""What a block knows of each expert, and behind them of no expert: in shared memory, for all its warpgroups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT, EXPERT, FIRST, IS_EXPERT, LAST, NUM_TILES, ROW
from pallas_kernels.routing.mosaic_gpu.squares import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    SIDE,
    SQUARE,
    chosen,
    in_turn,
    load,
    numbers,
    ones,
    square_of,
    total,
    zeros,
)

STARTS, SIZES, BEFORE = range(3)  # rows of a table; BEFORE is of tiles, or of pairs up to a chunk
PAD, FAR = -2, 1 << 30  # the id of a pair that there is not, and its key


class Keys(NamedTuple):
    """Pairs by expert: those of no expert come last."""

    ids_gmem: Any  # [n]
    num_experts: int
    padded: bool  # whether the last ids may be PAD

    @property
    def sides(self) -> int:
        """How many there are."""
        sides: int = self.ids_gmem.shape[0] // SIDE
        return sides

    def side(self, begin: Any, layout: Any) -> jax.Array:
        """Keys of the pairs `[begin, begin + SIDE)`."""
        ids = load(self.ids_gmem.at[pl.ds(begin, SIDE)], layout)
        others: Any = jnp.full_like(ids, self.num_experts)
        if self.padded:
            others = jnp.where(ids == PAD, jnp.full_like(ids, FAR), others)
        return jnp.where((ids >= 0) & (ids < self.num_experts), ids, others)

    def sizes(self, expert: Any, begin: Any, end: Any) -> jax.Array:
        """How many pairs of the sides `[begin, end)` each of the experts `[expert, expert + SIDE)` has."""

        def add(side: Any, found: jax.Array) -> jax.Array:
            keys = square_of(self.side(side * SIDE, ALONG_COLUMNS), 1)
            return found + ones(keys == expert + numbers(0))

        return total(lax.fori_loop(begin, end, add, zeros()))

    def places(self, first: Any, own: Any) -> jax.Array:
        """Of the pairs `[own, own + SIDE)` among all, or with `first` among those of their experts from there on."""
        keys, index = square_of(self.side(own, ALONG_ROWS), 0), own + numbers(0)

        def add(side: Any, found: jax.Array) -> jax.Array:
            others = square_of(self.side(side * SIDE, ALONG_COLUMNS), 1)
            before = (others == keys) & (side * SIDE + numbers(1) < index)
            return found + ones(before if first is not None else before | (others < keys))

        begin, end = (0, self.sides) if first is None else (first // SIDE, own // SIDE + 1)
        return total(lax.fori_loop(begin, end, add, zeros()))


class Table(NamedTuple):
    """Filled in step by step, by the warpgroups of a block in turn."""

    smem: Any  # int32 [3, experts]
    ready: Any  # barrier of all warpgroups
    warpgroup: Any

    @property
    def sides(self) -> int:
        """How many there are."""
        sides: int = self.smem.shape[1] // SIDE
        return sides

    def fill(self, keys: Keys) -> None:
        """Sizes and starts, from all pairs."""
        self._each(lambda expert: self._put(SIZES, expert, keys.sizes(expert, 0, keys.sides)))
        self._each(lambda expert: self._put(STARTS, expert, self._sum_before(expert, self._sizes)))

    def add_up(self, counts_gmem: Any, chunk: Any) -> None:
        """Sizes and starts from the counts of all chunks, and where the first pairs of a chunk go."""

        def of_counts(expert: Any) -> None:
            def add(side: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                counts = load(counts_gmem.at[pl.ds(expert, SIDE), pl.ds(side * SIDE, SIDE)], SQUARE)
                return found[0] + counts, found[1] + chosen(side * SIDE + numbers(1) < chunk, counts)

            sizes, earlier = lax.fori_loop(0, counts_gmem.shape[1] // SIDE, add, (zeros(), zeros()))
            self._put(SIZES, expert, total(sizes))
            self._put(BEFORE, expert, total(earlier))

        def starts(expert: Any) -> None:
            start = self._sum_before(expert, self._sizes)
            self._put(STARTS, expert, start)
            self._put(BEFORE, expert, start + self._get(BEFORE, expert, ALONG_ROWS))

        self._each(of_counts)
        self._each(starts)

    def entries(self, row: Any, keys: jax.Array, sides: tuple[Any, Any] | None = None) -> jax.Array:
        """A row's entries of these keys, which are known to be in some of its sides."""

        def add(side: Any, found: jax.Array) -> jax.Array:
            entries = square_of(self._get(row, side * SIDE, ALONG_COLUMNS), 1)
            return found + chosen(square_of(keys - side * SIDE, 0) == numbers(1), entries)

        begin, end = sides or (0, self.sides)
        return total(lax.fori_loop(begin, end, add, zeros()))

    def store_groups(self, groups_gmem: Any) -> None:
        """Starts and sizes."""

        def store(expert: Any) -> None:
            for row in (STARTS, SIZES):
                groups_gmem[row, pl.ds(expert, SIDE)] = self._get(row, expert, ALONG_ROWS)

        in_turn(store, self.sides, self.warpgroup)

    def store_tiles(self, tiles_gmem: Any, tile: Any, *, num_experts: int, num_pairs: int, block_m: int) -> None:
        """The tiles `[tile, tile + SIDE)`, as `plan_work` has them."""

        def counts(starts: Any, sizes: Any) -> Any:
            above = starts - starts // ALIGNMENT * ALIGNMENT + sizes + (block_m - 1)
            return jnp.where(sizes > 0, above // block_m, jnp.zeros_like(sizes))

        def of_side(expert: Any) -> jax.Array:
            found: jax.Array = counts(self._get(STARTS, expert, ALONG_COLUMNS), self._get(SIZES, expert, ALONG_COLUMNS))
            return found

        def end(side: int) -> Any:
            """Where the tiles of these experts end."""
            last = (side + 1) * SIDE - 1
            return self.smem[BEFORE, last] + counts(self.smem[STARTS, last], self.smem[SIZES, last])

        def add(side: Any, found: jax.Array) -> jax.Array:
            ends = self._get(BEFORE, side * SIDE, ALONG_COLUMNS) + of_side(side * SIDE)
            return found + ones(square_of(ends, 1) <= tile + numbers(0))

        self._each(lambda expert: self._put(BEFORE, expert, self._sum_before(expert, of_side)))
        ends = [end(side) for side in range(self.sides)]
        first, last = (sum(jnp.int32(each <= at) for each in ends[:-1]) for at in (tile, tile + (SIDE - 1)))
        expert = first * SIDE + total(lax.fori_loop(first, last + 1, add, zeros()))
        # Each of three warpgroups looks for one thing, and tells the others.
        row = jnp.minimum(self.warpgroup, BEFORE)
        found = self.entries(row, expert, (first, last + 1))
        self._share()

        @pl.when(self.warpgroup == row)
        def _tell() -> None:
            self._put(row, 0, found)

        self._share()

        @pl.when(self.warpgroup == 0)
        def _store() -> None:
            start, size, before = (self._get(row, 0, ALONG_ROWS) for row in (STARTS, SIZES, BEFORE))
            index = tile + total(chosen(numbers(1) == 0, numbers(0)))
            row = start // ALIGNMENT * ALIGNMENT + (index - before) * block_m
            most = max(-(-num_pairs // ALIGNMENT) * ALIGNMENT - block_m, 0)
            zero, is_expert = expert - expert, expert < num_experts  # as it lies in registers
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

    def _sizes(self, expert: Any) -> jax.Array:
        return self._get(SIZES, expert, ALONG_COLUMNS)

    def _sum_before(self, expert: Any, values: Callable[[Any], jax.Array]) -> jax.Array:
        """Of each of the experts `[expert, expert + SIDE)`, the sum of the values of those before it."""

        def add(side: Any, found: jax.Array) -> jax.Array:
            return found + values(side * SIDE)

        own = values(expert)
        earlier = lax.fori_loop(0, expert // SIDE, add, own - own)
        return total(square_of(earlier, 1) + chosen(numbers(1) < numbers(0), square_of(own, 1)))

    def _get(self, row: int, expert: Any, layout: Any) -> jax.Array:
        return load(self.smem.at[row, pl.ds(expert, SIDE)], layout)

    def _put(self, row: Any, expert: Any, values: jax.Array) -> None:
        self.smem[row, pl.ds(expert, SIDE)] = values

    def _each(self, body: Callable[[Any], None]) -> None:
        """Does it for all experts; afterwards each warpgroup sees what the others have put there."""
        in_turn(body, self.sides, self.warpgroup)
        self._share()

    def _share(self) -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ready)
        plgpu.barrier_wait(self.ready)
