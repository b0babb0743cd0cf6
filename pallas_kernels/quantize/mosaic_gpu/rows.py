"""Formats with one scale for each row, on Hopper: the threads of a program share a row and read it twice, the second
time from the L1 cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.formats import Format
from pallas_kernels.quantize.mosaic_gpu.registers import (
    COMPILER_PARAMS,
    THREADS,
    flushed,
    numbers,
    packed,
    rounded,
    spread,
)
from pallas_kernels.quantize.scales import block_scales

ROWS = 4  # of a program, one after the other
VECTOR, UNROLL = 8, 2  # elements that a thread has at a time, and how often in a step


@functools.partial(jax.jit, static_argnames="fmt")  # traced, and lowered, once for calls that are alike
def quantize_rows(
    x: BFloat16[Array, "e S N K"], place: Int32[Array, "2"], values: Any, scales: Any, *, fmt: Format
) -> Float[Array, "3 e S parts"]:
    """Quantizes `x` into refs of the finished leaf; K is a multiple of 128.

    Args:
      place: Of the first expert in the leaf, and of the first half.
      values: Ref `[E, S_out, N, K]`.
      scales: Ref `[E, S_out, 1, N]`.

    Returns:
      Sums of squares of the error and of the source, and largest magnitudes, of parts of each matrix.
    """
    experts, halves, n, _ = x.shape
    rows = math.gcd(n, ROWS)
    kernel = plgpu.kernel(
        functools.partial(_kernel, fmt=fmt, rows=rows),
        out_type=jax.ShapeDtypeStruct((3, experts, halves, n // rows), jnp.float32),
        grid=(experts, halves, n // rows),
        grid_names=("expert", "half", "part"),
        kernel_name=f"quantize_rows_{fmt.name}",
        compiler_params=COMPILER_PARAMS,
    )
    sums: jax.Array = kernel(x, place, values, scales)
    return sums


def _kernel(
    x_gmem: Any,  # [e, S, N, K]
    place_gmem: Any,  # [2]
    values_gmem: Any,  # [E, S_out, N, K]
    scales_gmem: Any,  # [E, S_out, 1, N]
    sums_gmem: Any,  # [3, e, S, N / rows]
    *,
    fmt: Format,
    rows: int,
) -> None:
    expert, s, part = (lax.axis_index(name) for name in ("expert", "half", "part"))
    source, out = (expert, s), (place_gmem[0] + expert, place_gmem[1] + s)
    k = x_gmem.shape[-1]
    vector = math.gcd(k // THREADS, VECTOR)
    size = vector * THREADS
    unroll = math.gcd(k // size, UNROLL)
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)

    def visit(body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """`carry = body(carry, columns)` for one piece of a row after the other."""

        def some(i: Any, carry: Any) -> Any:
            for j in range(unroll):
                carry = body(carry, pl.ds(pl.multiple_of((i * unroll + j) * size, size), size))
            return carry

        return lax.fori_loop(0, k // (size * unroll), some, carry)

    def quantize_row(i: Any, sums: Any) -> Any:
        row = part * rows + i
        error, norm, largest = sums

        def load(columns: Any) -> jax.Array:
            loaded: jax.Array = plgpu.load(x_gmem.at[*source, row, columns], layout=layout, optimized=False)
            return loaded

        def larger(so_far: jax.Array, columns: Any) -> jax.Array:
            return jnp.maximum(so_far, jnp.abs(load(columns)))

        none = plgpu.layout_cast(jnp.zeros((size,), x_gmem.dtype), layout)
        amax = jnp.max(visit(larger, none)).astype(jnp.float32)
        found = block_scales(flushed(lax.broadcast_in_dim(amax, (1,), ())), fmt)
        scales_gmem[*out, 0, pl.ds(row, 1)] = found.stored

        def quantize_piece(sums: Any, columns: Any) -> Any:
            units, norm = sums
            (x,) = numbers(load(columns), flush=True)
            codes = rounded(x, found.by, fmt)
            values_gmem[*out, row, columns] = packed([codes], values_gmem.dtype)
            return units + codes.error * codes.error, norm + x * x

        units, norm = visit(quantize_piece, (zeros, norm))
        scale = spread(found.stored, units)
        return error + units * (scale * scale), norm, jnp.maximum(largest, amax)

    zeros = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout)
    error, norm, largest = lax.fori_loop(0, rows, quantize_row, (zeros, zeros, jnp.float32(0)))
    for i, total in enumerate((jnp.sum(error), jnp.sum(norm), largest)):
        sums_gmem[i, *source, part] = total
