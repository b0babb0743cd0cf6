"""Grouped matmul on NVIDIA Hopper."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.devices import num_cores
from pallas_kernels.formats import QuantizedArray
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_gpu.config import SMEM_LIMIT, MosaicGpuConfig, heuristic
from pallas_kernels.grouped_matmul.mosaic_gpu.work import max_tiles, plan_work
from pallas_kernels.hopper import unsupported_here

__all__ = ["MosaicGpuConfig", "run", "unsupported"]

NOT_IN_KERNELS = ("gelu", "gelu_no_mul")  # they need the error function, which jax lacks there: applied in XLA
DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported(call: Call) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: Call) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    if isinstance(call.lhs, QuantizedArray) or isinstance(call.rhs, QuantizedArray):
        return "there is no kernel for quantized operands yet"
    for name in ("activation_format", "out_format"):
        if getattr(call, name) is not None:
            return f"it does not take {name} yet"
    return _unsupported_arrays(call) or _unsupported_config(call)


def _unsupported_arrays(call: Call) -> str | None:
    lhs, rhs = call.lhs, call.rhs
    if lhs.dtype != rhs.dtype or lhs.dtype not in DTYPES:
        return f"it multiplies bfloat16 with bfloat16 or float16 with float16, not {lhs.dtype} with {rhs.dtype}"
    n, k = math.prod(rhs.shape[1:-1]), rhs.shape[-1]
    unit = 128 if call.gated else 64  # gate and up in equal parts
    if n % unit or n < 128 or k % 64 or not k:
        return f"N={n} must be a multiple of {unit}, at least 128, and K={k} one of 64"
    return None


def _unsupported_config(call: Call) -> str | None:
    config = call.config
    if config is None:
        return None
    if not isinstance(config, MosaicGpuConfig):
        return f"config must be a MosaicGpuConfig, not {config!r}"
    if config.smem_bytes() > SMEM_LIMIT:
        return f"{config} takes {config.smem_bytes()} bytes of shared memory of {SMEM_LIMIT}; use fewer stages"
    n = math.prod(call.rhs.shape[1:-1])
    if call.gated and config.warpgroup_n < 128:
        return f"{config} gives a warpgroup {config.warpgroup_n} columns; gated it needs 128, gate and up"
    return f"{config.block_n=} is above N={n}" if config.block_n > n else None


def run(call: Call) -> jax.Array:
    """Serves a call that `unsupported` let pass."""
    if call.epilogue is not None and call.epilogue.name in NOT_IN_KERNELS:
        return call.epilogue.of_rows(run(dataclasses.replace(call, epilogue=None))).astype(call.out_dtype)
    from pallas_kernels.grouped_matmul.mosaic_gpu.sm90_bf16 import grouped_matmul_bf16

    lhs, rhs = call.lhs, call.rhs
    assert isinstance(lhs, jax.Array)
    assert isinstance(rhs, jax.Array)
    num_experts, k = rhs.shape[0], rhs.shape[-1]
    rhs = rhs.reshape(num_experts, -1, k)
    (m, _), n = lhs.shape, rhs.shape[1]
    if m == 0 or num_experts == 0:
        return jnp.zeros((m, n // 2 if call.gated else n), call.out_dtype)
    config = call.config or heuristic(m=m, num_experts=num_experts, n=n, gated=call.gated)
    tiles = plan_work(
        call.metadata.group_starts,
        call.group_sizes,
        num_rows=m,
        num_experts=num_experts,
        group_offset=call.group_offset,
        block_m=config.block_m,
    )
    most = max_tiles(m, num_experts, config.block_m) * -(-n // config.block_n)
    out: jax.Array = grouped_matmul_bf16(
        lhs,
        rhs,
        tiles,
        bias=None if call.bias is None else call.bias.reshape(num_experts, n),
        epilogue=call.epilogue,
        out_dtype=call.out_dtype,
        config=config,
        num_programs=min(num_cores(), most),
    )
    return out
