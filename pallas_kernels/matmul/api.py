"""`matmul`: the dense case of `grouped_matmul`, all rows in one group."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul.operands import activation_format_for, check_float, check_operand, result_dtype
from pallas_kernels.implementations import Implementation, choose
from pallas_kernels.matmul import reference


def matmul(
    x: Float[Array, "M K"] | QuantizedArray,
    w: Float[Array, "N K"] | QuantizedArray,
    *,
    bias: Float[Array, " N"] | None = None,
    activation_format: Format | str | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """`x @ w.T + bias` with f32 sums, rounded once.

    Args:
      x: bf16, f16 or f32 `[M, K]`, or quantized.
      w: Weights `[N, K]`, quantized or not.
      bias: `[N]`, added in f32.
      activation_format: Quantizes `x` to this first.
      implementation: `None` or `"xla"`.

    Returns:
      `[M, N]` in the dtype of `x`, bf16 where it is quantized. It is differentiable by real operands: the gradient
      passes straight through the rounding of `activation_format`.

    Raises:
      TypeError: a dtype that is none of those above.
      ValueError: shapes that do not fit, an unknown format, a quantized `x` with `activation_format`.
      UnsupportedError: the named implementation cannot serve; differentiation by what is quantized.

    Source: the definition in `pallas_kernels.quantize`, multiplied out.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[3.0, 7.0]]
    """
    check_operand("x", x, "[M, K]", role="activation")
    check_operand("w", w, "[N, K]", role="weight")
    n, k = w.shape
    if x.shape[1] != k:
        raise ValueError(f"{x.shape=} and {w.shape=} must have the same K as their last axis")
    if bias is not None:
        check_float("bias", bias)
        if bias.shape != (n,):
            raise ValueError(f"{bias.shape=} must be [N] = {(n,)}")
    choose("matmul", implementation, {})
    return reference.matmul(x, w, bias, activation_format_for(x, activation_format), result_dtype(x))
