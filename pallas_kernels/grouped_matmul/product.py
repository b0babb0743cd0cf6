"""The exact product of two operands in XLA: what every reference matmul is made of.

Codes are exact in bf16, so a product of codes, or of codes and bf16, is exact in f32; scales in f32 multiply f32 sums,
once per K block. A code times a scale of few bits (E8M0, e4m3) is exact in bf16 as well and multiplied out beforehand.
No dequantized weight is ever rounded.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.bits import take
from pallas_kernels.formats import QuantizedArray
from pallas_kernels.implementations import UnsupportedError


class Operand(NamedTuple):
    """Rows to contract along K, with the scale of each row and K block."""

    values: jax.Array  # [rows, K], or [E, rows, K] where `expert` chooses
    scales: jax.Array | None  # [K blocks, rows] f32
    block_k: int  # elements along K that share a scale; K where there are no blocks
    expert: jax.Array | None = None

    def columns(self, start: jax.Array, size: int) -> Float[Array, "rows size"]:
        """The values of `size` columns, as they are stored."""
        *_, rows, _ = self.values.shape
        zero = jnp.zeros_like(start)
        if self.expert is None:
            return take(self.values, (zero, start), (rows, size))
        return take(self.values, (self.expert, zero, start), (1, rows, size))[0]


def operand(x: jax.Array | QuantizedArray) -> Operand:
    """`x` `[rows, K]`, its scales spread over the rows; values of 8 bits with scales in f32 stay as they are stored."""
    rows, k = x.shape
    if not isinstance(x, QuantizedArray):
        return Operand(x, None, k)
    block_rows, block_k = x.format.block
    if not x.format.exact_in_bf16:
        return Operand(x.unpacked(), spread_rows(x.scales, block_rows, rows), min(block_k or k, k))
    values = dataclasses.replace(x, global_scale=None).dequantize(jnp.bfloat16)
    second = x.global_scale
    return Operand(values, None if second is None else jnp.broadcast_to(second, (1, rows)), k)


def operand_dtype(x: jax.Array | QuantizedArray) -> np.dtype[Any]:
    """Of the values of `operand(x)`."""
    dtype: np.dtype[Any] = np.dtype(x.dtype)
    if isinstance(x, QuantizedArray):
        if x.format.exact_in_bf16:
            dtype = np.dtype(jnp.bfloat16)
        elif x.format.codes_per_element == 2:
            dtype = np.dtype(np.int8)
    return dtype


def spread_rows(scales: jax.Array, block_rows: int | None, rows: int) -> Float[Array, "*batch blocks rows"]:
    """Scales `[..., K blocks, N blocks]` -> one per row, `[..., K blocks, rows]`."""
    if block_rows is None:
        return jnp.broadcast_to(scales, (*scales.shape[:-1], rows))
    return scales if block_rows == 1 else jnp.repeat(scales, block_rows, axis=-1)[..., :rows]


def contraction_dtype(lhs: np.dtype[Any], rhs: np.dtype[Any]) -> np.dtype[Any]:
    """The narrowest dtype that multiplies both exactly: the wider real one; bf16 for codes, int8 for int8 codes."""
    if lhs == rhs == jnp.int8:
        return np.dtype(np.int8)
    real = {dtype for dtype in (lhs, rhs) if dtype in (jnp.bfloat16, jnp.float16, jnp.float32)}
    if len(real) == 1:
        return np.dtype(real.pop())
    return np.dtype(np.float32 if real else jnp.bfloat16)


def product(lhs: Operand, rhs: Operand) -> Float[Array, "M N"]:
    """`lhs [M, K]` times `rhs [N, K]` transposed, in f32."""
    k = lhs.values.shape[-1]
    block_k = min(lhs.block_k, rhs.block_k)  # blocks are powers of two, or all of K
    if block_k == k:
        return _scaled(_dot(lhs.values, rhs.values), lhs, rhs, 0)

    def add_block(total: jax.Array, wanted: jax.Array) -> tuple[jax.Array, None]:
        start = jnp.minimum(wanted, k - block_k)
        part = lhs.columns(start, block_k)
        if k % block_k:  # the last block reaches back into the one before it
            new = start + lax.iota(jnp.int32, block_k) >= wanted
            part = jnp.where(new[None], part, jnp.zeros_like(part))
        return total + _scaled(_dot(part, rhs.columns(start, block_k)), lhs, rhs, wanted), None

    zeros = jnp.zeros((lhs.values.shape[-2], rhs.values.shape[-2]), jnp.float32)
    total, _ = lax.scan(add_block, zeros, jnp.arange(0, k, block_k, dtype=jnp.int32))
    return total


def _dot(lhs: jax.Array, rhs: jax.Array) -> Float[Array, "M N"]:
    dtype = contraction_dtype(lhs.dtype, rhs.dtype)
    total = jnp.int32 if dtype == jnp.int8 else jnp.float32
    dims = (((1,), (1,)), ((), ()))
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None  # GPUs and TPUs would round to less
    product = lax.dot_general(
        lhs.astype(dtype), rhs.astype(dtype), dims, precision=precision, preferred_element_type=total
    )
    return product.astype(jnp.float32)


def _scaled(part: jax.Array, lhs: Operand, rhs: Operand, start: jax.Array | int) -> jax.Array:
    """Multiplies a sum over the K block that begins at `start` with its scales."""
    if lhs.scales is not None:
        part = part * lax.dynamic_index_in_dim(lhs.scales, start // lhs.block_k, keepdims=False)[:, None]
    if rhs.scales is not None:
        part = part * lax.dynamic_index_in_dim(rhs.scales, start // rhs.block_k, keepdims=False)[None, :]
    return part


@jax.custom_jvp
def no_second_gradient(x: jax.Array) -> jax.Array:
    """`x`, of a gradient; differentiating it is an error rather than a silent zero."""
    return x


@no_second_gradient.defjvp
def _no_second_gradient_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise UnsupportedError("grouped_matmul has no second derivative; differentiate it once")


@jax.custom_jvp
def no_gradient(x: jax.Array) -> jax.Array:
    """`x`; differentiating it is an error rather than a silent zero."""
    return x


@no_gradient.defjvp
def _no_gradient_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise UnsupportedError(
        "quantized arrays have no gradient; differentiate by real operands, or keep them out with lax.stop_gradient"
    )
