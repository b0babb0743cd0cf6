"""What becomes of a tile's sums: scales, bias, rounding, activation; then the rows that it owns are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu.config import WARPGROUP_ROWS
from pallas_kernels.grouped_matmul.mosaic_gpu.requantize import OF_ROWS, Quantizer, Rows
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK, Pair
from pallas_kernels.grouped_matmul.mosaic_gpu.tiles import Work

OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Epilogue(NamedTuple):
    """Registers -> SMEM -> HBM in chunks of columns, only the rows that a tile owns."""

    work: Work
    scales: Pair | None  # that multiply whole rows; None: there are none, or they are in the sums
    bias_gmem: Any
    out_gmem: Any
    out_smem: Any
    warpgroup: jax.Array
    num_experts: int
    out_dtype: Any  # that results are rounded to, and then quantized where there is a quantizer
    quantizer: Quantizer | None

    def store_tile(
        self, sums: Sequence[jax.Array], stores: jax.Array, expert: Any, row: Any, first: Any, last: Any, column: Any
    ) -> jax.Array:
        """Stores what this warpgroup has of a tile; `stores` counts its chunks, which take slots in turn."""
        wn = self.work.warpgroup_n
        size = min(self.out_smem.shape[-1], wn)
        loaded_column = self.work.loaded_column(column)
        if self.work.config.split_rows:
            row = row + self.warpgroup * WARPGROUP_ROWS
        else:
            loaded_column = loaded_column + self.warpgroup * wn
        begin = jnp.clip(first - row, 0, WARPGROUP_ROWS)
        count = jnp.clip(last - row, 0, WARPGROUP_ROWS) - begin
        rows = Rows(row, begin, count)
        store = self._store_half if size < self.out_smem.shape[-1] else self._store
        for offset in range(0, wn, size):
            place = loaded_column + offset
            mine = (count > 0) & (place >= column)

            @pl.when(mine)
            def _store(offset: int = offset, place: Any = place, stores: jax.Array = stores) -> None:
                store(functools.partial(self._finish, sums, expert, row, place, offset, size), rows, place, stores)

            stores = stores + mine.astype(jnp.int32)
        return stores

    def _store(self, finish: Callable[[], jax.Array], rows: Rows, place: Any, stores: jax.Array) -> None:
        """A chunk from this warpgroup alone."""
        slots, size = self.out_smem.shape[1], self.out_smem.shape[-1]
        part = self.out_smem.at[self.warpgroup, lax.rem(stores, jnp.int32(slots))]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        real = finish()
        part[...] = real if self.quantizer is None else self.quantizer.codes(real, rows, place, self.warpgroup)
        plgpu.commit_smem()
        store_rows(part, self.out_gmem, rows, pl.multiple_of(place, size))

    def _store_half(self, finish: Callable[[], jax.Array], rows: Rows, place: Any, stores: jax.Array) -> None:
        """A block of codes of which each warpgroup has half of the columns; the first one stores it."""
        assert self.quantizer is not None
        written = self.quantizer.written
        both, size = self.out_smem.at[0, 0], self.work.warpgroup_n
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # before the other one hears from this one
        codes = self.quantizer.codes_of_half(finish(), rows, place, self.warpgroup, stores)
        both.at[:, pl.ds(pl.multiple_of(self.warpgroup * size, size), size)][...] = codes
        plgpu.commit_smem()

        @pl.when(self.warpgroup == 1)
        def _ready() -> None:
            plgpu.barrier_arrive(written)

        @pl.when(self.warpgroup == 0)
        def _both() -> None:
            plgpu.barrier_wait(written)
            store_rows(both, self.out_gmem, rows, pl.multiple_of(place, BLOCK))

    def _finish(
        self, sums: Sequence[jax.Array], expert: Any, row: Any, place: Any, offset: int, size: int
    ) -> jax.Array:
        """The output's columns `[place, place + size)`, which lie at `offset` among this warpgroup's."""

        def rounded(half: int) -> jax.Array:
            features = pl.ds(pl.multiple_of(half * self.work.n_out + place, 8), size)
            part = self._scaled(
                _columns(sums, half * self.work.warpgroup_n + offset, size), expert, row, half, features
            )
            if self.bias_gmem is not None:
                biased = jnp.where(expert >= 0, expert, self.bias_gmem.shape[0] - 1)
                bias = plgpu.load(self.bias_gmem.at[biased, features], layout=OF_COLUMNS, optimized=False)
                part = part + lax.broadcast_in_dim(bias, part.shape, (1,))
            return part.astype(self.out_dtype)

        activation = self.work.epilogue
        if activation is None:
            return rounded(0)
        return activation(*map(rounded, range(2 if self.work.gated else 1))).astype(self.out_dtype)

    def _scaled(self, sums: jax.Array, expert: Any, row: Any, half: int, features: Any) -> jax.Array:
        """Sums of codes times the scales of their rows and columns, in f32."""
        if self.scales is None:
            return sums
        sums, (lhs, rhs) = sums.astype(jnp.float32), self.scales
        expert = jnp.maximum(expert, 0)
        if lhs.of == "row":
            own = plgpu.load(lhs.values.at[pl.ds(row, WARPGROUP_ROWS)], layout=OF_ROWS, optimized=False)
            sums = sums * lax.broadcast_in_dim(own, sums.shape, (0,))
        else:
            sums = sums * lhs.values[0]
        if rhs.of == "row":
            own = plgpu.load(rhs.values.at[expert, features], layout=OF_COLUMNS, optimized=False)
            return sums * lax.broadcast_in_dim(own, sums.shape, (1,))
        halves = rhs.values.shape[0] // self.num_experts  # 2 with gate and up apart
        scaled: jax.Array = sums * rhs.values[expert * halves + (half if halves > 1 else 0)]
        return scaled


def _columns(sums: Sequence[jax.Array], begin: int, size: int) -> jax.Array:
    """Columns of sums that lie side by side in parts of one width."""
    width = sums[0].shape[1]
    found: jax.Array = sums[begin // width][:, begin % width : begin % width + size]
    return found


def store_rows(src_smem: Any, out_gmem: Any, rows: Rows, column: Any) -> None:
    """Stores the owned rows of a chunk.

    A copy has a static height, so a part of the rows goes in powers of two.
    """
    (height, width), (row, begin, count) = src_smem.shape, rows

    def store(offset: Any, size: int) -> None:
        target = out_gmem.at[pl.ds(row + offset, size), pl.ds(column, width)]
        plgpu.copy_smem_to_gmem(src_smem.at[pl.ds(offset, size)], target, commit_group=False)

    @pl.when(count == height)
    def _whole() -> None:
        store(0, height)

    @pl.when(count < height)
    def _part() -> None:
        offset, size = begin, height // 2
        while size:
            pl.when((count & size) != 0)(functools.partial(store, offset, size))
            offset, size = offset + (count & size), size // 2

    plgpu.commit_smem_to_gmem_group()
