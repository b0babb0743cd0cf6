"""Grouped matmul on TPU: f32 sums of bf16 operands, weights `[N, K]` of each expert as they are stored.

The grid goes over column tiles, visits (a row block and an expert) and steps along K. Consecutive visits of one expert
find its weights in VMEM where one step covers K; consecutive visits of one row block find what the others stored.
Edges need no padding: copies from and to HBM stop at the array's end, and what lies past it meets no valid result.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.mosaic_tpu.config import MosaicTpuConfig
from pallas_kernels.grouped_matmul.mosaic_tpu.schedule import Schedule


def grouped_matmul_bf16(
    lhs: jax.Array, rhs: jax.Array, schedule: Schedule, *, out_dtype: Any, config: MosaicTpuConfig, vmem_limit: int
) -> jax.Array:
    """`lhs [M, K]` times the expert of each row in `rhs [E, N, K]`; M, N and E at least 1, K a multiple of 128.

    Returns:
      `[M, N]` in `out_dtype`, zero in rows of no expert.
    """
    (m, k), (_, n, _) = lhs.shape, rhs.shape
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    n_tiles, k_steps = pl.cdiv(n, bn), pl.cdiv(k, bk)
    *visits, num_visits = schedule

    # A visit that multiplies nothing stays at the last step of the visit before it, so that nothing is loaded.
    def step(vi: Any, ki: Any, multiplies: Any) -> Any:
        return jnp.where(multiplies[vi] != 0, ki, k_steps - 1)

    def lhs_index(ni: Any, vi: Any, ki: Any, experts: Any, lhs_blocks: Any, multiplies: Any, *_: Any) -> Any:
        return lhs_blocks[vi], step(vi, ki, multiplies)

    def rhs_index(ni: Any, vi: Any, ki: Any, experts: Any, lhs_blocks: Any, multiplies: Any, *_: Any) -> Any:
        return experts[vi], ni, step(vi, ki, multiplies)

    def out_index(
        ni: Any, vi: Any, ki: Any, experts: Any, lhs_blocks: Any, multiplies: Any, out_blocks: Any, *_: Any
    ) -> Any:
        return out_blocks[vi], ni

    read = n_tiles * lhs.size * lhs.dtype.itemsize + rhs.size * rhs.dtype.itemsize
    written = m * n * jnp.dtype(out_dtype).itemsize
    call = pl.pallas_call(
        functools.partial(_kernel, k=k),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(n_tiles, num_visits, k_steps),
            in_specs=[pl.BlockSpec((bm, bk), lhs_index), pl.BlockSpec((None, bn, bk), rhs_index)],
            out_specs=pl.BlockSpec((bm, bn), out_index),
            scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)] if k_steps > 1 else [],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(flops=2 * m * n * k, bytes_accessed=read + written, transcendentals=0),
        name=f"grouped_matmul_{m}x{k}x{n}_tiles_{bm}x{bk}x{bn}",
    )
    out: jax.Array = call(*visits, lhs, rhs)
    return out


def _kernel(
    experts_smem: Any,  # [max_visits] int32, for the index maps only
    lhs_blocks_smem: Any,  # [max_visits] int32, for the index maps only
    multiplies_smem: Any,  # [max_visits] int32
    out_blocks_smem: Any,  # [max_visits] int32
    firsts_smem: Any,  # [max_visits] int32
    lasts_smem: Any,  # [max_visits] int32
    lhs_vmem: Any,  # [block_m, block_k]
    rhs_vmem: Any,  # [block_n, block_k]
    out_vmem: Any,  # [block_m, block_n]
    *acc_vmem: Any,  # [block_m, block_n] f32, where there are several steps along K
    k: int,
) -> None:
    bm, bk = lhs_vmem.shape
    k_steps = pl.cdiv(k, bk)
    tail = k - (k_steps - 1) * bk  # of K in the last step: what the block holds past it was never loaded

    # 1. work: planned once outside
    vi, ki = pl.program_id(1), pl.program_id(2)
    multiplies, is_last = multiplies_smem[vi] != 0, ki == k_steps - 1

    # 2. main loop: steps along K add up in VMEM
    def product(width: int) -> jax.Array:
        return lax.dot_general(
            lhs_vmem[:, :width],
            rhs_vmem[:, :width],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    if acc_vmem:

        @pl.when(ki == 0)
        def _start() -> None:
            acc_vmem[0][...] = jnp.zeros_like(acc_vmem[0])

        @pl.when(multiplies & jnp.logical_not(is_last))
        def _accumulate() -> None:
            acc_vmem[0][...] += product(bk)

    # 3. epilogue: the rows that this visit owns; the block's other rows were or will be stored by their owners
    def store(sums: jax.Array) -> None:
        rows = out_blocks_smem[vi] * bm + lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        mine = (rows >= firsts_smem[vi]) & (rows < lasts_smem[vi])
        out_vmem[...] = jnp.where(mine, sums, out_vmem[...].astype(jnp.float32)).astype(out_vmem.dtype)

    @pl.when(is_last & multiplies)
    def _store() -> None:
        store(acc_vmem[0][...] + product(tail) if acc_vmem else product(tail))

    @pl.when(is_last & jnp.logical_not(multiplies))
    def _clear() -> None:
        store(jnp.zeros(out_vmem.shape, jnp.float32))
