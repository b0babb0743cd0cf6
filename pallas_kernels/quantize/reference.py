"""Quantization in XLA: the definition of every format, exact on each backend."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import codes
from pallas_kernels.formats import E4M3_MAX, SMALLEST_NORMAL, Format, QuantizedArray
from pallas_kernels.quantize.quotient import Divisor, divide, divisor, quotient

AxisNames = tuple[str, ...]
_MANTISSA, _INFINITY = 0x007FFFFF, 0x7F800000  # bits of f32


def quantize(
    x: Float[Array, "*batch N K"],
    fmt: Format,
    *,
    shared_axes: tuple[int, ...] = (),
    axis_names: tuple[AxisNames, AxisNames] = ((), ()),
    amax: Float[Array, "*batch"] | None = None,
) -> QuantizedArray:
    """Quantizes `x`; see `pallas_kernels.quantize`."""
    x = _without_subnormals(x)
    blocks = _block_amax(x, *fmt.block)
    if fmt.two_level:
        whole = _block_amax(x, fmt.global_rows, None) if amax is None else amax[..., None, None]
        return _two_level(x, fmt, blocks, _shared(whole, fmt, shared_axes, axis_names))
    if fmt.block == (None, None) and amax is not None:
        blocks = amax[..., None, None]
    blocks = _shared(blocks, fmt, shared_axes, axis_names)
    return (_power_of_two if fmt.arithmetic == "power_of_two" else _linear)(x, fmt, blocks)


def matrix_amax(x: Float[Array, "*batch N K"]) -> Float[Array, "*batch"]:
    """Largest magnitude of each matrix; see `pallas_kernels.quantize.matrix_amax`."""
    return _block_amax(_without_subnormals(x), None, None)[..., 0, 0]


def _linear(x: jax.Array, fmt: Format, amax: jax.Array) -> QuantizedArray:
    """A scale in f32 per block."""
    amax = jnp.maximum(amax, np.float32(fmt.amax_floor))
    scales = jnp.maximum(quotient(amax, jnp.float32(fmt.code_max)), np.float32(fmt.scale_floor))
    if fmt.zero_scale is not None:
        scales = jnp.where(amax == 0, np.float32(fmt.zero_scale), scales)
    match fmt.arithmetic:
        case "divide":
            units = divide(x, Divisor(*(_spread(part, x, fmt.block) for part in divisor(scales))))
        case "reciprocal":
            units = x * _spread(quotient(jnp.ones_like(scales), scales), x, fmt.block)
        case _:
            units = x * _spread(quotient(jnp.full_like(amax, fmt.code_max), amax), x, fmt.block)
    return QuantizedArray(values=_stored(units, fmt), scales=jnp.swapaxes(scales, -1, -2), format=fmt)


def _power_of_two(x: jax.Array, fmt: Format, amax: jax.Array) -> QuantizedArray:
    """An exponent per block, from the bits: backends do not agree about logarithms."""
    limit, floor = (int(np.float32(value).view(np.int32)) for value in (fmt.amax_limit, fmt.amax_floor))
    bits = jnp.maximum(lax.bitcast_convert_type(amax, jnp.int32), floor)
    above = (bits & _MANTISSA) > (limit & _MANTISSA)
    exponent = (bits >> 23) - (limit >> 23) + above.astype(jnp.int32)
    exponent = jnp.where(amax == 0, 0, jnp.clip(exponent, -126, 127))
    scales = jnp.where(bits >= _INFINITY, codes.E8M0_NAN, exponent + codes.E8M0_ONE).astype(jnp.uint8)
    inverse = lax.bitcast_convert_type((codes.E8M0_ONE - exponent) << 23, jnp.float32)
    units = x * _spread(inverse, x, fmt.block)
    return QuantizedArray(values=_stored(units, fmt), scales=jnp.swapaxes(scales, -1, -2), format=fmt)


def _two_level(x: jax.Array, fmt: Format, amax: jax.Array, whole: jax.Array) -> QuantizedArray:
    """A scale in e4m3 per block and one in f32 over them; `whole` is the amax that belongs to the latter."""
    whole = jnp.maximum(whole, np.float32(fmt.amax_floor))
    largest = jnp.float32(fmt.code_max * E4M3_MAX)
    encode = quotient(jnp.broadcast_to(largest, whole.shape), whole)
    # The barrier keeps the order of the two products; the other one the cast, which XLA:GPU would drop.
    units = lax.optimization_barrier(amax * np.float32(1 / fmt.code_max))
    scales = jnp.clip(encode * units, -E4M3_MAX, E4M3_MAX).astype(fmt.scale_dtype)
    scales = lax.optimization_barrier(scales)
    real = scales.astype(jnp.float32)
    inverse = jnp.where(real == 0, np.float32(0), quotient(encode, jnp.where(real == 0, np.float32(1), real)))
    second = quotient(whole, largest)[..., 0]
    return QuantizedArray(
        values=_stored(x * _spread(inverse, x, fmt.block), fmt),
        scales=jnp.swapaxes(scales, -1, -2),
        global_scale=second if fmt.global_rows else second[..., 0],
        format=fmt,
    )


def _stored(units: jax.Array, fmt: Format) -> jax.Array:
    """The codes of numbers in units of their scale, as they are stored."""
    units = jnp.clip(units, -fmt.code_max, fmt.code_max)  # XLA's cast to e4m3fn makes NaN of anything above 464
    if fmt.codes_per_element == 1:
        # half to even, as the float cast does
        values = (jnp.round(units) if jnp.issubdtype(fmt.code, jnp.integer) else units).astype(fmt.code)
    elif jnp.issubdtype(fmt.code, jnp.integer):
        values = codes.pack(jnp.round(units).astype(jnp.int32))
    else:
        values = codes.pack(codes.e2m1_codes(units))
    # XLA:GPU would drop a cast to a small float that is cast back at once: nothing would be rounded.
    stored: jax.Array = lax.optimization_barrier(values)
    return stored


def _without_subnormals(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, jnp.zeros_like(x), x)  # backends disagree about subnormals


def _shared(
    amax: jax.Array, fmt: Format, shared_axes: tuple[int, ...], axis_names: tuple[AxisNames, AxisNames]
) -> jax.Array:
    """The maxima over all that shares a scale beyond a block: `shared_axes` and devices."""
    if fmt.whole_matrix and shared_axes:
        amax = jnp.broadcast_to(_largest(amax, shared_axes), amax.shape)
    for spans, names in zip(fmt.spans(), axis_names, strict=True):
        if spans and names:
            amax = lax.pmax(amax, names)
    return amax


def _block_amax(x: jax.Array, bn: int | None, bk: int | None) -> jax.Array:
    """Largest magnitude per block, `[..., N blocks, K blocks]`; ragged ends are filled with zeros."""
    *lead, n, k = x.shape
    (blocks_n, bn), (blocks_k, bk) = (
        (1, size) if block is None else (math.ceil(size / block), block) for size, block in ((n, bn), (k, bk))
    )
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, blocks_n * bn - n), (0, blocks_k * bk - k)])
    return _largest(x.reshape(*lead, blocks_n, bn, blocks_k, bk), (-3, -1))[..., 0, :, 0]


def _largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Largest magnitude over these axes, which stay with size 1.

    Taken of the bits, which order as the magnitudes do with NaN on top: XLA:CPU's maximum of floats drops NaN.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
    return lax.bitcast_convert_type(jnp.max(bits, axis=axes, keepdims=True, initial=0), jnp.float32)


def _spread(blocks: jax.Array, x: jax.Array, block: tuple[int | None, int | None]) -> jax.Array:
    """One value per block -> one per element of `x` (`[..., N, K]`)."""
    *lead, n, k = x.shape
    *_, blocks_n, blocks_k = blocks.shape
    bn, bk = block[0] or n, block[1] or k
    wide = jnp.broadcast_to(blocks[..., :, None, :, None], (*lead, blocks_n, bn, blocks_k, bk))
    return wide.reshape(*lead, blocks_n * bn, blocks_k * bk)[..., :n, :k]
