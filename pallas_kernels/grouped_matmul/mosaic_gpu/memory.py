"""The memory warpgroup: brings the operands of the next steps, tile after tile and matmul after matmul."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu.config import block_k
from pallas_kernels.grouped_matmul.mosaic_gpu.epilogue import Epilogue
from pallas_kernels.grouped_matmul.mosaic_gpu.operands import Operands
from pallas_kernels.grouped_matmul.mosaic_gpu.progress import Progress
from pallas_kernels.grouped_matmul.mosaic_gpu.tiles import Work


class Matmul(NamedTuple):
    """One of those that a launch does in turn."""

    work: Work
    operands: Operands
    store: Epilogue
    after: Progress | None  # of its rows, where another matmul makes them
    then: Progress | None  # of its results


class Slots(NamedTuple):
    """Steps in shared memory, and their barriers."""

    loaded: Any
    consumed: Any
    stages: int
    between: Any  # for jax's interpreter: the matmul before is done

    def of(self, step: jax.Array) -> jax.Array:
        """Where a step is."""
        slot: jax.Array = lax.rem(step, jnp.int32(self.stages))
        return slot


def load(matmuls: Sequence[Matmul], slots: Slots) -> None:
    """Runs ahead of the products by up to `stages` steps."""
    total: Any = jnp.int32(0)
    for matmul in matmuls:
        if matmul.after is not None and slots.between is not None:
            plgpu.barrier_wait(slots.between)
        total = lax.fori_loop(0, matmul.work.num_tiles, functools.partial(_load_tile, matmul, slots), total)

    def drain(step: jax.Array, carry: None) -> None:
        plgpu.barrier_wait(slots.consumed.at[slots.of(step)])

    lax.fori_loop(jnp.maximum(total - slots.stages, 0), total, drain, None)


def _load_tile(matmul: Matmul, slots: Slots, i: jax.Array, step: jax.Array) -> jax.Array:
    """The steps of one tile; returns the number of those up to its end."""
    work, (lhs_gmem, rhs_gmem, scales, lhs_smem, rhs_smem, scales_smem) = matmul.work, matmul.operands
    bm, bk = work.config.block_m, block_k(lhs_gmem.dtype)
    tile = work.tile(i)
    column, needed = work.loaded_column(tile.column), tile.last - tile.row
    if matmul.after is not None:
        pl.when(tile.steps > 0)(functools.partial(matmul.after.wait, tile.number))

    def load_step(ki: jax.Array, step: jax.Array) -> jax.Array:
        slot = slots.of(step)

        @pl.when(step >= slots.stages)
        def _wait() -> None:
            plgpu.barrier_wait(slots.consumed.at[slot])

        ks = pl.ds(pl.multiple_of(ki * bk, bk), bk)
        for fewer, height in itertools.pairwise((0, *_heights(bm))):

            @pl.when((needed > fewer) & (needed <= height))
            def _rows(height: int = height) -> None:
                rows_smem = lhs_smem.at[slot, pl.ds(0, height)]
                plgpu.copy_gmem_to_smem(lhs_gmem.at[pl.ds(tile.row, height), ks], rows_smem, slots.loaded.at[slot])

        if scales is not None:
            of_rows = scales.lhs.values.at[ki, pl.ds(tile.row, bm)]
            plgpu.copy_gmem_to_smem(of_rows, scales_smem.at[slot, pl.ds(0, bm)], slots.loaded.at[slot])
        for place, half, offset, size in work.pieces:
            features = pl.ds(pl.multiple_of(column + (half * work.n_out + offset), 8), size)
            piece_smem = rhs_smem.at[slot, pl.ds(place, size)]
            plgpu.copy_gmem_to_smem(rhs_gmem.at[tile.expert, features, ks], piece_smem, slots.loaded.at[slot])
        return step + 1

    end: jax.Array = lax.fori_loop(0, tile.steps, load_step, step)
    return end


def _heights(block_m: int) -> list[int]:
    """Rows of tokens that are loaded at once, the fewest that hold what a tile needs: others are not looked at."""
    return [*(height for height in (16, 32, 64, 128) if height < block_m), block_m]
