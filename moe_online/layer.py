"""The functional Mixture-of-Experts layer: what every framework's module calls."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights
from moe_online.method import get_method, zero_padding


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
      token_mask: False for tokens that are padding. Whatever they hold, they come out as zeros and change nothing for
        others.

    Returns:
      The shape and dtype of `x`.

    Raises:
      ValueError: a mask, a router or a router's bias of another shape; and what `apply_monolithic` raises.
    """
    h, e = x.shape[-1], config.num_experts if weights.expert_map is None else weights.expert_map.shape[0]
    if router.shape != (h, e) or (router_bias is not None and router_bias.shape != (e,)):
        shapes = (router.shape, None if router_bias is None else router_bias.shape)
        raise ValueError(f"router and its bias of shapes {shapes} must be [H, E] = {(h, e)} and [E] for {x.shape=}")
    if token_mask is not None and token_mask.shape != x.shape[:-1]:
        raise ValueError(f"{token_mask.shape=} must be {x.shape[:-1]}, as of {x.shape=} less its last axis")
    tokens, mask = x.reshape(-1, h), None if token_mask is None else token_mask.reshape(-1)
    if mask is not None:
        tokens = zero_padding(tokens, mask)
    logits = jnp.dot(
        tokens.astype(jnp.float32),
        router.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,  # a GPU would round
    )
    if router_bias is not None:
        logits = logits + router_bias.astype(jnp.float32)[None]
    return get_method(None, config).apply_monolithic(weights, tokens, logits, token_mask=mask).reshape(x.shape)
