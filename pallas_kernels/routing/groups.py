"""Rows sorted by expert: computed once per layer call, shared by both matmuls."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.devices import target_device
from pallas_kernels.implementations import Implementation, choose
from pallas_kernels.routing.call import KERNELS, Order, OrderCall

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any  # jax.tree.map may put a ShapeDtypeStruct, a sharding or a spec here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupMetadata:
    """What every grouped matmul over the same rows derives from `group_sizes`."""

    group_starts: Leaf  # [groups] int32, first row of each group
    plan: Any = None  # of a kernel's tiles, where sorting made one
    groups: Any = None  # int32 [2, more than groups], where sorting made it: starts and sizes, then of all other rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """The (token, slot) pairs sorted by expert; pairs of no expert here come last and belong to no group.

    Row `r` holds token `tokens[r]`; pair `(t, j)` lies in row `rows[t, j]`, and `routed[t, j]` says whether it has an
    expert. Within an expert rows are in order of (token, slot), so the order is the same from run to run.
    """

    tokens: Leaf  # [T * top_k] int32
    rows: Leaf  # [T, top_k] int32
    routed: Leaf  # [T, top_k] bool
    group_sizes: Leaf  # [E] int32
    metadata: GroupMetadata


def make_group_metadata(group_sizes: Int32[Array, " groups"]) -> GroupMetadata:
    """The metadata of `grouped_matmul` for these groups.

    >>> import jax.numpy as jnp
    >>> make_group_metadata(jnp.array([2, 0, 3], jnp.int32)).group_starts.tolist()
    [0, 2, 2]
    """
    return GroupMetadata(group_starts=running_sum(group_sizes) - group_sizes)


def running_sum(x: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """`cumsum` of a few hundred numbers by comparing all pairs: one launch on a GPU, where XLA takes two or three."""
    index = lax.iota(jnp.int32, x.shape[0])
    return jnp.sum(jnp.where(index[None] <= index[:, None], x[None], jnp.zeros_like(x[None])), axis=1, dtype=jnp.int32)


def row_ranges(
    group_starts: Int32[Array, " groups"],
    group_sizes: Int32[Array, " groups"],
    num_rows: int,
    num_experts: int,
    group_offset: Int32[Array, ""] | int | None,
) -> tuple[Int32[Array, " ranges"], Int32[Array, " ranges"]]:
    """Starts and ends of the rows before the experts `[group_offset, group_offset + E)`, of each expert, and after."""
    if group_offset is not None:
        group_starts = lax.dynamic_slice_in_dim(group_starts, group_offset, num_experts)
        group_sizes = lax.dynamic_slice_in_dim(group_sizes, group_offset, num_experts)
    begin, end = group_starts[:1], group_starts[-1:] + group_sizes[-1:]
    starts = jnp.concatenate([jnp.zeros_like(begin), group_starts, end])
    ends = jnp.concatenate([begin, group_starts + group_sizes, jnp.full_like(end, num_rows)])
    return starts, ends


def sort_by_expert(
    topk_ids: Int32[Array, "T top_k"],
    num_experts: int,
    *,
    expert_map: Int32[Array, " global_E"] | None = None,
    implementation: Implementation | None = None,
) -> ExpertOrder:
    """Sorts the (token, slot) pairs by expert, once for both matmuls.

    Args:
      topk_ids: int32 `[T, top_k]`; an id outside the experts' range has no expert.
      num_experts: Experts here.
      expert_map: int32 `[global_E]`, the place here of each global id, or -1; `topk_ids` are global ids then.
      implementation: `"xla"` for no kernel; of any other choice the order is the same.

    >>> import jax.numpy as jnp
    >>> order = sort_by_expert(jnp.array([[1, 0], [-1, 1]], jnp.int32), 2)
    >>> order.tokens.tolist(), order.rows.tolist(), order.group_sizes.tolist()
    ([0, 0, 1, 1], [[1, 0], [3, 2]], [1, 2])
    """
    num_tokens, top_k = topk_ids.shape
    ids = ids_here(topk_ids, expert_map).reshape(-1)
    call, kernel = OrderCall(ids=ids, num_experts=num_experts), None
    if implementation in (None, *KERNELS):
        kernel = choose("sort_by_expert", None, KERNELS, call, warn=False)
    if kernel is not None:
        return expert_order(ids.reshape(num_tokens, top_k), num_experts, kernel.run(call))
    routed = (ids >= 0) & (ids < num_experts)
    keys, index, pairs = (
        jnp.where(routed, ids, jnp.full_like(ids, num_experts)),
        lax.iota(jnp.int32, ids.shape[0]),
        None,
    )
    if target_device().platform == "gpu":
        rows, bounds = counted(keys if expert_map is None else lax.optimization_barrier(keys), num_experts)
    else:
        keys, pairs = lax.sort((keys, index), num_keys=1, is_stable=True)
        rows = jnp.zeros_like(index).at[pairs].set(index, unique_indices=True)
        bounds = jnp.searchsorted(keys, lax.iota(jnp.int32, num_experts + 1)).astype(jnp.int32)
    found = Order(rows, bounds[:-1], bounds[1:] - bounds[:-1])
    return expert_order(ids.reshape(num_tokens, top_k), num_experts, found, pairs)


def ids_here(
    topk_ids: Int32[Array, "T top_k"], expert_map: Int32[Array, " global_E"] | None
) -> Int32[Array, "T top_k"]:
    """The experts' places here; what is unknown to the map has none."""
    if expert_map is None:
        return topk_ids
    known = (topk_ids >= 0) & (topk_ids < expert_map.shape[0])
    here = expert_map[jnp.clip(topk_ids, 0, expert_map.shape[0] - 1)]
    return jnp.where(known, here, jnp.full_like(topk_ids, -1))


