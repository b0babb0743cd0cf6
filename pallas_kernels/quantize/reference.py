"""Quantization in XLA: the definition of every format, exact on each backend."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import codes
from pallas_kernels.formats import SMALLEST_NORMAL, Format, QuantizedArray
from pallas_kernels.quantize.quotient import Divisor, divide
from pallas_kernels.quantize.scales import block_scales, encode_scale

AxisNames = tuple[str, ...]


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
    blocks, encode, second = _block_amax(x, *fmt.block), None, None
    if fmt.two_level:
        whole = _block_amax(x, fmt.global_rows, None) if amax is None else amax[..., None, None]
        encode, second = encode_scale(_shared(whole, fmt, shared_axes, axis_names), fmt)
        second = second[..., 0] if fmt.global_rows else second[..., 0, 0]
    else:
        if fmt.whole_matrix and amax is not None:
            blocks = amax[..., None, None]
        blocks = _shared(blocks, fmt, shared_axes, axis_names)
    scales = block_scales(blocks, fmt, encode)
    if isinstance(scales.by, Divisor):
        units = divide(x, Divisor(*(_spread(part, x, fmt.block) for part in scales.by)))
    else:
        units = x * _spread(scales.by, x, fmt.block)
    return QuantizedArray(
        values=_stored(units, fmt), scales=jnp.swapaxes(scales.stored, -1, -2), global_scale=second, format=fmt
    )


def matrix_amax(x: Float[Array, "*batch N K"]) -> Float[Array, "*batch"]:
    """Largest magnitude of each matrix; see `pallas_kernels.quantize.matrix_amax`."""
    return _block_amax(_without_subnormals(x), None, None)[..., 0, 0]


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
