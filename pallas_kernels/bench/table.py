"""Rows as a markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("case", "config", "us", "us_loop", "floor us", "x floor", "TF", "TB/s", "error")
MISSING = "-"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row, the best config of a case in bold, one column per peer, and where the rows come from.

    Times are microseconds. Rows that only have the host's clock say so in place of a device time.
    """
    if not rows:
        return "no rows"
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [_line([*COLUMNS, *peers]), _line(["---"] * (len(COLUMNS) + len(peers)))]
    lines += [_line([*_cells(row), *(_number(row["peers"].get(name)) for name in peers)]) for row in rows]
    failures = [f"* {row['case']} {_config(row)}: {row['failure']}" for row in rows if row["failure"]]
    sources = dict.fromkeys(_source(row) for row in rows)
    return "\n".join([*lines, "", *failures, *([""] if failures else []), *sources])


def _cells(row: dict[str, Any]) -> list[str]:
    us, floor = row["us"], row["roofline_us"]
    time = _number(us)
    if us is None and row["wall_us"] is not None:
        time = f"({_number(row['wall_us'])} host clock)"
    if row["best"]:
        time = f"**{time}**"
    ratio = MISSING if us is None or floor is None else f"{us / floor:.2f}"
    error = MISSING if row["error"] is None else f"{row['error']:.1e}"
    times = [time, _number(row["us_loop"]), _number(floor), ratio]
    return [row["case"], _config(row), *times, _number(row["tflops"]), _number(row["tb_per_s"]), error]


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
