"""What a MoE layer is (`MoEConfig`) and how layers are quantized while they load (`OnlineQuantConfig`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_online.errors import ConfigError
from moe_online.quant_config import OnlineQuantConfig as OnlineQuantConfig
from pallas_kernels import Activation, get_activation
from pallas_kernels.routing import RoutingFunction
from pallas_kernels.routing.grouped import check_groups
from pallas_kernels.routing.reference import SCORING


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything static about one MoE layer; hashable.

    Raises:
      TypeError: an `activation`, a `params_dtype` or a `custom_routing_function` of another type.
      ConfigError: a value out of its range; the message says which one and what is valid.
    """

    num_experts: int
    top_k: int  # experts per token
    hidden_size: int  # H
    intermediate_size: int  # I, of one expert
    activation: str | Activation = "silu"
    scoring: str = "softmax"  # how router logits become scores
    renormalize: bool = True  # the chosen scores sum to 1
    num_expert_group: int | None = None  # of neighbouring experts, of which a token visits `topk_group`
    topk_group: int | None = None
    has_correction_bias: bool = False  # experts are chosen by score plus a learned bias
    routed_scaling_factor: float = 1.0
    apply_routed_scale_to_output: bool = False  # that factor multiplies the output, not the router's weights
    custom_routing_function: RoutingFunction | None = None  # in place of all of the above but the last
    shared_intermediate_size: int = 0  # I of all shared experts together; 0: there are none
    shared_expert_gate: bool = False  # weighs their output by the sigmoid of a projection
    has_bias: bool = False
    apply_router_weight_on_input: bool = False  # needs top_k == 1
    params_dtype: np.dtype[Any] = np.dtype(jnp.bfloat16)  # of weights before quantization

    def __post_init__(self) -> None:
        object.__setattr__(self, "params_dtype", jnp.dtype(self.params_dtype))
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.shared_intermediate_size < 0:
            raise ConfigError(f"shared_intermediate_size={self.shared_intermediate_size} must be at least 0")
        if self.shared_expert_gate and not self.shared_intermediate_size:
            raise ConfigError("shared_expert_gate=True needs shared experts: give shared_intermediate_size")
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
            check_groups(self.num_expert_group, self.topk_group, self.num_experts, self.top_k)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._check_custom_routing()

    def _check_custom_routing(self) -> None:
        if self.custom_routing_function is None:
            return
        if not callable(self.custom_routing_function):
            raise TypeError(f"custom_routing_function={self.custom_routing_function!r} must be a function")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        ignored = ["scoring", "num_expert_group", "topk_group", "has_correction_bias"]
        if not self.apply_routed_scale_to_output:
            ignored.append("routed_scaling_factor")
        given = [f"{name}={getattr(self, name)!r}" for name in ignored if getattr(self, name) != default[name]]
        if given:
            raise ConfigError(f"custom_routing_function decides all that {', '.join(given)} would say; leave them out")

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate and up, or one matrix."""
        return get_activation(self.activation).gated

    @property
    def output_scale(self) -> float:
        """What multiplies the routed experts' output."""
        return self.routed_scaling_factor if self.apply_routed_scale_to_output else 1.0
