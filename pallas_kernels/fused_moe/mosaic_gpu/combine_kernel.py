"""The weighted sum of each token's outputs on Hopper: a block has one token, or a piece of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.quantize.mosaic_gpu.registers import COMPILER_PARAMS
from pallas_kernels.quantize.mosaic_gpu.tokens.rows import Lanes, lanes


@functools.partial(jax.jit, static_argnames=("num_experts", "dtype"))  # traced once for calls alike
def combine(
    rows: Float[Array, "M H"],
    weights: Float[Array, "T top_k"],
    places: Int32[Array, "T top_k"],
    groups: Int32[Array, "fields more_than_E"],
    *,
    num_experts: int,
    dtype: np.dtype[Any],
) -> Float[Array, "T H"]:
    """The sum over the slots of each token, in f32 and in their order, rounded once.

    Args:
      rows: Outputs of the experts; those behind the last group have no say, whatever they are.
      weights: f32.
      places: The rows of each token.
      groups: First of all the first row of each expert, and behind them that of the rows of none.
      num_experts: E.
      dtype: Of the result.
    """
    tokens, hidden = weights.shape[0], rows.shape[1]
    lay = lanes(hidden, in_groups=False)
    kernel = plgpu.kernel(
        functools.partial(_kernel, num_experts=num_experts, lay=lay),
        out_type=jax.ShapeDtypeStruct((tokens, hidden), dtype),
        grid=(1 if _overlap(lay) else len(lay.begins), tokens),  # the last one may have any length
        grid_names=("piece", "token"),
        kernel_name="combine",
        compiler_params=COMPILER_PARAMS,
    )
    total: jax.Array = kernel(rows, weights, places, groups)
    return total


def _kernel(
    rows_gmem: Any,  # [M, H]
    weights_gmem: Any,  # f32 [T, top_k]
    places_gmem: Any,  # int32 [T, top_k]
    groups_gmem: Any,  # int32 [fields, more than E]
    total_gmem: Any,  # [T, H]
    *,
    num_experts: int,
    lay: Lanes,
) -> None:
    token, piece = lax.axis_index("token"), lax.axis_index("piece")
    slots = range(weights_gmem.shape[1])
    places = [places_gmem[token, slot] for slot in slots]
    weights = [weights_gmem[token, slot] for slot in slots]
    end = groups_gmem[0, num_experts]
    size = lay.shape[0] - lay.begins[-1]
    for columns in lay.columns if _overlap(lay) else [pl.ds(piece * size, size)]:
        # All are on their way before one is used.
        outputs = [plgpu.load(rows_gmem.at[place, columns], layout=lay.layout, optimized=False) for place in places]
        total = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), lay.layout)
        for place, weight, output in zip(places, weights, outputs, strict=True):
            weighted = weight * output.astype(jnp.float32)
            total = total + jnp.where(place < end, weighted, jnp.zeros_like(weighted))
        total_gmem[token, columns] = total.astype(total_gmem.dtype)


def _overlap(lay: Lanes) -> bool:
    """Whether two pieces have some columns: then a block has them all."""
    hidden, last = lay.shape[0], lay.begins[-1]
    return hidden % (hidden - last) > 0
