"""Dense matmul in XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul.product import no_gradient, operand, product
from pallas_kernels.quantize import quantize


def matmul(
    x: Float[Array, "M K"] | QuantizedArray,
    w: Float[Array, "N K"] | QuantizedArray,
    bias: jax.Array | None,
    activation_format: Format | None,
    out_dtype: np.dtype[Any],
) -> Float[Array, "M N"]:
    """See `pallas_kernels.matmul`."""
    if activation_format is not None and not isinstance(x, QuantizedArray):
        x = quantize(no_gradient(x), activation_format)
    total = product(operand(x), operand(w))
    if bias is not None:
        total = total + bias.astype(jnp.float32)[None]
    return total.astype(out_dtype)
