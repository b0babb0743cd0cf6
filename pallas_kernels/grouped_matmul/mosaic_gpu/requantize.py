"""Results in 1x128 blocks of fp8 before they leave the registers: rows for the next matmul.

A warpgroup has whole blocks, or two have half of each and tell each other their largest magnitudes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import Format
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK
from pallas_kernels.grouped_matmul.mosaic_gpu.sides import OF_ROWS
from pallas_kernels.quantize.scales import block_scales


class Rows(NamedTuple):
    """Rows of a warpgroup's tile."""

    row: Any  # the first one's place in the output
    begin: Any  # the first one that the tile owns
    count: Any  # how many it owns


class Quantizer(NamedTuple):
    """Codes and scales of a warpgroup's rows at a time.

    Codes are of the product with the reciprocal scale; where the definition divides, a few differ by one.
    """

    format: Format
    scales_gmem: Any  # [N/128, M]
    rows_smem: Any  # [slots, 2 warpgroups, 64]: the last one of scales, two of maxima where they are exchanged
    exchanged: Any  # barrier of both warpgroups: maxima are there
    written: Any  # barrier: the second one's codes are there

    def codes(self, real: jax.Array, rows: Rows, column: Any, warpgroup: Any) -> jax.Array:
        """Codes of `real [rows, 128]`, which begins at this column of the output; stores the scales of its rows."""
        x = real.astype(jnp.float32)
        scale = block_scales(jnp.max(jnp.abs(x), axis=1), self.format).stored
        self._store(scale, column // BLOCK, rows, warpgroup)
        return self._codes(x, scale)

    def codes_of_half(self, real: jax.Array, rows: Rows, column: Any, warpgroup: Any, turn: Any) -> jax.Array:
        """The same of half of the columns; `turn` counts such calls, of which both warpgroups make as many."""
        x = real.astype(jnp.float32)
        amax = jnp.max(jnp.abs(x), axis=1)
        slot = lax.rem(turn, jnp.int32(2))  # a slow one still reads while a fast one is on its next tile
        self.rows_smem[slot, warpgroup] = amax
        plgpu.barrier_arrive(self.exchanged)
        plgpu.barrier_wait(self.exchanged)
        others = plgpu.load(self.rows_smem.at[slot, 1 - warpgroup], layout=OF_ROWS, optimized=False)
        scale = block_scales(jnp.maximum(amax, others), self.format).stored

        @pl.when(warpgroup == 0)
        def _store() -> None:
            self._store(scale, column // BLOCK, rows, warpgroup)

        return self._codes(x, scale)

    def _codes(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        codes: jax.Array = (x * lax.broadcast_in_dim(1 / scale, x.shape, (0,))).astype(self.format.storage)
        return codes

    def _store(self, scale: jax.Array, group: Any, rows: Rows, warpgroup: Any) -> None:
        (height,) = scale.shape

        @pl.when(rows.count == height)
        def _whole() -> None:
            self.scales_gmem[group, pl.ds(rows.row, height)] = scale

        @pl.when(rows.count < height)
        def _part() -> None:  # the others belong to neighbours
            own_smem = self.rows_smem.at[self.rows_smem.shape[0] - 1, warpgroup, pl.ds(0, height)]
            own_smem[...] = scale
            plgpu.commit_smem()

            def store_one(i: Any, _: None) -> None:
                self.scales_gmem[group, rows.row + i] = own_smem[i]

            lax.fori_loop(rows.begin, rows.begin + rows.count, store_one, None)
