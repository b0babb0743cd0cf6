"""What a launch is given of each matmul, but for its rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pallas_kernels.activations import Activation
from pallas_kernels.formats import Format
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import Scales

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any  # in a kernel, references


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """One matmul but for its rows: what they are multiplied with, and what becomes of the sums."""

    rhs: Leaf  # [E, N, K]
    scales: Scales | None = None
    bias: Leaf | None = None  # f32 [E + 1, N], zeros for the rows of no expert
    epilogue: Activation | None = dataclasses.field(default=None, metadata={"static": True})
    out_dtype: np.dtype[Any] = dataclasses.field(metadata={"static": True})
    out_format: Format | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def gated(self) -> bool:
        """Whether gate and up meet in a tile."""
        return self.epilogue is not None and self.epilogue.gated

    @property
    def n_out(self) -> int:
        """Columns of the result."""
        n: int = self.rhs.shape[1]
        return n // 2 if self.gated else n

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of the result, or of its codes."""
        return np.dtype(self.out_dtype if self.out_format is None else self.out_format.storage)
