"""What one block works on: which tiles are its own, and what each consists of."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.activations import Activation
from pallas_kernels.grouped_matmul.mosaic_gpu.config import COMPUTE_WARPGROUPS, MosaicGpuConfig
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import BLOCK
from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT, EXPERT, FIRST, IS_EXPERT, LAST, NUM_TILES, ROW


class Part(NamedTuple):
    """Columns of a warpgroup's tile that belong together: of gate or up, in one block of scales."""

    begin: int  # in the warpgroup's tile
    size: int
    half: int  # 0, or of a gated tile 1 for up
    offset: int  # in the warpgroup's columns of the output


class Tile(NamedTuple):
    """Of the output, and what it takes."""

    number: Any  # of its rows
    expert: Any
    row: Any  # the first one loaded
    first: Any  # of the rows that it owns
    last: Any  # past them
    column: Any  # its first one
    steps: Any  # along K: none for the rows of no expert


class Work:
    """A block's tiles: `program`, `program + num_programs`, ... of all (row tile, column tile) pairs.

    After an `earlier` matmul in the same launch the programs go on in turn.
    """

    def __init__(
        self,
        tiles_gmem: Any,
        n_out: int,
        k_steps: jax.Array,
        config: MosaicGpuConfig,
        program: jax.Array,
        num_programs: int,
        epilogue: Activation | None,
        num_pieces: int,
        earlier: Work | None,
    ):
        self.config, self.epilogue, self.n_out = config, epilogue, n_out
        self.gated = epilogue is not None and epilogue.gated
        halves = 2 if self.gated else 1
        self.pieces = pieces(config, gated=self.gated, count=num_pieces)  # what a step of weights is loaded in
        self.block_n = config.block_n // halves  # columns of the output per tile
        self.warpgroup_n = config.warpgroup_n // halves  # and per warpgroup
        self._tiles_gmem, self.k_steps = tiles_gmem, k_steps
        self._num_tiles, self.n_tiles = tiles_gmem[NUM_TILES, 0], pl.cdiv(n_out, self.block_n)
        if earlier is not None:
            before = lax.rem(self._num_tiles * earlier.n_tiles, jnp.int32(num_programs))
            program = lax.rem(program - before + num_programs, jnp.int32(num_programs))
        self._program, self._num_programs = program, num_programs
        self.num_tiles = (self._num_tiles * self.n_tiles - program + num_programs - 1) // num_programs

    def tile(self, i: jax.Array) -> Tile:
        """This block's tile `i`."""
        most = self._num_tiles * self.n_tiles - 1  # a block that has no tile asks for its first one too
        index = jnp.minimum(self._program + i * self._num_programs, most)
        number, ni = in_bands(index, self._num_tiles, self.n_tiles, self.config.band)
        fields = EXPERT, ROW, FIRST, LAST, IS_EXPERT
        expert, row, first, last, is_expert = (self._tiles_gmem[field, number] for field in fields)
        row, column, steps = pl.multiple_of(row, ALIGNMENT), ni * self.block_n, is_expert * self.k_steps
        return Tile(number, expert, row, first, last, column, steps)

    def parts(self) -> list[Part]:
        """A warpgroup's columns, cut where gate ends and up begins, and where blocks of scales do."""
        found = []
        for half in range(2 if self.gated else 1):
            for offset in range(0, self.warpgroup_n, BLOCK):
                size = min(BLOCK, self.warpgroup_n - offset)
                found.append(Part(half * self.warpgroup_n + offset, size, half, offset))
        return found

    def loaded_column(self, column: Any) -> jax.Array:
        """Where the columns of a tile begin; the last tile of a row reaches back into the one before it."""
        return jnp.minimum(column, self.n_out - self.block_n)


def in_bands(index: jax.Array, num_tiles: jax.Array, n_tiles: int, band: int) -> tuple[jax.Array, jax.Array]:
    """The (row tile, column tile) of a linear index: down a band of row tiles, then to the next column, and back."""
    number = index // (band * n_tiles)
    within = index - number * (band * n_tiles)
    height = jnp.minimum(num_tiles - number * band, band)
    ni = within // height
    turned = jnp.where(lax.rem(number, jnp.int32(2)) == 1, n_tiles - 1 - ni, ni)
    return number * band + within - ni * height, turned


def pieces(config: MosaicGpuConfig, *, gated: bool, count: int = 1) -> list[tuple[int, int, int, int]]:
    """What a tile of weights consists of: `(place in the tile, 0 or 1 for gate or up, column offset, size)`.

    Of a gated tile each warpgroup has gate columns, and then the up columns that belong to them; others come in
    `count` pieces.
    """
    if not gated:
        size = config.block_n // count
        return [(size * part, 0, size * part, size) for part in range(count)]
    parts = 1 if config.split_rows else COMPUTE_WARPGROUPS
    size = config.block_n // (2 * parts)
    return [(size * (2 * part + half), half, size * part, size) for part in range(parts) for half in (0, 1)]
