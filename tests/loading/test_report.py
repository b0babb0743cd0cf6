"""Plan and report: the numbers, and that each way of showing them works."""

import dataclasses
import io
import json
import re
import time

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import moe_online
from moe_online.flax import Linear
from moe_online.loading import messages
from moe_online.loading.messages import progress_bar
from numpy_quantizer import dequantize_numpy, quantize_numpy
from quick import few
from sources import KEN_MAPPING, as_ken, declared, ours, quiet_load

TREE = ours(e=3, h=160, i=96, layers=2)
SCHEMES = {"fp8_per_block": "fp8_per_block", "fp8_per_channel": "fp8_per_channel", "int8_w8a16": "int8_per_channel"}


@pytest.fixture(scope="module")
def loaded():
    config = {"moe": "fp8_per_block", "ignore": ["l0"]}
    arguments = {"quantization": config, "mapping": KEN_MAPPING}
    return moe_online.plan(declared(TREE), as_ken(TREE), **arguments), quiet_load(
        declared(TREE), as_ken(TREE), **arguments
    ).report


@pytest.mark.parametrize("unit_bytes", few([1, 2**28], (1,)))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_are_those_of_numpy(scheme, unit_bytes):
    tree = {"l0": TREE["l0"]}
    report = quiet_load(declared(tree), tree, quantization=scheme, unit_bytes=unit_bytes).report
    for tensor in report.tensors:
        x = tree["l0"][tensor.name.removeprefix("l0.")]
        format = SCHEMES[scheme]
        error = np.square(dequantize_numpy(quantize_numpy(x, format), format) - x.astype(np.float64))
        norm = np.square(x.astype(np.float64))
        assert tensor.error == pytest.approx(np.sqrt(error.sum() / norm.sum()), rel=1e-3)
        axes = tuple(range(1, x.ndim))
        worst = np.sqrt((error.sum(axis=axes) / norm.sum(axis=axes)).max())
        assert tensor.worst_expert_error == pytest.approx(worst, rel=1e-3)
        assert 0.001 < tensor.error <= tensor.worst_expert_error < 0.05


def scaled(magnitude):
    """One layer, its weights times this."""
    return {
        "l0": {name: (x.astype(np.float32) * np.float32(magnitude)).astype(x.dtype) for name, x in TREE["l0"].items()}
    }


