"""Grouped matmul on Hopper for 16-bit operands: tokens on M, f32 sums.

A persistent grid: each block takes tiles until there are none. One warpgroup loads the operands of the next steps, tile
after tile without a pause, two multiply. A tile belongs to one expert; where two experts meet within its rows, each
loads them and stores its own. Technique: DeepSeek-V3 (arXiv:2412.19437) 3.3 and CUTLASS's persistent grouped GEMM.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation
from pallas_kernels.grouped_matmul.mosaic_gpu.config import (
    COMPUTE_WARPGROUPS,
    STORE_BYTES,
    WARPGROUP_ROWS,
    MosaicGpuConfig,
)
from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT, EXPERT, FIRST, LAST, NUM_TILES, ROW

MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232  # per thread: 2 * 232 + 40 <= 512, the register file over 128 threads


@functools.partial(jax.jit, static_argnames=("epilogue", "out_dtype", "config", "num_programs"))  # lowered once
def grouped_matmul_bf16(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E N K"],
    tiles: Int32[Array, "5 max_tiles"],
    *,
    bias: Float[Array, "E N"] | None,
    epilogue: Activation | None,
    out_dtype: Any,
    config: MosaicGpuConfig,
    num_programs: int,
) -> Float[Array, "M N_out"]:
    """`lhs [M, K]` times the expert of each row in `rhs [E, N, K]`, plus `bias [E, N]`; K and N are multiples of 64.

    Returns:
      `[M, N]` in `out_dtype`, or with a gated epilogue `[M, N/2]`: gate and up rows of the same features meet in one
      tile. Zero in rows of no expert.
    """
    gated = epilogue is not None and epilogue.gated
    m, n_out = lhs.shape[0], rhs.shape[1] // (2 if gated else 1)
    if m % ALIGNMENT:  # a swizzled operand consists of whole groups of rows
        lhs = jnp.pad(lhs, ((0, -m % ALIGNMENT), (0, 0)))
    bm, bn, bk, stages = config.block_m, config.block_n, config.block_k, config.stages
    store_n = STORE_BYTES // jnp.dtype(out_dtype).itemsize
    operand = (plgpu.TilingTransform((8, bk)), plgpu.SwizzleTransform(128))
    stored = (plgpu.TilingTransform((1, store_n)), plgpu.SwizzleTransform(128))  # cut at any row
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, num_programs=num_programs, epilogue=epilogue),
        out_type=jax.ShapeDtypeStruct((m, n_out), out_dtype),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul_16bit",
        scratch_types=[
            plgpu.SMEM((stages, bm, bk), lhs.dtype, transforms=operand),
            plgpu.SMEM((stages, bn, bk), rhs.dtype, transforms=operand),
            plgpu.SMEM((COMPUTE_WARPGROUPS, 2, WARPGROUP_ROWS, store_n), out_dtype, transforms=stored),
            plgpu.Barrier(num_arrivals=1 + len(_pieces(config, gated=gated)), num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        ],
    )
    if bias is not None:
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 1), (0, 0)))  # zeros for the rows of no expert
    out: jax.Array = kernel(tiles, lhs, rhs, bias)
    return out


def _pieces(config: MosaicGpuConfig, *, gated: bool) -> list[tuple[int, int, int, int]]:
    """What a tile of weights consists of: `(place in the tile, 0 or 1 for gate or up, column offset, size)`.

    Of a gated tile each warpgroup has gate columns, and then the up columns that belong to them.
    """
    if not gated:
        return [(0, 0, 0, config.block_n)]
    parts = 1 if config.split_rows else COMPUTE_WARPGROUPS
    size = config.block_n // (2 * parts)
    return [(size * (2 * part + half), half, size * part, size) for part in range(parts) for half in (0, 1)]


def _kernel(
    tiles_gmem: Any,  # [5, max_tiles] int32
    lhs_gmem: Any,  # [M, K]
    rhs_gmem: Any,  # [E, N, K]
    bias_gmem: Any,  # [E + 1, N] f32, or None
    out_gmem: Any,  # [M, N], or [M, N/2]
    lhs_smem: Any,  # [stages, block_m, block_k]
    rhs_smem: Any,  # [stages, block_n, block_k]
    out_smem: Any,  # [2 warpgroups, 2 slots, 64, 128 bytes]
    loaded: Any,  # barriers [stages]
    consumed: Any,  # barriers [stages]
    *,
    config: MosaicGpuConfig,
    num_programs: int,
    epilogue: Activation | None,
) -> None:
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    k_steps = rhs_gmem.shape[2] // config.block_k
    work = _Work(tiles_gmem, out_gmem.shape[1], k_steps, config, program, num_programs, epilogue)
    store = _Epilogue(work, bias_gmem, out_gmem, out_smem, warpgroup)
    lax.cond(
        warpgroup == COMPUTE_WARPGROUPS,
        functools.partial(_load, work, lhs_gmem, rhs_gmem, lhs_smem, rhs_smem, loaded, consumed),
        functools.partial(_multiply, work, lhs_smem, rhs_smem, loaded, consumed, store),
    )


class _Work:
    """A block's tiles: `program`, `program + num_programs`, ... of all (row tile, column tile) pairs."""

    def __init__(
        self,
        tiles_gmem: Any,
        n_out: int,
        k_steps: int,
        config: MosaicGpuConfig,
        program: jax.Array,
        num_programs: int,
        epilogue: Activation | None,
    ):
        self.config, self.epilogue, self.n_out = config, epilogue, n_out
        self.gated = epilogue is not None and epilogue.gated
        halves = 2 if self.gated else 1
        self.block_n = config.block_n // halves  # columns of the output per tile
        self.warpgroup_n = config.warpgroup_n // halves  # and per warpgroup
        self._tiles_gmem, self._k_steps = tiles_gmem, k_steps
        self._program, self._num_programs = program, num_programs
        self._num_tiles, self._n_tiles = tiles_gmem[NUM_TILES, 0], pl.cdiv(n_out, self.block_n)
        self.num_tiles = (self._num_tiles * self._n_tiles - program + num_programs - 1) // num_programs

    def tile(self, i: jax.Array) -> tuple[jax.Array, ...]:
        """Expert, first row loaded, first and last row owned, first column, steps along K of this block's tile `i`."""
        index = self._program + i * self._num_programs
        ti, ni = _in_bands(index, self._num_tiles, self._n_tiles, self.config.band)
        expert, row, first, last = (self._tiles_gmem[field, ti] for field in (EXPERT, ROW, FIRST, LAST))
        steps = jnp.where(expert >= 0, jnp.int32(self._k_steps), jnp.int32(0))
        return expert, pl.multiple_of(row, ALIGNMENT), first, last, ni * self.block_n, steps

    def loaded_column(self, column: Any) -> jax.Array:
        """Where the columns of a tile begin; the last tile of a row reaches back into the one before it."""
        return jnp.minimum(column, self.n_out - self.block_n)


