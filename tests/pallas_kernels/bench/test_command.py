"""The command on a CPU: rows, the table, and the path that a GPU takes, with a clock that stands in for CUPTI."""

import json
import subprocess
import sys

import pytest

from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import floors, grouped_matmul, peers, runner, table, timing
from pallas_kernels.bench.floors import Floors


@pytest.fixture
def out(tmp_path):
    return tmp_path / "rows.jsonl"


def run(out, *arguments):
    return command.main(["grouped_matmul", "--cases", "tiny", "--tokens", "4", "--out", str(out), *arguments])


@pytest.mark.smoke
def test_on_a_cpu(out, capsys):
    assert run(out, "--peers", "none", "--commit", "abc") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["tiny_w13_T4", "tiny_w2_T4"]
    for row in rows:
        assert row["us"] is row["us_loop"] is row["tflops"] is row["roofline_us"] is None  # no device time
        assert row["wall_us"] > 0
        assert 1e-3 < row["error"] < 2.5e-3
        assert row["best"]
        assert row["failure"] is None
        assert (row["commit"], row["impl"], row["peers"]) == ("abc", "xla", {})
    printed = capsys.readouterr()
    assert "NO ACCELERATOR" in printed.err
    assert "host clock" in printed.out


def test_what_cannot_run_has_its_reason_in_the_row(out):
    arguments = ["--cases", "mixtral_w2", "--peers", "none", "--configs", '[{"block_m": 64}]']
    assert run(out, *arguments) == 1
    assert "no accelerator" in json.loads(out.read_text())["failure"]
    out.unlink()
    assert run(out, "--peers", "none", "--configs", '[{"block_m": 64}, null]') == 0
    bad, good = map(json.loads, out.read_text().splitlines()[:2])
    assert "takes no config" in bad["failure"]
    assert (bad["best"], bad["error"]) == (False, None)
    assert (good["best"], good["failure"]) == (True, None)


def test_the_path_of_a_gpu(out, monkeypatch):
    def recorder():
        return lambda run: timing.Kernels(("plan", "main"), (1.0, timing.wall_us(lambda _: run(), 1)))

    def broken(case):
        yield peers.Variant("tile=1", lambda x, w, sizes: x)

    class Torch:
        def time(self, problem):
            raise RuntimeError("torch sees no GPU")

        def close(self):
            pass

    monkeypatch.setattr(timing, "kernel_recorder", recorder)
    monkeypatch.setattr(timing, "REPETITIONS", 3)
    monkeypatch.setattr(timing, "LOOP_US", 500)
    monkeypatch.setattr(timing, "l2_flush", lambda: lambda: None)
    monkeypatch.setattr(runner, "measure_floors", lambda: Floors(1e9, 1e9))
    monkeypatch.setattr(grouped_matmul, "TorchPeer", Torch)
    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer(variants=broken))
    names = ["ragged_dot", "broken", "tokamax", peers.TORCH]
    monkeypatch.setattr(peers, "installed", lambda package: package == "torch")
    bench = grouped_matmul.Bench([None], names, log=lambda line: None, commit=None)
    bench._platform = "gpu"
    (case,) = command.cases.select(["tiny_w13"], [4])
    ((row,),) = bench.run([case])
    assert row.failure is None
    assert (row.kernel, row.num_kernels, row.best) == ("main", 2, True)
    assert row.us > row.us_kernel > 0
    assert row.us_loop > 0
    assert row.roofline_us == pytest.approx(1e6 * max(case.min_bytes, case.flops) / 1e9)
    assert row.tflops == pytest.approx(case.flops / row.us / 1e6)
    assert row.dense_us > 0
    assert row.peers["ragged_dot"] > 0
    assert {name for name in names if row.peers[name] is None} == {"broken", "tokamax", peers.TORCH}
    assert "tile=1 WrongResult: shape" in row.peer_notes["broken"]
    assert "not installed" in row.peer_notes["tokamax"]
    assert "torch sees no GPU" in row.peer_notes[peers.TORCH]
    floors.dense_us.cache_clear()  # it holds a time that is none
    text = table.markdown([json.loads(row.to_json())])
    assert "ragged_dot" in text.splitlines()[0]


def test_table(out, capsys):
    assert run(out, "--peers", "none") == 0
    capsys.readouterr()
    assert command.main(["table", str(out)]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| case | config | us |")
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    assert "| tiny_w13_T4 | default | **(" in rows[0]
    assert table.markdown([]) == "no rows"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "nobody"], "unknown peers 'nobody'"),
        (["--cases", "nobody"], "unknown cases 'nobody'"),
        (["--tokens", "0"], "must be positive"),
        (["--peers", "none", "--configs", "[3]"], "must be a JSON list"),
    ],
)
def test_bad_arguments(arguments, said, out, capsys):
    with pytest.raises(SystemExit) as error:
        run(out, *arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_configs_from_a_file(tmp_path):
    path = tmp_path / "configs.json"
    path.write_text('[null, {"block_m": 128}]')
    assert command.read_configs(str(path)) == [None, {"block_m": 128}]
    assert command.read_configs(None) == [None]


@pytest.mark.smoke
def test_the_package_does_not_import_it():
    script = "import sys, pallas_kernels; print(*[m for m in sys.modules if 'bench' in m or m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pallas_kernels.bench" not in done.stdout
    assert "torch" not in done.stdout.split()
