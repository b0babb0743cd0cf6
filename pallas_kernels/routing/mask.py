"""Padding among the tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.routing.checks import check_vector


def mask_tokens(
    weights: Float[Array, "T top_k"], ids: Int32[Array, "T top_k"], token_mask: Bool[Array, " T"]
) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
    """Weights 0 and ids -1 where the mask is False: such a token visits no expert and counts nowhere.

    Raises:
      ValueError: a mask of another shape.
      TypeError: one that is not bool.
    """
    check_vector("token_mask", token_mask, ids.shape[0], jnp.bool_)
    is_token = token_mask[:, None]
    return jnp.where(is_token, weights, jnp.zeros_like(weights)), jnp.where(is_token, ids, jnp.full_like(ids, -1))
