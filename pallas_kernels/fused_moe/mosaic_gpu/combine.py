"""The weighted sum of each token's outputs on Hopper: which calls the kernel serves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.fused_moe.combine_call import CombineCall
from pallas_kernels.hopper import unsupported_here

__all__ = ["run", "unsupported"]

MOST_SLOTS = 32  # of a token: a thread has a piece of each output at once
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def unsupported(call: CombineCall) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: CombineCall) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    hidden, top_k = call.rows.shape[1], call.weights.shape[1]
    if 0 in call.rows.shape or not call.order.group_sizes.shape[0]:
        return "there are no rows or no experts"
    if call.rows.dtype not in DTYPES or call.dtype not in DTYPES:
        return f"it adds up bf16, f16 or f32, not {call.rows.dtype} to {call.dtype}"
    if top_k > MOST_SLOTS:
        return f"a token has at most {MOST_SLOTS} slots, not {top_k}"
    return f"H={hidden} must be at least 128" if hidden < 128 else None


def run(call: CombineCall) -> jax.Array:
    """Serves a call that `unsupported` let pass."""
    from pallas_kernels.fused_moe.mosaic_gpu.combine_kernel import combine

    order, groups = call.order, call.order.metadata.groups
    if groups is None:
        starts, sizes = order.metadata.group_starts, order.group_sizes
        groups = jnp.append(starts, starts[-1] + sizes[-1])[None]
    total: jax.Array = combine(
        call.rows, call.weights, order.rows, groups, num_experts=order.group_sizes.shape[0], dtype=call.dtype
    )
    return total
