"""Published opponents, and how the table judges rows of `fused_moe` beside them."""

import json
from pathlib import Path

import pytest

from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import layer, opponents, table
from pallas_kernels.bench.floors import Floors
from pallas_kernels.bench.opponents import Cell
from pallas_kernels.bench.rows import Row

H200 = Path(__file__).parents[3] / "docs/bench/opponents_h200.json"
CELL = Cell(floor_us=100, us=200, name="them", goal_us=141)  # twice the floor, the goal 1.41
TIGHT = Cell(floor_us=100, us=110, name="them", goal_us=105)


def row(us, *, loop=None, floor=50.0, scheme="bf16", routing="uniform", **fields):
    shape = {"model": "m", "scheme": scheme, "tokens": 8, "routing": routing}
    made = Row(case="m_T8", op="fused_moe", impl="mosaic_gpu", shape=shape, us=us, us_loop=loop, roofline_us=floor)
    for name, value in fields.items():
        setattr(made, name, value)
    return json.loads(made.to_json()) | {"date": "2026-01-01"}


@pytest.mark.parametrize(
    ("us", "cell", "said"),
    [
        (70, CELL, "at goal"),  # 1.4 floors of its own run
        (71, CELL, "better"),
        (99, CELL, "better"),
        (100, CELL, "worse"),
        (150, CELL, "worse"),
        (52, TIGHT, "tight, at goal"),
        (54, TIGHT, "tight, better"),
        (56, TIGHT, "tight, worse"),
        (56, Cell(floor_us=100, us=111, name="them", goal_us=105), "worse"),
        (50, Cell(floor_us=100), None),
        (50, None, None),
        (None, CELL, None),
    ],
)
def test_verdict(us, cell, said):
    assert opponents.verdict(row(us), cell) == said


def test_a_loop_that_says_otherwise():
    assert opponents.verdict(row(70, loop=70.4), CELL) == "at goal"
    assert opponents.verdict(row(70, loop=80), CELL) == "at goal, better in a loop"
    assert opponents.verdict(row(54, loop=60), TIGHT) == "tight, better, worse in a loop"
    assert opponents.verdict(row(70, floor=None), CELL) is None


def test_table():
    cells = {("m", "bf16", 8): CELL}
    measured = row(80, loop=90, num_kernels=5, temp_bytes=1_000_000, temp_limit_bytes=40_000_000, error=2e-3)
    measured["peers"] = {"xla": 300.0}
    head, _, line, other_routing, other_scheme, *_ = table.markdown(
        [measured, row(80, routing="zipf"), row(80, scheme="fp8_tensor")], cells
    ).splitlines()
    assert head == "| case | " + " | ".join(table.LAYER[1:]) + " | xla |"
    assert line == ("| m_T8 | 80 | 90 | 50 | 1.60 | 2.00 them | 1.41 | better | 5 | 1 | 40 | 2.0e-03 | 300 |")
    for nothing_to_compare in (other_routing, other_scheme):
        assert "| 80 | - | 50 | 1.60 | - | - | - |" in nothing_to_compare


def test_other_rows_keep_their_table():
    matmul = json.loads(Row(case="c", op="grouped_matmul", impl="xla", shape={}, us=2.0).to_json())
    matmul["date"] = "2026-01-01"
    lines = table.markdown([row(80), matmul], {}).splitlines()
    assert lines[0].startswith("| case | config | us |")
    assert lines[2].startswith("| c | default | 2 |")
    assert lines[3] == ""
    assert lines[4].startswith("| case | us | us_loop | floor us | x floor | opponent")
    assert lines[6].startswith("| m_T8 | 80 |")


def test_the_command_reads_another_file(tmp_path, capsys):
    rows, cells = tmp_path / "rows.jsonl", tmp_path / "cells.json"
    rows.write_text(json.dumps(row(80)) + "\n")
    cells.write_text(json.dumps({"cells": [{"model": "m", "scheme": "bf16", "tokens": 8, **CELL._asdict()}]}))
    assert command.main(["table", str(rows), "--opponents", str(cells)]) == 0
    assert "| 2.00 them | 1.41 | better |" in capsys.readouterr().out
    assert command.main(["table", str(rows), "--opponents", str(tmp_path / "none")]) == 0
    assert "them" not in capsys.readouterr().out


def test_the_file_has_a_cell_for_each_name():
    cells = opponents.read(H200)
    batches = (1, 4, 16, 64, 512, 4096, 16384)
    wanted = {(m, s, t) for m in ("qwen3-30b", "mixtral", "dsv3-tp8") for s in layer.SCHEMES for t in batches}
    assert wanted - set(cells) == set()
    measured = {key for key in wanted if cells[key].us is not None}
    assert wanted - measured == {
        *((model, "fp8_tensor", 16384) for model in ("qwen3-30b", "mixtral")),
        *(("dsv3-tp8", scheme, 16384) for scheme in layer.SCHEMES),
    }
    file = json.loads(H200.read_text())
    assert {cell.name for cell in cells.values()} - {None} == set(file["opponents"])


def test_goals_are_what_the_file_says_they_are():
    for key, cell in opponents.read(H200).items():
        assert (cell.us is None) == (cell.name is None) == (cell.goal_us is None), key
        if cell.us is not None:
            halfway = max((cell.us * cell.floor_us) ** 0.5, 1.05 * cell.floor_us)
            assert cell.goal_us == pytest.approx(min(halfway, cell.us), rel=0.06, abs=1), key


def test_floors_are_those_of_the_bench():
    """The published ones took the expected number of experts; the bench counts those that are hit."""
    machine = json.loads(H200.read_text())["machine"]
    floors = Floors(1e12 * machine["copy_tb_per_s"], 1e12 * machine["bf16_tflops"])
    for (model, scheme, tokens), cell in opponents.read(H200).items():
        if scheme in layer.SCHEMES and model != "gpt-oss-20b" and tokens >= 64:
            (case,) = layer.select([model], [scheme], [tokens])
            found = floors.roofline_us(case, speed=case.scheme.matmul_speed)
            assert found == pytest.approx(cell.floor_us, rel=0.02), case.name
