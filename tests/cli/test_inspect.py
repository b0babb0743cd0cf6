"""`moe-online inspect`: metadata only, and all of it."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from moe_online import models, save_quantized
from moe_online.assets import PYTHON_MOE_7M
from moe_online.cli import main
from moe_online.loading.orbax import OrbaxSource
from pallas_kernels import quantize


@pytest.fixture
def no_reads(monkeypatch):
    def read(self, name, index):
        pytest.fail(f"{name} was read")

    monkeypatch.setattr(OrbaxSource, "read_into", read)


@pytest.fixture(scope="module")
def without_data(tmp_path_factory):
    """The shipped model without the file that holds its weights."""
    copy = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(PYTHON_MOE_7M, copy)
    (data,) = (file for file in copy.rglob("d/*") if file.stat().st_size > 2**20)
    data.unlink()
    return copy


@pytest.mark.smoke
@pytest.mark.usefixtures("no_reads")
def test_plan_of_a_model_folder(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["inspect", str(PYTHON_MOE_7M), "--scheme", "fp8_per_block", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "layers.*.moe.experts.w13_wei" in out  # cut by the width
    assert "peak on the device" in out
    facts = json.loads(file.read_text())
    assert facts == models.plan(PYTHON_MOE_7M, quantization="fp8_per_block").to_json()
    assert facts["resident_bytes"] < 0.6 * facts["read_bytes"]


def test_neither_kind_needs_the_weights(without_data, capsys):
    assert main(["inspect", str(without_data), "--scheme", "int8_w8a16"]) == 0
    assert main(["inspect", str(without_data / "checkpoint")]) == 0
    assert "w13" in capsys.readouterr().out
    assert main(["inspect", str(without_data / "checkpoint" / "state")]) == 0


@pytest.mark.usefixtures("no_reads")
def test_tensors_of_a_bare_checkpoint(tmp_path, capsys):
    tree = {"blocks": {str(i): {"w_in": np.ones((4, 32, 16), np.float32), "norm": np.ones(32)} for i in range(3)}}
    ocp.save(tmp_path / "checkpoint", {"model": tree, "step": np.array(7, np.int32)})
    file = tmp_path / "tensors.json"
    assert main(["inspect", str(tmp_path / "checkpoint"), "--scheme", "fp8_per_channel", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if "model.blocks.*.w_in" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    # 3 x 4 x 32 x 16 codes, and 3 x 4 x 32 scales of 4 bytes
    assert cells == ["model.blocks.*.w_in", "3", "4x32x16", "float32", "24.6 kB", "whole", "7.68 kB"]
    assert "E K N -> *.experts.w13_weight.gate" in out  # how a mapping would reach it
    facts = json.loads(file.read_text())
    assert facts["stored_bytes"] == 3 * (4 * 32 * 16 * 4 + 32 * 8) + 4
    assert facts["tensors"][1] == {
        "name": "model.blocks.0.w_in",
        "shape": [4, 32, 16],
        "dtype": "float32",
        "stored_bytes": 8192,
        "estimated_bytes": 2560,
    }


def test_prefix_chooses_a_part(tmp_path, capsys):
    ocp.save(tmp_path / "checkpoint", {"params": {"w": np.ones((4, 4))}, "opt": {"m": np.ones((4, 4))}})
    assert main(["inspect", str(tmp_path / "checkpoint"), "--prefix", "params"]) == 0
    out = capsys.readouterr().out
    assert "1 tensor, 128 B" in out
    assert "mapping" not in out  # nothing of rank 3


def test_stored_chunks_are_shown(capsys):
    """The shipped checkpoint stores whole tensors."""
    assert main(["inspect", str(PYTHON_MOE_7M / "checkpoint"), "--prefix", "params"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 13
    assert all(row.rstrip("│ ").endswith("whole") for row in rows)


def test_an_export_needs_nothing_said(tmp_path, capsys):
    params = {"w": quantize(jnp.ones((2, 128, 128)), "fp8_per_block")}
    save_quantized(params, tmp_path / "export", progress=False)
    assert main(["inspect", str(tmp_path / "export")]) == 0
    out = capsys.readouterr().out
    assert "w.values" in out
    assert "An export of save_quantized" in out
    assert "mapping={" not in out
