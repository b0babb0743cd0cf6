"""One call of `sort_by_expert`'s kernels: what they get and give."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from pallas_kernels.implementations import Implementation

KERNELS: dict[Implementation, str] = {"mosaic_gpu": "pallas_kernels.routing.mosaic_gpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderCall:
    """What a kernel gets."""

    ids: Any  # int32 [n], of all (token, slot) pairs; outside of [0, num_experts): of no expert
    num_experts: int


class Order(NamedTuple):
    """What it gives."""

    rows: jax.Array  # int32 [n], the place of each pair
    group_starts: jax.Array  # int32 [E]
    group_sizes: jax.Array  # int32 [E]
    plan: Any = None  # of the tiles of grouped matmuls over these rows
    groups: Any = None  # int32 [2, more than E], starts and sizes, and behind them those of the rows of no expert
