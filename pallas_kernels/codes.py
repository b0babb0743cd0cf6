"""Codes and scales of few bits as bytes: packing, e2m1 and E8M0.

Written with integer and comparison operations, so that every backend gives the same bits, whether or not it knows the
narrow types. Sources: OCP Microscaling Formats (MX) v1.0 for e2m1 and E8M0.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; bit 3 is the sign
E8M0_ONE, E8M0_NAN = 127, 255
# The midpoints between neighbours; a tie goes to the even code, so that half of them belong to the upper one.
_E2M1_ABOVE, _E2M1_FROM = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)


def pack(codes: Int32[Array, "*batch K"]) -> UInt8[Array, "*batch K/2"]:
    """Two 4-bit codes to a byte, the even index along K in the low half; bits above the fourth are dropped."""
    pairs = (codes & 0xF).astype(jnp.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(values: UInt8[Array, "*batch K/2"]) -> UInt8[Array, "*batch K"]:
    """The codes 0 to 15 in the order of K."""
    half = lax.broadcasted_iota(jnp.uint8, (*values.shape, 2), values.ndim)
    pairs = (jnp.broadcast_to(values[..., None], half.shape) >> (half << 2)) & 0xF
    return pairs.reshape(*values.shape[:-1], 2 * values.shape[-1])


def int4_values(codes: UInt8[Array, "*shape"]) -> Array:
    """int8 numbers of 4-bit two's complement codes."""
    return (codes ^ 8).astype(jnp.int8) - np.int8(8)


def e2m1_codes(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """The codes 0 to 15 of f32 numbers, rounded half to even; above 6 they saturate. NaN becomes +-0."""
    magnitude = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.int32)
    for bound in _E2M1_ABOVE:
        code += (magnitude > bound).astype(jnp.int32)
    for bound in _E2M1_FROM:
        code += (magnitude >= bound).astype(jnp.int32)
    sign = lax.bitcast_convert_type(x, jnp.uint32) >> 31
    return code | (sign.astype(jnp.int32) << 3)


def e2m1_values(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The f32 numbers of codes 0 to 15."""
    code = (codes & 7).astype(jnp.uint32)
    # exponent bits and the mantissa bit, moved to their places; only the code below the normal ones differs
    normal = lax.bitcast_convert_type((code + np.uint32(2 * 126)) << 22, jnp.float32)
    value = jnp.where(code < 2, code.astype(jnp.float32) * np.float32(0.5), normal)
    sign = (codes >> 3).astype(jnp.uint32) << 31
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.uint32) | sign, jnp.float32)


def e8m0_values(scales: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`2 ** (byte - 127)` in f32 for the bytes 1 to 254; 255 is NaN."""
    value = lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(scales == E8M0_NAN, np.float32(np.nan), value)
