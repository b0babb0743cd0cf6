"""What a MoE layer is (`MoEConfig`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything static about one MoE layer."""

    num_experts: int
    top_k: int  # experts per token
    hidden_size: int  # H
    intermediate_size: int  # I, of one expert
    activation: str = "silu"
    scoring: str = "softmax"  # how router logits become scores
    renormalize: bool = True  # the chosen scores sum to 1
    routed_scaling_factor: float = 1.0
    has_bias: bool = False
    apply_router_weight_on_input: bool = False  # needs top_k == 1
    params_dtype: np.dtype[Any] = np.dtype(jnp.bfloat16)  # of weights before quantization