def _load(work: _Work, lhs_gmem: Any, rhs_gmem: Any, lhs_smem: Any, rhs_smem: Any, loaded: Any, consumed: Any) -> None:
    """The memory warpgroup: runs ahead of the products by up to `stages` steps, also from tile to tile."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    bm, bk, stages = work.config.block_m, work.config.block_k, work.config.stages

    def load_tile(i: jax.Array, step: jax.Array) -> jax.Array:
        expert, row, _, _, column, steps = work.tile(i)
        column = work.loaded_column(column)

        def load_step(ki: jax.Array, step: jax.Array) -> jax.Array:
            slot = lax.rem(step, jnp.int32(stages))

            @pl.when(step >= stages)
            def _wait() -> None:
                plgpu.barrier_wait(consumed.at[slot])

            ks = pl.ds(pl.multiple_of(ki * bk, bk), bk)
            plgpu.copy_gmem_to_smem(lhs_gmem.at[pl.ds(row, bm), ks], lhs_smem.at[slot], loaded.at[slot])
            for place, half, offset, size in _pieces(work.config, gated=work.gated):
                features = pl.ds(pl.multiple_of(column + (half * work.n_out + offset), 8), size)
                piece_smem = rhs_smem.at[slot, pl.ds(place, size)]
                plgpu.copy_gmem_to_smem(rhs_gmem.at[expert, features, ks], piece_smem, loaded.at[slot])
            return step + 1

        end: jax.Array = lax.fori_loop(0, steps, load_step, step)
        return end

    total = lax.fori_loop(0, work.num_tiles, load_tile, jnp.int32(0))

    def drain(step: jax.Array, carry: None) -> None:
        plgpu.barrier_wait(consumed.at[lax.rem(step, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


def _multiply(work: _Work, lhs_smem: Any, rhs_smem: Any, loaded: Any, consumed: Any, epilogue: _Epilogue) -> None:
    """A compute warpgroup: half of the rows, or of the columns, of each tile."""
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    config, stages = work.config, work.config.stages
    half = epilogue.warpgroup * WARPGROUP_ROWS if config.split_rows else epilogue.warpgroup * config.warpgroup_n
    rows = pl.ds(half, WARPGROUP_ROWS) if config.split_rows else slice(None)
    columns = slice(None) if config.split_rows else pl.ds(half, config.warpgroup_n)

    def multiply_tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, stores = carry
        expert, row, first, last, column, steps = work.tile(i)

        def accumulate(acc: Any) -> jax.Array:
            def k_step(ki: jax.Array, carry: None) -> None:
                slot = lax.rem(step + ki, jnp.int32(stages))
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.wgmma(acc, lhs_smem.at[slot, rows], rhs_smem.at[slot, columns].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[slot])

            lax.fori_loop(0, steps, k_step, None)
            sums: jax.Array = acc[...]
            return sums

        sums = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, config.warpgroup_n)))
        return step + steps, epilogue.store_tile(sums, stores, expert, row, first, last, column)

    lax.fori_loop(0, work.num_tiles, multiply_tile, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _Epilogue(NamedTuple):
    """Registers -> SMEM -> HBM in chunks of columns, only the rows that a tile owns."""

    work: _Work
    bias_gmem: Any
    out_gmem: Any
    out_smem: Any
    warpgroup: jax.Array

    def store_tile(
        self, sums: jax.Array, stores: jax.Array, expert: Any, row: Any, first: Any, last: Any, column: Any
    ) -> jax.Array:
        """Stores what this warpgroup has of a tile; `stores` counts its chunks, which take two slots in turn."""
        size, wn = self.out_smem.shape[-1], self.work.warpgroup_n
        loaded_column = self.work.loaded_column(column)
        if self.work.config.split_rows:
            row = row + self.warpgroup * WARPGROUP_ROWS
        else:
            loaded_column = loaded_column + self.warpgroup * wn
        begin = jnp.clip(first - row, 0, WARPGROUP_ROWS)
        count = jnp.clip(last - row, 0, WARPGROUP_ROWS) - begin
        for offset in range(0, wn, size):
            place = loaded_column + offset
            mine = (count > 0) & (place >= column)

            @pl.when(mine)
            def _store(offset: int = offset, place: Any = place, stores: jax.Array = stores) -> None:
                part = self.out_smem.at[self.warpgroup, lax.rem(stores, jnp.int32(2))]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                part[...] = self._finish(sums, expert, place, offset, size)
                plgpu.commit_smem()
                _store_rows(part, self.out_gmem, row, begin, count, pl.multiple_of(place, size))

            stores = stores + mine.astype(jnp.int32)
        return stores

    def _finish(self, sums: jax.Array, expert: Any, place: Any, offset: int, size: int) -> jax.Array:
        """The output's columns `[place, place + size)`, which lie at `offset` in this warpgroup's sums."""

        def rounded(half: int) -> jax.Array:
            begin = half * self.work.warpgroup_n + offset
            part = sums[:, begin : begin + size]
            if self.bias_gmem is not None:
                features = pl.ds(pl.multiple_of(half * self.work.n_out + place, 8), size)
                layout = plgpu.Layout.WGMMA.reduce(0)
                biased = jnp.where(expert >= 0, expert, self.bias_gmem.shape[0] - 1)
                bias = plgpu.load(self.bias_gmem.at[biased, features], layout=layout, optimized=False)
                part = part + lax.broadcast_in_dim(bias, part.shape, (1,))
            return part.astype(self.out_gmem.dtype)

        activation = self.work.epilogue
        if activation is None:
            return rounded(0)
        return activation(*map(rounded, range(2 if self.work.gated else 1))).astype(self.out_gmem.dtype)


def _in_bands(index: jax.Array, num_tiles: jax.Array, n_tiles: int, band: int) -> tuple[jax.Array, jax.Array]:
    """The (row tile, column tile) of a linear index: down a band of row tiles, then to the next column, and back."""
    number = index // (band * n_tiles)
    within = index - number * (band * n_tiles)
    height = jnp.minimum(num_tiles - number * band, band)
    ni = within // height
    turned = jnp.where(lax.rem(number, jnp.int32(2)) == 1, n_tiles - 1 - ni, ni)
    return number * band + within - ni * height, turned


def _store_rows(src_smem: Any, out_gmem: Any, row: Any, begin: Any, count: Any, column: Any) -> None:
    """Stores the rows `[begin, begin + count)` of a chunk whose row 0 is `row` of the output.

    A copy has a static height, so a part of the rows goes in powers of two.
    """
    height, width = src_smem.shape

    def store(offset: Any, size: int) -> None:
        target = out_gmem.at[pl.ds(row + offset, size), pl.ds(column, width)]
        plgpu.copy_smem_to_gmem(src_smem.at[pl.ds(offset, size)], target, commit_group=False)

    @pl.when(count == height)
    def _whole() -> None:
        store(0, height)

    @pl.when(count < height)
    def _part() -> None:
        offset, size = begin, height // 2
        while size:
            pl.when((count & size) != 0)(functools.partial(store, offset, size))
            offset, size = offset + (count & size), size // 2

    plgpu.commit_smem_to_gmem_group()
