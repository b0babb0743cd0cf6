"""Which row blocks each expert visits: planned in XLA, once for each block height, from the sizes of the groups."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.routing.groups import row_ranges


class Schedule(NamedTuple):
    """Visits of row blocks in order of rows; a visit owns the rows `[first, last)`, and every row has one owner.

    Visits of one row block follow each other, so that it stays in VMEM until all its rows are there. The rows of no
    expert are visited too, to become zero; such a visit names the operands of the one before it: nothing is loaded.
    """

    experts: jax.Array  # [max_visits] int32, place in rhs; entries past `num_visits` have no meaning, here and below
    lhs_blocks: jax.Array  # [max_visits] int32, row block to load
    multiplies: jax.Array  # [max_visits] int32, 0 where the rows become zero
    out_blocks: jax.Array  # [max_visits] int32, row block to store
    firsts: jax.Array  # [max_visits] int32
    lasts: jax.Array  # [max_visits] int32
    num_visits: jax.Array  # [] int32, at least 1


def plan(
    group_starts: jax.Array,
    group_sizes: jax.Array,
    *,
    num_rows: int,
    num_experts: int,
    group_offset: jax.Array | int | None,
    block_m: int,
) -> Schedule:
    """The visits of the groups `[group_offset, group_offset + num_experts)`, and of the rows before and after them."""
    starts, ends = row_ranges(group_starts, group_sizes, num_rows, num_experts, group_offset)
    first_blocks = starts // block_m
    counts = jnp.where(ends > starts, (ends + block_m - 1) // block_m - first_blocks, jnp.zeros_like(ends))
    after = jnp.cumsum(counts, dtype=jnp.int32)  # visits up to and with each range of rows
    visits = lax.iota(jnp.int32, max_visits(num_rows, num_experts, block_m))
    owners = jnp.searchsorted(after, visits, side="right", method="compare_all").astype(jnp.int32)
    owners = jnp.minimum(owners, num_experts + 1)
    out_blocks = first_blocks[owners] + visits - (after - counts)[owners]
    firsts = jnp.maximum(starts[owners], out_blocks * block_m)
    lasts = jnp.minimum(ends[owners], (out_blocks + 1) * block_m)
    multiplies = (owners > 0) & (owners <= num_experts)
    experts, lhs_blocks = (lax.cummax(jnp.where(multiplies, x, jnp.zeros_like(x))) for x in (owners - 1, out_blocks))
    return Schedule(
        experts,
        lhs_blocks,
        multiplies.astype(jnp.int32),
        out_blocks,
        firsts,
        lasts,
        jnp.minimum(after[-1], visits.size),
    )


def max_visits(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most visits that any sizes of groups can ask for: where two ranges of rows meet, a block may be shared."""
    ranges = min(num_experts + 2, num_rows)
    return -(-num_rows // block_m) + ranges - 1
