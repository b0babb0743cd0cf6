"""Codes of a tile in registers, the bits of `pallas_kernels.quantize.reference` in few instructions.

A number is rounded to the grid of its binade by adding and taking away 1.5 * 2**23 steps. The compilers may contract a
product and a sum into a fused multiply-add. So every product that meets a sum here is exact, or only guides a choice;
where a rounded product is to be rounded again, a minimum stands between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats import SMALLEST_NORMAL, Format
from pallas_kernels.quantize.quotient import Divisor, halves

_SIGN, _EXPONENT = np.int32(-(2**31)), np.int32(0x7F800000)
_MAGIC = 1.5 * 2**23


class Rounded(NamedTuple):
    """What became of numbers in units of their scale."""

    code: jax.Array  # e4m3, or in int32 integers and e2m1: the low 8 or 4 bits, those above mean nothing
    error: jax.Array  # f32, in units of the scale; of either sign


def multiplied(x: jax.Array, factor: jax.Array, fmt: Format) -> Rounded:
    """The codes of `x * factor`: of formats whose arithmetic is a product, `factor` spread over `x`."""
    units = x * factor
    if fmt.code == jnp.float8_e4m3fn:
        code = units.astype(fmt.code)  # saturates
        return Rounded(code, code.astype(jnp.float32) - units)
    if fmt.code == jnp.int8:
        clipped = jnp.minimum(jnp.maximum(units, np.float32(-fmt.code_max)), np.float32(fmt.code_max))
        shifted = clipped + np.float32(_MAGIC)
        return Rounded(lax.bitcast_convert_type(shifted, jnp.int32), (shifted - np.float32(_MAGIC)) - units)
    assert fmt.code == jnp.float4_e2m1fn
    magnitude = jnp.abs(units)
    clipped = jnp.minimum(magnitude, np.float32(fmt.code_max))
    binade, steps = _binade(clipped, 0), np.float32(_MAGIC / 2)
    shifted = clipped + binade * steps
    # A code is twice the exponent and the steps in the binade, which the sum has at bit 22 and at bit 0. Of the
    # constants the low four bits count: 11 is what the exponent of the magic number brings along.
    sign = jnp.where(x <= np.float32(-SMALLEST_NORMAL), np.int32(8 + 16 - 11), np.int32(16 - 11))
    bits = _bits(shifted)
    return Rounded(bits + (bits >> 22) + sign, (shifted + binade * -steps) - magnitude)


def divided(x: jax.Array, by: Divisor, fmt: Format) -> Rounded:
    """The codes of the IEEE quotient `x / scale` of bf16 numbers, the divisor spread over `x`.

    An approximate quotient finds the midpoint of two codes that is nearest, an exact residual says on which side of it
    the quotient lies. Within half a unit in the last place the quotient itself rounds to the midpoint, which goes to
    the even code; so does the sum below. Its reciprocal is too large, by 2**-20 or so, but nothing lies that near to
    the half unit: with M the 8 bits of `x`, N the 24 of the scale and B the odd number of at most 8 bits that the
    midpoint is, the residual `M * 2**s - B * N` would have to be a multiple of B, and is smaller.
    """
    m, n = x * by.power, by.mantissa
    q = m * by.reciprocal
    float_code = jnp.issubdtype(fmt.code, jnp.floating)
    # Of integers it is 1, but no constant: XLA:CPU would simplify (x + magic) - magic.
    binade, mantissa_bits = (_binade(q, -6), 3) if float_code else (_power(n), 0)
    magic = binade * np.float32(_MAGIC * 2.0**-mantissa_bits)
    half_step = binade * np.float32(2.0 ** -(mantissa_bits + 1))
    middle = (((q - half_step) + magic) - magic) + half_step
    high, low = halves(n)
    residual = (m - middle * high) - middle * low
    shifted = (middle + residual * (by.reciprocal * np.float32(1 + 2**-20))) + magic
    value = shifted - magic
    if not float_code:
        return Rounded(lax.bitcast_convert_type(shifted, jnp.int32), value - q)
    value = _from_bits((_bits(value) & ~_SIGN) | (_bits(x) & _SIGN))  # of a zero the sums lose the sign
    return Rounded(value.astype(fmt.code), value - q)


def to_e4m3(x: jax.Array) -> jax.Array:
    """Positive numbers, each the result of a minimum, rounded to what e4m3 has; a cast and back XLA:CPU would drop."""
    magic = _binade(x, -6) * np.float32(_MAGIC / 8)
    return (x + magic) - magic


def _binade(x: jax.Array, smallest: int) -> jax.Array:
    """The power of two in `x`, at least `2**smallest`."""
    return jnp.maximum(_power(x), np.float32(2.0**smallest))


def _power(x: jax.Array) -> jax.Array:
    return _from_bits(_bits(x) & _EXPONENT)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _from_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
