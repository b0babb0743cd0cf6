"""Tokens on Hopper: quantized on their way to the rows of their experts, each read once and written to all its places.

A program has a few tokens in its registers from the first look at their magnitudes to the last store.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.formats import Format
from pallas_kernels.quantize.mosaic_gpu.registers import COMPILER_PARAMS, THREADS, flushed, numbers, packed, rounded
from pallas_kernels.quantize.mosaic_gpu.tokens import GROUP
from pallas_kernels.quantize.scales import block_scales

VECTORS = (8, 4, 2, 1)  # elements that a thread loads at once
ROWS = 4  # of a program, at most, where a row is short
ROW_ELEMENTS = 4096  # that a program has at once, unless one row has more


def lanes(fmt: Format | None, k: int) -> tuple[Any, list[int]]:
    """How a piece of a row lies in the registers of a warpgroup, and where pieces begin; K as `unsupported` lets pass.

    The last piece may take once more what the one before it had.
    """
    if fmt is None or fmt.block != (1, GROUP):
        vector = next(v for v in VECTORS if k % v == 0 and THREADS * v <= k)
        size = THREADS * vector
        return plgpu.Layout.WG_STRIDED((size,), vec_size=vector), [min(i, k - size) for i in range(0, k, size)]
    if k // GROUP % 8:  # a group is in a warp, or else in half of one: the largest magnitude goes through shuffles
        tiling = Tiling(((4, GROUP), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1), [0]
    tiling = Tiling(((8, GROUP), (2, GROUP), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1), [0]


@functools.partial(jax.jit, static_argnames=("fmt", "num_rows"))  # traced, and lowered, once for calls that are alike
def send(
    x: Float[Array, "T K"],
    places: Int32[Array, "T top_k"] | None,
    factor: Float[Array, "1"] | None,
    *,
    fmt: Format | None,
    num_rows: int,
) -> tuple[Shaped[Array, "M K"], Float[Array, "blocks M"] | None]:
    """Codes and scales of the rows `[0, num_rows)`; a row that is no token's place holds what memory held.

    Args:
      x: bf16, or without a format any dtype of 16 bits.
      places: The rows of each token; None: token t goes to row t.
      factor: For a scale of the whole matrix: what numbers are multiplied with.
      fmt: None: tokens are copied.
    """
    tokens, k = x.shape
    in_groups = fmt is not None and fmt.block == (1, GROUP)
    rows = math.gcd(tokens, min(ROWS, max(1, ROW_ELEMENTS // k)))
    shape = (k // GROUP, GROUP) if in_groups else (k,)
    values = jax.ShapeDtypeStruct((num_rows, *shape), x.dtype if fmt is None else fmt.storage)
    scales = []
    if fmt is not None and not fmt.whole_matrix:
        scales = [jax.ShapeDtypeStruct((shape[0] if in_groups else 1, num_rows), jnp.float32)]
    kernel = plgpu.kernel(
        functools.partial(_kernel, fmt=fmt, rows=rows),
        out_type=[values, *scales],
        grid=(tokens // rows,),
        grid_names=("program",),
        kernel_name=f"tokens_{'copied' if fmt is None else fmt.name}",
        compiler_params=COMPILER_PARAMS,
    )
    out = kernel(x.reshape(tokens, *shape), places, factor)
    return out[0].reshape(num_rows, k), out[1] if scales else None


def _kernel(
    x_gmem: Any,  # [T, K], or in groups [T, K/128, 128]
    places_gmem: Any,  # [T, top_k], or None
    factor_gmem: Any,  # [1], or None
    values_gmem: Any,  # [M, K], or [M, K/128, 128]
    scales_gmem: Any = None,  # [K/128, M] or [1, M]
    *,
    fmt: Format | None,
    rows: int,
) -> None:
    first = lax.axis_index("program") * rows
    tokens = [first + row for row in range(rows)]
    in_groups = len(x_gmem.shape) > 2
    layout, begins = lanes(fmt, math.prod(x_gmem.shape[1:]))
    columns = [pl.ds(begin, (x_gmem.shape[1] - begins[-1])) for begin in begins]

    def load(token: Any, piece: Any) -> jax.Array:
        loaded: jax.Array = plgpu.load(x_gmem.at[token, piece], layout=layout, optimized=False)
        return loaded

    loaded = [[load(token, piece) for piece in columns] for token in tokens]  # all are on their way before one is used
    for token, pieces in zip(tokens, loaded, strict=True):
        stored: jax.Array | None = None
        if fmt is not None:
            pieces, stored = _quantized(pieces, factor_gmem, fmt, layout if in_groups else None, values_gmem.dtype)
        for slot in range(1 if places_gmem is None else places_gmem.shape[1]):
            place = token if places_gmem is None else places_gmem[token, slot]
            for piece, codes in zip(columns, pieces, strict=True):
                values_gmem[place, piece] = codes
            if stored is None:
                continue
            if in_groups:
                scales_gmem[pl.ds(0, scales_gmem.shape[0]), place] = stored
            else:
                scales_gmem[0, pl.ds(place, 1)] = stored


def _quantized(
    pieces: list[jax.Array], factor_gmem: Any, fmt: Format, layout: Any, dtype: Any
) -> tuple[list[jax.Array], jax.Array | None]:
    """A token's codes, and its scales where they are its own."""
    stored: jax.Array | None = None
    by: Any
    if factor_gmem is not None:
        by = lax.broadcast_in_dim(factor_gmem[0], (1,), ())
    else:
        largest = functools.reduce(jnp.maximum, [jnp.abs(piece) for piece in pieces])
        if layout is None:
            amax = lax.broadcast_in_dim(jnp.max(largest).astype(jnp.float32), (1,), ())
        else:
            amax = jnp.max(largest.astype(jnp.float32), axis=1)
        stored, by = block_scales(flushed(amax), fmt)
    found = []
    for piece in pieces:
        (x,) = numbers(piece, flush=True)
        found.append(packed([rounded(x, by, fmt, layout)], dtype))
    return found, stored
