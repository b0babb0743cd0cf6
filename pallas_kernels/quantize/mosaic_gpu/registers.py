"""What a thread does with the bf16 numbers it has in registers: unpack, round to codes, pack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import SMALLEST_NORMAL, Format
from pallas_kernels.quantize.mosaic_gpu.rounding import Rounded, divided, multiplied
from pallas_kernels.quantize.quotient import Divisor

THREADS = 128  # of a warpgroup
# Of each thread, as the kernels here state every layout: jax's inference of layouts would take a second per kernel.
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def numbers(loaded: jax.Array, *, flush: bool) -> list[jax.Array]:
    """bf16 numbers in f32, with `flush` subnormal ones as zero.

    `loaded` has bf16 elements, or uint32 ones of two; then they come in two lists, the even ones along K first.
    """
    if loaded.dtype == jnp.bfloat16:
        found = [loaded.astype(jnp.float32)]
    else:
        bits = loaded << 16, loaded & np.uint32(0xFFFF0000)
        found = [lax.bitcast_convert_type(each, jnp.float32) for each in bits]
    return [flushed(x) for x in found] if flush else found


def flushed(x: jax.Array) -> jax.Array:
    """`x`, subnormal numbers as zero."""
    return jnp.where(jnp.abs(x) < np.float32(SMALLEST_NORMAL), np.float32(0), x)


def rounded(x: jax.Array, by: jax.Array | Divisor, fmt: Format, layout: Any = None) -> Rounded:
    """The codes of `x`, with one factor or divisor for each row of it, or for all; `layout` as `spread` has it."""
    if isinstance(by, Divisor):
        return divided(x, Divisor(*(spread(each, x, layout) for each in by)), fmt)
    return multiplied(x, spread(by, x, layout), fmt)


def spread(per_row: jax.Array, x: jax.Array, layout: Any = None) -> jax.Array:
    """One value for each row, or for all, as one for each element of `x`.

    Where the one for a row of many is not like that of `x` in registers, `layout` says how `x` lies there.
    """
    wide: jax.Array = lax.broadcast_in_dim(per_row, x.shape, tuple(range(per_row.ndim)))
    return wide if layout is None or not per_row.ndim else plgpu.layout_cast(wide, layout)


def packed(found: list[Rounded], dtype: Any) -> jax.Array:
    """Codes as they are stored: as they are, or two to a byte."""
    if len(found) == 1:
        return found[0].code.astype(dtype)
    even, odd = (each.code for each in found)
    return ((even & 0xF) + (odd << 4)).astype(dtype)
