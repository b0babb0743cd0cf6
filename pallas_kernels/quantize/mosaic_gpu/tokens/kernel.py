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
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.formats import Format
from pallas_kernels.quantize.mosaic_gpu.registers import COMPILER_PARAMS
from pallas_kernels.quantize.mosaic_gpu.tokens import GROUP
from pallas_kernels.quantize.mosaic_gpu.tokens.rows import Lanes, lanes, out_types, quantized, store_scales

ROWS = 4  # of a program, at most, where a row is short
ROW_ELEMENTS = 4096  # that a program has at once, unless one row has more


@functools.partial(jax.jit, static_argnames=("fmt", "num_rows", "by_reciprocal"))  # traced once for calls alike
def send(
    x: Float[Array, "T K"],
    places: Int32[Array, "T top_k"] | None,
    factor: Float[Array, "1"] | None,
    *,
    fmt: Format | None,
    num_rows: int,
    by_reciprocal: bool,
) -> tuple[Shaped[Array, "M K"], Float[Array, "blocks M"] | None]:
    """Codes and scales of the rows `[0, num_rows)`; a row that is no token's place holds what memory held.

    Args:
      x: bf16, or without a format any dtype of 16 bits.
      places: The rows of each token; None: token t goes to row t.
      factor: For a scale of the whole matrix: what numbers are multiplied with.
      fmt: None: tokens are copied.
      by_reciprocal: As of `quantized`.
    """
    tokens, k = x.shape
    lay = lanes(k, in_groups=fmt is not None and fmt.block == (1, GROUP))
    rows = math.gcd(tokens, min(ROWS, max(1, ROW_ELEMENTS // k)))
    kernel = plgpu.kernel(
        functools.partial(_kernel, fmt=fmt, rows=rows, lay=lay, by_reciprocal=by_reciprocal),
        out_type=out_types(fmt, lay, num_rows, x.dtype),
        grid=(tokens // rows,),
        grid_names=("program",),
        kernel_name=f"tokens_{'copied' if fmt is None else fmt.name}",
        compiler_params=COMPILER_PARAMS,
    )
    values, *scales = kernel(x.reshape(tokens, *lay.shape), places, factor)
    return values.reshape(num_rows, k), scales[0] if scales else None


def _kernel(
    x_gmem: Any,  # [T, K], or in groups [T, K/128, 128]
    places_gmem: Any,  # [T, top_k], or None
    factor_gmem: Any,  # [1], or None
    values_gmem: Any,  # [M, K], or [M, K/128, 128]
    scales_gmem: Any = None,  # [K/128, M] or [1, M]
    *,
    fmt: Format | None,
    rows: int,
    lay: Lanes,
    by_reciprocal: bool,
) -> None:
    first = lax.axis_index("program") * rows
    tokens = [first + row for row in range(rows)]
    loaded = [lay.load(x_gmem, token) for token in tokens]  # all are on their way before one is used
    for token, pieces in zip(tokens, loaded, strict=True):
        stored: list[jax.Array] = []
        if fmt is not None:
            pieces, stored = quantized(
                pieces,
                fmt,
                lay,
                factor=factor_gmem,
                largest_of=jnp.max,
                dtype=values_gmem.dtype,
                by_reciprocal=by_reciprocal,
            )
        for slot in range(1 if places_gmem is None else places_gmem.shape[1]):
            place = token if places_gmem is None else places_gmem[token, slot]
            lay.store(values_gmem, place, pieces)
            if stored:
                store_scales(scales_gmem, place, lay, stored)
