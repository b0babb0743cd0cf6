"""From the largest magnitude of each block to its scale: the arithmetic of every format, for XLA and kernels alike."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import codes
from pallas_kernels.formats import E4M3_MAX, Format
from pallas_kernels.quantize.quotient import Divisor, divisor, quotient

_MANTISSA, _INFINITY = 0x007FFFFF, 0x7F800000  # bits of f32


class Scales(NamedTuple):
    """Of some blocks."""

    stored: jax.Array  # in the format's dtype
    by: jax.Array | Divisor  # what gives units of a scale: a factor in f32, or for IEEE quotients a divisor


def block_scales(
    amax: Float[Array, "*blocks"],
    fmt: Format,
    encode: Float[Array, "*#blocks"] | None = None,
) -> Scales:
    """The scales of blocks with these largest magnitudes.

    Args:
      amax: Largest magnitudes in f32; NaN and infinity give scales that are none.
      encode: Of two-level formats `encode_scale` of all that shares a second-level scale.
    """
    if fmt.two_level:
        assert encode is not None
        return _two_level(amax, fmt, encode)
    return (_power_of_two if fmt.arithmetic == "power_of_two" else _linear)(amax, fmt)


def encode_scale(amax: Float[Array, "*shape"], fmt: Format) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """G of a two-level format, which makes the scales of blocks fit into theirs, and the second-level scale."""
    amax = jnp.maximum(amax, np.float32(fmt.amax_floor))
    largest = jnp.float32(fmt.code_max * E4M3_MAX)
    second = quotient(amax, largest)
    return quotient(*((jnp.float32(1), second) if fmt.global_rows else (largest, amax))), second


def _linear(amax: jax.Array, fmt: Format) -> Scales:
    """A scale in f32 per block."""
    amax = jnp.maximum(amax, np.float32(fmt.amax_floor))
    code_max = jnp.float32(fmt.code_max)
    scales = jnp.maximum(quotient(amax, code_max), np.float32(fmt.scale_floor))
    if fmt.zero_scale is not None:
        scales = jnp.where(amax == 0, np.float32(fmt.zero_scale), scales)
    match fmt.arithmetic:
        case "divide":
            return Scales(scales, divisor(scales))
        case "reciprocal":
            return Scales(scales, quotient(jnp.float32(1), scales))
        case _:
            return Scales(scales, quotient(code_max, amax))


def _power_of_two(amax: jax.Array, fmt: Format) -> Scales:
    """An exponent per block, from the bits: backends do not agree about logarithms."""
    limit, floor = (int(np.float32(value).view(np.int32)) for value in (fmt.amax_limit, fmt.amax_floor))
    bits = jnp.maximum(lax.bitcast_convert_type(amax, jnp.int32), np.int32(floor))
    above = (bits & _MANTISSA) > (limit & _MANTISSA)
    exponent = (bits >> 23) - (limit >> 23) + above.astype(jnp.int32)
    exponent = jnp.minimum(jnp.maximum(exponent, -126), 127)
    exponent = jnp.where(amax == 0, 0, exponent)
    stored = jnp.where(bits >= _INFINITY, codes.E8M0_NAN, exponent + codes.E8M0_ONE)
    inverse = lax.bitcast_convert_type((codes.E8M0_ONE - exponent) << 23, jnp.float32)
    return Scales(stored.astype(jnp.uint8), inverse)


def _two_level(amax: jax.Array, fmt: Format, encode: jax.Array) -> Scales:
    """A scale in e4m3 per block, under one in f32."""
    # The barrier keeps the order of the two products; the other one the cast, which XLA:GPU would drop.
    units = lax.optimization_barrier(amax * np.float32(1 / fmt.code_max))
    stored = jnp.clip(encode * units, -E4M3_MAX, E4M3_MAX).astype(fmt.scale_dtype)
    stored = lax.optimization_barrier(stored)
    real = stored.astype(jnp.float32)
    is_zero = real == 0
    inverse = quotient(encode, jnp.where(is_zero, np.float32(1), real))
    # The barrier keeps the quotient from being computed anew for every element.
    return Scales(stored, lax.optimization_barrier(jnp.where(is_zero, np.float32(0), inverse)))
