"""Grouped matmuls on Hopper, tokens or weights on M; operands of 16 bits, or of 8 with scales.

A persistent grid: each block takes tiles until there are none. One warpgroup loads the operands of the next steps, tile
after tile without a pause, two multiply. A tile belongs to one expert; where two experts meet within its rows, each
loads them and stores its own. Technique: DeepSeek-V3 (arXiv:2412.19437) 3.3 and CUTLASS's persistent grouped GEMM.

Two matmuls in one launch share all that: no block is idle between them, since a tile of the second one waits for the
rows that it multiplies and not for all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels.devices import interpreting
from pallas_kernels.grouped_matmul.mosaic_gpu.config import (
    COMPUTE_WARPGROUPS,
    STEP_BYTES,
    STORE_BYTES,
    WARPGROUP_ROWS,
    MosaicGpuConfig,
    block_k,
    scales_height,
)
from pallas_kernels.grouped_matmul.mosaic_gpu.epilogue import Epilogue
from pallas_kernels.grouped_matmul.mosaic_gpu.memory import Matmul, Slots, load
from pallas_kernels.grouped_matmul.mosaic_gpu.operands import Operands
from pallas_kernels.grouped_matmul.mosaic_gpu.products import multiply
from pallas_kernels.grouped_matmul.mosaic_gpu.progress import Progress
from pallas_kernels.grouped_matmul.mosaic_gpu.requantize import Quantizer
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK, Pair, Scales
from pallas_kernels.grouped_matmul.mosaic_gpu.tiles import Work, pieces
from pallas_kernels.grouped_matmul.mosaic_gpu.weights import Weights
from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT, Plan

# Per thread of the memory and of a compute warpgroup, each with the fewest spills, as ptxas tells. Their sum over the
# three is at most 504, what a block of 384 threads is given: a warpgroup waits for more without an end.
REGISTERS, REGISTERS_IN_BLOCKS, REGISTERS_OF_ROWS_IN_BLOCKS = (40, 232), (72, 216), (88, 208)


@functools.partial(jax.jit, static_argnames=("config", "num_programs"))  # lowered once
def grouped_matmuls_sm90(
    lhs: Shaped[Array, "M K"],
    lhs_scales: Scales | None,
    weights: tuple[Weights, ...],
    plan: Plan,
    *,
    config: MosaicGpuConfig,
    num_programs: int,
) -> tuple[Shaped[Array, "M N_out"], Float[Array, "N_out/128 M"] | None]:
    """`lhs [M, K]` times the expert of each row in `rhs [E, N, K]`; of two matmuls that result times the second one's.

    K is a multiple of 64 bytes and N of 64. Codes of 8 bits come with `lhs_scales`; of blocks they have an N, or with
    gate and up each half of it, that is a multiple of 128. The rows of a second matmul are of the dtype of the first
    ones, codes with scales of blocks if those are; its N is at least `block_n`.

    Returns:
      `[M, N]` in `out_dtype`, or with a gated epilogue `[M, N/2]`: gate and up rows of the same features meet in one
      tile. Zero in rows of no expert. With an `out_format`, of 1x128 blocks, its codes of that, and the scales.
    """
    m, between = lhs.shape[0], len(weights) - 1
    if m % ALIGNMENT:  # a swizzled operand consists of whole groups of rows
        lhs = jnp.pad(lhs, ((0, -m % ALIGNMENT), (0, 0)))
    bm, bn, bk, stages = config.block_m, config.block_n, block_k(lhs.dtype), config.stages
    # Half a step is the least that K can end with: the rest of the step is zeros then.
    swizzle = STEP_BYTES // (2 if any(each.rhs.shape[2] % bk for each in weights) else 1)
    operand = (plgpu.TilingTransform((8, swizzle // lhs.dtype.itemsize)), plgpu.SwizzleTransform(swizzle))
    out_type = []
    for i, each in enumerate(weights):
        height = m if i == between else max(lhs.shape[0], bm)  # as the operands of the first one
        out_type.append(jax.ShapeDtypeStruct((m if i == between else lhs.shape[0], each.n_out), each.stored_dtype))
        if each.out_format is not None:
            out_type.append(jax.ShapeDtypeStruct((each.n_out // BLOCK, height), jnp.float32))
    quantizes = any(each.out_format is not None for each in weights)
    in_blocks = lhs_scales is not None and lhs_scales.of == "block"
    of_groups = [
        plgpu.SMEM((1 if config.split_rows else 3, COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        plgpu.Barrier(num_arrivals=1),
    ]
    stored = [_stored(each, config, 2 if between or each.out_format is None else 1) for each in weights]
    num_pieces = len(pieces(config, gated=weights[0].gated))
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, num_programs=num_programs),
        out_type=out_type,
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),  # of activations, two ulp of f32
        kernel_name=f"grouped_matmul{'s' if between else ''}_{jnp.dtype(lhs.dtype).itemsize * 8}bit",
        scratch_types=[
            plgpu.SMEM((stages, bm, bk), lhs.dtype, transforms=operand),
            plgpu.SMEM((stages, bn, bk), lhs.dtype, transforms=operand),
            # The slots of a warpgroup lie in the same place for each matmul.
            stored[0] if len(stored) == 1 else plgpu.RefUnion(*stored),
            plgpu.Barrier(num_arrivals=1 + in_blocks + num_pieces, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            *([plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS)] if between and interpreting.get() is not None else []),
            *([plgpu.SMEM((stages, scales_height(bm)), jnp.float32)] if in_blocks else []),
            *([_turned(weights, config)] if quantizes and config.weights_on_m else []),
            *(of_groups if quantizes else []),
        ],
    )
    # Not known to the compiler, which would unroll loops of a known length, or of a multiple of one: with 8 bits there
    # are no registers for that.
    steps = np.array([-(-each.rhs.shape[2] // bk) for each in weights], np.int32)
    counters = jax.new_ref(plan.counters) if between else None
    out = kernel(plan.tiles, steps, counters, lhs, lhs_scales, weights)
    return out[-1 - (weights[-1].out_format is not None)], None if weights[-1].out_format is None else out[-1]


def _turned(weights: Sequence[Weights], config: MosaicGpuConfig) -> Any:
    """Rows of what has still to be quantized."""
    (dtype,) = {each.out_dtype for each in weights if each.out_format is not None}
    width = STORE_BYTES // dtype.itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(STORE_BYTES))
    return plgpu.SMEM((2, config.chunk_m, BLOCK), dtype, transforms=transforms)


def _turned_rows(weights: Weights, config: MosaicGpuConfig) -> Any:
    """The same with weights on M: two slots of 128 bytes of a row, or one of 256."""
    dtype, width, slots = weights.stored_dtype, BLOCK, 2
    transforms: tuple[Any, ...] = ()
    if weights.out_format is None:
        width = STORE_BYTES // dtype.itemsize
        if width < WARPGROUP_ROWS:  # f32: features are turned 64 at a time
            width, slots = WARPGROUP_ROWS, 1
        else:
            transforms = (plgpu.TilingTransform((1, width)), plgpu.SwizzleTransform(STORE_BYTES))
            own = config.warpgroup_n // (2 if weights.gated else 1)
            if config.chunk_m == config.block_m and own >= 2 * width and weights.n_out % (2 * width) == 0:
                width, slots = 2 * width, 1  # few rows: more columns at once
    return plgpu.SMEM((COMPUTE_WARPGROUPS, slots, config.chunk_m, width), dtype, transforms=transforms)


def _stored(weights: Weights, config: MosaicGpuConfig, slots: int) -> Any:
    """The chunks of results on their way from registers to memory: rows of their own, so that they are cut anywhere.

    As many bytes for each warpgroup whatever the results are, so that those of two matmuls can share a place.
    """
    dtype, halves = weights.stored_dtype, 2 if weights.gated else 1
    if config.weights_on_m:
        return _turned_rows(weights, config)
    width = min(STORE_BYTES // dtype.itemsize, config.warpgroup_n // halves)
    transforms: tuple[Any, ...]
    transforms = (plgpu.TilingTransform((1, width)), plgpu.SwizzleTransform(width * dtype.itemsize))
    if weights.out_format is not None and width < BLOCK:  # the warpgroups have half of it each: no swizzled rows
        width, transforms = BLOCK, ()
    return plgpu.SMEM((COMPUTE_WARPGROUPS, slots, WARPGROUP_ROWS, width), dtype, transforms=transforms)


def _kernel(
    tiles_gmem: Any,  # [6, max_tiles] int32
    steps_gmem: Any,  # int32, along K of each matmul
    counters_gmem: Any,  # [max_tiles] int32, or None
    lhs_gmem: Any,  # [M, K]
    lhs_scales: Scales | None,
    weights: tuple[Weights, ...],
    *refs: Any,  # results [M, N_out], after each with an out_format its scales [N_out/128, M]; then shared memory
    config: MosaicGpuConfig,
    num_programs: int,
) -> None:
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    results = []
    for each in weights:
        quantized = each.out_format is not None
        results.append((refs[0], refs[1] if quantized else None))
        refs = refs[1 + quantized :]
    # [steps, block_m, block_k], [steps, block_n, block_k], [2 warpgroups, slots, rows, columns], barriers [steps]
    lhs_smem, rhs_smem, stored, loaded, consumed, *of_scales = refs
    done, scales_smem, turned_smem = None, None, None
    if len(weights) > 1 and interpreting.get() is not None:
        done, *of_scales = of_scales
    slots = Slots(loaded, consumed, config.stages, done)
    if lhs_scales is not None and lhs_scales.of == "block":
        scales_smem, *of_scales = of_scales
    if config.weights_on_m and any(each.out_format is not None for each in weights):
        turned_smem, *of_scales = of_scales
    stored = [stored] if len(weights) == 1 else list(stored)
    num_pieces = len(pieces(config, gated=weights[0].gated))
    matmuls: list[Matmul] = []
    for i, (each, (out_gmem, scales_gmem), out_smem) in enumerate(zip(weights, results, stored, strict=True)):
        earlier, after, then = None, None, None
        if matmuls:
            earlier, after = matmuls[-1].work, matmuls[-1].then
            lhs_gmem, values = results[i - 1]
            lhs_scales = None if values is None else Scales(values=values, of="block")
        work = Work(
            tiles_gmem,
            each.n_out,
            steps_gmem[i],
            config,
            program,
            num_programs,
            each.epilogue,
            num_pieces,
            earlier,
        )
        if len(matmuls) < len(weights) - 1:
            then = Progress(counters_gmem, work.n_tiles * COMPUTE_WARPGROUPS)
        scales = None
        if lhs_scales is not None:
            assert each.scales is not None
            scales = Pair(lhs_scales, each.scales)
        in_blocks = scales is not None and scales.in_blocks
        operands = Operands(lhs_gmem, each.rhs, scales if in_blocks else None, lhs_smem, rhs_smem, scales_smem)
        quantizer = None if each.out_format is None else Quantizer(each.out_format, scales_gmem, *of_scales)
        at_end = None if in_blocks else scales
        store = Epilogue(
            work=work,
            scales=at_end,
            bias_gmem=each.bias,
            out_gmem=out_gmem,
            out_smem=out_smem,
            turned_smem=turned_smem,
            warpgroup=warpgroup,
            num_experts=each.rhs.shape[0],
            out_dtype=each.out_dtype,
            quantizer=quantizer,
        )
        matmuls.append(Matmul(work, operands, store, after, then))
    in_blocks = any(matmul.operands.scales_gmem is not None for matmul in matmuls)
    of_memory, of_products = REGISTERS
    if in_blocks:
        of_memory, of_products = REGISTERS_OF_ROWS_IN_BLOCKS if config.split_rows else REGISTERS_IN_BLOCKS

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _memory() -> None:
        plgpu.set_max_registers(of_memory, action="decrease")
        load(matmuls, slots)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _products() -> None:
        plgpu.set_max_registers(of_products, action="increase")
        multiply(matmuls, slots)
