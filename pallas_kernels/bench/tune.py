"""Which tiles to try for the two matmuls of a layer, which of those measured to take, and how they are written down.

With the same tiles of `block_m=64` both matmuls are one launch, if the layer lets them; with others they are two. In
two launches each matmul has a time of its own, so a list as long as the longer of the two tries all tiles of both.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.bench.rows import message
from pallas_kernels.fused_moe import FusedMoeConfig
from pallas_kernels.fused_moe.experts import ExpertsCall
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig, both, tuned
from pallas_kernels.grouped_matmul.mosaic_gpu.config import SMEM_LIMIT, STEP_BYTES, heuristic

BLOCKS_M, BLOCKS_N, FEWEST_STAGES, BANDS = (64, 128), (128, 256), 3, (1, 2, 4, 8)
GAIN, GAIN_OF_OTHER_PLAN = 0.02, 0.05  # of the time without; with another `block_m` rows are planned again


class Tiles(NamedTuple):
    """Of both matmuls."""

    w13: MosaicGpuConfig
    w2: MosaicGpuConfig

    def __str__(self) -> str:
        """Once where they are the same."""
        said = [f"{c.block_m}x{c.block_n}, {c.stages} stages, band {c.band}" for c in self]
        return " | ".join(dict.fromkeys(said))

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


def of_a_matmul(call: Call, block_m: int, band: int) -> list[MosaicGpuConfig]:
    """All tiles that the kernel takes for a matmul, those with most steps in flight first."""
    found = []
    for block_n in BLOCKS_N:
        for stages in range(SMEM_LIMIT // (STEP_BYTES * (block_m + block_n)), FEWEST_STAGES - 1, -1):
            config = MosaicGpuConfig(block_m=block_m, block_n=block_n, stages=stages, band=band)
            if mosaic_gpu.unsupported_anywhere(dataclasses.replace(call, config=config)) is None:
                found.append(config)
    return found


def candidates(cell: Cell) -> list[Tiles]:
    """Tiles in the heuristic's bands; those of its `block_m` come first."""
    found = []
    for block_m in sorted(BLOCKS_M, key=lambda block_m: block_m != cell.block_m):
        w13, w2 = (
            of_a_matmul(call, block_m, config.band) for call, config in zip(cell.matmuls, cell.default, strict=True)
        )
        found += [tiles for each in w13 if cell.in_one_launch(tiles := Tiles(each, each))]
        found += in_pairs(w13, w2, cell.in_one_launch)
    return [tiles for tiles in found if tiles != cell.default]


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


def in_other_bands(cell: Cell, measured: Sequence[Measured]) -> list[Tiles]:
    """The best tiles in one launch and in two, in the bands that were not tried."""
    known = {each.tiles for each in measured}
    found = {
        Tiles(*(dataclasses.replace(config, band=band) for config in tiles)): None
        for tiles, _ in best(cell, measured)
        for band in BANDS
    }
    return [tiles for tiles in found if tiles not in known]


def best(cell: Cell, measured: Sequence[Measured]) -> list[tuple[Tiles, float]]:
    """The best in one launch and the best in two, of each `block_m`, with the time of both matmuls; the best first.

    Those in two launches may be tiles that were not measured beside each other.
    """
    found = []
    for block_m in BLOCKS_M:
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
    for which, find in (("tiles", candidates), ("bands", lambda cell: in_other_bands(cell, measured))):
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
    in_blocks = shape.operands.endswith("_block")
    return heuristic(m=call.lhs.shape[0], num_experts=shape.experts, n=shape.n, gated=shape.gated, in_blocks=in_blocks)
