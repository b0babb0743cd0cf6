"""Tiles of the Hopper grouped matmul: what they cost, and which to take for a shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

SMEM_LIMIT = 232_448  # bytes of shared memory that one block may take on sm_90
WARPGROUP_ROWS = 64  # of one wgmma
COMPUTE_WARPGROUPS = 2
STEP_BYTES = 128  # of K per pipeline step: one swizzled row
STORE_BYTES = 128  # width of the column chunks that go from registers to memory: one swizzled row
TURNED_BYTES = 256  # and where they are turned on their way
ALIGNED_SCALES = 32  # of the rows of a step: the next ones begin where the TMA may write, at 128 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
    """Tiles of one block: two compute warpgroups and one that loads.

    Raises:
      ValueError: a size that the hardware's instructions do not have; the message says which they do.
    """

    # Rows of one expert per tile. 128: a warpgroup has half of the rows, 64: half of the columns. 16 or 32: the same, and
    # weights are on the side of the products that is never less than 64.
    block_m: int
    block_n: int  # rows of the weights per tile
    stages: int = 4  # steps whose operands sit in shared memory at once
    band: int = 8  # row tiles that share a column of weights before the next column, so that it comes from L2

    def __post_init__(self) -> None:
        if self.block_m not in (16, 32, 64, 128):
            raise ValueError(
                f"block_m={self.block_m} must be 16, 32, {WARPGROUP_ROWS} or {2 * WARPGROUP_ROWS}"
            )
        if self.block_n % 128 or not 128 <= self.block_n <= 512 // max(1, self.block_m // 64):
            raise ValueError(f"block_n={self.block_n} must be a multiple of 128, at most 256 for each warpgroup")
        if self.stages < 2 or self.band < 1:
            raise ValueError(f"stages={self.stages} must be at least 2 and band={self.band} at least 1")

    @property
    def split_rows(self) -> bool:
        """Whether the warpgroups share the rows of a tile, not its columns."""
        return self.block_m == 2 * WARPGROUP_ROWS

    @property
    def weights_on_m(self) -> bool:
        """Whether the products' rows are weights, and their columns tokens."""
        return self.block_m < WARPGROUP_ROWS

    @property
    def warpgroup_n(self) -> int:
        """Columns that one warpgroup multiplies."""
        return self.block_n if self.split_rows else self.block_n // COMPUTE_WARPGROUPS

    @property
    def smem_bytes(self) -> int:
        """Shared memory of operands, the scales of their rows, barriers and output."""
        step = STEP_BYTES * (self.block_m + self.block_n) + 4 * max(self.block_m, ALIGNED_SCALES) + 16
        operands = self.stages * step
        if self.weights_on_m:  # before they are turned and after
            return operands + COMPUTE_WARPGROUPS * self.block_m * 2 * TURNED_BYTES
        return operands + 2 * COMPUTE_WARPGROUPS * WARPGROUP_ROWS * STORE_BYTES


def block_k(dtype: Any) -> int:
    """Elements of K per pipeline step: the 128 bytes of one swizzled row."""
    size: int = STEP_BYTES // np.dtype(dtype).itemsize
    return size


def block_m_for(m: int, num_experts: int) -> int:
    """Rows of a tile that `heuristic` mostly takes for `m` rows over `num_experts` experts.

    Few experts are large ones: many steps for each tile, which make up for smaller tiles and leave fewer empty rows.
    """
    if m <= 20 * num_experts:
        return 16 if m <= 6 * num_experts else 32
    return 128 if m > (160 if num_experts <= 16 else 64) * num_experts else 64


def heuristic(*, m: int, num_experts: int, n: int, gated: bool, in_blocks: bool) -> MosaicGpuConfig:
    """The tiles for `m` rows over `num_experts` experts with `n` rows of weights each.

    Wide tiles reach the tensor cores' rate; with few rows for each expert the weights' bytes bind, and narrow tiles
    keep more loads in flight, unless each step has its scales to wait for (LOGBOOK.md has the measurements).
    """
    if block_m_for(m, num_experts) == 128:
        return MosaicGpuConfig(block_m=128, block_n=256 if n >= 256 else 128, stages=4 if n >= 256 else 5, band=4)
    if gated and n < 256:  # two narrow warpgroups would not have whole rows to store
        return MosaicGpuConfig(block_m=128, block_n=128)
    band = 1 if m <= 20 * num_experts else 2  # an expert mostly has one tile: its rows are done early
    if (block_m := block_m_for(m, num_experts)) < WARPGROUP_ROWS:
        return MosaicGpuConfig(
            block_m=block_m, block_n=256 if n >= 256 else 128, stages=6 if block_m == 16 else 5, band=band
        )
    if n >= 256 and (gated or in_blocks):
        return MosaicGpuConfig(block_m=64, block_n=256, band=band)
    return MosaicGpuConfig(block_m=64, block_n=128, stages=6, band=band)
