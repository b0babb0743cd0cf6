"""Routing in XLA, all of it in f32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.routing.grouped import ExpertGroups, only_best_groups
from pallas_kernels.routing.mask import mask_tokens

TINY = np.finfo(np.float32).tiny


def sqrt_softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sqrt(softplus(x)); far below 0 that is exp(x / 2), whose gradient does not become 0 / 0 there."""
    low = x < -20  # the two differ by e^-20 / 4, relative
    zero = jnp.zeros_like(x)  # the side that is not taken must be finite too: its gradient is multiplied by 0
    return jnp.where(low, jnp.exp(0.5 * jnp.where(low, x, zero)), jnp.sqrt(jax.nn.softplus(jnp.where(low, zero, x))))


SCORING: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": sqrt_softplus,
}


def route(
    router_logits: Float[Array, "T E"],
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    groups: ExpertGroups | None,
    e_score_correction_bias: Float[Array, " E"] | None,
    routed_scaling_factor: float,
    token_mask: Bool[Array, " T"] | None,
) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
    """See `pallas_kernels.route`."""
    logits = jnp.asarray(router_logits).astype(jnp.float32)
    if token_mask is not None:  # padding may hold NaN, and 0 * NaN would be its gradient
        logits = jnp.where(token_mask[:, None], logits, jnp.zeros_like(logits))
    scores = SCORING[scoring](logits)
    weights, ids = choose(scores, top_k, groups, e_score_correction_bias)
    if renormalize:
        weights = normalized(weights)
    weights = weights * np.float32(routed_scaling_factor)
    return (weights, ids) if token_mask is None else mask_tokens(weights, ids, token_mask)


def choose(
    scores: Float[Array, "T E"], top_k: int, groups: ExpertGroups | None, bias: Float[Array, " E"] | None
) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
    """Scores and ids of the chosen experts; of equal ones `lax.top_k` takes the lower id."""
    ranked = scores  # never -0, which to top_k is less than 0
    if bias is not None:
        ranked = lax.stop_gradient(scores + jnp.asarray(bias).astype(jnp.float32)[None])
    if groups is not None:
        ranked = only_best_groups(ranked, groups, num_best=1 if bias is None else 2)
    weights, ids = lax.top_k(ranked, top_k)
    if bias is not None:
        weights = jnp.take_along_axis(scores, ids, axis=1, mode="promise_in_bounds")
    return weights, ids.astype(jnp.int32)


def normalized(weights: Float[Array, "T top_k"]) -> Float[Array, "T top_k"]:
    """Each row divided by its sum; a row without a normal number stays as it is, for sigmoids may all underflow.

    Divided by the largest weight first, because the gradient of a quotient has the square of its divisor.
    """
    largest = lax.stop_gradient(jnp.max(weights, axis=1, keepdims=True))
    normal, one = largest >= TINY, jnp.ones_like(largest)
    weights = weights / jnp.where(normal, largest, one)
    return weights / jnp.where(normal, jnp.sum(weights, axis=1, keepdims=True), one)
