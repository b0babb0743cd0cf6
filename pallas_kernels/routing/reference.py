"""Routing in XLA."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

SCORING: dict[str, Callable[[jax.Array], jax.Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


def route(
    router_logits: Float[Array, "T E"], *, top_k: int, scoring: str, renormalize: bool, routed_scaling_factor: float
) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
    """See `pallas_kernels.route`."""
    scores = SCORING[scoring](router_logits.astype(jnp.float32))
    weights, ids = lax.top_k(scores, top_k)  # of equal scores the lower id comes first
    if renormalize:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.maximum(total, np.finfo(np.float32).tiny)  # sigmoids may all underflow to 0
    return weights * np.float32(routed_scaling_factor), ids.astype(jnp.int32)
