"""Rows as a markdown table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench import opponents

MISSING = "-"

Cells = list[str]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def markdown(rows: Sequence[dict[str, Any]], against: opponents.Cells | None = None) -> str:
    """One line per row, the best config of a case in bold, one column per peer, and where the rows come from.

    Times are microseconds. Rows that only have the host's clock say so in place of a device time. Rows of `fused_moe`
    stand in a table of their own, beside opponents `against` which they are judged.
    """
    if not rows:
        return "no rows"
    layers = [row for row in rows if row["op"] == "fused_moe"]
    others = [row for row in rows if row["op"] != "fused_moe"]
    tables = [_table(others, OPERATION, _of_operation)] if others else []
    if layers:
        tables.append(_table(layers, LAYER, lambda row: _of_layer(row, against or {})))
    failures = [f"* {row['case']} {_config(row)}: {row['failure']}" for row in rows if row["failure"]]
    sources = dict.fromkeys(_source(row) for row in rows)
    return "\n".join([*"\n\n".join(tables).splitlines(), "", *failures, *([""] if failures else []), *sources])


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], cells: Callable[[dict[str, Any]], Cells]) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [_line([*columns, *peers]), _line(["---"] * (len(columns) + len(peers)))]
    lines += [_line([*cells(row), *(_number(row["peers"].get(name)) for name in peers)]) for row in rows]
    return "\n".join(lines)


TIMES = ("us", "us_loop", "floor us", "x floor")
OPERATION = ("case", "config", *TIMES, "TF", "TB/s", "error")
LAYER = ("case", *TIMES, "opponent x its floor", "goal x floor", "verdict", "kernels", "temp MB", "limit MB", "error")


def _of_operation(row: dict[str, Any]) -> Cells:
    return [row["case"], _config(row), *_times(row), _number(row["tflops"]), _number(row["tb_per_s"]), _error(row)]


def _of_layer(row: dict[str, Any], against: opponents.Cells) -> Cells:
    cell = opponents.find(row, against)
    opponent = goal = MISSING
    if cell is not None and cell.ratio is not None:
        opponent, goal = f"{_ratio(cell.ratio)} {cell.name}", _ratio(cell.goal_ratio)
    verdict = opponents.verdict(row, cell) or MISSING
    memory = (_megabytes(row[name]) for name in ("temp_bytes", "temp_limit_bytes"))
    return [row["case"], *_times(row), opponent, goal, verdict, _number(row["num_kernels"]), *memory, _error(row)]


def _times(row: Mapping[str, Any]) -> Cells:
    us, floor = row["us"], row["roofline_us"]
    time = _number(us)
    if us is None and row["wall_us"] is not None:
        time = f"({_number(row['wall_us'])} host clock)"
    if row["best"]:
        time = f"**{time}**"
    return [time, _number(row["us_loop"]), _number(floor), _ratio(None if us is None or floor is None else us / floor)]


def _error(row: Mapping[str, Any]) -> str:
    return MISSING if row["error"] is None else f"{row['error']:.1e}"


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return MISSING if value is None else _number(value / 1e6)


def _config(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in (row["config"] or {}).items()) or "default"


def _number(value: float | None) -> str:
    """Three digits or all before the point."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _source(row: dict[str, Any]) -> str:
    floors = ""
    if row["copy_tb_per_s"] is not None:
        floors = f", copy {_number(row['copy_tb_per_s'])} TB/s, dense bf16 {_number(row['matmul_tflops'])} TF"
    return f"{row['device']}, driver {row['driver']}, jax {row['jax']}, {row['commit']}, {row['date'][:10]}{floors}."


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
