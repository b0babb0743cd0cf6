"""Formats whose scales belong to blocks, or to all of a matrix, on Hopper: a thread has one row of a tile.

So blocks along K need no exchange between threads, and the scales of a tile are stored along N, as they lie in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import codes
from pallas_kernels.formats import E4M3_MAX, Format
from pallas_kernels.quantize.mosaic_gpu.registers import COMPILER_PARAMS, THREADS, flushed, numbers, packed, rounded
from pallas_kernels.quantize.mosaic_gpu.rounding import to_e4m3
from pallas_kernels.quantize.quotient import Divisor, quotient
from pallas_kernels.quantize.scales import block_scales, encode_scale

ROW_BYTES = 128  # of a row of the source in shared memory: what a swizzle spans
STEPS, STAGES = 8, 2  # tiles along K that a program visits at most, and those on their way at once
FACTOR, SCALE = 0, 1  # in `matrix_constants`
_PER_ROW = plgpu.Layout.TCGEN05_TMEM_NATIVE(8).reduce(1)


def tile_width(fmt: Format) -> int:
    """Elements along K of a tile: those of a scale, at least a row of shared memory."""
    return max(ROW_BYTES // 2, fmt.block[1] or 0)


@functools.partial(jax.jit, static_argnames="fmt")  # traced, and lowered, once for calls that are alike
def quantize_tiles(
    x: Any,
    constants: Float[Array, "e*S C"] | None,
    place: Int32[Array, "2"],
    values: Any,
    scales: Any,
    *,
    fmt: Format,
) -> Float[Array, "3 e S parts"]:
    """Quantizes `x` `[e, S, N, K]` into refs of the finished leaf; N is a multiple of 128, K one of `tile_width`.

    Args:
      x: bf16, or for codes of 4 bits pairs of them in uint32.
      constants: `matrix_constants` of each matrix, for formats with a scale of all of it.
      place: Of the first expert in the leaf, and of the first half.
      values: Ref `[E, S_out, N, K]`, or bytes of two codes `[E, S_out, N, K / 2]`.
      scales: Ref `[E, S_out, K blocks, N blocks]`; untouched where one scale is all of a matrix.

    Returns:
      Sums of squares of the error and of the source, and largest magnitudes, of parts of each matrix.
    """
    experts, halves, n, width = x.shape
    tile = tile_width(fmt) * 2 // x.dtype.itemsize
    steps = math.gcd(width // tile, STEPS)
    stages, parts = min(STAGES, steps), (width // (tile * steps), n // THREADS)
    kernel = plgpu.kernel(
        functools.partial(_kernel, fmt=fmt, steps=steps),
        out_type=jax.ShapeDtypeStruct((3, experts, halves, math.prod(parts)), jnp.float32),
        grid=(experts, halves, *parts),
        grid_names=("expert", "half", "part", "row_tile"),
        kernel_name=f"quantize_tiles_{fmt.name}",
        compiler_params=COMPILER_PARAMS,
        scratch_types=[
            plgpu.SMEM((stages, THREADS, tile), x.dtype, transforms=_swizzled(ROW_BYTES // x.dtype.itemsize)),
            # Bytes of pairs come four by four from a thread, too few for a swizzled store.
            plgpu.SMEM(
                (2, THREADS, tile), fmt.storage, transforms=_swizzled(tile, tile) if fmt.codes_per_element == 1 else ()
            ),
            plgpu.Barrier(num_barriers=stages),
        ],
    )
    sums: jax.Array = kernel(x, constants, place, values, scales)
    return sums


def matrix_constants(amax: Float[Array, "*matrices"], fmt: Format) -> Float[Array, "*matrices C"]:
    """What the kernel wants to know of whole matrices, from their largest magnitudes.

    Returns:
      FACTOR and SCALE: of one-level formats what numbers are multiplied with, and the scale; of two-level ones G and
      the second-level scale. Of the latter also the quotients of G by the eight mantissas that scales of blocks have.
    """
    if not fmt.two_level:
        scales = block_scales(amax, fmt)
        assert not isinstance(scales.by, Divisor)
        return jnp.stack([scales.by, scales.stored], axis=-1)
    encode, second = encode_scale(amax, fmt)
    quotients = quotient(encode[..., None], 1 + jnp.arange(8, dtype=jnp.float32) / 8)
    return jnp.concatenate([encode[..., None], second[..., None], quotients], axis=-1)


def _swizzled(columns: int, row_bytes: int = ROW_BYTES) -> tuple[Any, ...]:
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(row_bytes)


def _kernel(
    x_gmem: Any,  # [e, S, N, K]
    constants_gmem: Any,  # [e * S, C], or None
    place_gmem: Any,  # [2]
    values_gmem: Any,  # [E, S_out, N, K]
    scales_gmem: Any,  # [E, S_out, K blocks, N blocks]
    sums_gmem: Any,  # [3, e, S, parts]
    x_smem: Any,  # [stages, 128, tile]
    values_smem: Any,  # [2, 128, tile]
    loaded: Any,  # barriers [stages]
    *,
    fmt: Format,
    steps: int,
) -> None:
    expert, s, part, row_tile = (lax.axis_index(name) for name in ("expert", "half", "part", "row_tile"))
    out, rows = (place_gmem[0] + expert, place_gmem[1] + s), pl.ds(row_tile * THREADS, THREADS)
    matrix, num_constants = expert * x_gmem.shape[1] + s, 0 if constants_gmem is None else constants_gmem.shape[1]
    constants = [constants_gmem[matrix, i] for i in range(num_constants)]
    stages, _, tile = x_smem.shape
    blocks = tile_width(fmt) // (fmt.block[1] or tile_width(fmt))  # of a tile

    def columns(step: Any) -> Any:
        return pl.ds(pl.multiple_of((part * steps + step) * tile, tile), tile)

    def load(step: Any) -> None:
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.copy_gmem_to_smem(x_gmem.at[expert, s, rows, columns(step)], x_smem.at[slot], loaded.at[slot])

    def store_scale(step: Any, i: int, scale: jax.Array) -> None:
        at = (part * steps + step) * blocks + i
        if fmt.block[0] == 1:
            scales_gmem[*out, at, rows] = scale
        else:
            scales_gmem[*out, at, row_tile] = jnp.max(scale)  # they are equal

    def quantize_tile(step: Any, sums: Any) -> Any:
        slot, out_slot = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2))
        plgpu.barrier_wait(loaded.at[slot])
        values, sums = _quantize_tile(
            x_smem.at[slot], constants, functools.partial(store_scale, step), sums, fmt, values_gmem.dtype
        )
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        values_smem[out_slot] = values
        plgpu.commit_smem()  # and all threads are done with the source
        plgpu.copy_smem_to_gmem(values_smem.at[out_slot], values_gmem.at[*out, rows, columns(step)])
        pl.when(step + stages < steps)(lambda: load(step + stages))
        return sums

    for step in range(stages):
        load(jnp.int32(step))
    zeros = plgpu.layout_cast(jnp.zeros((THREADS,), jnp.float32), _PER_ROW)
    sums = lax.fori_loop(0, steps, quantize_tile, (zeros, zeros, zeros))
    error, norm, largest = sums
    place = part * (x_gmem.shape[2] // THREADS) + row_tile
    for i, total in enumerate((jnp.sum(error), jnp.sum(norm), jnp.max(largest))):
        sums_gmem[i, expert, s, place] = total
    plgpu.wait_smem_to_gmem(0)


def _quantize_tile(
    x_smem: Any, constants: list[jax.Array], store_scale: Any, sums: Any, fmt: Format, dtype: Any
) -> tuple[jax.Array, Any]:
    """Codes `[128, tile]` as they are stored; the scale of block i of each row goes to `store_scale(i, ...)`."""
    _, tile = x_smem.shape
    itemsize = x_smem.dtype.itemsize
    width = ROW_BYTES // itemsize  # of what is worked on at once
    block = tile if fmt.block[1] is None else fmt.block[1] * 2 // itemsize
    layout = plgpu.Layout.TCGEN05_TMEM_NATIVE(16 // itemsize)

    def load(column: int) -> jax.Array:
        loaded: jax.Array = plgpu.load(x_smem.at[:, pl.ds(column, width)], layout=layout)
        return loaded

    if block <= width:  # of a larger block the registers hold only a part: it is loaded twice
        load = functools.cache(load)

    def pieces(first: int, *, flush: bool) -> Iterator[list[jax.Array]]:
        """The numbers of the block that begins here."""
        for column in range(first - first % width, first + block, width):
            begin = max(first - column, 0)
            yield numbers(load(column)[:, begin : begin + min(block, width)], flush=flush)

    values, squares = [], jnp.float32(0)
    error, norm, largest = sums
    for i, first in enumerate(range(0, tile, block)):
        magnitudes = (jnp.max(jnp.abs(x), axis=1) for piece in pieces(first, flush=False) for x in piece)
        amax = flushed(functools.reduce(jnp.maximum, magnitudes))
        stored, by, scale = _scales(amax, constants, fmt)
        if stored is not None:
            store_scale(i, stored)
        changes = jnp.float32(0)  # squares are summed in place first: a product and a sum are one instruction
        # Under two levels no subnormal number reaches a code: factors are below 2**48.
        for piece in pieces(first, flush=not fmt.two_level):
            found = [rounded(x, by, fmt, layout) for x in piece]
            values.append(packed(found, dtype))
            for x, each in zip(piece, found, strict=True):
                changes = changes + each.error * each.error
                squares = squares + x * x
        error, largest = error + jnp.sum(changes, axis=1) * (scale * scale), jnp.maximum(largest, amax)
    norm = norm + jnp.sum(squares, axis=1)
    return values[0] if len(values) == 1 else lax.concatenate(values, 1), (error, norm, largest)


def _scales(amax: jax.Array, constants: list[jax.Array], fmt: Format) -> tuple[jax.Array | None, Any, jax.Array]:
    """Of one block of each row: what is stored (None for the scale of a whole matrix), what divides, the real scale."""
    if fmt.two_level:
        return _two_level(amax, constants, fmt)
    if constants:
        return None, constants[FACTOR], constants[SCALE]
    if fmt.block[0] != 1:
        amax = plgpu.layout_cast(lax.broadcast_in_dim(jnp.max(amax), amax.shape, ()), _PER_ROW)
    found = block_scales(amax, fmt)
    is_exponent = fmt.arithmetic == "power_of_two"
    return found.stored, found.by, codes.e8m0_values(found.stored) if is_exponent else found.stored


def _two_level(amax: jax.Array, constants: list[jax.Array], fmt: Format) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `block_scales`, but the exact quotient of G by a scale is chosen from those by its mantissa."""
    encode, second, *quotients = constants
    units = lax.optimization_barrier(amax * np.float32(1 / fmt.code_max))  # before the other product
    scale = to_e4m3(jnp.minimum(encode * units, np.float32(E4M3_MAX)))
    stored = scale.astype(fmt.scale_dtype)
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    for bit in (20, 21, 22):
        is_set = (bits & np.int32(1 << bit)) != 0
        quotients = [jnp.where(is_set, odd, even) for even, odd in zip(quotients[::2], quotients[1::2], strict=True)]
    power = lax.bitcast_convert_type(np.int32(254 << 23) - (bits & np.int32(0x7F800000)), jnp.float32)
    # Of a scale of 0 all codes are 0. So they are with a scale of 1, which in its place tells what is lost.
    is_zero = scale == 0
    factor = jnp.where(is_zero, encode, quotients[0] * power)
    return stored, factor, jnp.where(is_zero, second, scale * second)
