"""Tiles of the two matmuls of the experts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul.mosaic_gpu.config import MosaicGpuConfig
else:
    MosaicGpuConfig = Any  # imported by those who make one


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedMoeConfig:
    """Tiles of the kernels of `fused_moe` on NVIDIA Hopper, in place of what is measured or guessed for the shape.

    Both matmuls share a launch where both are named with the same tiles, or only `w13` is, and the call otherwise
    allows it; else, and always with tiles of `block_m=128` that have tokens on M, each has its own. Rows are sorted for
    the heuristic's `block_m` before these are known: with another they are planned again, in XLA.
    """

    w13: MosaicGpuConfig | None = None  # of the first matmul; None: chosen by shape
    w2: MosaicGpuConfig | None = None  # of the second one; None: that of `w13` in one launch, or chosen by shape
