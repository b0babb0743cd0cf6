"""The bench of whole loads, on a tiny model: each row has both sides, and what it measured was right."""

import json

import numpy as np
import pytest

from moe_online.bench import loading as bench
from moe_online.loading import open_source
from quick import few

SIZES = (4, 128, 64)
ARGUMENTS = ["--layers", "2", "--experts", "4", "--hidden", "128", "--intermediate", "64", "--schemes", "int8_w8a16"]


@pytest.mark.parametrize("layout", few(["fused", "per_expert", "orbax"], ("orbax",)))
def test_rows(tmp_path, capsys, layout):
    assert bench.main([str(tmp_path), "--layout", layout, *ARGUMENTS]) == 0
    load, again, export = map(json.loads, capsys.readouterr().out.splitlines())
    source = 2 * 3 * np.prod(SIZES) * 2
    assert (load["what"], load["layout"], load["scheme"], load["cache"]) == ("load", layout, "int8_w8a16", "warm")
    assert load["source_bytes"] == source
    assert source / 2 < load["kept_bytes"] == export["source_bytes"] == export["kept_bytes"] < source * 0.6
    assert load["of_floor"] == pytest.approx(load["seconds"] / max(load["read_seconds"], load["copy_seconds"]))
    assert load["compile_seconds"] < load["seconds"]
    assert min(load["read_seconds"], load["copy_seconds"], export["save_seconds"]) > 0
    assert export["times_faster"] == pytest.approx(export["online_seconds"] / export["seconds"])
    assert (again["what"], again["source_bytes"]) == ("reload", source)
    assert again["of_quantize"] == pytest.approx(again["seconds"] / again["quantize_seconds"])
    assert load["peak_bytes"] <= load["planned_peak_bytes"]


def test_what_is_written_are_the_experts(tmp_path):
    for layout in ("fused", "per_expert"):
        bench.write_files(tmp_path / layout, 1, SIZES, layout)
    fused, apart = open_source(tmp_path / "fused"), open_source(tmp_path / "per_expert")
    whole = fused.read("l0.gate", tuple(slice(0, n) for n in fused.tensors["l0.gate"].shape))
    one = apart.read("l0.2.w1", tuple(slice(0, n) for n in apart.tensors["l0.2.w1"].shape))
    np.testing.assert_array_equal(whole[2], one)
    assert (whole[0] != whole[1]).any()
