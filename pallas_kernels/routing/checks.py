"""What routing asks of its arguments."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def check_factor(routed_scaling_factor: Any) -> None:
    """Raises ValueError unless it is a finite number."""
    if not isinstance(routed_scaling_factor, int | float) or not math.isfinite(routed_scaling_factor):
        raise ValueError(f"{routed_scaling_factor=} must be a finite number; 1.0 changes nothing")


def check_logits(router_logits: jax.Array, top_k: int) -> None:
    """Raises what `route` says of logits and of `top_k`."""
    if router_logits.ndim != 2:
        raise ValueError(f"{router_logits.shape=} must be [T, E]; flatten the batch axes into T")
    if not jnp.issubdtype(router_logits.dtype, jnp.floating):
        raise TypeError(f"{router_logits.dtype=} must be a floating dtype")
    num_experts = router_logits.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"{top_k=} must be between 1 and the {num_experts} experts of {router_logits.shape=}")


def check_vector(name: str, vector: jax.Array, length: int, dtype: type) -> None:
    """Raises unless `vector` is `[length]`, of a dtype below `dtype`."""
    if vector.shape != (length,):
        raise ValueError(f"{name} of shape {vector.shape} must have shape ({length},), like its axis of the logits")
    if not jnp.issubdtype(vector.dtype, dtype):
        raise TypeError(f"{name} of dtype {vector.dtype} must be {dtype.__name__}")
