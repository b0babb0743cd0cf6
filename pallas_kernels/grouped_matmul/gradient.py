"""Gradients of `grouped_matmul` by its left side, real weights and bias, out of grouped matmuls again.

Of quantized weights the codes count as given; of a left side that is quantized on the way the gradient passes straight
through (arXiv:1308.3432).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation
from pallas_kernels.bits import storage_bits, take, update
from pallas_kernels.formats import QuantizedArray
from pallas_kernels.grouped_matmul.product import Operand, contraction_dtype
from pallas_kernels.grouped_matmul.reference import find_groups, tile_sizes, visit_groups
from pallas_kernels.routing import GroupMetadata


def before_epilogue(
    epilogue: Activation | None, sums: Float[Array, "M N"], gradient: Float[Array, "M N_out"]
) -> Float[Array, "M N"]:
    """The gradient by the rounded `sums` of that by their activation, in f32."""
    if epilogue is None:
        return gradient.astype(jnp.float32)
    _, vjp = jax.vjp(epilogue.of_rows, sums.astype(jnp.float32))
    by_sums: jax.Array = vjp(gradient.astype(jnp.float32))[0]
    return by_sums


def times_transposed(
    gradient: Float[Array, "M N"],
    rhs: jax.Array | QuantizedArray,
    group_sizes: Int32[Array, " groups"],
    *,
    metadata: GroupMetadata,
    group_offset: Int32[Array, ""] | int | None,
) -> Float[Array, "M K"]:
    """The rows of `gradient`, each times its expert of `rhs [E, ..., K]`: N is contracted, expert by expert.

    Quantized experts are dequantized to the dtype of `gradient`, one at a time.
    """
    groups = find_groups(group_sizes, metadata, rhs.shape[0], gradient.shape[0], group_offset)
    dtype = contraction_dtype(gradient.dtype, gradient.dtype if isinstance(rhs, QuantizedArray) else rhs.dtype)

    def weights(expert: jax.Array) -> Operand:
        def one_of(x: jax.Array) -> jax.Array:
            zero = jnp.zeros_like(expert)
            return take(x, (expert, *(zero,) * (x.ndim - 1)), (1, *x.shape[1:]))[0]

        one = jax.tree.map(one_of, rhs)
        values = one.dequantize(dtype) if isinstance(one, QuantizedArray) else one.astype(dtype)
        values = values.reshape(-1, values.shape[-1]).T
        return Operand(values, None, values.shape[1])

    return visit_groups(
        Operand(gradient, None, gradient.shape[1]),
        weights,
        groups,
        n_out=rhs.shape[-1],
        num_experts=rhs.shape[0],
        finish=lambda total, expert: total.astype(gradient.dtype),
        out_dtype=gradient.dtype,
    )


def by_weights(
    lhs: Float[Array, "M K"],
    gradient: Float[Array, "M N"],
    group_sizes: Int32[Array, " groups"],
    *,
    metadata: GroupMetadata,
    group_offset: Int32[Array, ""] | int | None,
    num_experts: int,
    out_dtype: Any,
) -> Float[Array, "E N K"]:
    """For each expert the rows of `gradient`, transposed, times those of `lhs`: summed in f32, rounded once."""
    (num_rows, n), k, out_dtype = gradient.shape, lhs.shape[1], np.dtype(out_dtype)
    out = jnp.zeros((num_experts, n, k), storage_bits(out_dtype))
    if num_rows and out.size:
        groups = find_groups(group_sizes, metadata, num_experts, num_rows, group_offset)
        tile = tile_sizes(num_rows, num_experts)[0][0]
        dtype = contraction_dtype(lhs.dtype, gradient.dtype)
        precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

        def one_group(i: jax.Array, out: jax.Array) -> jax.Array:
            expert = groups.active[i]
            begin, size = groups.starts[expert], groups.sizes[expert]

            def one_tile(j: jax.Array, total: jax.Array) -> jax.Array:
                row = begin + j * tile
                start = jnp.minimum(row, num_rows - tile)
                index = start + lax.iota(jnp.int32, tile)
                mine = ((index >= row) & (index < begin + size))[:, None]
                left, right = (
                    jnp.where(mine, part, jnp.zeros_like(part)).astype(dtype)  # of both: NaN times zero is no zero
                    for part in (take(x, (start, jnp.zeros_like(start)), (tile, x.shape[1])) for x in (gradient, lhs))
                )
                dims = (((0,), (0,)), ((), ()))
                return total + lax.dot_general(
                    left, right, dims, precision=precision, preferred_element_type=jnp.float32
                )

            total = lax.fori_loop(0, (size + tile - 1) // tile, one_tile, jnp.zeros((n, k), jnp.float32))
            bits = lax.bitcast_convert_type(total.astype(out_dtype), out.dtype)
            zero = jnp.zeros_like(expert)
            return update(out, bits, (expert, zero, zero))

        out = lax.fori_loop(0, groups.num_active, one_group, out)
    return lax.bitcast_convert_type(out, out_dtype)


def by_bias(gradient: Float[Array, "M N"], bias: jax.Array, **groups: Any) -> jax.Array:
    """For each expert the sum of its rows of `gradient`, in the shape and dtype of `bias`."""
    ones = jnp.ones((gradient.shape[0], 1), gradient.dtype)
    sums = by_weights(ones, gradient, num_experts=bias.shape[0], out_dtype=bias.dtype, **groups)
    assert math.prod(sums.shape) == bias.size
    return sums.reshape(bias.shape)
