"""Published opponents: what the best of others took for the same layer on another day, beside the floor of that day."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

H200 = Path(__file__).parents[2] / "docs/bench/opponents_h200.json"  # of a checkout; not in the wheel
TIGHT = 1.10  # an opponent this close to its floor leaves next to nothing to win


class Cell(NamedTuple):
    """The best opponent for a model, a scheme and T; null where nobody was measured."""

    floor_us: float
    us: float | None = None
    name: str | None = None
    goal_us: float | None = None

    @property
    def ratio(self) -> float | None:
        """The opponent's time over its floor."""
        return None if self.us is None else self.us / self.floor_us

    @property
    def goal_ratio(self) -> float | None:
        """Where half of what the opponent leaves open is closed."""
        return None if self.goal_us is None else self.goal_us / self.floor_us


Cells = Mapping[tuple[str, str, int], Cell]  # by model, scheme and T


def read(path: Path = H200) -> Cells:
    """The cells of a file; none where there is no file."""
    if not path.exists():
        return {}
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return {(cell.pop("model"), cell.pop("scheme"), cell.pop("tokens")): Cell(**cell) for cell in cells}


def find(row: Mapping[str, Any], cells: Cells) -> Cell | None:
    """The cell that a row of `fused_moe` compares with: that of the same routing."""
    shape = row["shape"]
    return cells.get((shape["model"], shape["scheme"], shape["tokens"])) if shape["routing"] == "uniform" else None


def verdict(row: Mapping[str, Any], cell: Cell | None) -> str | None:
    """What a row's times say beside an opponent's, each over the floor of its own run; None without both.

    `tight` where the opponent leaves next to nothing; then `at goal`, `better` than the opponent, or `worse`. A time in
    a loop that says otherwise is named as well.
    """
    floor = row["roofline_us"]
    if cell is None or cell.us is None or floor is None or row["us"] is None:
        return None
    words = judge(row["us"] / floor, cell)
    if row["us_loop"] is not None and (in_loop := judge(row["us_loop"] / floor, cell)) != words:
        words += f", {in_loop} in a loop"
    return f"tight, {words}" if cell.us <= TIGHT * cell.floor_us else words


def judge(ratio: float, cell: Cell) -> str:
    """`ratio` is a time over its floor; the cell has an opponent."""
    assert cell.ratio is not None
    if cell.goal_ratio is not None and ratio <= cell.goal_ratio:
        return "at goal"
    return "better" if ratio < cell.ratio else "worse"
