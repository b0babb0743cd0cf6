"""Rows sorted by expert on Hopper: which calls the kernels serve."""

from __future__ import annotations

from pallas_kernels.grouped_matmul.mosaic_gpu.config import block_m_for
from pallas_kernels.hopper import unsupported_here
from pallas_kernels.routing.call import Order, OrderCall

__all__ = ["run", "unsupported"]

MOST_EXPERTS = 1024  # of a table in shared memory, compared all with all
MOST_PAIRS = 1 << 20


def unsupported(call: OrderCall) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: OrderCall) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    if not 0 < call.ids.size <= MOST_PAIRS:
        return f"it sorts 1 to {MOST_PAIRS} pairs, not {call.ids.size}"
    if not 0 < call.num_experts <= MOST_EXPERTS:
        return f"it knows 1 to {MOST_EXPERTS} experts, not {call.num_experts}"
    return None


def run(call: OrderCall) -> Order:
    """Serves a call that `unsupported` let pass."""
    from pallas_kernels.routing.mosaic_gpu.kernel import sort

    block_m = block_m_for(call.ids.size, call.num_experts, in_blocks=False)
    order: Order = sort(call.ids, num_experts=call.num_experts, block_m=block_m)
    return order