def report_of(tree, scheme):
    return quiet_load(declared(tree), tree, quantization=scheme).report


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e25])
def test_an_error_that_cannot_be_told(magnitude):
    """Sums of squares in f32 overflow or vanish; that is no error of 0, and neither NaN nor a warning."""
    report = report_of(scaled(magnitude), "int8_w8a16")
    for tensor in report.tensors:
        assert tensor.quantized
        assert tensor.error is tensor.worst_expert_error is None
    assert sum(line.count(" - ") for line in str(report).splitlines()) == 4
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**50])
def test_errors_do_not_depend_on_the_magnitude(magnitude):
    reports = (report_of(scaled(factor), "int8_w8a16") for factor in (1, magnitude))
    for one, other in zip(*(report.tensors for report in reports), strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert one.worst_expert_error == pytest.approx(other.worst_expert_error, rel=1e-3)


def test_the_worst_expert_is_one_that_can_be_told():
    zero = {name: np.concatenate([np.zeros_like(x[:1]), x[1:]]) for name, x in TREE["l0"].items()}
    part = {name: x[1:] for name, x in zero.items()}
    whole, part = (report_of({"l0": layer}, "fp8_per_block") for layer in (zero, part))
    for tensor, other in zip(whole.tensors, part.tensors, strict=True):
        assert 0 < tensor.error == pytest.approx(other.error, rel=1e-5)
        assert 0 < tensor.worst_expert_error == pytest.approx(other.worst_expert_error, rel=1e-5)


def test_json(loaded):
    plan, report = (json.loads(json.dumps(part.to_json())) for part in loaded)
    assert plan["read_bytes"] == report["read_bytes"] == sum(x.nbytes for x in jax.tree.leaves(TREE))
    assert plan["resident_bytes"] == report["resident_bytes"] == sum(t["stored_bytes"] for t in report["tensors"])
    assert plan["peak_bytes"] == report["planned_peak_bytes"] >= report["peak_bytes"]
    common = ("name", "sources", "shape", "scheme", "rule", "source_bytes", "stored_bytes")
    assert [[t[key] for key in common] for t in plan["tensors"]] == [
        [t[key] for key in common] for t in report["tensors"]
    ]
    first = report["tensors"][0]
    assert first["name"] == "l0.w13_weight"
    assert first["sources"] == ["l0.w_gate", "l0.w_up"]
    assert first["shape"] == [3, 2, 96, 160]
    assert report["seconds"] > 0
    assert set(report) == {field.name for field in dataclasses.fields(loaded[1])}


def test_rules_and_schemes(loaded):
    facts = [(tensor.rule, tensor.scheme, tensor.error is None) for tensor in loaded[1].tensors]
    ignored = ("ignore: l0", "bfloat16", True)
    assert facts == [ignored] * 2 + [("moe", "fp8_per_block / fp8_per_group", False)] * 2


def test_tables(loaded):
    for part in loaded:
        console = Console(record=True, width=140, file=io.StringIO())
        console.print(part)
        text = console.export_text()
        assert str(part).split() == text.split()
        for words in ("l0.w13_weight", "l1.w2_weight", "fp8_per_block", "ignore: l0", "in memory", "peak"):
            assert words in text
    assert "%" in str(loaded[1])


def test_equal_layers_share_a_row():
    text = str(moe_online.plan(declared(TREE), TREE))
    assert "l*.w13" not in text  # a number that is a part of a name is no index
    tree = {"layers": {str(i): TREE["l0"] for i in range(3)}}
    abstract = {"layers": {str(i): declared(TREE)["l0"] for i in range(3)}}
    text = str(moe_online.plan(abstract, tree))
    assert text.count("layers.*.w13_weight") == text.count("layers.*.w2_weight") == 1


def test_picture(loaded, tmp_path):
    loaded[1].plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_one_line_of_log(caplog):
    config = {"moe": "fp8_per_block", "linear": "int8_w8a16", "ignore": ["l0"]}
    tree = {**TREE, "l2": TREE["l1"]} | {"q": {"kernel": np.ones((96, 64), np.float32)}}
    model = nnx.eval_shape(lambda: Linear(96, 64, use_bias=False, rngs=nnx.Rngs(0)))
    abstract = nnx.Dict(l0=nnx.Param(declared(TREE)["l0"]), l1=nnx.Param(declared(TREE)["l1"]), q=model)
    abstract.l2 = nnx.Param(declared(TREE)["l1"])
    with caplog.at_level("INFO", logger="moe_online"):
        report = quiet_load(abstract, tree, quantization=config).report
    (line,) = [record.getMessage() for record in caplog.records if record.name == "moe_online"]
    assert line == report.summary
    assert "\n" not in line
    for words in (
        "2 moe layers as fp8_per_block / fp8_per_group",
        "1 linear layer as int8_per_channel",
        "kept",
        " s; ",
    ):
        assert words in line


def test_a_bar_shows_what_is_done_the_rate_and_the_time_left(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(messages, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=120))
    with progress_bar(True, "loading", 2_000_000) as advance:
        for _ in range(2):
            advance(500_000)
            time.sleep(0.2)  # it is drawn ten times a second
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"loading .*1\.0/2\.0 MB .*\d MB/s .*\d:\d\d", drawn)


def test_progress_bar(capsys):
    tree = {"l0": TREE["l0"]}
    moe_online.load(declared(tree), tree)
    assert not "".join(capsys.readouterr()).strip()  # no terminal: no bar
    moe_online.load(declared(tree), tree, progress=False)
    assert not "".join(capsys.readouterr())
