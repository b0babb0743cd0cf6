"""One call of the kernel that adds up the outputs of each token: what it gets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from pallas_kernels.implementations import Implementation, choose

if TYPE_CHECKING:
    from pallas_kernels.routing import ExpertOrder

KERNELS: dict[Implementation, str] = {"mosaic_gpu": "pallas_kernels.fused_moe.mosaic_gpu.combine"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineCall:
    """What a kernel gets."""

    rows: Any  # [M, H]
    weights: Any  # f32 [T, top_k]
    order: ExpertOrder
    dtype: np.dtype[Any]  # of the sums


def kernel_for(call: CombineCall, implementation: Implementation | None) -> Any:
    """The device's own, unless another implementation was asked for; None where XLA serves."""
    if implementation not in (None, *KERNELS):
        return None
    return choose("combine", None, KERNELS, call, warn=False)
