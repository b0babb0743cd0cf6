"""A token in the registers of a warpgroup: how it lies there, what becomes of it, how it gets to a row of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import Format
from pallas_kernels.quantize.mosaic_gpu.registers import THREADS, flushed, numbers, packed, rounded
from pallas_kernels.quantize.mosaic_gpu.tokens import GROUP
from pallas_kernels.quantize.quotient import Divisor
from pallas_kernels.quantize.scales import block_scales

VECTORS = (8, 4, 2, 1)  # elements that a thread loads at once


class Lanes(NamedTuple):
    """How rows of K elements lie in memory and in registers."""

    shape: tuple[int, ...]  # [K], or in groups [K / GROUP, GROUP]: a warp has whole ones
    layout: Any  # of each piece of a row
    begins: list[int]  # where they begin; the last may take once more what the one before it had

    @property
    def in_groups(self) -> bool:
        """Whether they do."""
        return len(self.shape) > 1

    @property
    def columns(self) -> list[Any]:
        """The pieces: what is computed of one needs no registers while others are."""
        return [pl.ds(begin, self.shape[0] - self.begins[-1]) for begin in self.begins]

    def load(self, x_gmem: Any, row: Any) -> list[jax.Array]:
        """All pieces, on their way: nothing waits for one before all are asked for."""
        return [plgpu.load(x_gmem.at[row, piece], layout=self.layout, optimized=False) for piece in self.columns]

    def store(self, gmem: Any, row: Any, pieces: list[jax.Array]) -> None:
        """All pieces."""
        for piece, values in zip(self.columns, pieces, strict=True):
            gmem[row, piece] = values


def lanes(k: int, *, in_groups: bool) -> Lanes:
    """For rows of K elements, as `unsupported` lets pass."""
    if not in_groups:
        vector = next(v for v in VECTORS if k % v == 0 and THREADS * v <= k)
        size = THREADS * vector
        layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)
        return Lanes((k,), layout, [min(i, k - size) for i in range(0, k, size)])
    groups = k // GROUP
    if groups % 8:  # a group is in a warp, or else in half of one: the largest magnitude goes through shuffles
        size, tiling = 4, Tiling(((4, GROUP), (4,)))
        layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    else:
        size, tiling = 8, Tiling(((8, GROUP), (2, GROUP), (8,)))
        layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    return Lanes((groups, GROUP), layout, list(range(0, groups, size)))


def out_types(fmt: Format | None, lay: Lanes, num_rows: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Codes or copies, and scales where they are a row's own."""
    values = jax.ShapeDtypeStruct((num_rows, *lay.shape), dtype if fmt is None else fmt.storage)
    if fmt is None or fmt.whole_matrix:
        return [values]
    return [values, jax.ShapeDtypeStruct((lay.shape[0] if fmt.block[1] is not None else 1, num_rows), jnp.float32)]


def quantized(
    pieces: list[jax.Array],
    fmt: Format,
    lay: Lanes,
    *,
    factor: Any,
    largest_of: Callable[[jax.Array], jax.Array],
    dtype: Any,
    by_reciprocal: bool = False,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """A token's codes, and its scales where they are its own: in one, or of the groups of each piece.

    Args:
      pieces: In bf16.
      fmt: Neither two-level nor of another block than `unsupported` lets pass.
      lay: How they lie.
      factor: For a scale of the whole matrix, [1] in memory: what numbers are multiplied with.
      largest_of: Finds the largest number of a piece, where one scale is that of a row.
      dtype: Of the codes.
      by_reciprocal: A product in place of a quotient, where one scale is that of a row: a few codes differ by one.
    """
    one, layout = (1,) * len(lay.shape), None
    by: list[Any]
    stored: list[jax.Array] = []
    if factor is not None:
        by = [lax.broadcast_in_dim(factor[0], one, ())] * len(pieces)
    elif fmt.block[1] is None:
        largest = functools.reduce(jnp.maximum, [jnp.abs(piece) for piece in pieces])
        amax = lax.broadcast_in_dim(largest_of(largest).astype(jnp.float32), one, ())
        found = block_scales(flushed(amax), fmt)
        approximate = by_reciprocal and isinstance(found.by, Divisor)
        stored, by = [found.stored], [1 / found.stored if approximate else found.by] * len(pieces)
    else:
        layout = lay.layout
        amaxes = [jnp.max(jnp.abs(piece).astype(jnp.float32), axis=1) for piece in pieces]
        of_pieces = [block_scales(flushed(amax), fmt) for amax in amaxes]
        stored, by = [each.stored for each in of_pieces], [each.by for each in of_pieces]
    codes = []
    for piece, each in zip(pieces, by, strict=True):
        (x,) = numbers(piece, flush=True)
        codes.append(packed([rounded(x, each, fmt, layout)], dtype))
    return codes, stored


def store_scales(scales_gmem: Any, row: Any, lay: Lanes, scales: list[jax.Array]) -> None:
    """A row's own, as `quantized` has them."""
    if scales_gmem.shape[0] > 1:
        for piece, each in zip(lay.columns, scales, strict=True):
            scales_gmem[piece, row] = each
        return
    for each in scales:
        if each.ndim > 1:
            scales_gmem[pl.ds(0, 1), pl.ds(row, 1)] = each
        else:
            scales_gmem[0, pl.ds(row, 1)] = each
