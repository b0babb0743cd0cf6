"""`fused_ffn`: one expert for all tokens, as shared experts are."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, get_activation
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.fused_moe.checks import check_experts, check_tokens
from pallas_kernels.fused_moe.gradient import Arrays, Static, run
from pallas_kernels.grouped_matmul.operands import activation_format_for, result_dtype
from pallas_kernels.implementations import Implementation


def fused_ffn(
    x: Float[Array, "T K"],
    w13: Float[Array, "1 S I K"] | QuantizedArray,
    w2: Float[Array, "1 H I"] | QuantizedArray,
    *,
    activation: Activation | str = "silu",
    activation_format: Format | str | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T H"]:
    """The output of one expert for every token: `fused_moe` without routing, and with its numerics and gradients.

    Args:
      x: bf16, f16 or f32 `[T, K]`.
      w13: `[1, 2, I, K]`, gate and up, or `[1, 1, I, K]` for an activation that is not gated; quantized or not.
      w2: `[1, H, I]`, quantized or not; H may differ from K.
      activation: An activation or its name.
      activation_format: Quantizes `x` and the activation's output; `None` leaves them as they are.
      out_dtype: bf16, f16 or f32. Default: that of `x`.
      implementation: Of the matmuls: `None` for the best one here, `"xla"`, `"mosaic_gpu"` or `"mosaic_tpu"`.

    Returns:
      `[T, H]`.

    Raises:
      TypeError: a dtype that is none of those above.
      ValueError: shapes that do not fit, an unknown format or activation.
      UnsupportedError: the named implementation cannot serve; differentiation by quantized weights.

    >>> import jax.numpy as jnp
    >>> fused_ffn(jnp.ones((3, 4)), jnp.ones((1, 2, 8, 4)), jnp.ones((1, 2, 8)), activation="relu2")[0].tolist()
    [512.0, 512.0]
    """
    activation = get_activation(activation)
    check_tokens(x)
    check_experts(x.shape[1], w13, w2, activation, None, None)
    if w2.shape[0] != 1:
        raise ValueError(f"{w2.shape=} must be [1, H, I]: one expert for all tokens")
    static = Static(
        activation=activation,
        activation_format=activation_format_for(x, activation_format),
        implementation=implementation,
        out_dtype=result_dtype(x, out_dtype),
    )
    return run(static, Arrays(x, w13, w2))
