"""Grouped top-k: each token chooses among the experts of its best groups only.

A group is a run of neighbouring ids; DeepSeek-V2 and V3 place each on one device or node, so a token visits few.
Source: vllm/model_executor/layers/fused_moe/router/grouped_topk_router.py.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """How many groups there are, and how many of them each token keeps."""

    total: int
    kept: int


def check_groups(
    num_expert_group: int | None, topk_group: int | None, num_experts: int, top_k: int
) -> ExpertGroups | None:
    """The groups that confine the choice; None where it is plain top-k. The rules are those of `route`."""
    if num_expert_group is None and topk_group is None:
        return None
    given = f"{num_expert_group=}, {topk_group=}"
    if num_expert_group is None or topk_group is None:
        raise ValueError(f"{given}: grouped top-k needs both; give the other too, or neither")
    if not 1 <= topk_group <= num_expert_group:
        raise ValueError(f"{given}: must be at least 1, and topk_group at most num_expert_group")
    if topk_group == num_expert_group or num_experts <= num_expert_group or num_experts % num_expert_group:
        return None
    if (candidates := topk_group * (num_experts // num_expert_group)) < top_k:
        raise ValueError(
            f"{given}: the kept groups hold {candidates} of the {num_experts} experts, fewer than {top_k=}; "
            "raise topk_group or lower top_k"
        )
    return ExpertGroups(total=num_expert_group, kept=topk_group)


def only_best_groups(scores: Float[Array, "T E"], groups: ExpertGroups, *, num_best: int) -> Float[Array, "T E"]:
    """`scores` with -inf outside the kept groups, which have the largest sums of their `num_best` best scores."""
    num_tokens, num_experts = scores.shape
    by_group = scores.reshape(num_tokens, groups.total, num_experts // groups.total)
    best, _ = lax.top_k(lax.stop_gradient(by_group), num_best)  # there are two: E is a multiple of the groups
    _, kept_ids = lax.top_k(jnp.sum(best, axis=2), groups.kept)
    kept = jnp.any(kept_ids[:, :, None] == lax.iota(kept_ids.dtype, groups.total)[None, None], axis=1)
    return jnp.where(kept[:, :, None], by_group, jnp.full_like(by_group, -jnp.inf)).reshape(scores.shape)
