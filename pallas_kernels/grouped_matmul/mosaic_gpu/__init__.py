"""Grouped matmul on NVIDIA Hopper."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.devices import num_cores
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_gpu import tuned
from pallas_kernels.grouped_matmul.mosaic_gpu.config import (
    MOST_TOKENS_IN_BLOCKS,
    SMEM_LIMIT,
    STEP_BYTES,
    MosaicGpuConfig,
    heuristic,
)
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK, Scales, kind, of_tokens, of_weights
from pallas_kernels.grouped_matmul.mosaic_gpu.weights import Weights
from pallas_kernels.grouped_matmul.mosaic_gpu.work import Plan, max_tiles, plan_work
from pallas_kernels.grouped_matmul.reference import quantize_rows
from pallas_kernels.hopper import unsupported_here
from pallas_kernels.quantize.tokens import quantize_tokens

__all__ = ["MosaicGpuConfig", "run", "unsupported"]

NOT_IN_KERNELS = ("gelu", "gelu_no_mul")  # they need the error function, which jax lacks there: applied in XLA
DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported(call: Call) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: Call) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    return _unsupported_arrays(call) or _unsupported_config(call)


def _unsupported_arrays(call: Call) -> str | None:
    lhs, rhs = call.lhs, call.rhs
    n, k = math.prod(rhs.shape[1:-1]), rhs.shape[-1]
    unit = 128 if call.gated else 64  # gate and up in equal parts
    if n % unit or n < 128 or not k:
        return f"N={n} must be a multiple of {unit}, at least 128"
    if isinstance(lhs, QuantizedArray) or isinstance(rhs, QuantizedArray) or call.activation_format is not None:
        return _unsupported_codes(call, n, k)
    if lhs.dtype != rhs.dtype or lhs.dtype not in DTYPES:
        return f"it multiplies bfloat16 with bfloat16 or float16 with float16, not {lhs.dtype} with {rhs.dtype}"
    unit = STEP_BYTES // 2 // lhs.dtype.itemsize
    return f"K={k} must be a multiple of {unit}" if k % unit else None


def _unsupported_codes(call: Call, n: int, k: int) -> str | None:
    """The same of quantized operands."""
    lhs = call.lhs.format if isinstance(call.lhs, QuantizedArray) else call.activation_format
    rhs = call.rhs.format if isinstance(call.rhs, QuantizedArray) else None
    if lhs is None or rhs is None:
        return "it takes quantized weights with quantized rows only: no kernel dequantizes yet"
    kinds = kind(lhs, weights=False), kind(rhs, weights=True)
    if None in kinds or lhs.code != rhs.code or (kinds[0] == "block") != (kinds[1] == "block"):
        return (
            "it multiplies fp8 with fp8 and int8 with int8, with scales of rows or whole matrices, or of 1x128 and "
            f"128x128 blocks; not {lhs} with {rhs}"
        )
    if k % (STEP_BYTES // 2):
        return f"K={k} must be a multiple of {STEP_BYTES // 2} for codes of 8 bits"
    of_half = n // 2 if call.gated or call.rhs.ndim > 3 else n
    if kinds[1] == "block" and of_half % 128:
        return f"N={of_half} must be a multiple of 128 for scales of 128x128 blocks"
    return None


def _unsupported_config(call: Call) -> str | None:
    config = call.config
    if config is None:
        return None
    if not isinstance(config, MosaicGpuConfig):
        return f"config must be a MosaicGpuConfig, not {config!r}"
    in_blocks = _in_blocks(call)
    if (size := config.smem_bytes(in_blocks=in_blocks)) > SMEM_LIMIT:
        return f"{config} takes {size} bytes of shared memory of {SMEM_LIMIT}; use fewer stages"
    if in_blocks and config.weights_on_m and config.block_m * config.block_n > MOST_TOKENS_IN_BLOCKS * 256:
        most = MOST_TOKENS_IN_BLOCKS * 256
        return (
            f"{config} needs more registers than there are: with scales of blocks block_m * block_n is at most {most}"
        )
    n = math.prod(call.rhs.shape[1:-1])
    if call.gated and config.warpgroup_n < 128:
        return f"{config} gives a warpgroup {config.warpgroup_n} columns; gated it needs 128, gate and up"
    return f"{config.block_n=} is above N={n}" if config.block_n > n else None


def run(call: Call) -> jax.Array | QuantizedArray:
    """Serves a call that `unsupported` let pass."""
    if call.out_format is not None and not quantizes(call, call.out_format):
        real = run(dataclasses.replace(call, out_format=None))
        assert isinstance(real, jax.Array)
        return quantize_tokens(real, call.out_format, "mosaic_gpu", by_reciprocal=True)
    if call.activation_format is not None:
        assert isinstance(call.lhs, jax.Array)
        codes = quantize_rows(call.lhs, call.activation_format, call.group_sizes)
        return run(dataclasses.replace(call, lhs=codes, activation_format=None))
    if call.epilogue is not None and call.epilogue.name in NOT_IN_KERNELS:
        real = run(dataclasses.replace(call, epilogue=None))
        assert isinstance(real, jax.Array)
        return call.epilogue.of_rows(real).astype(call.out_dtype)
    from pallas_kernels.grouped_matmul.mosaic_gpu.sm90 import grouped_matmuls_sm90

    num_experts = call.rhs.shape[0]
    m, n = call.lhs.shape[0], math.prod(call.rhs.shape[1:-1])
    if m == 0 or num_experts == 0:
        return jnp.zeros((m, n // 2 if call.gated else n), call.out_dtype)
    config = config_of(call)
    most = max_tiles(m, num_experts, config.block_m) * -(-n // config.block_n)
    out, out_scales = grouped_matmuls_sm90(
        *rows_of(call, config.block_m),
        (weights_of(call),),
        plan_of(call, config.block_m),
        config=config,
        num_programs=min(num_cores(), most),
    )
    return out if call.out_format is None else QuantizedArray(values=out, scales=out_scales, format=call.out_format)


def rows_of(call: Call, block_m: int) -> tuple[jax.Array, Scales | None]:
    """The rows as the kernel takes them, and the scales of codes."""
    if isinstance(call.lhs, QuantizedArray):
        return call.lhs.values, of_tokens(call.lhs, block_m)
    return call.lhs, None


def weights_of(call: Call) -> Weights:
    """The rest of a matmul as the kernel takes it."""
    rhs, bias = call.rhs, call.bias
    shape = rhs.shape[0], math.prod(rhs.shape[1:-1]), rhs.shape[-1]
    if bias is not None:
        bias = jnp.pad(bias.reshape(shape[:2]).astype(jnp.float32), ((0, 1), (0, 0)))  # zeros for rows of no expert
    return Weights(
        rhs=(rhs.values if isinstance(rhs, QuantizedArray) else rhs).reshape(shape),
        scales=of_weights(rhs) if isinstance(rhs, QuantizedArray) else None,
        bias=bias,
        epilogue=call.epilogue,
        out_dtype=call.out_dtype,
        out_format=call.out_format,
    )


def plan_of(call: Call, block_m: int) -> Plan:
    """The one that was made with the order of the rows, or a new one."""
    m, num_experts, plan = call.lhs.shape[0], call.rhs.shape[0], call.metadata.plan
    all_groups = call.group_offset is None and call.group_sizes.shape[0] == num_experts
    if plan is not None and all_groups and (plan.num_rows, plan.block_m) == (m, block_m):
        assert isinstance(plan, Plan)
        return plan
    tiles = plan_work(
        call.metadata.group_starts,
        call.group_sizes,
        num_rows=m,
        num_experts=num_experts,
        group_offset=call.group_offset,
        block_m=block_m,
    )
    return Plan(tiles=tiles, counters=jnp.zeros(tiles.shape[1:], jnp.int32), num_rows=m, block_m=block_m)


def config_of(call: Call) -> MosaicGpuConfig:
    """The one that was given, or that was measured for such a matmul, or that the heuristic takes."""
    config: MosaicGpuConfig | None = call.config or tuned.config_for(call)
    if config is not None:
        return config
    return heuristic(
        m=call.lhs.shape[0],
        num_experts=call.rhs.shape[0],
        n=math.prod(call.rhs.shape[1:-1]),
        gated=call.gated,
        in_blocks=_in_blocks(call),
    )


def _in_blocks(call: Call) -> bool:
    """Whether the rows have scales of 1x128 blocks."""
    lhs = call.lhs.format if isinstance(call.lhs, QuantizedArray) else call.activation_format
    return lhs is not None and kind(lhs, weights=False) == "block"


def quantizes(call: Call, fmt: Format) -> bool:
    """Whether the kernel makes codes of its results: in blocks that a tile has whole."""
    if 0 in (*call.lhs.shape, *call.rhs.shape):
        return False
    config, halves = config_of(call), 2 if call.gated else 1
    if config.weights_on_m and not (_in_blocks(call) and call.out_dtype.itemsize == 2):
        return False  # turned rows of f32, or beside operands without scales, are not in `smem_bytes`
    n, of_tile = math.prod(call.rhs.shape[1:-1]) // halves, config.block_n // halves
    in_kernel = call.epilogue is None or call.epilogue.name not in NOT_IN_KERNELS
    is_group = fmt.block == (1, BLOCK) and fmt.code == jnp.float8_e4m3fn and fmt.scale_dtype == np.float32
    return is_group and in_kernel and n % BLOCK == of_tile % BLOCK == 0
