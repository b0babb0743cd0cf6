"""The IEEE f32 quotient on every backend, jitted or not.

XLA does not promise one: on CPU it turns a division by a broadcast value into a multiplication by the reciprocal, on
GPU it emits an approximate divide. A weight's codes must be the same bits everywhere, so the quotient is corrected
twice: a Newton step brings it to one of the two nearest floats, and the residual of that one, compared with half a
unit, says which. Residuals are exact: factors are split into 12-bit halves, so no product rounds and a contraction
into a fused multiply-add changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_MANTISSA = np.uint32(0x007FFFFF)
_EXPONENT = np.uint32(0x7F800000)
_ONE = np.uint32(0x3F800000)
_SIGN = np.uint32(0x80000000)
_HIGH_HALF = np.uint32(0xFFFFF000)  # 12 significant bits stay


def quotient(x: Float[Array, "*shape"], scale: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """`x / scale` in f32, correctly rounded (half to even).

    Args:
      x: Finite; magnitudes below 2**-126 count as zero.
      scale: Positive, finite and normal. Broadcasts against `x`.

    Returns:
      The quotient; below 2**-126 it may be flushed to zero. NaN and infinities in `x` give NaN.
    """
    x = x.astype(jnp.float32)
    scale = jnp.broadcast_to(scale.astype(jnp.float32), jnp.broadcast_shapes(x.shape, scale.shape))
    x = jnp.broadcast_to(x, scale.shape)
    x_bits, s_bits = (lax.bitcast_convert_type(v, jnp.uint32) for v in (x, scale))
    m, n = (_from_bits((bits & _MANTISSA) | _ONE) for bits in (x_bits, s_bits))  # both in [1, 2)
    exponent = _exponent(x_bits) - _exponent(s_bits)

    q = _divide(m, n)
    q = q + _divide(_residual(m, n, q), n)  # a neighbour of the true quotient, which lies at most about half a unit off
    unit = jnp.where(q < 1, np.float32(2**-24), np.float32(2**-23))
    residual, half = _residual(m, n, q), n * (unit * np.float32(0.5))
    step = (residual > half).astype(jnp.float32) - (residual < -half).astype(jnp.float32)  # a tie is impossible
    q = q + step * unit

    # 2**exponent in two factors: the exponent alone may leave the range of a normal number.
    first = exponent >> 1
    q = (q * _power_of_two(first)) * _power_of_two(exponent - first)
    q = _from_bits(lax.bitcast_convert_type(q, jnp.uint32) | (x_bits & _SIGN))
    q = jnp.where(jnp.abs(x) < np.finfo(np.float32).tiny, np.float32(0), q)
    return jnp.where(_is_finite(x) & _is_finite(scale), q, np.float32(np.nan))


class Divisor(NamedTuple):
    """What is shared by all quotients with the same divisor: each field may be spread over them."""

    mantissa: jax.Array  # n in [1, 2)
    reciprocal: jax.Array  # of n, within a few units in the last place
    power: jax.Array  # 2**-exponent, so that scale * power = n


def divisor(scale: Float[Array, "*shape"]) -> Divisor:
    """Of a positive, finite and normal f32 `scale` below 2**127; NaN and infinity stay NaN."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    mantissa = _from_bits((bits & _MANTISSA) | _ONE)
    power = _power_of_two(-(_exponent(bits) - 127))
    power = jnp.where(_is_finite(scale), power, np.float32(np.nan))
    # The barrier keeps them from being computed anew for every element.
    return Divisor(*lax.optimization_barrier((mantissa, _divide(np.float32(1), mantissa), power)))


def divide(x: Float[Array, "*shape"], by: Divisor) -> Float[Array, "*shape"]:
    """`quotient(x, scale)`, without a division per element; exact from 2**-60 on, below that within a unit or zero.

    Codes are rounded from far larger quotients.

    Markstein's scheme (IBM J. Res. Dev. 34, 1990) with exact residuals in the place of fused multiply-adds.
    """
    m, n = x * by.power, by.mantissa
    q = m * by.reciprocal
    q = q + _residual(m, n, q) * by.reciprocal
    magnitude = lax.bitcast_convert_type(q, jnp.uint32) & _EXPONENT
    unit = _from_bits(magnitude) * np.float32(2**-23)
    residual, half = _residual(m, n, q), n * (unit * np.float32(0.5))
    step = (residual > half).astype(jnp.float32) - (residual < -half).astype(jnp.float32)
    bits = lax.bitcast_convert_type(q + step * unit, jnp.uint32)  # of a zero the sums lose the sign
    return _from_bits(bits | (lax.bitcast_convert_type(x, jnp.uint32) & _SIGN))


def _divide(m: jax.Array | np.float32, n: jax.Array) -> jax.Array:
    """The quotient within a few units in the last place, however the backend divides."""
    return m / n


def _residual(m: jax.Array, n: jax.Array, q: jax.Array) -> jax.Array:
    """`m - q * n`, exact where `q` is within one unit of the quotient."""
    (q_high, q_low), (n_high, n_low) = halves(q), halves(n)
    return (((m - q_high * n_high) - q_high * n_low) - q_low * n_high) - q_low * n_low


def _is_finite(v: jax.Array) -> jax.Array:
    return jnp.abs(v) < np.float32(np.inf)  # a kernel has no `isfinite`


def _from_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _exponent(bits: jax.Array) -> jax.Array:
    return ((bits >> 23) & np.uint32(0xFF)).astype(jnp.int32)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return _from_bits((exponent + 127).astype(jnp.uint32) << 23)


def halves(v: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Two numbers of 12 significant bits at most that add up to `v`: their products with such numbers are exact."""
    high = _from_bits(lax.bitcast_convert_type(v, jnp.uint32) & _HIGH_HALF)
    return high, v - high
