"""Operands of a matmul as a block sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import interpreting
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK, Pair
from pallas_kernels.grouped_matmul.mosaic_gpu.sides import Sides


class Operands(NamedTuple):
    """In memory, and the steps of them that are in shared memory."""

    lhs_gmem: Any  # [M, K]
    rhs_gmem: Any  # [E, N, K]
    scales_gmem: Pair | None  # of blocks
    lhs_smem: Any  # [stages, block_m, block_k]
    rhs_smem: Any  # [stages, block_n, block_k]
    scales_smem: Any  # f32 [stages, at least block_m], those of rows in blocks

    def row_scales(self, first: Any, slot: Any, sides: Sides) -> jax.Array:
        """Those of a warpgroup's rows of a tile, from `first` on, at the step in a slot."""
        own = self.scales_smem.at[slot, pl.ds(first, sides.num_tokens)]
        scales: jax.Array = plgpu.load(own, layout=sides.of_tokens, optimized=False)
        if interpreting.get() is not None:
            # The barrier of the free slot orders this read and the next copy into it (DeepGEMM does the same); the race
            # detector wants a fence between threads and TMA, which takes 6 % of a long matmul.
            plgpu.commit_smem()
        return scales

    def weight_scale(self, expert: Any, half: int, column: Any, n_out: int, ki: Any) -> jax.Array:
        """That of the block with this column of the output, of gate or up, at a step of K."""
        assert self.scales_gmem is not None
        values = self.scales_gmem.rhs.values
        expert = jnp.maximum(expert, 0)
        if values.shape[0] > self.rhs_gmem.shape[0]:  # gate and up apart
            expert = 2 * expert + half
        else:
            column = column + half * n_out
        scale: jax.Array = values[expert, ki, column // BLOCK]
        return scale
