"""One call of the kernel that sorts pairs by expert and sends tokens to their rows at once: what it gets and gives."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.fused_moe.taken import taken
from pallas_kernels.grouped_matmul.product import no_gradient
from pallas_kernels.implementations import Implementation, choose
from pallas_kernels.routing import ExpertOrder
from pallas_kernels.routing.call import Order
from pallas_kernels.routing.groups import expert_order

KERNELS: dict[Implementation, str] = {"mosaic_gpu": "pallas_kernels.fused_moe.mosaic_gpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareCall:
    """What a kernel gets."""

    x: Any  # [T, K]
    ids: Any  # int32 [T, top_k]; outside of [0, num_experts): of no expert
    num_experts: int
    format: Format | None


class Sent(NamedTuple):
    """What it gives."""

    rows: jax.Array | QuantizedArray  # [T * top_k, K]
    order: Order


def sort_and_send(
    x: Float[Array, "T K"],
    ids: Int32[Array, "T top_k"],
    num_experts: int,
    fmt: Format | None,
    implementation: Implementation | None,
) -> tuple[jax.Array | QuantizedArray, ExpertOrder] | None:
    """The rows of all pairs and their order, by the device's own kernel; None where only a sort by itself can serve.

    Args:
      x: Tokens; without a format their gradient is that of `take_tokens`.
      ids: An id outside of `[0, num_experts)` has no expert.
      num_experts: E.
      fmt: None: tokens are copied.
      implementation: Another than the device's own gives None.
    """
    if implementation not in (None, *KERNELS):
        return None
    kernel: Any = choose(
        "prepare", None, KERNELS, PrepareCall(x=x, ids=ids, num_experts=num_experts, format=fmt), warn=False
    )
    if kernel is None:
        return None
    tokens = lax.stop_gradient(x) if fmt is None else no_gradient(x)
    sent: Sent = kernel.run(PrepareCall(x=tokens, ids=ids, num_experts=num_experts, format=fmt))
    order = expert_order(ids, num_experts, sent.order)
    return (taken(x, sent.rows, order) if fmt is None else sent.rows), order
