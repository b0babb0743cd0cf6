"""`fused_moe`: tokens and their experts in, the weighted sum of the experts' outputs out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation, get_activation
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.fused_moe import pipeline
from pallas_kernels.grouped_matmul.operands import activation_format_for, check_float, check_operand
from pallas_kernels.implementations import Implementation


def fused_moe(
    x: Float[Array, "T H"],
    w13: Float[Array, "E 2 I H"] | Float[Array, "E N H"] | QuantizedArray,
    w2: Float[Array, "E H I"] | QuantizedArray,
    topk_weights: Float[Array, "T top_k"],
    topk_ids: Int32[Array, "T top_k"],
    *,
    activation: Activation | str = "silu",
    activation_format: Format | str | None = None,
    w13_bias: Float[Array, "E 2 I"] | Float[Array, "E N"] | None = None,
    w2_bias: Float[Array, "E H"] | None = None,
    expert_map: Int32[Array, " global_E"] | None = None,
    apply_router_weight_on_input: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "T H"]:
    """Sends each token through its experts and adds up their outputs, weighted.

    Sums are f32. What is rounded to the dtype of `x`: the sums of the first matmul, the activation of them (computed
    in f32, and before it is quantized), and the result, once, after the weighted sum in f32.

    Args:
      x: bf16, f16 or f32 `[T, H]`.
      w13: `[E, 2, I, H]`, gate and up, or `[E, 2I, H]`, gate rows first; quantized or not.
      w2: `[E, H, I]`, quantized or not.
      topk_weights: `[T, top_k]`; used in f32.
      topk_ids: int32 `[T, top_k]`. An id outside of `[0, E)` contributes nothing.
      activation: A gated activation or its name.
      activation_format: Quantizes `x` and the activation's output; `None` leaves them as they are.
      w13_bias: `[E, 2, I]` or `[E, 2I]`, added in f32.
      w2_bias: `[E, H]`, added in f32.
      expert_map: int32 `[global_E]`: `topk_ids` are global ids, and this gives the place of each in `w13` and `w2`, or
        -1 for an expert that is elsewhere and contributes nothing.
      apply_router_weight_on_input: Multiplies `x` (rounded to its dtype) in place of the output; top_k must be 1.
      implementation: Of the matmuls: `None` for the best one here, `"xla"`, `"mosaic_gpu"` or `"mosaic_tpu"`.

    Returns:
      `[T, H]` in the dtype of `x`; the same bits from run to run.

    Raises:
      TypeError: a dtype that is none of those above.
      ValueError: shapes that do not fit, an unknown format or activation, router weights on the input with top_k > 1.
      UnsupportedError: the named implementation cannot serve; differentiation by `x`, the weights or biases.

    Source: numerics and arguments of vllm/model_executor/layers/fused_moe/.

    >>> import jax.numpy as jnp
    >>> x, w13, w2 = jnp.ones((3, 4)), jnp.ones((2, 2, 8, 4)), jnp.ones((2, 4, 8))
    >>> fused_moe(x, w13, w2, jnp.ones((3, 1)), jnp.array([[0], [1], [-1]]), activation="relu2")[:, 0].tolist()
    [512.0, 512.0, 0.0]
    """
    check_operand("w2", w2, "[E, H, I]", role="weight")
    check_operand("w13", w13, "[E, 2, I, H]" if w13.ndim == 4 else "[E, 2I, H]", role="weight")
    check_operand("x", x, "[T, H]", role="activation")
    if isinstance(x, QuantizedArray):
        raise TypeError("x must be a real array [T, H]; give activation_format to have it quantized")
    _check_weights(x, w13, w2)
    _check_bias("w13_bias", w13_bias, (w13.shape[:-1], (w13.shape[0], 2, w2.shape[2]), (w13.shape[0], 2 * w2.shape[2])))
    _check_bias("w2_bias", w2_bias, (w2.shape[:2],))
    _check_routing(x, topk_weights, topk_ids, expert_map)
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(f"apply_router_weight_on_input needs top_k 1, not {topk_ids.shape[1]}: {topk_ids.shape=}")
    return pipeline.fused_moe(
        x,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation=get_activation(activation),
        activation_format=activation_format_for(x, activation_format),
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        implementation=implementation,
    )


def _check_weights(x: jax.Array, w13: jax.Array | QuantizedArray, w2: jax.Array | QuantizedArray) -> None:
    num_experts, hidden, intermediate = w2.shape
    wanted = (num_experts, 2, intermediate, hidden), (num_experts, 2 * intermediate, hidden)
    if w13.shape not in wanted:
        raise ValueError(
            f"{w13.shape=} must be {wanted[0]} or {wanted[1]}, [E, 2, I, H] or [E, 2I, H], for {w2.shape=}"
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
