"""Pairs sorted and tokens sent in one launch on Hopper: which calls the kernel serves."""

from __future__ import annotations

from pallas_kernels.fused_moe.prepare_call import PrepareCall, Sent
from pallas_kernels.grouped_matmul.mosaic_gpu.config import block_m_for
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import kind
from pallas_kernels.hopper import unsupported_here
from pallas_kernels.quantize.mosaic_gpu import tokens
from pallas_kernels.quantize.tokens import TokensCall
from pallas_kernels.routing import mosaic_gpu as routing
from pallas_kernels.routing.call import OrderCall

__all__ = ["run", "unsupported"]

MOST_SLOTS = 64  # of a token: a block counts all that come before it with one side of a square
UNIT = 4 * tokens.GROUP  # of K: each warp has whole groups
MOST_ELEMENTS = 7168  # of a token: what the registers of one of four warpgroups can hold


def unsupported(call: PrepareCall) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: PrepareCall) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    of_pairs = OrderCall(ids=call.ids, num_experts=call.num_experts)
    of_tokens = TokensCall(x=call.x, format=call.format, places=call.ids)
    reason = routing.unsupported_anywhere(of_pairs) or tokens.unsupported_anywhere(of_tokens)
    if reason is not None:
        return reason
    k, top_k, fmt = call.x.shape[1], call.ids.shape[1], call.format
    if top_k > MOST_SLOTS:
        return f"a token has at most {MOST_SLOTS} slots, not {top_k}"
    if k > MOST_ELEMENTS:
        return f"a token has at most {MOST_ELEMENTS} elements, not {k}"
    if fmt is not None and not fmt.whole_matrix and k % UNIT:
        return f"K={k} must be a multiple of {UNIT}"
    return None


def run(call: PrepareCall) -> Sent:
    """Serves a call that `unsupported` let pass."""
    from pallas_kernels.fused_moe.mosaic_gpu.prepare import sort_and_send

    fmt = call.format
    in_blocks = fmt is not None and kind(fmt, weights=False) == "block"
    factor, whole = tokens.whole_matrix_scale(call.x, fmt)
    values, scales, order = sort_and_send(
        call.x,
        call.ids,
        factor,
        fmt=fmt,
        num_experts=call.num_experts,
        block_m=block_m_for(call.ids.size, call.num_experts, in_blocks=in_blocks),
    )
    return Sent(tokens.rows_of(values, scales, whole, fmt), order)