def expert_order(
    ids: Int32[Array, "T top_k"], num_experts: int, found: Order, pairs: Int32[Array, " n"] | None = None
) -> ExpertOrder:
    """What a kernel found, and what follows from it, of these experts here; `pairs` are those of each row, if known."""
    top_k = ids.shape[1]
    if pairs is None:
        index = lax.iota(jnp.int32, ids.size)
        pairs = jnp.zeros_like(index).at[found.rows].set(index, unique_indices=True)
    return ExpertOrder(
        tokens=pairs // top_k,
        rows=found.rows.reshape(ids.shape),
        routed=(ids >= 0) & (ids < num_experts),
        group_sizes=found.group_sizes,
        metadata=GroupMetadata(group_starts=found.group_starts, plan=found.plan, groups=found.groups),
    )


AT_ONCE, CHUNK = 4096, 256  # keys that are compared all with all, and of more, those of a part


def counted(keys: Int32[Array, " n"], num_experts: int) -> tuple[Int32[Array, " n"], Int32[Array, " bounds"]]:
    """Where a stable sort puts each key of `[0, E]`, and where the E + 1 groups begin, by counting smaller ones.

    On a GPU this takes two launches for a few thousand keys and six for more; XLA's sort and search take dozens.
    """
    experts = lax.iota(jnp.int32, num_experts + 1)
    if keys.shape[0] <= AT_ONCE:
        index = lax.iota(jnp.int32, keys.shape[0])
        before = (keys[None] < keys[:, None]) | ((keys[None] == keys[:, None]) & (index[None] < index[:, None]))
        return _count(before), _count(keys[None] < experts[:, None])
    parts = jnp.pad(keys, (0, -keys.shape[0] % CHUNK), constant_values=num_experts).reshape(-1, CHUNK)
    within, part = lax.iota(jnp.int32, CHUNK), lax.iota(jnp.int32, parts.shape[0])
    smaller = (within[None] < within[:, None])[None]
    among = _count((parts[:, None] == parts[:, :, None]) & smaller)  # of its part and expert
    sizes = _count(parts[:, None] == experts[None, :, None])  # [parts, E + 1]
    earlier = jnp.where(part[None, :, None] < part[:, None, None], sizes[None], jnp.zeros_like(sizes)[None])
    earlier = jnp.sum(earlier, axis=1, dtype=jnp.int32)  # of each expert in the parts before
    total = jnp.sum(sizes, axis=0, dtype=jnp.int32)
    bounds = running_sum(total) - total
    rows = among + (earlier + bounds[None])[part[:, None], parts]
    return rows.reshape(-1)[: keys.shape[0]], bounds


def _count(found: Bool[Array, "*shape n"]) -> Int32[Array, "*shape"]:
    return jnp.sum(found, axis=-1, dtype=jnp.int32)
