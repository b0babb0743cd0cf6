"""Which tiles there are: planned once for each block height, from the sizes of the groups."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.routing.groups import row_ranges, running_sum

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any  # jax.tree.map may put a ShapeDtypeStruct, a sharding or a spec here

ALIGNMENT = 8  # rows: where a tile of a swizzled operand can begin
EXPERT, ROW, FIRST, LAST, IS_EXPERT, NUM_TILES = range(6)  # fields of a plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The tiles of all groups: made where rows are sorted, for all matmuls over them."""

    tiles: Leaf  # int32 [6, at least max_tiles], as `plan_work` returns them
    counters: Leaf  # int32 [as many], zeros: of a launch that counts what it has finished
    num_rows: int = dataclasses.field(metadata={"static": True})
    block_m: int = dataclasses.field(metadata={"static": True})


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
    rows from ROW on and owns `[FIRST, LAST)` of them: the others belong to its neighbours. Where there are so many
    rows, it loads none past the last.

    Returns:
      int32 `[6, max_tiles]`, one field a row; NUM_TILES is the same in each column, and columns past it mean nothing.
      One array of one reduction over the experts, since each array and each step is a launch of its own on a GPU.
      IS_EXPERT is 1 or 0: how often a tile takes its steps along K. So all matmuls over the same rows share a plan.
    """
    starts, ends = row_ranges(group_starts, group_sizes, num_rows, num_experts, group_offset)
    experts = jnp.arange(-1, num_experts + 1, dtype=jnp.int32).at[-1].set(-1)
    aligned = starts // ALIGNMENT * ALIGNMENT
    counts = jnp.where(ends > starts, (ends - aligned + block_m - 1) // block_m, jnp.zeros_like(ends))
    after = running_sum(counts)  # tiles up to and with each range
    starts, ends, experts, aligned, counts, after = (x[None] for x in (starts, ends, experts, aligned, counts, after))
    index = lax.iota(jnp.int32, max_tiles(num_rows, num_experts, block_m))[:, None]
    before = after - counts
    row = aligned + (index - before) * block_m
    most = max(-(-num_rows // ALIGNMENT) * ALIGNMENT - block_m, 0)
    fields = {
        EXPERT: experts,
        ROW: jnp.minimum(row, most),
        FIRST: jnp.maximum(row, starts),
        LAST: jnp.minimum(row + block_m, ends),
        IS_EXPERT: (experts >= 0).astype(jnp.int32),
    }
    mine = (index >= before) & (index < after)
    field = lax.broadcasted_iota(jnp.int32, (6, *row.shape), 0)
    value = jnp.broadcast_to(counts[None], field.shape)  # NUM_TILES is the sum of them
    for i, each in fields.items():
        value = jnp.where(field == i, jnp.where(mine, each, jnp.zeros_like(row))[None], value)
    return jnp.sum(value, axis=2, dtype=jnp.int32)


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that any sizes of groups can ask for: each range of rows may begin and end within a tile."""
    ranges = min(num_experts + 2, num_rows)
    return (num_rows + ranges * (block_m + ALIGNMENT - 2)) // block_m
