"""`route`: router logits in, the experts of each token and their weights out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.routing import reference
from pallas_kernels.routing.checks import check_factor, check_logits, check_vector
from pallas_kernels.routing.grouped import check_groups


def route(
    router_logits: Float[Array, "T E"],
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    e_score_correction_bias: Float[Array, " E"] | None = None,
    routed_scaling_factor: float = 1.0,
    token_mask: Bool[Array, " T"] | None = None,
) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
    """Chooses `top_k` experts for each token; all arithmetic in f32.

    Each token is routed by itself: NaN in the logits of one leaves the others alone. Weights are differentiable by
    the logits, as if the choice were fixed.

    Args:
      router_logits: `[T, E]`, any floating dtype.
      top_k: Experts per token, at most E. They come by falling score (plus bias); of equal ones the lower id wins.
      scoring: `"softmax"` over all experts, `"sigmoid"` of each, or `"sqrtsoftplus"` of each: sqrt(ln(1 + e^x)).
      renormalize: Divides the chosen scores by their sum; where all of them are 0 they stay 0.
      num_expert_group: Groups of E / num_expert_group neighbouring experts, for grouped top-k. Plain top-k is what
        remains where this is no divisor of E, or not below E.
      topk_group: Groups that each token keeps; it chooses from their experts only. Kept are those with the largest
        score, with a bias those with the largest sum of two (biased) scores; of equal ones the lower group.
      e_score_correction_bias: `[E]`. Added to the scores for the choice of groups and experts only: weights are made
        of scores without it, and it has no gradient.
      routed_scaling_factor: Multiplies the weights, after renormalization.
      token_mask: bool `[T]`, False for padding, which gets ids -1 (no expert: `fused_moe` skips it, and no load is
        counted) and weights 0, whatever its logits; their gradient is 0.

    Returns:
      Weights f32 `[T, top_k]` and ids int32 `[T, top_k]`.

    Raises:
      TypeError: logits or a bias that are no floats, or a mask that is not bool.
      ValueError: an unknown `scoring`, a `top_k` outside 1..E, an array of another shape, one of `num_expert_group`
        and `topk_group` without the other, `topk_group` outside 1..num_expert_group, or `top_k` experts not to be had
        from `topk_group` groups.

    Source: vllm/model_executor/layers/fused_moe/router/ (fused_topk_router.py, fused_topk_bias_router.py,
    grouped_topk_router.py); DeepSeek-V3 Technical Report (arXiv:2412.19437), section 2.1.2.

    >>> import jax.numpy as jnp
    >>> weights, ids = route(jnp.array([[0.0, 2.0, 1.0, 2.0]]), top_k=2)
    >>> ids.tolist(), weights.round(3).tolist()
    ([[1, 3]], [[0.5, 0.5]])

    A bias moves the choice, not the weights; of two groups only the one with the best expert is left:

    >>> logits, bias = jnp.array([[0.0, 2.0, 1.0, 1.0]]), jnp.array([0.0, 0.0, 1.0, 0.0])
    >>> weights, ids = route(logits, top_k=2, scoring="sigmoid", e_score_correction_bias=bias, renormalize=False)
    >>> ids.tolist(), [f"{weight:.3f}" for weight in weights[0]]
    ([[2, 1]], ['0.731', '0.881'])
    >>> route(logits, top_k=2, num_expert_group=2, topk_group=1)[1].tolist()
    [[1, 0]]
    """
    check_logits(router_logits, top_k)
    check_factor(routed_scaling_factor)
    num_tokens, num_experts = router_logits.shape
    if scoring not in reference.SCORING:
        raise ValueError(f"unknown {scoring=}; valid names: {', '.join(sorted(reference.SCORING))}")
    if e_score_correction_bias is not None:
        check_vector("e_score_correction_bias", e_score_correction_bias, num_experts, jnp.floating)
    if token_mask is not None:
        check_vector("token_mask", token_mask, num_tokens, jnp.bool_)
    return reference.route(
        router_logits,
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        groups=check_groups(num_expert_group, topk_group, num_experts, top_k),
        e_score_correction_bias=e_score_correction_bias,
        routed_scaling_factor=routed_scaling_factor,
        token_mask=token_mask,
    )
