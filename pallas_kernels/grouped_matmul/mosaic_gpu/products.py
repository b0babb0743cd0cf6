"""A compute warpgroup: half of the rows, or of the columns, of each tile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu.config import WARPGROUP_ROWS
from pallas_kernels.grouped_matmul.mosaic_gpu.memory import Matmul, Slots
from pallas_kernels.grouped_matmul.mosaic_gpu.sides import sides
from pallas_kernels.grouped_matmul.mosaic_gpu.tiles import Part, Tile

Found = TypeVar("Found")


def multiply(matmuls: Sequence[Matmul], slots: Slots) -> None:
    """Multiplies what is loaded, and stores the results."""
    step: Any = jnp.int32(0)
    for matmul in matmuls:
        step = _Products(matmul, slots).all_tiles(step)
        if matmul.then is not None and slots.between is not None:
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(slots.between)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _Products(NamedTuple):
    """Of one matmul."""

    matmul: Matmul
    slots: Slots

    def all_tiles(self, step: Any) -> jax.Array:
        """Multiplies this block's tiles, the first step of which is this one; returns the number of steps after it."""
        work, then = self.matmul.work, self.matmul.then

        def multiply_tile(i: jax.Array, carry: Any) -> Any:
            step, stores, before, tile, scales = carry

            def meanwhile() -> tuple[Tile, Any]:
                """What takes its time, while this warpgroup would have to wait for operands anyway."""
                if then is not None:
                    pl.when(i > 0)(functools.partial(self._tell, before))
                return work.tile(jnp.minimum(i + 1, work.num_tiles - 1)), self.matmul.store.scales_of(tile)

            sums, (following, at_end) = self._sums(step, tile, scales, meanwhile)
            scales = self._first_scales(following)
            stores = self.matmul.store.store_tile(sums, stores, tile, at_end)
            return step + tile.steps, stores, tile.number, following, scales

        first = work.tile(jnp.int32(0))
        begin = (step, jnp.int32(0), first.number, first, self._first_scales(first))
        step, _, told, *_ = lax.fori_loop(0, work.num_tiles, multiply_tile, begin)
        if then is not None:
            pl.when(work.num_tiles > 0)(functools.partial(self._tell, told))
        end: jax.Array = step
        return end

    def _sums(
        self, step: jax.Array, tile: Tile, scales: Any, meanwhile: Callable[[], Found]
    ) -> tuple[list[jax.Array], Found]:
        """Those of the columns that are this warpgroup's, in parts; zero where its rows are none of the tile's.

        Halfway it does something else, and returns what that found.
        """
        mine = tile.steps
        if self.matmul.work.config.split_rows:
            half = self._first_row
            needed = (tile.first < tile.row + half + WARPGROUP_ROWS) & (tile.last > tile.row + half)
            mine = jnp.where(needed, tile.steps, jnp.zeros_like(tile.steps))
            self._pass_by(step, tile.steps - mine)
        if self.matmul.operands.scales_gmem is None:
            return self._sum_up(step, mine, meanwhile)
        return self._sum_up_blocks(step, mine, tile, scales, meanwhile)

    def _tell(self, number: jax.Array) -> None:
        """All that this warpgroup has stored is in memory: also of the row tile with this number."""
        assert self.matmul.then is not None
        plgpu.wait_smem_to_gmem(0)
        self.matmul.then.tell(number)

    @property
    def _first_row(self) -> jax.Array:
        """Of a tile, this warpgroup's."""
        first: jax.Array = self.matmul.store.warpgroup * WARPGROUP_ROWS
        return first

    def _multiply(self, acc: Any, slot: jax.Array, begin: int, size: int) -> None:
        config, operands, warpgroup = self.matmul.work.config, self.matmul.operands, self.matmul.store.warpgroup
        rows = pl.ds(self._first_row, WARPGROUP_ROWS) if config.split_rows else slice(None)
        first_column = 0 if config.split_rows else warpgroup * config.warpgroup_n
        weights, tokens = (
            operands.rhs_smem.at[slot, pl.ds(first_column + begin, size)],
            operands.lhs_smem.at[slot, rows],
        )
        if config.weights_on_m:
            plgpu.wgmma(acc, weights, tokens.transpose((1, 0)))
        else:
            plgpu.wgmma(acc, tokens, weights.transpose((1, 0)))
        plgpu.wgmma_wait(0)

    def _pass_by(self, step: jax.Array, steps: jax.Array) -> None:
        """Steps of a tile none of whose rows are this warpgroup's: the other one has the tensor cores alone."""

        def k_step(ki: jax.Array, carry: None) -> None:
            slot = self.slots.of(step + ki)
            plgpu.barrier_wait(self.slots.loaded.at[slot])
            plgpu.barrier_arrive(self.slots.consumed.at[slot])

        lax.fori_loop(0, steps, k_step, None)

    def _halfway(self, steps: jax.Array) -> Any:
        """When to do something else: at once where registers are too few for two loops."""
        return 0 if self.matmul.work.config.split_rows else steps // 2

    def _sum_up(
        self, step: jax.Array, steps: jax.Array, meanwhile: Callable[[], Found]
    ) -> tuple[list[jax.Array], Found]:
        """The sums over all of K at once."""
        width = self.matmul.work.config.warpgroup_n
        shape = sides(self.matmul.work.config).shape(width)
        integers = jnp.issubdtype(self.matmul.operands.lhs_gmem.dtype, jnp.integer)

        def accumulate(acc: Any) -> tuple[list[jax.Array], Found]:
            def k_step(ki: jax.Array, carry: None) -> None:
                slot = self.slots.of(step + ki)
                plgpu.barrier_wait(self.slots.loaded.at[slot])
                self._multiply(acc, slot, 0, width)
                plgpu.barrier_arrive(self.slots.consumed.at[slot])

            half = self._halfway(steps)
            lax.fori_loop(0, half, k_step, None)
            found = meanwhile()
            lax.fori_loop(half, steps, k_step, None)
            return [acc[...]], found

        sums: tuple[list[jax.Array], Found]
        sums = pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.int32 if integers else jnp.float32))
        return sums

    def _sum_up_blocks(
        self, step: jax.Array, steps: jax.Array, tile: Tile, scales: Any, meanwhile: Callable[[], Found]
    ) -> tuple[list[jax.Array], Found]:
        """The sums of each block of K times its scales, added up in f32; `scales` are the first ones of weights."""
        work, operands, parts = self.matmul.work, self.matmul.operands, self.matmul.work.parts()
        side = sides(work.config)

        def k_step(ki: jax.Array, carry: Any) -> Any:
            sums, of_parts = carry
            slot = self.slots.of(step + ki)
            plgpu.barrier_wait(self.slots.loaded.at[slot])
            of_rows = operands.row_scales(self._first_row if work.config.split_rows else 0, slot, side)
            following = self._scales_at(tile, jnp.minimum(ki + 1, work.k_steps - 1))  # on their way in the meantime
            added = []
            for part, total, of_part in zip(parts, sums, of_parts, strict=True):

                def multiplied(acc: Any, part: Part = part) -> jax.Array:
                    self._multiply(acc, slot, part.begin, part.size)
                    found: jax.Array = acc[...]
                    return found

                found = pl.run_scoped(multiplied, plgpu.ACC(side.shape(part.size)))
                if part is parts[-1]:
                    plgpu.barrier_arrive(self.slots.consumed.at[slot])
                added.append(total + side.times(found, of_rows * of_part, side.tokens))
            return added, following

        zeros = [plgpu.layout_cast(jnp.zeros(side.shape(part.size), jnp.float32), plgpu.Layout.WGMMA) for part in parts]
        half = self._halfway(steps)
        carry = lax.fori_loop(0, half, k_step, (zeros, scales))
        found = meanwhile()
        sums, _ = lax.fori_loop(half, steps, k_step, carry)
        return sums, found

    def _first_scales(self, tile: Tile) -> list[jax.Array]:
        """Those of the weights' first block of K, ahead of time."""
        return [] if self.matmul.operands.scales_gmem is None else self._scales_at(tile, jnp.int32(0))

    def _scales_at(self, tile: Tile, ki: jax.Array) -> list[jax.Array]:
        """Those of each part's weights."""
        work, operands = self.matmul.work, self.matmul.operands
        column = work.loaded_column(tile.column) + self.matmul.store.first_column
        return [
            operands.weight_scale(tile.expert, part.half, column + part.offset, work.n_out, ki) for part in work.parts()
        ]
