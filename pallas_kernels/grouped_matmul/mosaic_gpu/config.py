"""Tiles of the Hopper grouped matmul: what they cost, and which to take for a shape."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

SMEM_LIMIT = 232_448  # bytes of shared memory that one block may take on sm_90
WARPGROUP_ROWS = 64  # of one wgmma
COMPUTE_WARPGROUPS = 2
STEP_BYTES = 128  # of K per pipeline step: one swizzled row
STORE_BYTES = 128  # width of the column chunks that go from registers to memory: one swizzled row
TURNED_BYTES = 256  # of a row of 128 columns, while it is turned
ALIGNED_SCALES = 32  # 128 bytes: where the TMA may write
MOST_TOKENS, MOST_TOKENS_IN_BLOCKS = 160, 80  # per tile, with weights on M: what the sums' registers hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
    """Tiles of one block: two compute warpgroups and one that loads.

    Raises:
      ValueError: a size that the hardware's instructions do not have; the message says which they do.
    """

    block_m: int  # rows of one expert per tile
    block_n: int  # rows of the weights per tile
    stages: int = 4  # steps whose operands sit in shared memory at once
    band: int = 8  # row tiles that share a column of weights before the next column, so that it comes from L2
    # Which of the two is on that side of the tensor cores' products that is a multiple of 64. With tokens there, a
    # warpgroup has half of the rows of 128, or half of the columns; with weights it always has half of these.
    weights_on_m: bool = False

    def __post_init__(self) -> None:
        if self.weights_on_m and (self.block_m % 16 or not 16 <= self.block_m <= MOST_TOKENS):
            raise ValueError(
                f"block_m={self.block_m} must be a multiple of 16, at most {MOST_TOKENS}, with weights on M"
            )
        if not self.weights_on_m and self.block_m not in (64, 128):
            raise ValueError(f"block_m={self.block_m} must be 64 or 128, or weights_on_m=True")
        widths = (128, 256, 512) if self.block_m <= 64 else (128, 256)
        if self.block_n not in widths:
            raise ValueError(f"block_n={self.block_n} must be one of {widths} with block_m={self.block_m}")
        if self.stages < 2 or self.band < 1:
            raise ValueError(f"stages={self.stages} must be at least 2 and band={self.band} at least 1")

    @property
    def split_rows(self) -> bool:
        """Whether the warpgroups share the rows of a tile, not its columns."""
        return self.block_m == 2 * WARPGROUP_ROWS and not self.weights_on_m

    @property
    def warpgroup_n(self) -> int:
        """Columns that one warpgroup multiplies."""
        return self.block_n if self.split_rows else self.block_n // COMPUTE_WARPGROUPS

    @property
    def chunk_m(self) -> int:
        """Rows that are turned and stored at once, with weights on M."""
        return next(size for size in (48, 32, 16) if self.block_m % size == 0)

    def smem_bytes(self, *, in_blocks: bool) -> int:
        """Shared memory of operands, the scales of their rows, barriers and output."""
        size = self.stages * (STEP_BYTES * (self.block_m + self.block_n) + 16)
        if in_blocks:
            size += _in_pages(4 * self.stages * scales_height(self.block_m))
        if not self.weights_on_m:
            return size + 2 * COMPUTE_WARPGROUPS * WARPGROUP_ROWS * STORE_BYTES
        size += 2 * COMPUTE_WARPGROUPS * self.chunk_m * STORE_BYTES
        if in_blocks:  # what is turned before it is quantized, and 64 numbers of each kind
            size += 2 * self.chunk_m * TURNED_BYTES + 2048
        return size


def scales_height(block_m: int) -> int:
    """Scales of rows in a step, filled up so that the next ones begin where the TMA may write."""
    return -(-block_m // ALIGNED_SCALES) * ALIGNED_SCALES


def _in_pages(size: int) -> int:
    """Bytes, filled up to where the next array of shared memory begins."""
    return -(-size // 1024) * 1024


def block_k(dtype: Any) -> int:
    """Elements of K per pipeline step: the 128 bytes of one swizzled row."""
    size: int = STEP_BYTES // np.dtype(dtype).itemsize
    return size


def block_m_for(m: int, num_experts: int, *, in_blocks: bool) -> int:
    """Rows of a tile that `heuristic` mostly takes for `m` rows over `num_experts` experts."""
    tokens = _tokens(m, num_experts, in_blocks=in_blocks)
    return tokens or (128 if m > 64 * num_experts else 64)


def _tokens(m: int, num_experts: int, *, in_blocks: bool) -> int | None:
    """Rows of a tile with weights on M; None: tokens are better there."""
    mean = m / max(num_experts, 1)
    if not (mean <= 20 or (48 < mean <= 512 and not in_blocks)):
        return None
    span = rows_of_most(mean)
    return in_parts(span, math.ceil(span / MOST_TOKENS))


def rows_of_most(mean: float) -> float:
    """What nearly all experts have, and the up to 7 rows before them where a tile begins, if they have `mean` rows."""
    return mean + 1.75 * math.sqrt(mean) + 4


def in_parts(span: float, parts: int) -> int:
    """Rows of a tile with weights on M, of which so many have that many rows."""
    return 16 * math.ceil(span / parts / 16)


def heuristic(*, m: int, num_experts: int, n: int, gated: bool, in_blocks: bool) -> MosaicGpuConfig:
    """The tiles for `m` rows over `num_experts` experts with `n` rows of weights each.

    With few rows for each expert the weights' bytes bind: loads go on where the end of a tile is short, so there are
    few tokens in it. With some hundreds the tensor cores bind, and tiles are filled best by equal parts of what an
    expert has. Else they are as large as can be (LOGBOOK.md has the measurements).
    """
    block_n, narrow = 256 if n >= 256 else 128, gated and n < 256  # two such warpgroups have no whole rows to store
    band = 1 if m <= 20 * num_experts else 2  # an expert mostly has one tile: its rows are done early
    if (tokens := _tokens(m, num_experts, in_blocks=in_blocks)) and not narrow:
        configs = (
            MosaicGpuConfig(block_m=tokens, block_n=block_n, stages=stages, band=band, weights_on_m=True)
            for stages in range(6, 1, -1)
        )
        return next(config for config in configs if config.smem_bytes(in_blocks=in_blocks) <= SMEM_LIMIT)
    if narrow or block_m_for(m, num_experts, in_blocks=in_blocks) == 128:
        band = 2 if m <= 192 * num_experts else 4  # about the row tiles of an expert
        if in_blocks and num_experts <= 16 and m <= 2048 * num_experts and (gated or band == 2):
            band = 8
        return MosaicGpuConfig(block_m=128, block_n=block_n, stages=4 if block_n == 256 else 5, band=band)
    if n >= 256 and (gated or in_blocks):
        return MosaicGpuConfig(block_m=64, block_n=256, band=band)
    return MosaicGpuConfig(block_m=64, block_n=128, stages=6, band=band)
