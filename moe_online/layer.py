"""The functional Mixture-of-Experts layer: what every framework's module calls."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights
from moe_online.method import get_method


def moe_layer(
    x: Float[Array, "*batch H"], router: Float[Array, "H E"], weights: ExpertWeights, config: MoEConfig
) -> Float[Array, "*batch H"]:
    """Routes each token of `x` and adds up its experts' outputs.

    Args:
      x: bf16, f16 or f32.
      router: Kernel of the router; its logits are computed in f32.
      weights: Quantized or not; they say how their inputs are quantized.
      config: The layer.

    Returns:
      The shape and dtype of `x`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.dot(tokens.astype(jnp.float32), router.astype(jnp.float32))
    return get_method(None, config).apply_monolithic(weights, tokens, logits).reshape(x.shape)
