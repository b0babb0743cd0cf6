"""Tokens on Hopper: which calls the kernel serves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.hopper import unsupported_here
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.quotient import Divisor
from pallas_kernels.quantize.scales import block_scales
from pallas_kernels.quantize.tokens import TokensCall

__all__ = ["run", "unsupported"]

GROUP = 128  # of K: elements that share a scale, where not all of a row do
CODES = (jnp.float8_e4m3fn, jnp.int8)


def unsupported(call: TokensCall) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: TokensCall) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    fmt, k = call.format, call.x.shape[1]
    if not call.x.size:
        return "there are no tokens"
    if fmt is None:
        fits = call.x.dtype.itemsize == 2 and k % 8 == 0 and k >= 128
        return (
            None if fits else f"it copies rows of 16 bits, at least 128 and a multiple of 8; not {call.x.dtype}, {k=}"
        )
    if fmt.code not in CODES or fmt.two_level or fmt.scale_dtype != np.float32:
        return f"it makes codes of 8 bits with scales in float32, not {fmt}"
    if call.x.dtype != jnp.bfloat16:
        return f"it quantizes bfloat16, not {call.x.dtype}"
    if fmt.block not in ((1, GROUP), (1, None), (None, None)):
        return f"it knows scales of rows, of {GROUP} elements of one, or of the whole; not {fmt.block}"
    unit = 4 * GROUP if fmt.block == (1, GROUP) else GROUP
    return f"K={k} must be a multiple of {unit}" if k % unit else None


def run(call: TokensCall) -> jax.Array | QuantizedArray:
    """Serves a call that `unsupported` let pass."""
    from pallas_kernels.quantize.mosaic_gpu.tokens.kernel import send

    fmt = call.format
    num_rows = call.x.shape[0] if call.places is None else call.places.size
    factor, whole = whole_matrix_scale(call.x, fmt)
    values, scales = send(call.x, call.places, factor, fmt=fmt, num_rows=num_rows, by_reciprocal=call.by_reciprocal)
    return rows_of(values, scales, whole, fmt)


def whole_matrix_scale(x: jax.Array, fmt: Format | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Where one scale spans all tokens: what numbers are multiplied with `[1]`, and the scale `[1, 1]`."""
    if fmt is None or not fmt.whole_matrix:
        return None, None
    found = block_scales(reference.matrix_amax(x).reshape(1), fmt)
    assert not isinstance(found.by, Divisor)
    return found.by, found.stored.reshape(1, 1)


def rows_of(
    values: jax.Array, scales: jax.Array | None, whole: jax.Array | None, fmt: Format | None
) -> jax.Array | QuantizedArray:
    """Copies, or codes with their scales."""
    if fmt is None:
        return values
    found = scales if whole is None else whole
    assert found is not None
    return QuantizedArray(values=values, scales=found, format=fmt)
