"""`fused_moe`: tokens and their experts in, the weighted sum of the experts' outputs out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation, get_activation
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.fused_moe.gradient import Arrays, Static, run
from pallas_kernels.grouped_matmul.operands import activation_format_for, check_float, check_operand, result_dtype
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
) -> Float[Array, "T H"]:
    """Sends each token through its experts and adds up their outputs, weighted.

    Sums are f32. What is rounded to the dtype of `x`: the sums of the first matmul, the activation of them (computed
    in f32, and before it is quantized), and the result, once, after the weighted sum in f32.

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

    Returns:
      `[T, H]`; the same bits from run to run. It is differentiable (in reverse) by `x`, `topk_weights`, biases, and
      weights that are not quantized: the codes of quantized weights count as given, and the gradient passes straight
      through the rounding of `activation_format`.

    Raises:
      TypeError: a dtype that is none of those above.
      ValueError: shapes that do not fit, an unknown format or activation, router weights on the input with top_k > 1.
      UnsupportedError: the named implementation cannot serve; differentiation by quantized weights.

    Source: numerics and arguments of vllm/model_executor/layers/fused_moe/.

    >>> import jax.numpy as jnp
    >>> x, w13, w2 = jnp.ones((3, 4)), jnp.ones((2, 2, 8, 4)), jnp.ones((2, 4, 8))
    >>> fused_moe(x, w13, w2, jnp.ones((3, 1)), jnp.array([[0], [1], [-1]]), activation="relu2")[:, 0].tolist()
    [512.0, 512.0, 0.0]
    """
    check_operand("w2", w2, "[E, H, I]", role="weight")
    activation = get_activation(activation)
    check_operand("w13", w13, "[E, S, I, H]" if w13.ndim == 4 else "[E, S*I, H]", role="weight")
    check_operand("x", x, "[T, H]", role="activation")
    if isinstance(x, QuantizedArray):
        raise TypeError("x must be a real array [T, H]; give activation_format to have it quantized")
    shards = 2 if activation.gated else 1
    _check_weights(x, w13, w2, activation)
    e, i = w2.shape[0], w2.shape[2]
    _check_bias("w13_bias", w13_bias, (w13.shape[:-1], (e, shards, i), (e, shards * i)))
    _check_bias("w2_bias", w2_bias, (w2.shape[:2],))
    _check_routing(x, topk_weights, topk_ids, expert_map)
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(f"apply_router_weight_on_input needs top_k 1, not {topk_ids.shape[1]}: {topk_ids.shape=}")
    static = Static(
        activation=activation,
        activation_format=activation_format_for(x, activation_format),
        apply_router_weight_on_input=apply_router_weight_on_input,
        implementation=implementation,
    )
    dtype = result_dtype(x, out_dtype)
    if topk_ids.size == 0:
        return jnp.zeros(x.shape, dtype)
    arrays = Arrays(x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map)
    return run(static, arrays).astype(dtype)


def _check_weights(
    x: jax.Array, w13: jax.Array | QuantizedArray, w2: jax.Array | QuantizedArray, activation: Activation
) -> None:
    num_experts, hidden, intermediate = w2.shape
    shards = 2 if activation.gated else 1
    wanted = (num_experts, shards, intermediate, hidden), (num_experts, shards * intermediate, hidden)
    if w13.shape not in wanted:
        axes = "[E, 2, I, H] or [E, 2I, H]" if activation.gated else "[E, 1, I, H] or [E, I, H]"
        raise ValueError(
            f"{w13.shape=} must be {wanted[0]} or {wanted[1]}, {axes}, for {w2.shape=} and {activation.name!r}"
        )
    if x.shape[1] != hidden:
        raise ValueError(f"{x.shape=} must be [T, H] with the H={hidden} of {w2.shape=}")


def _check_bias(name: str, bias: jax.Array | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if bias is None:
        return
    check_float(name, bias)
    if bias.shape not in shapes:
        raise ValueError(
            f"{name}.shape={bias.shape} must be {' or '.join(str(shape) for shape in dict.fromkeys(shapes))}"
        )


def _check_routing(x: jax.Array, weights: jax.Array, ids: jax.Array, expert_map: jax.Array | None) -> None:
    check_float("topk_weights", weights)
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype != jnp.int32:
        raise ValueError(f"topk_ids must be int32 [T, top_k] with T={x.shape[0]}, not {ids.dtype} {ids.shape}")
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights.shape={weights.shape} must be topk_ids.shape={ids.shape}")
    if expert_map is not None and (expert_map.ndim != 1 or expert_map.dtype != jnp.int32):
        raise ValueError(f"expert_map must be int32 [global_E], not {expert_map.dtype} {expert_map.shape}")
