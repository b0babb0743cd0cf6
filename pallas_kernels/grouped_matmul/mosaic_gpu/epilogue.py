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
from pallas_kernels.grouped_matmul.mosaic_gpu.requantize import Quantizer, Rows
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK, Pair
from pallas_kernels.grouped_matmul.mosaic_gpu.sides import Sides, sides
from pallas_kernels.grouped_matmul.mosaic_gpu.tiles import Tile, Work
from pallas_kernels.grouped_matmul.mosaic_gpu.turned import load_blocks, store_turned


class AtEnd(NamedTuple):
    """Scales that multiply the sums of whole rows of K."""

    of_rows: Any  # of each chunk of rows
    of_columns: Any  # of each chunk of columns, of gate and up


class Chunk(NamedTuple):
    """A part of a warpgroup's sums that is stored at once."""

    row: int  # its first one, where tokens are along the columns of sums
    offset: int  # its first feature
    size: int  # how many


class Epilogue(NamedTuple):
    """Registers -> SMEM -> HBM in chunks of rows and columns, only the rows that a tile owns."""

    work: Work
    scales: Pair | None  # that multiply whole rows; None: there are none, or they are in the sums
    bias_gmem: Any
    out_gmem: Any
    out_smem: Any
    turned_smem: Any  # [2, chunk_m, 128]: rows of features before they are quantized; or None
    warpgroup: jax.Array
    num_experts: int
    out_dtype: Any  # that results are rounded to, and then quantized where there is a quantizer
    quantizer: Quantizer | None

    def scales_of(self, tile: Tile) -> AtEnd | None:
        """Those that multiply a tile's sums at its end: there by then, where registers can hold them as long."""
        config = self.work.config
        if self.scales is None or (config.block_m > 64 if config.weights_on_m else config.warpgroup_n > 128):
            return None
        return self._at_end(tile)

    def _at_end(self, tile: Tile) -> AtEnd:
        row, column = self._place(tile)
        halves, size = range(2 if self.work.gated else 1), self._chunk
        return AtEnd(
            [self._row_scales(row + first) for first in range(0, self._sides.num_tokens, self._chunk_m)],
            [
                [self._column_scales(tile.expert, half, column + offset, size) for half in halves]
                for offset in range(0, self.work.warpgroup_n, size)
            ],
        )

    @property
    def _sides(self) -> Sides:
        return sides(self.work.config)

    @property
    def _chunk(self) -> int:
        """Columns that are stored at once."""
        size: int = min(self.out_smem.shape[-1], self.work.warpgroup_n)
        return size

    @property
    def _chunk_m(self) -> int:
        """Rows that are stored at once."""
        return self.work.config.chunk_m if self.work.config.weights_on_m else WARPGROUP_ROWS

    def _place(self, tile: Tile) -> tuple[Any, Any]:
        """The first row and column of what this warpgroup has of a tile."""
        column = self.work.loaded_column(tile.column)
        if self.work.config.split_rows:
            return tile.row + self.warpgroup * WARPGROUP_ROWS, column
        return tile.row, column + self.first_column

    @property
    def first_column(self) -> Any:
        """Of a tile of the output, this warpgroup's."""
        return 0 if self.work.config.split_rows else self.warpgroup * self.work.warpgroup_n

    def store_tile(self, sums: Sequence[jax.Array], stores: jax.Array, tile: Tile, at_end: AtEnd | None) -> jax.Array:
        """Stores what this warpgroup has of a tile; `stores` counts its chunks, which take slots in turn."""
        (first_row, loaded_column), size, height = self._place(tile), self._chunk, self._chunk_m
        in_halves = size < self.out_smem.shape[-1]
        if self.work.config.weights_on_m:
            store = self._store_turned_half if in_halves else self._store_turned
            if at_end is None and self.scales is not None:
                at_end = self._at_end(tile)  # one wait for all chunks
        else:
            store = self._store_half if in_halves else self._store
        for chunk in range(self._sides.num_tokens // height):
            row = first_row + chunk * height
            begin = jnp.clip(tile.first - row, 0, height)
            count = jnp.clip(tile.last - row, 0, height) - begin
            rows = Rows(row, begin, count)
            for i, offset in enumerate(range(0, self.work.warpgroup_n, size)):
                place = loaded_column + offset
                mine = (count > 0) & (place >= tile.column)
                known = None if at_end is None else (at_end.of_rows[chunk], at_end.of_columns[i])
                which = Chunk(chunk * height, offset, size)
                finish = functools.partial(self._finish, sums, tile.expert, row, place, which, known)
                pl.when(mine)(functools.partial(store, finish, rows, place, stores))
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

    def _store_turned(self, finish: Callable[[], jax.Array], rows: Rows, place: Any, stores: jax.Array) -> None:
        """The same where features lie along the rows of sums."""
        slots, size = self.out_smem.shape[1], self.out_smem.shape[-1]
        part = self.out_smem.at[self.warpgroup, lax.rem(stores, jnp.int32(slots))]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        if self.quantizer is None:
            store_turned(finish(), part)
        else:
            turned = self.turned_smem.at[self.warpgroup]
            store_turned(finish(), turned)
            part[...] = self.quantizer.codes(load_blocks(turned), rows, place, self.warpgroup)
        plgpu.commit_smem()
        store_rows(part, self.out_gmem, rows, pl.multiple_of(place, size))

    def _store_turned_half(self, finish: Callable[[], jax.Array], rows: Rows, place: Any, stores: jax.Array) -> None:
        """A block of codes, of which each warpgroup has half of the features; they make the codes of both in turn.

        One still reads while the other is on its next block, but not on the one after that.
        """
        assert self.quantizer is not None
        turn, size = lax.rem(stores, jnp.int32(2)), self.work.warpgroup_n
        mine = pl.ds(pl.multiple_of(self.warpgroup * size, size), size)
        store_turned(finish(), self.turned_smem.at[turn, :, mine])
        plgpu.barrier_arrive(self.quantizer.exchanged)
        plgpu.barrier_wait(self.quantizer.exchanged)

        @pl.when(self.warpgroup == turn)
        def _both() -> None:
            assert self.quantizer is not None
            both = self.out_smem.at[self.warpgroup, 0]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            real, column = load_blocks(self.turned_smem.at[turn]), place - self.warpgroup * size
            both[...] = self.quantizer.codes(real, rows, column, self.warpgroup)
            plgpu.commit_smem()
            store_rows(both, self.out_gmem, rows, pl.multiple_of(column, BLOCK))

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
        self, sums: Sequence[jax.Array], expert: Any, row: Any, place: Any, chunk: Chunk, known: Any
    ) -> jax.Array:
        """The output's columns from `place` on, and rows from `row` on, that are a chunk of this warpgroup's."""
        side, size = self._sides, chunk.size

        def rounded(half: int) -> jax.Array:
            part = side.part(sums, half * self.work.warpgroup_n + chunk.offset, size)
            if side.tokens:
                part = part[:, chunk.row : chunk.row + self._chunk_m]
            if self.scales is not None:
                of_rows, of_columns = known or (self._row_scales(row), None)
                scales = of_columns[half] if of_columns else self._column_scales(expert, half, place, size)
                part = side.times(part.astype(jnp.float32), of_rows, side.tokens)
                part = side.times(part, scales, side.features)
            if self.bias_gmem is not None:
                biased = jnp.where(expert >= 0, expert, self.bias_gmem.shape[0] - 1)
                features = pl.ds(pl.multiple_of(half * self.work.n_out + place, 8), size)
                bias = plgpu.load(self.bias_gmem.at[biased, features], layout=side.of_features, optimized=False)
                part = part + lax.broadcast_in_dim(bias, part.shape, (side.features,))
            return part.astype(self.out_dtype)

        activation = self.work.epilogue
        if activation is None:
            return rounded(0)
        return activation(*map(rounded, range(2 if self.work.gated else 1))).astype(self.out_dtype)

    def _row_scales(self, row: Any) -> Any:
        """Those of a warpgroup's rows, or the one of them all."""
        assert self.scales is not None
        of_rows = self.scales.lhs
        if of_rows.of != "row":
            return of_rows.values[0]
        own = of_rows.values.at[pl.ds(row, self._chunk_m)]
        return plgpu.load(own, layout=self._sides.of_tokens, optimized=False)

    def _column_scales(self, expert: Any, half: int, place: Any, size: int) -> Any:
        """Those of the output's columns `[place, place + size)` of gate or up, or the one of them all."""
        assert self.scales is not None
        of_weights, expert = self.scales.rhs, jnp.maximum(expert, 0)
        if of_weights.of == "row":
            features = pl.ds(pl.multiple_of(half * self.work.n_out + place, 8), size)
            layout = self._sides.of_features
            return plgpu.load(of_weights.values.at[expert, features], layout=layout, optimized=False)
        halves = of_weights.values.shape[0] // self.num_experts  # 2 with gate and up apart
        return of_weights.values[expert * halves + (half if halves > 1 else 0)]


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
        offset, size = begin, 1 << (height - 1).bit_length() - 1
        while size:
            pl.when((count & size) != 0)(functools.partial(store, offset, size))
            offset, size = offset + (count & size), size // 2

    plgpu.commit_smem_to_gmem_group()
