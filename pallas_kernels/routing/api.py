"""`route`: router logits in, the experts of each token and their weights out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.routing import reference


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
) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
    """Chooses `top_k` experts for each token; all arithmetic in f32.

    Args:
      router_logits: `[T, E]`, any floating dtype.
      top_k: Experts per token, at most E. They come by falling score; of equal scores the lower id wins.
      scoring: `"softmax"` over all experts, or `"sigmoid"` of each.
      renormalize: Divides the chosen scores by their sum; where all of them are 0 they stay 0.
      num_expert_group: Not served yet (grouped top-k).
      topk_group: Not served yet (grouped top-k).
      e_score_correction_bias: Not served yet.
      routed_scaling_factor: Multiplies the weights, after renormalization.

    Returns:
      Weights f32 `[T, top_k]` and ids int32 `[T, top_k]`.

    Raises:
      TypeError: logits that are no floats.
      ValueError: an unknown `scoring`, a `top_k` outside 1..E, or logits that are not `[T, E]`.
      UnsupportedError: an argument that is not served yet.

    Source: vllm/model_executor/layers/fused_moe/router/.

    >>> import jax.numpy as jnp
    >>> weights, ids = route(jnp.array([[0.0, 2.0, 1.0, 2.0]]), top_k=2)
    >>> ids.tolist(), weights.round(3).tolist()
    ([[1, 3]], [[0.5, 0.5]])
    """
    if router_logits.ndim != 2:
        raise ValueError(f"{router_logits.shape=} must be [T, E]; flatten the batch axes into T")
    if not jnp.issubdtype(router_logits.dtype, jnp.floating):
        raise TypeError(f"{router_logits.dtype=} must be a floating dtype")
    num_experts = router_logits.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"{top_k=} must be between 1 and the {num_experts} experts of {router_logits.shape=}")
    if scoring not in reference.SCORING:
        raise ValueError(f"unknown {scoring=}; valid names: {', '.join(sorted(reference.SCORING))}")
    if num_expert_group is not None or topk_group is not None:
        raise UnsupportedError(
            f"route: grouped top-k ({num_expert_group=}, {topk_group=}) is not implemented yet; leave both None"
        )
    if e_score_correction_bias is not None:
        raise UnsupportedError("route: e_score_correction_bias is not implemented yet; leave it None")
    return reference.route(
        router_logits,
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )
