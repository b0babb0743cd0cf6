"""Shared experts: the dense part of a MoE layer, which every token visits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_online.experts import SharedExpertWeights
from pallas_kernels import Activation, fused_ffn


def apply_shared_experts(
    shared: SharedExpertWeights, x: Float[Array, "T H_shared"], *, activation: Activation | str = "silu"
) -> Float[Array, "T H"]:
    """Their output in f32, weighed by their gate where they have one.

    It depends on nothing that the routed experts compute, so XLA may overlap the two.

    Args:
      shared: Quantized or not.
      x: bf16, f16 or f32; H_shared is that of their first weight.
      activation: An activation or its name.

    Source: the shared experts of DeepSeekMoE (arXiv:2401.06066), the gate of Qwen2-MoE.
    """
    y = fused_ffn(
        x,
        shared.w13_weight,
        shared.w2_weight,
        activation=activation,
        activation_format=shared.activation_format,
        out_dtype=jnp.float32,
    )
    if shared.gate_weight is None:
        return y
    logits = jnp.sum(x.astype(jnp.float32) * shared.gate_weight.astype(jnp.float32)[None], axis=1)
    gated: jax.Array = y * jax.nn.sigmoid(logits)[:, None]
    return gated
