"""Grouped matmul in XLA: memory-bounded, and fast enough for CPU users.

Groups with rows are visited in order. Of each, one expert's weights are taken, and its rows are covered by tiles:
large ones first, smaller ones for the rest, so that little work falls on rows of other groups. `lax.ragged_dot` on a
CPU does the work of all experts on all rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation
from pallas_kernels.bits import rounded, storage_bits, take
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul.product import (
    Operand,
    contraction_dtype,
    operand,
    operand_dtype,
    product,
    spread_rows,
)
from pallas_kernels.quantize import quantize
from pallas_kernels.routing import GroupMetadata

MAX_TILE = 512  # rows; larger ones are no faster
MIN_TILE = 8
TILE_OVERHEAD = 37  # what a tile costs beside its rows (packing of the weights), in rows; measured on two Zen 4 cores


class Groups(NamedTuple):
    """The groups of the experts at hand that have rows, first `num_active` entries of `active`."""

    starts: jax.Array  # [E]
    sizes: jax.Array  # [E]
    active: jax.Array  # [min(E, M)] expert
    num_active: jax.Array  # []


def grouped_matmul(
    lhs: Float[Array, "M K"] | QuantizedArray,
    rhs: jax.Array | QuantizedArray,
    group_sizes: Int32[Array, " groups"],
    *,
    out_dtype: Any,
    metadata: GroupMetadata,
    activation_format: Format | None = None,
    out_format: Format | None = None,
    bias: jax.Array | None = None,
    epilogue: Activation | None = None,
    group_offset: Int32[Array, ""] | int | None = None,
) -> Float[Array, "M N_out"] | QuantizedArray:
    """See `pallas_kernels.grouped_matmul`; `rhs` may also be `[E, S, N, K]` with `bias` `[E, S, N]`."""
    if activation_format is not None and not isinstance(lhs, QuantizedArray):
        lhs = quantize_rows(lhs, activation_format, group_sizes)
    groups = find_groups(group_sizes, metadata, rhs.shape[0], lhs.shape[0], group_offset)
    in_blocks = _in_blocks(lhs, rhs)
    dtype = contraction_dtype(operand_dtype(lhs), operand_dtype(rhs))
    out_dtype = np.dtype(out_dtype)

    def finish(total: jax.Array, expert: jax.Array) -> jax.Array:
        """Bias, rounding and activation of f32 sums: each rounding is part of the definition."""
        if bias is not None:
            total = total + bias[expert].reshape(1, -1).astype(jnp.float32)
        total = rounded(total, out_dtype)
        return total if epilogue is None else rounded(epilogue.of_rows(total), out_dtype)

    out = visit_groups(
        operand(lhs),
        functools.partial(_expert, rhs, in_blocks=in_blocks, dtype=dtype),
        groups,
        n_out=math.prod(rhs.shape[1:-1]) // (2 if epilogue is not None and epilogue.gated else 1),
        num_experts=rhs.shape[0],
        finish=finish,
        out_dtype=out_dtype,
    )
    return out if out_format is None else quantize(out, out_format)


def quantize_rows(lhs: Float[Array, "M K"], fmt: Format, group_sizes: Int32[Array, " groups"]) -> QuantizedArray:
    """`lhs` quantized."""
    return quantize(zero_rows_of_none(lhs, group_sizes) if fmt.whole_matrix else lhs, fmt)


def zero_rows_of_none(lhs: Float[Array, "M K"], group_sizes: Int32[Array, " groups"]) -> Float[Array, "M K"]:
    """`lhs` with zeros in the rows of no group: they are padding, and their magnitude has no say in a common scale."""
    return jnp.where(jnp.arange(lhs.shape[0])[:, None] < jnp.sum(group_sizes), lhs, jnp.zeros_like(lhs))


def visit_groups(
    rows: Operand,
    weights: Callable[[jax.Array], Operand],
    groups: Groups,
    *,
    n_out: int,
    num_experts: int,
    finish: Callable[[jax.Array, jax.Array], jax.Array],
    out_dtype: np.dtype[Any],
) -> Float[Array, "M N_out"]:
    """Multiplies the rows of each group that has some with the weights of its expert.

    Args:
      rows: `[M, K]`.
      weights: Those of one expert, `[N, K]`.
      groups: Which rows belong to whom.
      n_out: Columns of what `finish` returns.
      num_experts: For the choice of tiles.
      finish: Makes f32 sums of some rows of an expert the result in `out_dtype`.
      out_dtype: Of the result.
    """
    num_rows = rows.values.shape[-2]
    if num_rows == 0 or num_experts == 0:
        return jnp.zeros((num_rows, n_out), out_dtype)
    tiles = tile_sizes(num_rows, num_experts)

    def one_group(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = groups.active[i]
        its_weights = weights(expert)
        row, end = groups.starts[expert], groups.starts[expert] + groups.sizes[expert]
        for tile, worth in tiles:

            def more(state: tuple[jax.Array, jax.Array], worth: int = worth) -> jax.Array:
                return end - state[0] > worth

            def one_tile(state: tuple[jax.Array, jax.Array], tile: int = tile) -> tuple[jax.Array, jax.Array]:
                row, out = state
                start = jnp.minimum(row, num_rows - tile)
                value = finish(product(_rows(rows, start, tile), its_weights), expert)
                return row + tile, _store(out, value, start, row, end)

            row, out = lax.while_loop(more, one_tile, (row, out))
        return out

    out = jnp.zeros((num_rows, n_out), storage_bits(out_dtype))
    out = lax.fori_loop(0, groups.num_active, one_group, out)
    return lax.bitcast_convert_type(out, out_dtype)


def tile_sizes(num_rows: int, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Tiles for groups of about `num_rows / num_groups` rows: `(rows, worth)`, largest first.

    A tile is used while more than `worth` rows are left: from there on it costs less than tiles of the next size.
    """
    largest = 2 ** math.ceil(math.log2(max(1, num_rows / num_groups)))
    sizes = [min(max(largest, MIN_TILE), MAX_TILE)]
    while sizes[-1] >= 4 * MIN_TILE:
        sizes.append(sizes[-1] // 4)
    sizes = sorted({min(size, num_rows) for size in sizes}, reverse=True)
    worth = [
        (math.ceil((size + TILE_OVERHEAD) / (smaller + TILE_OVERHEAD)) - 1) * smaller
        for size, smaller in itertools.pairwise(sizes)
    ]
    return tuple(zip(sizes, [*worth, 0], strict=True))


def find_groups(
    group_sizes: jax.Array, metadata: GroupMetadata, num_experts: int, num_rows: int, offset: jax.Array | int | None
) -> Groups:
    """The groups of the experts `[offset, offset + num_experts)`."""
    starts, sizes = metadata.group_starts, group_sizes
    if offset is not None:
        starts, sizes = (lax.dynamic_slice_in_dim(x, offset, num_experts) for x in (starts, sizes))
    (active,) = jnp.nonzero(sizes > 0, size=min(num_experts, num_rows), fill_value=0)
    return Groups(starts, sizes, active.astype(jnp.int32), jnp.sum(sizes > 0, dtype=jnp.int32))


def _expert(rhs: jax.Array | QuantizedArray, expert: jax.Array, *, in_blocks: bool, dtype: Any) -> Operand:
    """One expert's weights `[N, K]`, gate and up one after the other.

    They are taken, in the dtype of the contraction, once for all its tiles; with K in blocks it is faster to take
    them block by block and tile by tile, unless codes have to be unpacked or multiplied out.
    """
    num_experts, *halves, n, k = rhs.shape
    values = rhs.values if isinstance(rhs, QuantizedArray) else rhs
    rows, width = math.prod((*halves, n)), values.shape[-1]
    values = values.reshape(num_experts, rows, width)
    fmt = rhs.format if isinstance(rhs, QuantizedArray) else None
    at_once = fmt is not None and (fmt.codes_per_element == 2 or fmt.exact_in_bf16)
    if not in_blocks or at_once:
        zero = jnp.zeros_like(expert)
        values = take(values, (expert, zero, zero), (1, rows, width))[0]
    if not isinstance(rhs, QuantizedArray):
        return Operand(values.astype(dtype), None, k) if not in_blocks else Operand(values, None, k, expert)
    scales = spread_rows(lax.dynamic_index_in_dim(rhs.scales, expert, keepdims=False), rhs.format.block[0], n)
    if halves:
        scales = jnp.swapaxes(scales, 0, 1)
    scales = scales.reshape(-1, rows)
    second = rhs.global_scale
    if second is not None:
        second = jnp.repeat(lax.dynamic_index_in_dim(second, expert, keepdims=False).reshape(-1), n)
    if at_once:
        one = operand(QuantizedArray(values=values, scales=scales, global_scale=second, format=rhs.format))
        return one._replace(values=one.values.astype(dtype))
    block_k = min(rhs.format.block[1] or k, k)
    return Operand(values, scales, block_k, expert) if in_blocks else Operand(values.astype(dtype), scales, block_k)


def _in_blocks(*operands: jax.Array | QuantizedArray) -> bool:
    """Whether K is cut into blocks that have scales of their own."""
    quantized = (x for x in operands if isinstance(x, QuantizedArray) and not x.format.exact_in_bf16)
    return any((x.format.block[1] or x.shape[-1]) < x.shape[-1] for x in quantized)


def _rows(rows: Operand, start: jax.Array, size: int) -> Operand:
    values = take(rows.values, (start, jnp.zeros_like(start)), (size, rows.values.shape[1]))
    scales = None if rows.scales is None else lax.dynamic_slice_in_dim(rows.scales, start, size, 1)
    return rows._replace(values=values, scales=scales)


def _store(out: jax.Array, value: jax.Array, start: jax.Array, row: jax.Array, end: jax.Array) -> jax.Array:
    """Writes the rows `[row, end)` of a tile that begins at `start` and may hold others' rows as well."""
    index = start + lax.iota(jnp.int32, value.shape[0])
    mine = ((index >= row) & (index < end))[:, None]
    old = lax.dynamic_slice_in_dim(out, start, value.shape[0])
    value = jnp.where(mine, lax.bitcast_convert_type(value, out.dtype), old)
    return lax.dynamic_update_slice_in_dim(out, value, start, 0)
