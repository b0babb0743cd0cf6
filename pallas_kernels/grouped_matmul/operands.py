"""What matmuls ask of their operands, and the messages when they do not get it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Format, QuantizedArray, Role, get_format

REAL_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_float(name: str, x: jax.Array) -> None:
    """Raises TypeError unless `x` is bf16, f16 or f32."""
    if x.dtype not in REAL_DTYPES:
        raise TypeError(f"{name}.dtype={x.dtype} must be bfloat16, float16 or float32; codes go in a QuantizedArray")


def check_operand(name: str, x: jax.Array | QuantizedArray, axes: str, *, role: Role) -> None:
    """Raises unless `x` is real or quantized for this role, with as many axes as `axes` (such as "[M, K]") names."""
    if isinstance(x, QuantizedArray):
        if role not in x.format.roles:
            get_format(x.format, role=role)  # raises, and lists the formats that serve
    else:
        check_float(name, x)
    ndim = axes.count(",") + 1
    if x.ndim != ndim:
        raise ValueError(f"{name}.shape={x.shape} must be {axes}")


def activation_format_for(lhs: jax.Array | QuantizedArray, activation_format: Format | str | None) -> Format | None:
    """The format to quantize `lhs` to; ValueError where it is quantized already."""
    if activation_format is None:
        return None
    if isinstance(lhs, QuantizedArray):
        raise ValueError(
            f"activation_format={str(activation_format)!r} but the left side is quantized already, as "
            f"{lhs.format.name!r}; drop one of the two"
        )
    return get_format(activation_format, role="activation")


def result_dtype(lhs: jax.Array | QuantizedArray, out_dtype: Any = None) -> np.dtype[Any]:
    """The dtype of a result: as asked for, else that of `lhs`, else bf16."""
    if out_dtype is not None and np.dtype(out_dtype) not in REAL_DTYPES:
        raise TypeError(f"{out_dtype=} must be bfloat16, float16 or float32")
    default = jnp.bfloat16 if isinstance(lhs, QuantizedArray) else lhs.dtype
    return np.dtype(default if out_dtype is None else out_dtype)
