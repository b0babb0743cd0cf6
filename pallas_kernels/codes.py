"""Codes and scales of few bits as bytes: packing, e2m1, e4m3 and E8M0.

Written with integer and comparison operations, so that every backend gives the same bits, whether or not it knows the
narrow types. Sources: OCP Microscaling Formats (MX) v1.0 for e2m1 and
E8M0; Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433), for e4m3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int32, UInt8

from pallas_kernels.devices import target_device

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; bit 3 is the sign
E8M0_ONE, E8M0_NAN = 127, 255
_E4M3_BIAS, _E4M3_NAN = 7, 0x7F
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


@jax.custom_jvp
def e4m3_codes(x: Float[Array, "*shape"]) -> Float8e4m3fn[Array, "*shape"]:
    """f32 numbers of at most 448, or NaN, rounded half to even: as `astype(float8_e4m3fn)`.

    That is one instruction of a GPU; XLA:CPU takes fifteen times as long for it as for the bits.
    """
    if target_device().platform != "cpu":
        return x.astype(jnp.float8_e4m3fn)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    to_even = np.uint32(0x7FFFF) + ((magnitude >> 20) & 1)
    normal = ((magnitude + to_even) >> 20) - np.uint32((127 - _E4M3_BIAS) << 3)
    # Next to 2**14 f32 numbers are as far apart as subnormal codes: the sum rounds.
    summed = lax.bitcast_convert_type(magnitude, jnp.float32) + np.float32(2**14)
    subnormal = lax.bitcast_convert_type(summed, jnp.uint32) - np.float32(2**14).view(np.uint32)
    code = jnp.where(magnitude < np.float32(2.0 ** (1 - _E4M3_BIAS)).view(np.uint32), subnormal, normal)
    code = jnp.where(magnitude > np.float32(np.inf).view(np.uint32), np.uint32(_E4M3_NAN), code)
    signed = code | ((bits >> 24) & np.uint32(0x80))
    return lax.bitcast_convert_type(signed.astype(jnp.uint8), jnp.float8_e4m3fn)


@e4m3_codes.defjvp
def _e4m3_codes_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return e4m3_codes(*primals), tangents[0].astype(jnp.float8_e4m3fn)  # as of the cast


@jax.custom_jvp
def e4m3_values(codes: Float8e4m3fn[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The f32 numbers: as `astype(float32)`, which XLA:CPU takes twice as long for."""
    if target_device().platform != "cpu":
        return codes.astype(jnp.float32)
    code = lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint32)
    magnitude = code & 0x7F
    normal = lax.bitcast_convert_type((magnitude << 20) + np.uint32((127 - _E4M3_BIAS) << 23), jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * np.float32(2.0 ** (1 - _E4M3_BIAS - 3))
    value = jnp.where(magnitude < 8, subnormal, normal)
    value = jnp.where(magnitude == _E4M3_NAN, np.float32(np.nan), value)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.uint32) | ((code & 0x80) << 24), jnp.float32)


@e4m3_values.defjvp
def _e4m3_values_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return e4m3_values(*primals), tangents[0].astype(jnp.float32)


def e8m0_values(scales: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`2 ** (byte - 127)` in f32 for the bytes 1 to 254; 255 is NaN."""
    value = lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(scales == E8M0_NAN, np.float32(np.nan), value)
