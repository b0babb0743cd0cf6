"""`fused_moe`: tokens and their experts in, the weighted sum of the experts' outputs out."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation, get_activation
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.fused_moe.checks import check_config, check_experts, check_routing
from pallas_kernels.fused_moe.config import FusedMoeConfig
from pallas_kernels.fused_moe.gradient import Arrays, Static, run
from pallas_kernels.grouped_matmul.operands import activation_format_for, result_dtype
from pallas_kernels.implementations import Implementation


def fused_moe(
    x: Float[Array, "T H"],
    w13: Float[Array, "E S I H"] | Float[Array, "E N H"] | QuantizedArray,
    w2: Float[Array, "E H I"] | QuantizedArray,
    topk_weights: Float[Array, "T top_k"],
    topk_ids: Int32[Array, "T top_k"],
    *,
    activation: Activation | str = "silu",
    activation_format: Format | str | None = None,
    w13_bias: Float[Array, "E S I"] | Float[Array, "E N"] | None = None,
    w2_bias: Float[Array, "E H"] | None = None,
    expert_map: Int32[Array, " global_E"] | None = None,
    apply_router_weight_on_input: bool = False,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
    config: FusedMoeConfig | None = None,
) -> Float[Array, "T H"]:
    """Sends each token through its experts and adds up their outputs, weighted.

    Sums are f32. What is rounded to the dtype of `x`: the sums of the first matmul, the activation of them (computed
    in f32, and before it is quantized), by Hopper's kernels each expert's output, and the result, once, after the
    weighted sum in f32.

    Args:
      x: bf16, f16 or f32 `[T, H]`.
      w13: `[E, 2, I, H]`, gate and up, or `[E, 2I, H]`, gate rows first; `[E, 1, I, H]` or `[E, I, H]` for an
        activation that is not gated; quantized or not.
      w2: `[E, H, I]`, quantized or not.
      topk_weights: `[T, top_k]`; used in f32.
      topk_ids: int32 `[T, top_k]`. An id outside of `[0, E)` contributes nothing.
      activation: An activation or its name.
      activation_format: Quantizes `x` and the activation's output; `None` leaves them as they are.
      w13_bias: `[E, 2, I]` or `[E, 2I]`, of one activation that is not gated half of that; added in f32.
      w2_bias: `[E, H]`, added in f32.
      expert_map: int32 `[global_E]`: `topk_ids` are global ids, and this gives the place of each in `w13` and `w2`, or
        -1 for an expert that is elsewhere and contributes nothing.
      apply_router_weight_on_input: Multiplies `x` (rounded to its dtype) in place of the output; top_k must be 1.
      out_dtype: bf16, f16 or f32. Default: that of `x`.
      implementation: Of the matmuls: `None` for the best one here, `"xla"`, `"mosaic_gpu"` or `"mosaic_tpu"`.
      config: Tiles of Hopper's kernels. Default: measured ones of this shape where there are any, else by a rule.

    Returns:
      `[T, H]`; the same bits from run to run. It is differentiable (in reverse) by `x`, `topk_weights`, biases, and
      weights that are not quantized: the codes of quantized weights count as given, and the gradient passes straight
      through the rounding of `activation_format`.

    Raises:
      TypeError: a dtype that is none of those above, a config that is no `FusedMoeConfig`.
      ValueError: shapes that do not fit, an unknown format or activation, router weights on the input with top_k > 1, a
        config of a matmul that XLA serves.
      UnsupportedError: the named implementation cannot serve, or not with this config; differentiation by
        quantized weights.

    Source: numerics and arguments of vllm/model_executor/layers/fused_moe/.

    >>> import jax.numpy as jnp
    >>> x, w13, w2 = jnp.ones((3, 4)), jnp.ones((2, 2, 8, 4)), jnp.ones((2, 4, 8))
    >>> fused_moe(x, w13, w2, jnp.ones((3, 1)), jnp.array([[0], [1], [-1]]), activation="relu2")[:, 0].tolist()
    [512.0, 512.0, 0.0]
    """
    activation = get_activation(activation)
    check_routing(x, topk_weights, topk_ids, expert_map, apply_router_weight_on_input)
    if w2.ndim == 3 and x.shape[1] != w2.shape[1]:
        raise ValueError(f"{x.shape=} must be [T, H] with the H={w2.shape[1]} of {w2.shape=}")
    check_experts(x.shape[1], w13, w2, activation, w13_bias, w2_bias)
    check_config(config)
    static = Static(
        activation=activation,
        activation_format=activation_format_for(x, activation_format),
        apply_router_weight_on_input=apply_router_weight_on_input,
        implementation=implementation,
        out_dtype=result_dtype(x, out_dtype),
        config=config,
    )
    return run(static, Arrays(x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map))
