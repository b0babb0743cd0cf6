"""Which tiles there are: planned in XLA, once for each block height, from the sizes of the groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.routing.groups import row_ranges, running_sum

ALIGNMENT = 8  # rows: where a tile of a swizzled operand can begin


EXPERT, ROW, FIRST, LAST, NUM_TILES = range(5)  # fields of a plan


def plan_work(
    group_starts: jax.Array,
    group_sizes: jax.Array,
    *,
    num_rows: int,
    num_experts: int,
    group_offset: jax.Array | int | None,
    block_m: int,
) -> jax.Array:
    """The tiles of the groups `[group_offset, group_offset + num_experts)`, and of the rows before and after them.

    Experts come in order; the rows of no expert are tiles of expert -1, to be filled with zeros. A tile loads `block_m`
    rows from ROW on and owns `[FIRST, LAST)` of them: the others belong to its neighbours.

    Returns:
      int32 `[5, max_tiles]`, one field a row; NUM_TILES is the same in each column, and columns past it mean nothing.
      One array, since each array is a launch of its own on a GPU.
    """
    starts, ends = row_ranges(group_starts, group_sizes, num_rows, num_experts, group_offset)
    experts = jnp.arange(-1, num_experts + 1, dtype=jnp.int32).at[-1].set(-1)
    aligned = starts // ALIGNMENT * ALIGNMENT
    counts = jnp.where(ends > starts, (ends - aligned + block_m - 1) // block_m, jnp.zeros_like(ends))
    after = running_sum(counts)  # tiles up to and with each range
    index = lax.iota(jnp.int32, max_tiles(num_rows, num_experts, block_m))
    owner = jnp.sum(after[None] <= index[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, num_experts + 1)
    row = aligned[owner] + (index - (after - counts)[owner]) * block_m
    first, last = jnp.maximum(row, starts[owner]), jnp.minimum(row + block_m, ends[owner])
    return jnp.stack([experts[owner], row, first, last, jnp.broadcast_to(jnp.minimum(after[-1], row.size), row.shape)])


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that any sizes of groups can ask for: each range of rows may begin and end within a tile."""
    ranges = min(num_experts + 2, num_rows)
    return (num_rows + ranges * (block_m + ALIGNMENT - 2)) // block_m
