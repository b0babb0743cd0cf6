"""`OnlineMoEMethodBase`: the life of one layer's experts, from declaration to application, as pure functions.

Source of names and behaviour: vllm/model_executor/layers/quantization/online/moe_base.py. There a method mutates a
layer; here each step takes and returns `ExpertWeights`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_online.config import MoEConfig
from moe_online.errors import NonFiniteWeight
from moe_online.experts import ExpertWeights, abstract_experts
from moe_online.schemes import SHORTHANDS, QuantSpec, SchemeLike, Shorthand, add_shorthand, parse_scheme
from pallas_kernels import Format, QuantizedArray, fused_moe, quantize, route


class OnlineMoEMethodBase(abc.ABC):
    """How the experts of a layer are declared, quantized and applied.

    A subclass defines `process_weights_after_loading`; the rest serves any weights that `fused_moe` takes.

    Args:
      moe: The layer.
    """

    uses_meta_device: ClassVar[bool] = True  # weights are declared without storage
    supports_eplb: ClassVar[bool] = True  # every tensor leads with the expert axis

    def __init__(self, moe: MoEConfig):
        self.moe = moe

    def create_weights(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: DTypeLike,
        **extra_weight_attrs: Any,
    ) -> ExpertWeights:
        """Declares the weights before quantization; nothing is allocated.

        Args:
          num_experts: E of the declared arrays.
          hidden_size: H.
          intermediate_size_per_partition: I of the declared arrays. They are whole (global) arrays: a partition over
            devices is said by `mesh`.
          params_dtype: Dtype before quantization.
          **extra_weight_attrs: `mesh`, `expert_axis` and `tensor_axis`, as `abstract_experts` takes them.

        Returns:
          `ShapeDtypeStruct`s with shardings; biases where `MoEConfig.has_bias`.

        Raises:
          TypeError: another attribute.
          ValueError: an axis does not divide among its devices.
        """
        return abstract_experts(
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            has_bias=self.moe.has_bias,
            **extra_weight_attrs,
        )

    @abc.abstractmethod
    def process_weights_after_loading(self, weights: ExpertWeights) -> ExpertWeights:
        """Quantizes loaded weights: pure, and can be jitted.

        Raises:
          ValueError: weights that are quantized already.
        """

    def apply(
        self,
        weights: ExpertWeights,
        x: Float[Array, "T H"],
        topk_weights: Float[Array, "T top_k"],
        topk_ids: Int32[Array, "T top_k"],
        shared_experts_input: Float[Array, "T H"] | None = None,
    ) -> Float[Array, "T H"]:
        """The weighted sum of the chosen experts' outputs, in the dtype of `x`.

        Raises:
          ValueError: `shared_experts_input`, for there are no shared experts in `weights`.
        """
        if shared_experts_input is not None:
            raise ValueError("shared_experts_input is given, but the weights have no shared experts; drop it")
        return fused_moe(
            x,
            weights.w13_weight,
            weights.w2_weight,
            topk_weights,
            topk_ids,
            activation=self.moe.activation,
            activation_format=weights.activation_format,
            w13_bias=weights.w13_bias,
            w2_bias=weights.w2_bias,
            expert_map=weights.expert_map,
            apply_router_weight_on_input=self.moe.apply_router_weight_on_input,
        )

    def apply_monolithic(
        self, weights: ExpertWeights, x: Float[Array, "T H"], router_logits: Float[Array, "T E"]
    ) -> Float[Array, "T H"]:
        """Routes, then applies; `router_logits` are those of all experts, here or elsewhere."""
        topk_weights, topk_ids = route(
            router_logits,
            top_k=self.moe.top_k,
            scoring=self.moe.scoring,
            renormalize=self.moe.renormalize,
            e_score_correction_bias=weights.e_score_correction_bias,
            routed_scaling_factor=self.moe.routed_scaling_factor,
        )
        return self.apply(weights, x, topk_weights, topk_ids)

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """Never to be called: kept because vLLM has it.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__}.maybe_make_prepare_finalize must not be called: `apply` prepares and finalizes "
            "itself, inside pallas_kernels.fused_moe"
        )


