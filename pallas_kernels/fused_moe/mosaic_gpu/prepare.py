"""Tokens as the cargo of the kernel that sorts pairs: each is read once, quantized, and written to all its places."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.formats import Format
from pallas_kernels.quantize.mosaic_gpu.tokens.rows import Lanes, lanes, out_types, quantized, store_scales
from pallas_kernels.routing.call import Order
from pallas_kernels.routing.mosaic_gpu.kernel import place
from pallas_kernels.routing.mosaic_gpu.squares import ALONG_COLUMNS, SIDE, WARPGROUPS, load


@functools.partial(jax.jit, static_argnames=("fmt", "num_experts", "block_m"))  # traced once for calls alike
def sort_and_send(
    x: Float[Array, "T K"],
    ids: Int32[Array, "T top_k"],
    factor: Float[Array, "1"] | None,
    *,
    fmt: Format | None,
    num_experts: int,
    block_m: int,
) -> tuple[Shaped[Array, "M K"], Float[Array, "blocks M"] | None, Order]:
    """Codes and scales of the rows of all pairs, and their order.

    Args:
      x: bf16, or without a format any dtype of 16 bits.
      ids: An id outside of `[0, num_experts)` has no expert.
      factor: For a scale of the whole matrix: what numbers are multiplied with.
      fmt: None: tokens are copied.
      num_experts: E.
      block_m: Rows of a tile.
    """
    cargo = Tokens(x=x, factor=factor, fmt=fmt, num_rows=ids.size)
    order, (values, *scales) = place(ids, cargo, num_experts=num_experts, block_m=block_m)
    return values.reshape(ids.size, x.shape[1]), scales[0] if scales else None, order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What tokens carry to their places: see `Cargo`."""

    x: Any  # [T, K]
    factor: Any  # [1], or None
    fmt: Format | None
    num_rows: int

    @property
    def name(self) -> str:
        """Of the format."""
        return "copied" if self.fmt is None else self.fmt.name

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Tokens `[T, K]`, or `[T, K/128, 128]`, and the factor, or None."""
        return self.x.reshape(self.x.shape[0], *self._lanes.shape), self.factor

    @property
    def out_types(self) -> tuple[Any, ...]:
        """Copies, or codes, and their scales."""
        return tuple(out_types(self.fmt, self._lanes, self.num_rows, self.x.dtype))

    @property
    def scratch_types(self) -> tuple[Any, ...]:
        """The largest magnitudes that the parts of each warpgroup have found, and zeros behind them."""
        if self.fmt is None or self.fmt.block != (1, None):
            return ()
        return (plgpu.SMEM((WARPGROUPS, SIDE), jnp.float32),)

    def begin(self, scratch: Sequence[Any], warpgroup: Any) -> None:
        """Puts the zeros."""
        for largest_smem in scratch:
            zeros = plgpu.layout_cast(jnp.zeros((SIDE,), jnp.float32), ALONG_COLUMNS)
            largest_smem[warpgroup, pl.ds(0, SIDE)] = zeros

    def load(self, inputs: Sequence[Any], token: Any) -> list[jax.Array]:
        """The token, on its way."""
        return self._lanes.load(inputs[0], token)

    def send(self, loaded: list[jax.Array], places: list[Any], refs: tuple[Sequence[Any], ...], warpgroup: Any) -> None:
        """Quantizes the token and stores it."""
        (_, factor_gmem), (values_gmem, *scales_gmem), scratch = refs
        pieces, lay = loaded, self._lanes
        stored: list[jax.Array] = []
        if self.fmt is not None:
            largest_of = functools.partial(_largest, scratch, warpgroup)
            pieces, stored = quantized(
                pieces, self.fmt, lay, factor=factor_gmem, largest_of=largest_of, dtype=values_gmem.dtype
            )
        for each in places:
            lay.store(values_gmem, each, pieces)
            if stored:
                store_scales(scales_gmem[0], each, lay, stored)

    @property
    def _lanes(self) -> Lanes:
        return lanes(self.x.shape[1], in_groups=self.fmt is not None and not self.fmt.whole_matrix)


def _largest(scratch: Sequence[Any], warpgroup: Any, magnitudes: jax.Array) -> jax.Array:
    """Of all groups: each warp finds that of its own, and then all warps the largest of them."""
    largest_smem = scratch[0]
    groups = jnp.max(magnitudes, axis=1).astype(jnp.float32)
    largest_smem[warpgroup, pl.ds(0, groups.shape[0])] = groups
    plgpu.commit_smem()
    amax = jnp.max(load(largest_smem.at[warpgroup, pl.ds(0, SIDE)], ALONG_COLUMNS))
    plgpu.commit_smem()  # before the next token's are put there
    return amax
