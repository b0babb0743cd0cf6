"""Sums whose rows are features become rows of tokens, by way of shared memory."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK

# A warp has two of eight tokens, a lane eight features of one.
BLOCKS_OF_TOKENS = plgpu.Layout.TILED(
    Tiling(((8, BLOCK), (2, BLOCK), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def store_turned(real: jax.Array, rows_smem: Any) -> None:
    """`real [features, tokens]`, as products leave it, into rows `[tokens, features]`."""
    rows_smem.transpose((1, 0))[...] = plgpu.layout_cast(real, plgpu.Layout.WGMMA_TRANSPOSED)


def load_blocks(rows_smem: Any) -> jax.Array:
    """Rows of 128 features, each in the lanes of one warp."""
    rows: jax.Array = plgpu.load(rows_smem, layout=BLOCKS_OF_TOKENS, optimized=False)
    return rows
