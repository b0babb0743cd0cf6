"""Which side of a warpgroup's sums is tokens, and which is features: rows of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu.config import WARPGROUP_ROWS, MosaicGpuConfig

OF_ROWS, OF_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Sides(NamedTuple):
    """Tokens along the rows of sums, and features along the columns, or the other way around."""

    tokens: int  # dimension of sums
    num_tokens: int  # of a warpgroup's tile
    of_tokens: Any  # layout of one number for each token
    of_features: Any

    @property
    def features(self) -> int:
        """Dimension of sums."""
        return 1 - self.tokens

    def shape(self, num_features: int) -> tuple[int, int]:
        """Of the sums of so many features."""
        return (num_features, self.num_tokens) if self.tokens else (self.num_tokens, num_features)

    def times(self, sums: jax.Array, scales: Any, dimension: int) -> jax.Array:
        """Sums with a scale for each token or feature, or one for all."""
        if scales.ndim:
            scales = lax.broadcast_in_dim(scales, sums.shape, (dimension,))
        found: jax.Array = sums * scales
        return found

    def part(self, sums: Sequence[jax.Array], begin: int, size: int) -> jax.Array:
        """Features of sums that lie side by side in parts of one width."""
        width = sums[0].shape[self.features]
        within, part = begin % width, sums[begin // width]
        found: jax.Array = part[within : within + size] if self.tokens else part[:, within : within + size]
        return found


def sides(config: MosaicGpuConfig) -> Sides:
    """Those of a warpgroup's tiles."""
    if config.weights_on_m:
        return Sides(1, config.block_m, OF_COLUMNS, OF_ROWS)
    return Sides(0, WARPGROUP_ROWS, OF_ROWS, OF_COLUMNS)
