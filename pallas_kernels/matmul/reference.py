"""Dense matmul in XLA."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul.product import no_gradient, operand, product
from pallas_kernels.quantize import fake_quantize, quantize

Matrix = jax.Array | QuantizedArray


def matmul(
    x: Float[Array, "M K"] | QuantizedArray,
    w: Float[Array, "N K"] | QuantizedArray,
    bias: jax.Array | None,
    activation_format: Format | None,
    out_dtype: np.dtype[Any],
) -> Float[Array, "M N"]:
    """See `pallas_kernels.matmul`."""
    x, w = (jax.tree.map(no_gradient, a) if isinstance(a, QuantizedArray) else jnp.asarray(a) for a in (x, w))
    if activation_format is None or isinstance(x, QuantizedArray):
        return _multiply(x, w, bias, out_dtype)
    return _quantize_and_multiply(activation_format, out_dtype, x, w, bias)


def _multiply(x: Matrix, w: Matrix, bias: jax.Array | None, out_dtype: np.dtype[Any]) -> jax.Array:
    total = product(operand(x), operand(w))
    if bias is not None:
        total = total + bias.astype(jnp.float32)[None]
    return total.astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _quantize_and_multiply(
    fmt: Format, out_dtype: np.dtype[Any], x: jax.Array, w: Matrix, bias: jax.Array | None
) -> jax.Array:
    return _multiply(quantize(x, fmt), w, bias, out_dtype)


Operands = tuple[jax.Array, Matrix, jax.Array | None]


def _forward(fmt: Format, out_dtype: np.dtype[Any], *operands: Any) -> tuple[jax.Array, Operands]:
    return _quantize_and_multiply(fmt, out_dtype, *operands), operands


def _backward(fmt: Format, out_dtype: np.dtype[Any], operands: Operands, by_out: jax.Array) -> tuple[Any, Any, Any]:
    """The gradient on dequantized codes: it passes straight through the rounding."""
    x, w, bias = operands

    def run(x: jax.Array, real: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return _multiply(fake_quantize(x, fmt), w if real is None else real, bias, out_dtype)

    by_x, by_w, by_bias = jax.vjp(run, x, w if isinstance(w, jax.Array) else None, bias)[1](by_out)
    return by_x, by_w, by_bias


_quantize_and_multiply.defvjp(_forward, _backward)
