"""(token, slot) pairs sorted by expert, and the tiles of both matmuls planned, in one launch or two.

Nothing is moved: a pair's place is the number of pairs that come before it, which squares of comparisons count. Of few
pairs each block looks at all; of many a first launch counts those of each expert in each chunk, and a second adds up
the counts of the chunks before its own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.grouped_matmul.mosaic_gpu.work import Plan, max_tiles
from pallas_kernels.routing.call import Order
from pallas_kernels.routing.mosaic_gpu.squares import ALONG_ROWS, COMPILER_PARAMS, SIDE, WARPGROUPS, in_turn
from pallas_kernels.routing.mosaic_gpu.table import BEFORE, PAD, Keys, Table

AT_ONCE = 2048  # pairs that each block looks at, in one launch
CHUNK, MOST_CHUNKS = WARPGROUPS * SIDE, 256  # pairs of a block; twice as many where there would be too many blocks


@functools.partial(jax.jit, static_argnames=("num_experts", "block_m"))  # traced, and lowered, once for calls alike
def sort(ids: Int32[Array, " n"], *, num_experts: int, block_m: int) -> Order:
    """The stable order by expert of all pairs, those of no expert last, and the tiles of `block_m` rows."""
    num_pairs = ids.shape[0]
    chunk = CHUNK
    while num_pairs > MOST_CHUNKS * chunk:
        chunk *= 2
    unit = SIDE if num_pairs <= AT_ONCE else chunk
    padded = num_pairs % unit > 0
    if padded:
        ids = jnp.pad(jnp.maximum(ids, -1), (0, -num_pairs % unit), constant_values=PAD)
    table, chunks = whole_sides(num_experts + 1), pl.cdiv(ids.shape[0], chunk)
    of_pairs: dict[str, Any] = {"num_experts": num_experts, "padded": padded, "chunk": chunk}
    counts = None
    if num_pairs > AT_ONCE:
        counts = _block(
            functools.partial(_count, **of_pairs),
            name="count_by_expert",
            out_type=jax.ShapeDtypeStruct((table, whole_sides(chunks)), jnp.int32),
            grid=(whole_sides(chunks),),
        )(ids)
    num_tiles = max_tiles(num_pairs, num_experts, block_m)
    rows, groups, tiles = _block(
        functools.partial(_place, **of_pairs, num_pairs=num_pairs, chunks=chunks, block_m=block_m),
        name="sort_by_expert",
        out_type=[
            jax.ShapeDtypeStruct(ids.shape, jnp.int32),
            jax.ShapeDtypeStruct((2, table), jnp.int32),
            jax.ShapeDtypeStruct((6, whole_sides(num_tiles)), jnp.int32),
        ],
        grid=(chunks + whole_sides(num_tiles) // SIDE,),
        scratch_types=[plgpu.SMEM((3, table), jnp.int32), plgpu.Barrier(num_arrivals=WARPGROUPS)],
    )(ids, counts)
    plan = Plan(tiles=tiles, num_rows=num_pairs, block_m=block_m)
    return Order(rows[:num_pairs], groups[0, :num_experts], groups[1, :num_experts], plan)


def whole_sides(size: int) -> int:
    """A size, filled up."""
    return -(-size // SIDE) * SIDE


def _block(body: Any, *, name: str, **options: Any) -> Any:
    return plgpu.kernel(
        body,
        grid_names=("program",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=COMPILER_PARAMS,
        **options,
    )


def _count(ids_gmem: Any, counts_gmem: Any, *, num_experts: int, padded: bool, chunk: int) -> None:
    """How many pairs of each expert a chunk has; none past the last chunk."""
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    keys = Keys(ids_gmem, num_experts, padded)
    begin = jnp.minimum(program * (chunk // SIDE), keys.sides)
    end = jnp.minimum(begin + chunk // SIDE, keys.sides)

    def of_experts(expert: Any) -> None:
        counts_gmem[pl.ds(expert, SIDE), program] = keys.sizes(expert, begin, end)

    in_turn(of_experts, counts_gmem.shape[0] // SIDE, warpgroup)


def _place(
    ids_gmem: Any,  # [n]
    counts_gmem: Any,  # [experts, chunks], or None
    rows_gmem: Any,  # [n]
    groups_gmem: Any,  # [2, experts], starts and sizes
    tiles_gmem: Any,  # [6, tiles]
    table_smem: Any,  # [3, experts]
    ready: Any,
    *,
    num_experts: int,
    padded: bool,
    chunk: int,
    num_pairs: int,
    chunks: int,
    block_m: int,
) -> None:
    """The first blocks place the pairs of a chunk each, the others plan tiles."""
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    keys, table = Keys(ids_gmem, num_experts, padded), Table(table_smem, ready, warpgroup)
    first = program * chunk

    @pl.when(program < chunks)
    def _rows() -> None:
        if counts_gmem is not None:
            table.add_up(counts_gmem, program)

        def place(base: Any) -> None:
            own = first + base
            places = keys.places(None if counts_gmem is None else first, own)
            if counts_gmem is not None:
                places = places + table.entries(BEFORE, keys.side(own, ALONG_ROWS))
            rows_gmem[pl.ds(own, SIDE)] = places

        in_turn(place, jnp.minimum(chunk // SIDE, keys.sides - first // SIDE), warpgroup)

    @pl.when(program >= chunks)
    def _plan() -> None:
        if counts_gmem is None:
            table.fill(keys)
        else:
            table.add_up(counts_gmem, chunks)
        number = program - chunks

        @pl.when(number == 0)
        def _groups() -> None:
            table.store_groups(groups_gmem)

        table.store_tiles(tiles_gmem, number * SIDE, num_experts=num_experts, num_pairs=num_pairs, block_m=block_m)
