"""`OnlineMoEMethodBase`: the life of one layer's experts, from declaration to application, as pure functions.

Source of names and behaviour: vllm/model_executor/layers/quantization/online/moe_base.py. There a method mutates a
layer; here each step takes and returns `ExpertWeights`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from moe_online.config import MoEConfig
from moe_online.errors import ConfigError, NonFiniteWeight
from moe_online.experts import ExpertWeights, SharedExpertWeights, abstract_experts
from moe_online.schemes import SHORTHANDS, QuantSpec, SchemeLike, Shorthand, add_shorthand, parse_scheme
from moe_online.shared_experts import apply_shared_experts
from pallas_kernels import Format, QuantizedArray, fused_moe, quantize, route
from pallas_kernels.routing import SimulatedRouting, mask_tokens
from pallas_kernels.routing.checks import check_vector

AnyWeights = TypeVar("AnyWeights", ExpertWeights, SharedExpertWeights)


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
          `ShapeDtypeStruct`s with shardings; biases, correction bias and shared experts where `MoEConfig` has them.

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
            gated=self.moe.gated,
            num_correction_biases=self.moe.num_experts if self.moe.has_correction_bias else 0,
            shared_intermediate_size=self.moe.shared_intermediate_size,
            shared_gate=self.moe.shared_expert_gate,
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
        shared_experts_input: Float[Array, "T H_shared"] | None = None,
    ) -> Float[Array, "T H"]:
        """The weighted sum of the chosen experts' outputs, plus that of the shared experts, rounded once.

        Args:
          weights: Quantized or not; they say how their inputs are quantized.
          x: bf16, f16 or f32.
          topk_weights: Final, but for a `routed_scaling_factor` that the config applies to the output.
          topk_ids: Global ids where `weights` has an expert map; an id that has no expert here contributes nothing.
          shared_experts_input: What the shared experts get in place of `x`, as where `x` is a projection of it.

        Returns:
          `[T, H]` in the dtype of `x`.

        Raises:
          ValueError: `shared_experts_input` where `weights` has no shared experts, or of other tokens than `x`; biases
            or shared experts that the config has and `weights` lacks; and what `fused_moe` raises.
        """
        if shared_experts_input is not None and weights.shared is None:
            raise ValueError("shared_experts_input is given, but the weights have no shared experts; drop it")
        _check_promises(self.moe, weights)
        y = fused_moe(
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
            out_dtype=jnp.float32,
        )
        y = y * jnp.float32(self.moe.output_scale)
        if weights.shared is not None:
            shared_input = x if shared_experts_input is None else shared_experts_input
            shared = apply_shared_experts(weights.shared, shared_input, activation=self.moe.activation)
            if shared.shape != y.shape:  # one row would be added to all
                raise ValueError(
                    f"the shared experts make {shared.shape} of {shared_input.shape=}, which must be {y.shape} as of "
                    f"{x.shape=}"
                )
            y = y + shared
        out: jax.Array = y.astype(x.dtype)
        return out

    def apply_monolithic(
        self,
        weights: ExpertWeights,
        x: Float[Array, "T H"],
        router_logits: Float[Array, "T E"],
        *,
        shared_experts_input: Float[Array, "T H_shared"] | None = None,
        token_mask: Bool[Array, " T"] | None = None,
    ) -> Float[Array, "T H"]:
        """Routes, then applies.

        Args:
          weights: As of `apply`; their correction bias, if any, takes part in the choice.
          x: As of `apply`.
          router_logits: Of all experts, here or elsewhere.
          shared_experts_input: As of `apply`.
          token_mask: False for tokens that are padding. Whatever they hold, they come out as zeros and change nothing
            for others.

        Returns:
          `[T, H]` in the dtype of `x`.

        Raises:
          ValueError: as `apply`; logits of another number of experts; a mask that is not bool `[T]`; a correction bias
            that is missing, or that a custom function would not get.
        """
        if token_mask is not None:
            check_vector("token_mask", token_mask, x.shape[0], jnp.bool_)
            x, router_logits = (zero_padding(each, token_mask) for each in (x, router_logits))
            if shared_experts_input is not None:
                shared_experts_input = zero_padding(shared_experts_input, token_mask)
        topk_weights, topk_ids = self.route(weights, x, router_logits, token_mask=token_mask)
        return self.apply(weights, x, topk_weights, topk_ids, shared_experts_input)

    def route(
        self,
        weights: ExpertWeights,
        x: Float[Array, "T H"],
        router_logits: Float[Array, "T E"],
        *,
        token_mask: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
        """The experts of each token, and their weights, as `MoEConfig` says; arguments as of `apply_monolithic`."""
        moe, bias = self.moe, weights.e_score_correction_bias
        num_experts = moe.num_experts if weights.expert_map is None else weights.expert_map.shape[0]
        if router_logits.shape[-1] != num_experts:
            raise ValueError(
                f"{router_logits.shape=} must be [T, {num_experts}], one for each expert of the "
                f"{'config' if weights.expert_map is None else 'expert map'}"
            )
        if moe.has_correction_bias and bias is None:
            raise ValueError("has_correction_bias=True, but the weights have no e_score_correction_bias; give them one")
        simulated = isinstance(moe.custom_routing_function, SimulatedRouting)
        if moe.custom_routing_function is not None and bias is not None and not simulated:
            raise ValueError("the weights have an e_score_correction_bias, which custom_routing_function does not get")
        if moe.custom_routing_function is not None:
            chosen = moe.custom_routing_function(x, router_logits, moe.top_k, moe.renormalize)
            return chosen if token_mask is None else mask_tokens(*chosen, token_mask)
        return route(
            router_logits,
            top_k=moe.top_k,
            scoring=moe.scoring,
            renormalize=moe.renormalize,
            num_expert_group=moe.num_expert_group,
            topk_group=moe.topk_group,
            e_score_correction_bias=bias,
            routed_scaling_factor=1.0 if moe.apply_routed_scale_to_output else moe.routed_scaling_factor,
            token_mask=token_mask,
        )

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
    """The method of a `QuantSpec`, and of another for the shared experts; None leaves weights as they are."""

    def __init__(self, moe: MoEConfig, spec: QuantSpec | None, shared: QuantSpec | None = None):
        super().__init__(moe)
        self.spec, self.shared = spec, shared

    def process_weights_after_loading(self, weights: ExpertWeights) -> ExpertWeights:
        """Quantizes all weights; biases and gates stay. See the base class.

        Raises:
          NonFiniteWeight: NaN or infinity, for which there is no scale. Under `jit` nobody can tell: check before.
        """
        if weights.shared is None:
            return _quantized(weights, self.spec)
        shared = _quantized(weights.shared, self.shared, "shared.")
        return dataclasses.replace(_quantized(weights, self.spec), shared=shared)


def _quantized(weights: AnyWeights, spec: QuantSpec | None, prefix: str = "") -> AnyWeights:
    given = {name: unquantized(weights, name, prefix) for name in ("w13_weight", "w2_weight")}
    if spec is None or spec.weight is None:
        return weights
    _check_finite(**{f"{prefix}{name}": weight for name, weight in given.items()})
    changes: dict[str, Any] = {name: _by_expert(weight, spec.weight) for name, weight in given.items()}
    return dataclasses.replace(weights, **changes, activation_format=spec.activation)


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


def get_method(
    spec_or_name: SchemeLike | None, moe_config: MoEConfig, *, shared: SchemeLike | None = None
) -> OnlineMoEMethodBase:
    """The method that quantizes and applies a layer's experts.

    Args:
      spec_or_name: A shorthand, the name of a weight format or of a registered scheme, a `QuantSpec`, a dict of
        `weight` and `activation`, or None for weights that stay as they are.
      moe_config: The layer.
      shared: The scheme of its shared experts, which are dense layers: theirs is `linear` in a shorthand. None leaves
        them as they are.

    Raises:
      TypeError: another type.
      ConfigError: an unknown name, or one that says nothing about such layers; the message lists the valid ones. Or
        `shared` beside the name of a registered method.
    """
    own = SHORTHANDS.get(spec_or_name) if isinstance(spec_or_name, str) else None
    if own is not None and own.method is not None:
        if shared is not None:
            raise ConfigError(
                f"scheme {spec_or_name!r} is the method {own.method.__name__}, which says itself what becomes of "
                f"shared experts; leave out {shared=}"
            )
        return own.method(moe_config)
    spec = None if spec_or_name is None else parse_scheme(spec_or_name, kind="moe")
    return SpecMethod(moe_config, spec, None if shared is None else parse_scheme(shared, kind="linear"))


def unquantized(weights: ExpertWeights | SharedExpertWeights, name: str, prefix: str = "") -> jax.Array:
    """The weight of this name; ValueError where it is quantized already: its codes would be taken for values."""
    weight: jax.Array | QuantizedArray = getattr(weights, name)
    if isinstance(weight, QuantizedArray):
        raise ValueError(f"{prefix}{name} is quantized already, as {weight.format.name!r}; process weights once only")
    return weight


def zero_padding(x: Float[Array, "T N"], token_mask: Bool[Array, " T"]) -> Float[Array, "T N"]:
    """`x` with zeros where the mask is False, so that neither what padding holds nor its gradient reaches anything."""
    return jnp.where(token_mask[:, None], x, jnp.zeros_like(x))


def _check_promises(moe: MoEConfig, weights: ExpertWeights) -> None:
    """Raises ValueError where the config has something that the weights lack: left out, it would not be missed."""
    if moe.has_bias and (weights.w13_bias is None or weights.w2_bias is None):
        raise ValueError("has_bias=True, but the weights lack w13_bias or w2_bias; give them both")
    if moe.shared_intermediate_size and weights.shared is None:
        raise ValueError(f"{moe.shared_intermediate_size=}, but the weights have no shared experts; give them some")


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
