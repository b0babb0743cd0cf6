"""The functional Mixture-of-Experts layer: what every framework's module calls."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights
from moe_online.method import get_method


def moe_layer(
    x: Float[Array, "*batch H"],
    router: Float[Array, "H E"],
    weights: ExpertWeights,
    config: MoEConfig,
    *,
    router_bias: Float[Array, " E"] | None = None,
    token_mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch H"]:
    """Routes each token of `x` and adds up its experts' outputs, shared experts included.

    Args:
      x: bf16, f16 or f32.
      router: Kernel of the router; its logits are computed in f32.
      weights: Quantized or not; they say how their inputs are quantized.
      config: The layer.
      router_bias: Added to the router's logits.
      token_mask: False for tokens that are padding: they visit no routed expert.

    Returns:
      The shape and dtype of `x`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.dot(
        tokens.astype(jnp.float32),
        router.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,  # a GPU would round
    )
    if router_bias is not None:
        logits = logits + router_bias.astype(jnp.float32)[None]
    mask = None if token_mask is None else token_mask.reshape(-1)
    return get_method(None, config).apply_monolithic(weights, tokens, logits, token_mask=mask).reshape(x.shape)
