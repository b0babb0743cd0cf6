"""Quantization of bf16 weights on NVIDIA Hopper, in one pass over the source and in place.

Memory binds, so a source is read once (twice where a scale spans a whole matrix: XLA finds its largest magnitude
first), and what the load report wants to know falls out on the way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.formats import QuantizedArray
from pallas_kernels.hopper import unsupported_here
from pallas_kernels.quantize.into import IntoCall, QuantizationLoss

__all__ = ["run", "unsupported"]

ROWS, COLUMNS = 128, 128  # whole tiles only


def unsupported(call: IntoCall) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: IntoCall) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    *_, n, k = call.x.shape
    if call.x.dtype != jnp.bfloat16:
        return f"it reads bfloat16, not {call.x.dtype}"
    if not call.x.size:
        return "there is nothing to quantize"
    if n % ROWS or k % COLUMNS:
        return f"N={n} and K={k} must be multiples of {ROWS} and {COLUMNS}"
    return None


def run(call: IntoCall) -> tuple[QuantizedArray, QuantizationLoss]:
    """Serves a call that `unsupported` let pass."""
    from pallas_kernels.quantize.mosaic_gpu.rows import quantize_rows
    from pallas_kernels.quantize.mosaic_gpu.tiles import SCALE, matrix_constants, quantize_tiles

    out, fmt = call.out, call.out.format
    num_experts, *_, n, k = call.x.shape
    x = call.x.reshape(num_experts, -1, n, k)
    per_byte = fmt.codes_per_element
    values = jax.new_ref(out.values.reshape(out.shape[0], -1, n, k // per_byte))
    scales = jax.new_ref(out.scales.reshape(out.shape[0], -1, *out.scales.shape[-2:]))
    place = jnp.stack([call.start, jnp.int32(call.half or 0)])  # an argument: both halves share one kernel
    constants = matrix_constants(jnp.repeat(call.amax, x.shape[1]), fmt) if fmt.whole_matrix else None
    if fmt.block == (1, None):
        sums = quantize_rows(x, place, values, scales, fmt=fmt)
    else:
        if per_byte == 2:  # free: pairs become words, whose halves are taken apart in registers
            x = lax.bitcast_convert_type(x.reshape(*x.shape[:-1], k // 2, 2), jnp.uint32)
        sums = quantize_tiles(x, constants, place, values, scales, fmt=fmt)
    found = QuantizedArray(
        values=jax.freeze(values).reshape(out.values.shape),
        scales=jax.freeze(scales).reshape(out.scales.shape),
        global_scale=out.global_scale,
        format=fmt,
    )
    if constants is not None:
        found = _with_scales(found, constants[:, SCALE].reshape(x.shape[:2]), call)
    error, norm, largest = sums.reshape(3, num_experts, -1)
    # Mosaic's maximum keeps NaN, which XLA:CPU's does not: tests/device.
    finite = jnp.all(jnp.isfinite(largest), axis=1)
    return found, QuantizationLoss(error=jnp.sum(error, axis=1), norm=jnp.sum(norm, axis=1), finite=finite)


def _with_scales(out: QuantizedArray, scales: Float[Array, "e S"], call: IntoCall) -> QuantizedArray:
    """`out` with the scales of whole matrices in their places."""
    old: Any = out.global_scale if out.format.two_level else out.scales  # [E, (S,)], of one-level formats also [1, 1]
    new = call.written(old, scales.reshape(scales.shape[0], *old.shape[1 if call.half is None else 2 :]))
    if out.format.two_level:
        return dataclasses.replace(out, global_scale=new)
    return dataclasses.replace(out, scales=new)
