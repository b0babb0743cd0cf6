"""Quantization in XLA: the definition of every format, exact on each backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.formats import SMALLEST_NORMAL, Format, QuantizedArray
from pallas_kernels.quantize.quotient import quotient

AxisNames = tuple[str, ...]


def quantize(
    x: Float[Array, "*batch N K"], fmt: Format, axis_names: tuple[AxisNames, AxisNames] = ((), ())
) -> QuantizedArray:
    """Quantizes `x`; see `pallas_kernels.quantize`."""
    x = x.astype(jnp.float32)
    x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, jnp.zeros_like(x), x)  # backends disagree about subnormals
    amax = _block_amax(x, fmt)
    for spans, names in zip(fmt.spans(), axis_names, strict=True):
        if spans and names:
            amax = lax.pmax(amax, names)
    amax = jnp.maximum(amax, np.float32(fmt.amax_floor))
    scales = jnp.maximum(quotient(amax, jnp.float32(fmt.code_max)), np.float32(fmt.scale_floor))
    if fmt.zero_scale is not None:
        scales = jnp.where(amax == 0, np.float32(fmt.zero_scale), scales)
    match fmt.arithmetic:
        case "divide":
            codes = quotient(x, _spread(scales, x, fmt))
        case "reciprocal":
            codes = x * _spread(quotient(jnp.ones_like(scales), scales), x, fmt)
        case "inverse_amax":
            codes = x * _spread(quotient(jnp.full_like(amax, fmt.code_max), amax), x, fmt)
    codes = jnp.clip(codes, -fmt.code_max, fmt.code_max)  # XLA's cast to e4m3fn makes NaN of anything above 464
    if jnp.issubdtype(fmt.storage, jnp.integer):
        codes = jnp.round(codes)  # half to even, as the float cast does
    # XLA:GPU would drop a cast to a small float that is cast back at once: nothing would be rounded.
    values = lax.optimization_barrier(codes.astype(fmt.storage))
    return QuantizedArray(values=values, scales=jnp.swapaxes(scales, -1, -2), format=fmt)


def _block_amax(x: jax.Array, fmt: Format) -> jax.Array:
    """Largest magnitude per block, `[..., N blocks, K blocks]`; ragged ends are filled with zeros.

    Taken of the bits, which order as the magnitudes do with NaN on top: XLA:CPU's maximum of floats drops NaN.
    """
    *lead, n, k = x.shape
    blocks_n, blocks_k = fmt.grid(n, k)
    bn, bk = fmt.block[0] or n, fmt.block[1] or k
    bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
    bits = jnp.pad(bits, [(0, 0)] * len(lead) + [(0, blocks_n * bn - n), (0, blocks_k * bk - k)])
    highest = jnp.max(bits.reshape(*lead, blocks_n, bn, blocks_k, bk), axis=(-3, -1), initial=0)
    return lax.bitcast_convert_type(highest, jnp.float32)


def _spread(blocks: jax.Array, x: jax.Array, fmt: Format) -> jax.Array:
    """One value per block -> one per element of `x` (`[..., N, K]`)."""
    *lead, n, k = x.shape
    blocks_n, blocks_k = fmt.grid(n, k)
    bn, bk = fmt.block[0] or n, fmt.block[1] or k
    wide = jnp.broadcast_to(blocks[..., :, None, :, None], (*lead, blocks_n, bn, blocks_k, bk))
    return wide.reshape(*lead, blocks_n * bn, blocks_k * bk)[..., :n, :k]
