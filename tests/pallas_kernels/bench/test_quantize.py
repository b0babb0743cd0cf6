"""The bench of quantization on a CPU, and the path that a GPU takes, with a clock that stands in for CUPTI."""

import json

import pytest

from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import quantize, runner, timing
from pallas_kernels.bench.floors import Floors


def test_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--models", "tiny", "--formats", "mxfp4,int4_per_group", "--peers", "none", "--commit", "abc"]
    assert command.main(["quantize", *arguments, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = [f"tiny_{leaf}_{name}" for leaf in ("w13", "w2") for name in ("mxfp4", "int4_per_group")]
    assert [row["case"] for row in rows] == names
    for row in rows:
        assert row["us"] is row["tb_per_s"] is row["roofline_us"] is None  # no device time
        assert row["wall_us"] > 0
        assert row["error"] == 0
        assert (row["commit"], row["op"], row["impl"]) == ("abc", "quantize_into", "xla")
    assert rows[0]["shape"] == {"num_experts": 4, "halves": 2, "n": 128, "k": 128, "format": "mxfp4"}
    assert "host clock" in capsys.readouterr().out


def test_the_path_of_a_gpu(monkeypatch):
    def recorder():
        return lambda run: timing.Kernels(("main",), (timing.wall_us(lambda _: run(), 1),))

    monkeypatch.setattr(timing, "kernel_recorder", recorder)
    monkeypatch.setattr(timing, "REPETITIONS", 3)
    monkeypatch.setattr(timing, "l2_flush", lambda: lambda: None)
    monkeypatch.setattr(runner, "measure_floors", lambda: Floors(1e9, 1e9))
    bench = quantize.QuantizeBench(["xla", "qwix"], log=lambda line: None, commit=None)
    bench._platform = "gpu"
    ((row,),) = bench.run(quantize.select(["tiny"], ["fp8_per_block"])[:1])
    assert row.failure is None
    assert row.best
    assert row.impl == "xla"  # which is what ran
    elements = 4 * 2 * 128 * 128
    assert row.roofline_us == pytest.approx((2 * elements + elements + 4 * 2 * 4) / 1e9 * 1e6)
    assert row.us > 0
    assert row.peers["xla"] > 0
    assert row.peers["qwix"] or "qwix is not installed" in row.peer_notes["qwix"]


def test_other_bits_are_no_result(monkeypatch):
    """Negative control: a definition that is another format's."""
    monkeypatch.setattr(quantize, "through_xla", lambda case: lambda x: quantize.quantize(2 * x, case.format))
    bench = quantize.QuantizeBench([], log=lambda line: None, commit=None)
    ((row,),) = bench.run(quantize.select(["tiny"], ["mxfp8"])[:1])
    assert row.wall_us is None
    assert "are not those of the definition" in row.failure


def test_bad_names(tmp_path, capsys):
    for arguments, words in (
        (["--models", "gpt"], "unknown models 'gpt'; there are"),
        (["--formats", "fp3"], "unknown weight format 'fp3'"),
        (["--peers", "magic"], "unknown peers 'magic'; there are xla, qwix"),
    ):
        with pytest.raises(SystemExit):
            command.main(["quantize", *arguments, "--out", str(tmp_path / "rows")])
        assert words in capsys.readouterr().err


def test_a_cpu_runs_small_cases_only():
    bench = quantize.QuantizeBench([], log=lambda line: None, commit=None)
    ((row,),) = bench.run(quantize.select(["mixtral"], ["mxfp8"])[:1])
    assert "no accelerator: a CPU runs cases of up to 100 MB" in row.failure
