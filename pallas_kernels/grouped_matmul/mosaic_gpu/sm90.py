"""Grouped matmul on Hopper: tokens on M; operands of 16 bits, or of 8 with scales.

A persistent grid: each block takes tiles until there are none. One warpgroup loads the operands of the next steps, tile
after tile without a pause, two multiply. A tile belongs to one expert; where two experts meet within its rows, each
loads them and stores its own. Technique: DeepSeek-V3 (arXiv:2412.19437) 3.3 and CUTLASS's persistent grouped GEMM.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.activations import Activation
from pallas_kernels.formats import Format
from pallas_kernels.grouped_matmul.mosaic_gpu.config import (
    COMPUTE_WARPGROUPS,
    STORE_BYTES,
    WARPGROUP_ROWS,
    MosaicGpuConfig,
    block_k,
)
from pallas_kernels.grouped_matmul.mosaic_gpu.epilogue import Epilogue
from pallas_kernels.grouped_matmul.mosaic_gpu.requantize import OF_ROWS, Quantizer
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK, Pair
from pallas_kernels.grouped_matmul.mosaic_gpu.tiles import Part, Work, pieces
from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT

# Per thread of the memory and of a compute warpgroup, each with the fewest spills, as ptxas tells. Their sum over the
# three is at most 504, what a block of 384 threads is given: a warpgroup waits for more without an end.
REGISTERS, REGISTERS_IN_BLOCKS = (40, 232), (88, 208)


@functools.partial(
    jax.jit, static_argnames=("epilogue", "out_dtype", "out_format", "config", "num_programs")
)  # lowered once
def grouped_matmul_sm90(
    lhs: Shaped[Array, "M K"],
    rhs: Shaped[Array, "E N K"],
    tiles: Int32[Array, "6 max_tiles"],
    *,
    scales: Pair | None = None,
    bias: Float[Array, "E N"] | None,
    epilogue: Activation | None,
    out_dtype: Any,
    out_format: Format | None,
    config: MosaicGpuConfig,
    num_programs: int,
) -> tuple[Shaped[Array, "M N_out"], Float[Array, "N_out/128 M"] | None]:
    """`lhs [M, K]` times the expert of each row in `rhs [E, N, K]`, plus `bias [E, N]`.

    K is a multiple of 128 bytes and N of 64. Codes of 8 bits come with `scales`; of blocks they have an N, or with gate
    and up each half of it, that is a multiple of 128.

    Returns:
      `[M, N]` in `out_dtype`, or with a gated epilogue `[M, N/2]`: gate and up rows of the same features meet in one
      tile. Zero in rows of no expert. With an `out_format`, of 1x128 blocks, its codes of that, and the scales.
    """
    gated = epilogue is not None and epilogue.gated
    m, n_out = lhs.shape[0], rhs.shape[1] // (2 if gated else 1)
    if m % ALIGNMENT:  # a swizzled operand consists of whole groups of rows
        lhs = jnp.pad(lhs, ((0, -m % ALIGNMENT), (0, 0)))
    bm, bn, bk, stages = config.block_m, config.block_n, block_k(lhs.dtype), config.stages
    stored_dtype = jnp.dtype(out_dtype if out_format is None else out_format.storage)
    store_n = min(STORE_BYTES // stored_dtype.itemsize, config.warpgroup_n // (2 if gated else 1))
    operand = (plgpu.TilingTransform((8, bk)), plgpu.SwizzleTransform(128))
    # Rows of their own, so that they are cut anywhere.
    stored: tuple[Any, ...]
    stored = (plgpu.TilingTransform((1, store_n)), plgpu.SwizzleTransform(store_n * stored_dtype.itemsize))
    out_type, slots, of_groups = [jax.ShapeDtypeStruct((m, n_out), stored_dtype)], 2, list[Any]()
    if out_format is not None:
        out_type.append(jax.ShapeDtypeStruct((n_out // BLOCK, m), jnp.float32))
        of_groups = [
            plgpu.SMEM((3, COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_arrivals=1),
        ]
        slots = 1  # a tile is stored at once, long before the next one
        if store_n < BLOCK:  # the warpgroups have half of it each, and those are no swizzled rows
            store_n, stored = BLOCK, ()
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            config=config,
            num_programs=num_programs,
            epilogue=epilogue,
            out_dtype=jnp.dtype(out_dtype),
            out_format=out_format,
        ),
        out_type=out_type,
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"grouped_matmul_{jnp.dtype(lhs.dtype).itemsize * 8}bit",
        scratch_types=[
            plgpu.SMEM((stages, bm, bk), lhs.dtype, transforms=operand),
            plgpu.SMEM((stages, bn, bk), rhs.dtype, transforms=operand),
            plgpu.SMEM((COMPUTE_WARPGROUPS, slots, WARPGROUP_ROWS, store_n), stored_dtype, transforms=stored),
            plgpu.Barrier(num_arrivals=1 + len(pieces(config, gated=gated)), num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            *of_groups,
        ],
    )
    if bias is not None:
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 1), (0, 0)))  # zeros for the rows of no expert
    # Not known to the compiler, which would unroll loops of a known length, or of a multiple of one: with 8 bits there
    # are no registers for that.
    steps = np.array([rhs.shape[2] // bk], np.int32)
    out = kernel(tiles, steps, lhs, rhs, scales, bias)
    return out[0], None if out_format is None else out[1]


def _kernel(
    tiles_gmem: Any,  # [6, max_tiles] int32
    steps_gmem: Any,  # [1] int32, along K
    lhs_gmem: Any,  # [M, K]
    rhs_gmem: Any,  # [E, N, K]
    scales_gmem: Pair | None,
    bias_gmem: Any,  # [E + 1, N] f32, or None
    out_gmem: Any,  # [M, N], or [M, N/2]
    *refs: Any,  # with an out_format the scales [N/128, M]; then what is in shared memory
    config: MosaicGpuConfig,
    num_programs: int,
    epilogue: Activation | None,
    out_dtype: Any,
    out_format: Format | None,
) -> None:
    quantizer = None
    if out_format is not None:
        quantizer = Quantizer(out_format, refs[0], *refs[-3:])
        refs = refs[1:-3]
    # [stages, block_m, block_k], [stages, block_n, block_k], [2 warpgroups, slots, 64, columns], barriers [stages]
    lhs_smem, rhs_smem, out_smem, loaded, consumed = refs
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    work = Work(tiles_gmem, out_gmem.shape[1], steps_gmem[0], config, program, num_programs, epilogue)
    in_blocks = scales_gmem is not None and scales_gmem.in_blocks
    at_end = None if in_blocks else scales_gmem
    store = Epilogue(work, at_end, bias_gmem, out_gmem, out_smem, warpgroup, rhs_gmem.shape[0], out_dtype, quantizer)
    operands = _Operands(lhs_gmem, rhs_gmem, scales_gmem if in_blocks else None, lhs_smem, rhs_smem)
    lax.cond(
        warpgroup == COMPUTE_WARPGROUPS,
        functools.partial(_load, work, operands, loaded, consumed),
        functools.partial(_multiply, work, operands, loaded, consumed, store),
    )


class _Operands(NamedTuple):
    """In memory, and the steps of them that are in shared memory."""

    lhs_gmem: Any
    rhs_gmem: Any
    scales_gmem: Pair | None  # of blocks
    lhs_smem: Any
    rhs_smem: Any

    def row_scales(self, row: Any, ki: Any) -> jax.Array:
        """Those of a warpgroup's rows at a step of K."""
        assert self.scales_gmem is not None
        own = self.scales_gmem.lhs.values.at[ki, pl.ds(row, WARPGROUP_ROWS)]
        scales: jax.Array = plgpu.load(own, layout=OF_ROWS, optimized=False)
        return scales

    def weight_scale(self, expert: Any, half: int, column: Any, n_out: int, ki: Any) -> jax.Array:
        """That of the block with this column of the output, of gate or up, at a step of K."""
        assert self.scales_gmem is not None
        values = self.scales_gmem.rhs.values
        expert = jnp.maximum(expert, 0)
        if values.shape[0] > self.rhs_gmem.shape[0]:  # gate and up apart
            expert = 2 * expert + half
        else:
            column = column + half * n_out
        scale: jax.Array = values[expert, ki, column // BLOCK]
        return scale


def _registers(scales_of_blocks: Pair | None) -> tuple[int, int]:
    return REGISTERS if scales_of_blocks is None else REGISTERS_IN_BLOCKS


def _load(work: Work, operands: _Operands, loaded: Any, consumed: Any) -> None:
    """The memory warpgroup: runs ahead of the products by up to `stages` steps, also from tile to tile."""
    lhs_gmem, rhs_gmem, scales, lhs_smem, rhs_smem = operands
    plgpu.set_max_registers(_registers(scales)[0], action="decrease")
    bm, bk, stages = work.config.block_m, block_k(lhs_gmem.dtype), work.config.stages

    def load_tile(i: jax.Array, step: jax.Array) -> jax.Array:
        expert, row, _, last, column, steps = work.tile(i)
        column, needed = work.loaded_column(column), last - row

        def load_step(ki: jax.Array, step: jax.Array) -> jax.Array:
            slot = lax.rem(step, jnp.int32(stages))

            @pl.when(step >= stages)
            def _wait() -> None:
                plgpu.barrier_wait(consumed.at[slot])

            ks = pl.ds(pl.multiple_of(ki * bk, bk), bk)
            for fewer, height in itertools.pairwise((0, *_heights(bm))):

                @pl.when((needed > fewer) & (needed <= height))
                def _rows(height: int = height) -> None:
                    rows_smem = lhs_smem.at[slot, pl.ds(0, height)]
                    plgpu.copy_gmem_to_smem(lhs_gmem.at[pl.ds(row, height), ks], rows_smem, loaded.at[slot])

            for place, half, offset, size in pieces(work.config, gated=work.gated):
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


def _heights(block_m: int) -> list[int]:
    """Rows of tokens that are loaded at once, the fewest that hold what a tile needs: others are not looked at."""
    return [height for height in (16, 32, 64, 128) if height <= block_m]


def _multiply(work: Work, operands: _Operands, loaded: Any, consumed: Any, epilogue: Epilogue) -> None:
    """A compute warpgroup: half of the rows, or of the columns, of each tile."""
    in_blocks = operands.scales_gmem is not None
    plgpu.set_max_registers(_registers(operands.scales_gmem)[1], action="increase")
    config, stages = work.config, work.config.stages
    half = epilogue.warpgroup * WARPGROUP_ROWS if config.split_rows else epilogue.warpgroup * config.warpgroup_n
    rows = pl.ds(half, WARPGROUP_ROWS) if config.split_rows else slice(None)
    first_column = 0 if config.split_rows else half
    dtype = jnp.int32 if jnp.issubdtype(operands.lhs_gmem.dtype, jnp.integer) else jnp.float32

    def product(acc: Any, slot: jax.Array, begin: int, size: int) -> None:
        weights = operands.rhs_smem.at[slot, pl.ds(first_column + begin, size)]
        plgpu.wgmma(acc, operands.lhs_smem.at[slot, rows], weights.transpose((1, 0)))
        plgpu.wgmma_wait(0)

    def pass_by(step: jax.Array, steps: jax.Array) -> None:
        """Steps of a tile none of whose rows are this warpgroup's: the other one has the tensor cores alone."""

        def k_step(ki: jax.Array, carry: None) -> None:
            slot = lax.rem(step + ki, jnp.int32(stages))
            plgpu.barrier_wait(loaded.at[slot])
            plgpu.barrier_arrive(consumed.at[slot])

        lax.fori_loop(0, steps, k_step, None)

    def sum_up(step: jax.Array, steps: jax.Array) -> list[jax.Array]:
        """The sums over all of K at once."""

        def accumulate(acc: Any) -> jax.Array:
            def k_step(ki: jax.Array, carry: None) -> None:
                slot = lax.rem(step + ki, jnp.int32(stages))
                plgpu.barrier_wait(loaded.at[slot])
                product(acc, slot, 0, config.warpgroup_n)
                plgpu.barrier_arrive(consumed.at[slot])

            lax.fori_loop(0, steps, k_step, None)
            sums: jax.Array = acc[...]
            return sums

        return [pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, config.warpgroup_n), dtype))]

    def sum_up_blocks(step: jax.Array, steps: jax.Array, expert: Any, row: Any, column: Any) -> list[jax.Array]:
        """The sums of each block of K times its scales, added up in f32."""
        parts = work.parts()
        place = work.loaded_column(column) + (0 if config.split_rows else epilogue.warpgroup * work.warpgroup_n)

        first_row = row + half if config.split_rows else row

        def scales_at(ki: Any) -> tuple[jax.Array, list[jax.Array]]:
            """Of this warpgroup's rows, and of each part's weights."""
            ki = jnp.minimum(ki, work.k_steps - 1)
            own = operands.row_scales(first_row, ki)
            of_parts = [operands.weight_scale(expert, part.half, place + part.offset, work.n_out, ki) for part in parts]
            return own, of_parts

        def k_step(ki: jax.Array, carry: Any) -> Any:
            sums, (of_rows, of_parts) = carry
            slot = lax.rem(step + ki, jnp.int32(stages))
            plgpu.barrier_wait(loaded.at[slot])
            following = scales_at(ki + 1)  # on their way while this step multiplies
            added = []
            for part, total, of_part in zip(parts, sums, of_parts, strict=True):

                def multiplied(acc: Any, part: Part = part) -> jax.Array:
                    product(acc, slot, part.begin, part.size)
                    found: jax.Array = acc[...]
                    return found

                found = pl.run_scoped(multiplied, plgpu.ACC((WARPGROUP_ROWS, part.size)))
                if part is parts[-1]:
                    plgpu.barrier_arrive(consumed.at[slot])
                added.append(total + found * lax.broadcast_in_dim(of_rows * of_part, found.shape, (0,)))
            return added, following

        zeros = [
            plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, part.size), jnp.float32), plgpu.Layout.WGMMA) for part in parts
        ]
        sums, _ = lax.fori_loop(0, steps, k_step, (zeros, scales_at(0)))
        found: list[jax.Array] = sums
        return found

    def multiply_tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, stores = carry
        expert, row, first, last, column, steps = work.tile(i)
        mine = steps
        if config.split_rows:
            needed = (first < row + half + WARPGROUP_ROWS) & (last > row + half)
            mine = jnp.where(needed, steps, jnp.zeros_like(steps))
            pass_by(step, steps - mine)
        sums = sum_up_blocks(step, mine, expert, row, column) if in_blocks else sum_up(step, mine)
        return step + steps, epilogue.store_tile(sums, stores, expert, row, first, last, column)

    lax.fori_loop(0, work.num_tiles, multiply_tile, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
