"""Which tiles to try for the two matmuls of a layer, which of those measured to take, and how they are written down.

With the same tiles both matmuls are one launch, if the layer lets them; with others they are two. In two launches each
matmul has a time of its own, so a list as long as the longer of the two tries all tiles of both.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.bench.rows import message
from pallas_kernels.fused_moe import FusedMoeConfig
from pallas_kernels.fused_moe.experts import ExpertsCall
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig, both, tuned
from pallas_kernels.grouped_matmul.mosaic_gpu.config import (
    MOST_TOKENS,
    MOST_TOKENS_IN_BLOCKS,
    SMEM_LIMIT,
    STEP_BYTES,
    heuristic,
    in_parts,
    rows_of_most,
)

TOKENS_ON_M, BLOCKS_N = (64, 128), (128, 256)  # rows of a tile with tokens on M; with weights there: `rows_of_tiles`
BANDS, FEWER_STAGES, FEWEST_STAGES = (1, 2, 4, 8), (1, 2), 3
MOST_VARIED = 3  # of the best tiles: how many are tried in other bands and with fewer stages
GAIN, GAIN_OF_OTHER_PLAN = 0.02, 0.05  # of the time without; with another `block_m` rows are planned again


class Tiles(NamedTuple):
    """Of both matmuls."""

    w13: MosaicGpuConfig
    w2: MosaicGpuConfig

    def __str__(self) -> str:
        """Once where they are the same."""
        return " | ".join(dict.fromkeys(map(_said, self)))

    @property
    def config(self) -> FusedMoeConfig:
        """As `fused_moe` takes them."""
        return FusedMoeConfig(w13=self.w13, w2=self.w2)


class Measured(NamedTuple):
    """Microseconds of the matmuls: of both in one launch, or of each."""

    tiles: Tiles
    us: tuple[float, ...]

    def __str__(self) -> str:
        """In a line."""
        return f"{self.tiles}: {' + '.join(f'{us:.1f}' for us in self.us)} us"


class Cell:
    """The matmuls of a layer, which may be shapes alone.

    Raises:
      ValueError: Hopper's kernels do not serve them; the message says why.
    """

    def __init__(self, call: ExpertsCall) -> None:
        self._call, self._in_one_launch = call, dict[Tiles, bool]()
        self.matmuls = call.first, call.second(call.hidden)
        for name, each in zip(("w13", "w2"), self.matmuls, strict=True):
            if (reason := mosaic_gpu.unsupported_anywhere(each)) is not None:
                raise ValueError(f"{name} has no kernel to tune: {reason}")
        w13, w2 = (_heuristic(each) for each in self.matmuls)
        as_one = Tiles(w13, w13)
        self.default = as_one if self.in_one_launch(as_one) else Tiles(w13, w2)

    @property
    def block_m(self) -> int:
        """For which rows are sorted: that of the heuristic."""
        return self.default.w13.block_m

    @property
    def keys(self) -> list[tuple[tuned.Shape, int]]:
        """Of the matmuls in the table."""
        return [(tuned.shape_of(each), each.lhs.shape[0]) for each in self.matmuls]

    def in_one_launch(self, tiles: Tiles) -> bool:
        """Whether the matmuls share a launch."""
        if tiles not in self._in_one_launch:
            first = dataclasses.replace(self._call.first, config=tiles.w13)
            call = dataclasses.replace(self._call, first=first, config=tiles.w2)
            self._in_one_launch[tiles] = both.unsupported_anywhere(call) is None
        return self._in_one_launch[tiles]


def blocks_m(cell: Cell) -> list[int]:
    """Rows of a tile to try, those of the heuristic among them."""
    shape, m = cell.keys[0]
    most = MOST_TOKENS_IN_BLOCKS if _in_blocks(shape) else MOST_TOKENS
    return list(dict.fromkeys((cell.block_m, *rows_of_tiles(m / shape.experts, most), *TOKENS_ON_M)))


def rows_of_tiles(mean: float, most: int) -> list[int]:
    """With weights on M: what nearly all experts have, in equal parts, as the heuristic takes it; and what is near.

    That is 16 rows fewer, 16 more, and one part more.
    """
    span = rows_of_most(mean)
    fewest = math.ceil(span / most)
    equal, smaller = (in_parts(span, parts) for parts in (fewest, fewest + 1))
    return [rows for rows in dict.fromkeys((equal, equal - 16, equal + 16, smaller)) if 16 <= rows <= most]


def of_a_matmul(call: Call, block_m: int, band: int) -> list[MosaicGpuConfig]:
    """The tiles that the kernel takes for a matmul, with weights and with tokens on M, and as many stages as fit."""
    found = []
    sides = (True, False) if block_m in TOKENS_ON_M else (True,)
    for weights_on_m, block_n in itertools.product(sides, BLOCKS_N):
        for stages in range(SMEM_LIMIT // (STEP_BYTES * (block_m + block_n)), FEWEST_STAGES - 1, -1):
            config = MosaicGpuConfig(
                block_m=block_m, block_n=block_n, stages=stages, band=band, weights_on_m=weights_on_m
            )
            if mosaic_gpu.unsupported_anywhere(dataclasses.replace(call, config=config)) is None:
                found.append(config)
                break
    return found


def candidates(cell: Cell) -> list[Tiles]:
    """Tiles in the heuristic's bands; those of its `block_m` come first, and those with the same on M."""
    own, found = cell.default, list[Tiles]()
    for block_m in blocks_m(cell):
        w13, w2 = (of_a_matmul(call, block_m, config.band) for call, config in zip(cell.matmuls, own, strict=True))
        found += [tiles for each in w13 if cell.in_one_launch(tiles := Tiles(each, each))]
        found += in_pairs(w13, w2, cell.in_one_launch)

    def differs(tiles: Tiles) -> tuple[bool, bool]:
        return tiles.w13.block_m != own.w13.block_m, tiles.w13.weights_on_m != own.w13.weights_on_m

    return sorted((tiles for tiles in found if tiles != own), key=differs)


