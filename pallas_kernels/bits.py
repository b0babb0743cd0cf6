"""Small floats as their bits: XLA:CPU widens whole arrays of them to move a part, and XLA:GPU may not round to them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def take(x: jax.Array, starts: tuple[jax.Array, ...], sizes: tuple[int, ...]) -> jax.Array:
    """`lax.dynamic_slice` that never widens the whole of `x`.

    XLA:CPU slices small floats as f32 (bf16 in jax 0.10, e4m3 in 0.11 too) and then converts the whole array outside
    of the loop. Slicing their bits avoids that; the barrier keeps the reinterpretation itself inside of the loop.
    """
    bits = storage_bits(x.dtype)
    if bits == x.dtype:
        return lax.dynamic_slice(x, starts, sizes)
    x, *starts = lax.optimization_barrier((x, *starts))
    return lax.bitcast_convert_type(lax.dynamic_slice(lax.bitcast_convert_type(x, bits), starts, sizes), x.dtype)


@take.defjvp
def _take_jvp(
    sizes: tuple[int, ...], primals: tuple[jax.Array, tuple[jax.Array, ...]], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    x, starts = primals
    return take(x, starts, sizes), lax.dynamic_slice(tangents[0], starts, sizes)


def update(out: jax.Array, new: jax.Array, starts: Sequence[jax.Array | int]) -> jax.Array:
    """`lax.dynamic_update_slice` that never widens the whole of `out`; leading axes of size 1 may be left out of `new`.

    XLA:CPU writes small floats twenty times slower than bits. Reinterpreted here, inside of a loop, it costs nothing;
    outside it would copy all of `out`.
    """
    new = new.reshape(*(1,) * (out.ndim - new.ndim), *new.shape)
    bits = storage_bits(out.dtype)
    old, new = (x if x.dtype == bits else lax.bitcast_convert_type(x, bits) for x in (out, new))
    written: jax.Array = lax.dynamic_update_slice(old, new, [jnp.asarray(start, jnp.int32) for start in starts])
    if bits == out.dtype:
        return written
    reals: jax.Array = lax.bitcast_convert_type(written, out.dtype)
    return reals


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """f32 `x` rounded to `dtype`, also where a cast back to f32 follows: XLA:GPU drops such a pair of casts."""
    if dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    if dtype == jnp.float16:  # whose subnormal numbers `reduce_precision` would drop
        half: jax.Array = lax.optimization_barrier(x.astype(dtype))
        return half
    return x.astype(dtype)


def storage_bits(dtype: Any) -> np.dtype[Any]:
    """The dtype that XLA:CPU moves `dtype` as without converting it: unsigned integers for floats below 32 bits."""
    dtype = np.dtype(dtype)
    small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.dtype(f"uint{dtype.itemsize * 8}") if small else dtype
