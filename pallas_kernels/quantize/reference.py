"""Quantization in XLA: the definition of every format, exact on each backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import codes
from pallas_kernels.blocks import by_row, in_blocks, joined
from pallas_kernels.devices import target_device
from pallas_kernels.formats import SMALLEST_NORMAL, Format, QuantizedArray
from pallas_kernels.quantize.quotient import Divisor, divide
from pallas_kernels.quantize.scales import block_scales, encode_scale

AxisNames = tuple[str, ...]
LANES = 16  # elements of f32 in the widest vectors of CPUs


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
    n, k = x.shape[-2:]
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
    bn, bk = fmt.block
    x = in_blocks(x, bk)
    if isinstance(scales.by, Divisor):
        units = divide(x, Divisor(*(by_row(part, n, bn) for part in scales.by)))
    else:
        units = x * by_row(scales.by, n, bn)
    values = joined(_stored(units, fmt), k // fmt.codes_per_element)
    return QuantizedArray(values=values, scales=jnp.swapaxes(scales.stored, -1, -2), global_scale=second, format=fmt)


def matrix_amax(x: Float[Array, "*batch N K"]) -> Float[Array, "*batch"]:
    """Largest magnitude of each matrix; see `pallas_kernels.quantize.matrix_amax`."""
    return _block_amax(_without_subnormals(x), None, None)[..., 0, 0]


def _stored(units: jax.Array, fmt: Format) -> jax.Array:
    """The codes of numbers in units of their scale, as they are stored."""
    units = jnp.clip(units, -fmt.code_max, fmt.code_max)  # XLA's cast to e4m3fn makes NaN of anything above 464
    if fmt.codes_per_element == 1:
        # half to even, as the float cast does
        is_integer = jnp.issubdtype(fmt.code, jnp.integer)
        values = jnp.round(units).astype(fmt.code) if is_integer else codes.e4m3_codes(units)
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
    # The barrier keeps XLA:CPU from taking both maxima in one loop, which is slower.
    of_rows: jax.Array = lax.optimization_barrier(_largest(in_blocks(x, bk), (-1,))[..., 0])  # [..., N, K blocks]
    if bn == 1:
        return of_rows
    of_columns = in_blocks(jnp.swapaxes(of_rows, -1, -2), bn)  # [..., K blocks, N blocks, bn]
    return jnp.swapaxes(_largest(of_columns, (-1,))[..., 0], -1, -2)


def _largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Largest magnitude over these axes, which stay with size 1.

    Taken of the bits, which order as the magnitudes do with NaN on top: XLA:CPU's maximum of floats drops NaN.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
    *lead, size = x.shape
    # XLA:CPU vectorizes the maximum over any axis but the last; others may keep what lies between in memory.
    if target_device().platform == "cpu" and axes == (-1,) and size % (8 * LANES) == 0:
        bits = jnp.max(bits.reshape(*lead, size // (8 * LANES), 8, LANES), axis=-2, initial=0).reshape(*lead, size // 8)
    return lax.bitcast_convert_type(jnp.max(bits, axis=axes, keepdims=True, initial=0), jnp.float32)