def in_pairs(
    w13: Sequence[MosaicGpuConfig], w2: Sequence[MosaicGpuConfig], in_one_launch: Callable[[Tiles], bool]
) -> list[Tiles]:
    """Each of either at least once, where there is one of the other that makes two launches with it."""
    found: list[Tiles] = []
    for i in range(max(len(w13), len(w2)) if w13 and w2 else 0):
        for shift in range(min(len(w13), len(w2))):
            left, right = (0, shift) if len(w13) >= len(w2) else (shift, 0)  # the longer list goes on by one
            tiles = Tiles(w13[(i + left) % len(w13)], w2[(i + right) % len(w2)])
            if not in_one_launch(tiles):
                found.append(tiles)
                break
    return found


def varied(cell: Cell, measured: Sequence[Measured]) -> list[Tiles]:
    """The best tiles, those of the heuristic's `block_m` first, in other bands and with fewer stages."""
    ranked = sorted(best(cell, measured), key=lambda timed: timed[0].w13.block_m != cell.block_m)
    known, found = {each.tiles for each in measured}, dict[Tiles, None]()
    for tiles, _ in ranked[:MOST_VARIED]:
        in_bands = [[dataclasses.replace(config, band=band) for config in tiles] for band in BANDS]
        with_fewer = [
            [dataclasses.replace(config, stages=config.stages - fewer) for config in tiles]
            for fewer in FEWER_STAGES
            if min(config.stages for config in tiles) - fewer >= FEWEST_STAGES
        ]
        found |= dict.fromkeys(Tiles(*configs) for configs in (*in_bands, *with_fewer))
    return [tiles for tiles in found if tiles not in known]


def best(cell: Cell, measured: Sequence[Measured]) -> list[tuple[Tiles, float]]:
    """The best in one launch and the best in two, of each `block_m`, with the time of both matmuls; the best first.

    Those in two launches may be tiles that were not measured beside each other.
    """
    found = []
    for block_m in dict.fromkeys(each.tiles.w13.block_m for each in measured):
        of_height = [each for each in measured if each.tiles.w13.block_m == block_m]
        together = [(tiles, us[0]) for tiles, us in of_height if len(us) == 1]
        apart = [
            (tiles, us_a[0] + us_b[1])
            for (a, us_a), (b, us_b) in itertools.product((each for each in of_height if len(each.us) == 2), repeat=2)
            if not cell.in_one_launch(tiles := Tiles(a.w13, b.w2))
        ]
        found += [min(each, key=lambda timed: timed[1]) for each in (together, apart) if each]
    return sorted(found, key=lambda timed: timed[1])


