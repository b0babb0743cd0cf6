"""What a MoE layer is (`MoEConfig`) and how layers are quantized while they load (`OnlineQuantConfig`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_online.errors import ConfigError
from moe_online.quant_config import OnlineQuantConfig as OnlineQuantConfig
from pallas_kernels import Activation, get_activation
from pallas_kernels.routing.reference import SCORING


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything static about one MoE layer; hashable.

    Raises:
      TypeError: an `activation` or a `params_dtype` of another type.
      ConfigError: a value out of its range; the message says which one and what is valid.
    """

    num_experts: int
    top_k: int  # experts per token
    hidden_size: int  # H
    intermediate_size: int  # I, of one expert
    activation: str | Activation = "silu"
    scoring: str = "softmax"  # how router logits become scores
    renormalize: bool = True  # the chosen scores sum to 1
    routed_scaling_factor: float = 1.0
    has_bias: bool = False
    apply_router_weight_on_input: bool = False  # needs top_k == 1
    params_dtype: np.dtype[Any] = np.dtype(jnp.bfloat16)  # of weights before quantization

    def __post_init__(self) -> None:
        object.__setattr__(self, "params_dtype", jnp.dtype(self.params_dtype))
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")
        if self.apply_router_weight_on_input and self.top_k != 1:
            raise ConfigError(
                f"apply_router_weight_on_input needs top_k=1, not {self.top_k}: "
                "the input of an expert can carry the weight of one choice only"
            )
        if self.scoring not in SCORING:
            raise ConfigError(f"unknown scoring={self.scoring!r}; valid names: {', '.join(sorted(SCORING))}")
        if not jnp.issubdtype(self.params_dtype, jnp.floating):
            raise ConfigError(f"params_dtype={self.params_dtype} must be a floating dtype")
        try:
            get_activation(self.activation)
        except ValueError as error:
            raise ConfigError(str(error)) from None
