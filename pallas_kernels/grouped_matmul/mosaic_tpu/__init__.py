"""Grouped matmul on TPU."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantizedArray
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_tpu.config import LANES, MosaicTpuConfig, heuristic
from pallas_kernels.grouped_matmul.mosaic_tpu.schedule import plan

__all__ = ["MosaicTpuConfig", "run", "unsupported"]

OUT_DTYPES = (jnp.bfloat16, jnp.float32)
INTERPRETED_VMEM_BYTES = 2**26  # where a CPU stands in for the device


def unsupported(call: Call) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or _unsupported_config(call)


def unsupported_anywhere(call: Call) -> str | None:
    """Why it cannot serve a call on any TPU, or None."""
    if isinstance(call.lhs, QuantizedArray) or isinstance(call.rhs, QuantizedArray):
        return "it has no kernel for quantized operands yet"
    for name in ("activation_format", "out_format", "bias"):
        if getattr(call, name) is not None:
            return f"it does not take {name} yet"
    return _unsupported_arrays(call)


def _unsupported_arrays(call: Call) -> str | None:
    lhs, rhs = call.lhs, call.rhs
    if not lhs.dtype == rhs.dtype == jnp.bfloat16:
        return f"it multiplies bfloat16 with bfloat16, not {lhs.dtype} with {rhs.dtype}"
    if call.out_dtype not in OUT_DTYPES:
        return f"out_dtype={call.out_dtype} must be bfloat16 or float32"
    k = rhs.shape[-1]
    return f"{k=} must be a multiple of {LANES}, the lanes of a register" if k % LANES or not k else None


def _unsupported_config(call: Call) -> str | None:
    config = call.config
    if config is None:
        return None
    if not isinstance(config, MosaicTpuConfig):
        return f"config must be a MosaicTpuConfig, not {config!r}"
    needed, limit = config.vmem_bytes(call.rhs.shape[-1], out_itemsize=call.out_dtype.itemsize), vmem_limit()
    return f"{config} takes {needed} bytes of VMEM of {limit}; use smaller blocks" if needed > limit else None


def run(call: Call) -> jax.Array:
    """Serves a call that `unsupported` let pass; an epilogue is applied in XLA."""
    if call.epilogue is not None:
        return call.epilogue.of_rows(run(dataclasses.replace(call, epilogue=None))).astype(call.out_dtype)
    from pallas_kernels.grouped_matmul.mosaic_tpu.kernel import grouped_matmul_bf16

    lhs, rhs = call.lhs, call.rhs
    assert isinstance(lhs, jax.Array)
    assert isinstance(rhs, jax.Array)
    m, num_experts = lhs.shape[0], rhs.shape[0]
    n, k = math.prod(rhs.shape[1:-1]), rhs.shape[-1]
    if 0 in (m, num_experts, n):
        return jnp.zeros((m, n), call.out_dtype)
    limit = vmem_limit()
    config = call.config or heuristic(
        m=m, num_experts=num_experts, n=n, k=k, vmem_limit=limit, out_itemsize=call.out_dtype.itemsize
    )
    schedule = plan(
        call.metadata.group_starts,
        call.group_sizes,
        num_rows=m,
        num_experts=num_experts,
        group_offset=call.group_offset,
        block_m=config.block_m,
    )
    return grouped_matmul_bf16(
        lhs, rhs.reshape(num_experts, n, k), schedule, out_dtype=call.out_dtype, config=config, vmem_limit=limit
    )


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may take on the device that calls are traced for."""
    from jax.experimental.pallas import tpu as pltpu

    capacity: int = pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else INTERPRETED_VMEM_BYTES
    return capacity // 8 * 7  # the rest is the compiler's