class SpecMethod(OnlineMoEMethodBase):
    """The method of a `QuantSpec`; None leaves the weights as they are."""

    def __init__(self, moe: MoEConfig, spec: QuantSpec | None):
        super().__init__(moe)
        self.spec = spec

    def process_weights_after_loading(self, weights: ExpertWeights) -> ExpertWeights:
        """Quantizes both weights; biases stay. See the base class.

        Raises:
          NonFiniteWeight: NaN or infinity, for which there is no scale. Under `jit` nobody can tell: check before.
        """
        w13_weight, w2_weight = (unquantized(weights, name) for name in ("w13_weight", "w2_weight"))
        if self.spec is None or self.spec.weight is None:
            return weights
        _check_finite(w13_weight=w13_weight, w2_weight=w2_weight)
        return dataclasses.replace(
            weights,
            w13_weight=_by_expert(w13_weight, self.spec.weight),
            w2_weight=_by_expert(w2_weight, self.spec.weight),
            activation_format=self.spec.activation,
        )


def register_scheme(name: str, scheme: QuantSpec | type[OnlineMoEMethodBase], *, replace: bool = False) -> None:
    """Adds a scheme of one's own, until the process ends; the commands, which are others, do not know it.

    Args:
      name: Its name. That of a QuantSpec is taken wherever a shorthand is: by `get_method`, `load` and configs. That
        of a subclass is for `get_method` only: `load` and configs quantize by formats, so load such a layer
        unquantized and call the method's `process_weights_after_loading`.
      scheme: Formats for experts and dense layers, or a subclass that is made with the `MoEConfig`.
      replace: Lets `name` stand for something else from now on, if it was registered before.

    Raises:
      TypeError: something else, or a name that is no string.
      ConfigError: formats without one for the weights; a name that is taken, reserved, empty, or has a comma or space.
    """
    given: Any = scheme
    if isinstance(given, QuantSpec):
        spec = parse_scheme(given)
        add_shorthand(name, Shorthand(linear=spec, moe=spec), replace=replace)
    elif isinstance(given, type) and issubclass(given, OnlineMoEMethodBase):
        add_shorthand(name, Shorthand(method=given), replace=replace)
    else:
        raise TypeError(f"a scheme is a QuantSpec or a subclass of OnlineMoEMethodBase, not {scheme!r}")


def get_method(spec_or_name: SchemeLike | None, moe_config: MoEConfig) -> OnlineMoEMethodBase:
    """The method that quantizes and applies a layer's experts.

    Args:
      spec_or_name: A shorthand, the name of a weight format or of a registered scheme, a `QuantSpec`, a dict of
        `weight` and `activation`, or None for weights that stay as they are.
      moe_config: The layer.

    Raises:
      TypeError: another type.
      ConfigError: an unknown name, or one that says nothing about MoE layers; the message lists the valid ones.
    """
    own = SHORTHANDS.get(spec_or_name) if isinstance(spec_or_name, str) else None
    if own is not None and own.method is not None:
        return own.method(moe_config)
    return SpecMethod(moe_config, None if spec_or_name is None else parse_scheme(spec_or_name, kind="moe"))


def unquantized(weights: ExpertWeights, name: str) -> jax.Array:
    """The weight of this name; ValueError where it is quantized already: its codes would be taken for values."""
    weight: jax.Array | QuantizedArray = getattr(weights, name)
    if isinstance(weight, QuantizedArray):
        raise ValueError(f"{name} is quantized already, as {weight.format.name!r}; process weights once only")
    return weight


def _check_finite(**weights: jax.Array) -> None:
    bad = [name for name, w in weights.items() if not isinstance(w, jax.core.Tracer) and not _all_finite(w)]
    if bad:
        raise NonFiniteWeight(
            f"NaN or infinite elements in {' and '.join(bad)}; no scale can represent them", names=bad
        )


@jax.jit
def _all_finite(weight: jax.Array) -> jax.Array:
    finite: jax.Array = jnp.all(jnp.isfinite(weight))
    return finite


def _by_expert(weight: jax.Array, fmt: Format) -> QuantizedArray:
    """Expert after expert, so that f32 copies are those of one expert."""
    shared_axes = tuple(range(weight.ndim - 3))
    quantized: QuantizedArray = lax.map(lambda one: quantize(one, fmt, shared_axes=shared_axes), weight)
    return quantized