def choose(cell: Cell, measured: Sequence[Measured]) -> Tiles | None:
    """The tiles to take in place of the first measured, the default; None: there are none that are better by enough.

    Those of another `block_m` have to be far better than all of the default's.
    """
    own_us = sum(measured[0].us)
    ranked = best(cell, measured)
    same_plan_us = [us for tiles, us in ranked if tiles.w13.block_m == cell.block_m]
    for tiles, us in ranked:
        of_same = tiles.w13.block_m == cell.block_m
        if wins(us, own_us if of_same else min(own_us, *same_plan_us), same_plan=of_same):
            return tiles
    return None


def wins(us: float, than_us: float, *, same_plan: bool) -> bool:
    """Whether a time is better by enough."""
    return us < than_us * (1 - (GAIN if same_plan else GAIN_OF_OTHER_PLAN))


def search(
    cell: Cell,
    measure: Callable[[Tiles], tuple[float, ...]],
    *,
    left_s: Callable[[], float],
    log: Callable[[str], None],
) -> list[Measured]:
    """The default measured, and then candidates until there are none left, or no time.

    Args:
      cell: The matmuls.
      measure: Microseconds, as in `Measured`. Candidates for which it raises are left out, and the log says why.
      left_s: Seconds that are left.
      log: Called with a line for each.

    Raises:
      Exception: what `measure` raises of the default.
    """
    measured = [Measured(cell.default, measure(cell.default))]
    log(f"default: {measured[0]}")
    for which, find in (("tiles", candidates), ("variants", lambda cell: varied(cell, measured))):
        wanted = find(cell)
        for i, tiles in enumerate(wanted):
            left = left_s()
            if left <= 0:
                log(f"no time for the last {len(wanted) - i} of {len(wanted)} {which}")
                return measured
            try:
                measured.append(Measured(tiles, measure(tiles)))
            except Exception as error:  # such as too few registers: the others go on
                said = f"{tiles}: left out: {message(error)}"
            else:
                said = str(measured[-1])
            log(f"{which} {i + 1}/{len(wanted)}, {left:.0f} s left: {said}")
    return measured


def entries_of(cell: Cell, tiles: Tiles, **facts: Any) -> list[dict[str, Any]]:
    """For the table: one of each matmul; `facts` say how they were found."""
    return [tuned.write(shape, m, config, **facts) for (shape, m), config in zip(cell.keys, tiles, strict=True)]


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]], cell: Cell) -> list[dict[str, Any]]:
    """The entries of a table and those of a cell, sorted: of its matmuls, measured again, no old ones stay."""
    kept = [entry for entry in old if tuned.read(entry)[:2] not in cell.keys]
    return sorted([*kept, *new], key=lambda entry: tuned.read(entry)[:2])


def write_entries(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """A JSON list with an entry a line."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n" if entries else "[]\n", encoding="utf-8")


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Those of a file; none where there is no file yet.

    Raises:
      ValueError: it holds something else.
    """
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for entry in found:
            tuned.read(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of tiles: {message(error)}") from error
    return found


def _heuristic(call: Call) -> MosaicGpuConfig:
    """What the kernel takes for a matmul that is not in the table."""
    shape = tuned.shape_of(call)
    return heuristic(
        m=call.lhs.shape[0],
        num_experts=shape.experts,
        n=shape.n,
        gated=shape.gated,
        in_blocks=_in_blocks(shape),
    )


def _in_blocks(shape: tuned.Shape) -> bool:
    """Whether scales are of blocks."""
    return shape.operands.endswith("_block")


def _said(config: MosaicGpuConfig) -> str:
    on_m = "weights" if config.weights_on_m else "tokens"
    return f"{config.block_m}x{config.block_n}, {on_m} on M, {config.stages} stages, band {config.band}"
