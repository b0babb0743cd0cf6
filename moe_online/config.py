"""What a MoE layer is (`MoEConfig`) and how layers are quantized while they load (`OnlineQuantConfig`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_online.errors import ConfigError
from moe_online.quant_config import OnlineQuantConfig as OnlineQuantConfig
from pallas_kernels import Activation, get_activation
from pallas_kernels.routing import RoutingFunction, SimulatedRouting
from pallas_kernels.routing.checks import check_factor
from pallas_kernels.routing.grouped import check_groups
from pallas_kernels.routing.reference import SCORING

SIZES = {"num_experts": 1, "top_k": 1, "hidden_size": 1, "intermediate_size": 1, "shared_intermediate_size": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything static about one MoE layer; hashable.

    Args:
      num_experts: E, of the whole layer, wherever they are.
      top_k: Experts per token.
      hidden_size: H.
      intermediate_size: I, of one expert.
      activation: A name, or an `Activation` with its parameters.
      scoring: How router logits become scores: `"softmax"`, `"sigmoid"` or `"sqrtsoftplus"`.
      renormalize: The chosen scores are divided by their sum. With one expert per token that leaves 1 of each, so give
        False there, as to Llama 4.
      num_expert_group: Groups of neighbouring experts, of which a token visits `topk_group`.
      topk_group: How many; give both or neither.
      has_correction_bias: Whether to declare a bias that takes part in the choice of experts, not in their weights.
      routed_scaling_factor: Multiplies the router's weights.
      apply_routed_scale_to_output: That factor multiplies the routed experts' output instead.
      custom_routing_function: `(x, router_logits, top_k, renormalize) -> (weights, ids)` in place of scoring, groups,
        correction bias and factor; `pallas_kernels.routing` has some. A `SimulatedRouting` may stand beside them.
      router_bias: Whether `moe_online.flax.MoE` makes a router with a bias, as GPT-OSS has.
      shared_intermediate_size: I of all shared experts together; 0 where there are none.
      shared_expert_gate: Their output is weighed by the sigmoid of a projection of their input.
      has_bias: Whether the routed experts have biases.
      apply_router_weight_on_input: Weights multiply the experts' inputs, not their outputs; needs `top_k == 1`.
      params_dtype: Of weights before quantization.

    Raises:
      TypeError: an `activation`, a `params_dtype` or a `custom_routing_function` of another type.
      ConfigError: a value out of its range; the message says which one and what is valid.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str | Activation = "silu"
    scoring: str = "softmax"
    renormalize: bool = True
    num_expert_group: int | None = None
    topk_group: int | None = None
    has_correction_bias: bool = False
    routed_scaling_factor: float = 1.0
    apply_routed_scale_to_output: bool = False
    custom_routing_function: RoutingFunction | None = None
    router_bias: bool = False
    shared_intermediate_size: int = 0
    shared_expert_gate: bool = False
    has_bias: bool = False
    apply_router_weight_on_input: bool = False
    params_dtype: np.dtype[Any] = np.dtype(jnp.bfloat16)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params_dtype", jnp.dtype(self.params_dtype))
        for name, least in SIZES.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(f"{name}={value!r} must be a whole number, at least {least}")
        if self.shared_expert_gate and not self.shared_intermediate_size:
            raise ConfigError("shared_expert_gate=True needs shared experts: give shared_intermediate_size")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} must be at most num_experts={self.num_experts}")
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
            check_factor(self.routed_scaling_factor)
            check_groups(self.num_expert_group, self.topk_group, self.num_experts, self.top_k)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._check_custom_routing()

    def _check_custom_routing(self) -> None:
        if self.custom_routing_function is None:
            return
        if not callable(self.custom_routing_function):
            raise TypeError(f"custom_routing_function={self.custom_routing_function!r} must be a function")
        if isinstance(self.custom_routing_function, SimulatedRouting):  # of a real model, to try a load
            return
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
