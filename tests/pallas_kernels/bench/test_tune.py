"""The search for tiles without a GPU: what is tried, what is taken, what is written, with a clock that is made up."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import get_activation, prepare, quantize
from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import layer, timing, tune, tuner
from pallas_kernels.bench.layer_problem import LayerWeights
from pallas_kernels.bench.tune import Cell, Measured, Tiles
from pallas_kernels.fused_moe.experts import ExpertsCall
from pallas_kernels.fused_moe.pipeline import first_call
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig, tuned

FEW, MANY = 16, 4096  # tokens: of Qwen3-30B 1 and 256 rows for each expert


@functools.cache
def cell_of(tokens=FEW, scheme="fp8_block128", model="qwen3-30b"):
    """Of shapes alone."""
    e, top_k, hidden, width = layer.MODELS[model]
    weights, rows, _ = layer.SCHEMES[scheme]

    def make():
        w13, w2 = (jnp.zeros(shape, jnp.bfloat16) for shape in ((e, 2, width, hidden), (e, hidden, width)))
        if weights is not None:
            w13, w2 = quantize(w13, weights), quantize(w2, weights)
        ids = jnp.zeros((tokens, top_k), jnp.int32)
        x, topk_weights = jnp.zeros((tokens, hidden), jnp.bfloat16), jnp.zeros(ids.shape)
        return prepare(x, topk_weights, ids, e, activation_format=rows), w13, w2

    prepared, w13, w2 = jax.eval_shape(make)
    first = first_call(prepared, w13, None, get_activation("silu"), prepared.activation_format)
    return Cell(ExpertsCall(first=first, w2=w2, bias=None, dtype=prepared.dtype))


def low(block_n=256, stages=4, band=1):
    return MosaicGpuConfig(block_m=64, block_n=block_n, stages=stages, band=band)


def tall(block_n=256, stages=4, band=4):
    return MosaicGpuConfig(block_m=128, block_n=block_n, stages=stages, band=band)


def test_the_default_is_what_runs_without_a_table():
    assert cell_of(FEW).default == Tiles(low(), low())  # one launch
    assert cell_of(FEW, "bf16").default == Tiles(low(), low())
    rows_apart = cell_of(FEW, "fp8_channel")  # quantized between the matmuls: two launches
    assert rows_apart.default == Tiles(low(), low(128, 6))
    assert cell_of(MANY).default == Tiles(tall(), tall())
    assert [shape.operands for shape, _ in rows_apart.keys] == ["fp8_row"] * 2
    assert cell_of(FEW).keys == [
        (tuned.Shape(128, 1536, 2048, True, "fp8_block"), 128), (tuned.Shape(128, 2048, 768, False, "fp8_block"), 128),
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", layer.SCHEMES)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_candidates(tokens, scheme):
    cell = cell_of(tokens, scheme)
    found = tune.candidates(cell)
    assert len(set(found)) == len(found) < 20
    assert cell.default not in found
    for i, call in enumerate(cell.matmuls):
        for block_m in tune.BLOCKS_M:
            wanted = set(tune.of_a_matmul(call, block_m, cell.default[i].band))
            tried = {tiles[i] for tiles in found if not cell.in_one_launch(tiles)} | {cell.default[i]}
            assert wanted <= tried
    heights = [tiles.w13.block_m == cell.block_m for tiles in found]
    assert heights == sorted(heights, reverse=True)
    assert all(tiles.w13.block_m == tiles.w2.block_m for tiles in found)
    shared = [tiles for tiles in found if cell.in_one_launch(tiles)]
    assert bool(shared) == (scheme in ("bf16", "fp8_block128"))
    assert all(tiles.w13 == tiles.w2 for tiles in shared)


def test_tiles_of_a_matmul_are_those_that_fit():
    first, second = cell_of().matmuls
    assert tune.of_a_matmul(first, 64, 1) == [low(256, 4), low(256, 3)]
    assert tune.of_a_matmul(second, 64, 1) == [*(low(128, s) for s in (8, 7, 6, 5, 4, 3)), low(256, 4), low(256, 3)]
    assert tune.of_a_matmul(first, 128, 4) == [*(tall(128, s) for s in (5, 4, 3)), tall(256, 4), tall(256, 3)]


def test_pairs_are_two_launches():
    cell = cell_of()
    assert tune.in_pairs([low()], [low()], cell.in_one_launch) == []
    assert tune.in_pairs([low()], [], cell.in_one_launch) == []
    assert tune.in_pairs([tall()], [tall()], cell.in_one_launch) == [Tiles(tall(), tall())]
    crossed = tune.in_pairs([low(), low(256, 3)], [low(), low(256, 3)], cell.in_one_launch)
    assert crossed == [Tiles(low(), low(256, 3)), Tiles(low(256, 3), low())]


def test_the_best_of_two_launches_is_put_together():
    cell = cell_of()
    one = Tiles(low(), low())
    a, b = Tiles(low(), low(128, 6)), Tiles(low(256, 3), low(128, 8))
    measured = [Measured(one, (100.0,)), Measured(a, (60.0, 38.0)), Measured(b, (65.0, 30.0))]
    assert tune.best(cell, measured) == [(Tiles(low(), low(128, 8)), 90.0), (one, 100.0)]
    same = Measured(Tiles(low(256, 3), low()), (70.0, 20.0))  # its w2 with the first w13 would be one launch
    assert tune.best(cell, [*measured, same])[0] == (Tiles(low(256, 3), low()), 85.0)


def test_what_is_chosen():
    cell = cell_of()
    default, better, other = Tiles(low(), low()), Tiles(low(256, 3), low(256, 3)), Tiles(tall(), tall())

    def chosen(default_us, better_us, *other_us):
        measured = [Measured(default, (default_us,)), Measured(better, (better_us,))]
        return tune.choose(cell, [*measured, *([Measured(other, other_us)] if other_us else [])])

    assert chosen(100, 97) == better
    assert chosen(100, 99) is None
    assert chosen(100, 120) is None
    assert chosen(100, 120, 50, 46) is None  # rows would be planned again for 4 %
    assert chosen(100, 120, 50, 44) == other
    assert chosen(100, 97, 50, 42) == other
    assert chosen(100, 96, 50, 43) == better  # 3 % more is not worth another plan
    assert chosen(100, 97, 50, 47.5) == better


def test_search(monkeypatch):
    cell, lines, clock = cell_of(), [], iter(range(100, 0, -1))

    def measure(tiles):
        if tiles.w13.block_m == 128:
            raise RuntimeError("ptxas:\nno registers")
        times = [100.0 + config.stages - config.band for config in tiles]
        return (sum(times),) if cell.in_one_launch(tiles) else tuple(times)

    measured = tune.search(cell, measure, left_s=lambda: next(clock), log=lines.append)
    assert measured[0].tiles == cell.default
    assert len({each.tiles for each in measured}) == len(measured)
    assert tune.best(cell, measured)[0][0] in (
        Tiles(low(256, 3, 8), low(256, 3, 8)),
        Tiles(low(256, 3, 8), low(128, 3, 8)),
    )
    assert lines[0] == "default: 64x256, 4 stages, band 1: 206.0 us"
    assert lines[1].startswith(f"tiles 1/{len(tune.candidates(cell))}, 100 s left: 64x256, 3 stages, band 1: 204.0 us")
    assert any("left out: RuntimeError: ptxas: no registers" in line for line in lines)
    assert any(line.startswith("bands ") for line in lines)


def test_search_stops_with_what_it_has():
    cell, lines, clock = cell_of(), [], iter([2.0, 1.0, 0.0])
    measured = tune.search(cell, lambda tiles: (1.0, 1.0), left_s=lambda: next(clock), log=lines.append)
    assert len(measured) == 3
    count = len(tune.candidates(cell))
    assert lines[-1] == f"no time for the last {count - 2} of {count} tiles"


def test_a_default_that_fails_is_an_error():
    def broken(tiles):
        raise RuntimeError("no CUPTI")

    with pytest.raises(RuntimeError, match="no CUPTI"):
        tune.search(cell_of(), broken, left_s=lambda: 1.0, log=lambda line: None)


def test_the_table_is_merged_and_sorted(tmp_path):
    path = tmp_path / "table.json"
    assert tune.read_entries(path) == []
    few, many, narrow = cell_of(FEW), cell_of(MANY), cell_of(FEW, "int8_w8a8")
    found = tune.merged([], tune.entries_of(many, many.default, us=1.0), many)
    found = tune.merged(found, tune.entries_of(few, few.default, us=2.0), few)
    found = tune.merged(found, tune.entries_of(narrow, narrow.default), narrow)
    tune.write_entries(path, found)
    assert len(path.read_text().splitlines()) == 2 + 6
    again = tune.read_entries(path)
    assert again == found == sorted(found, key=lambda entry: tuned.read(entry)[:2])
    assert [(e["n"], e["operands"], e["m"]) for e in again[:3]] == [
        (1536, "fp8_block", 128), (1536, "fp8_block", 32768), (1536, "int8_row", 128),
    ]  # fmt: skip
    replaced = tune.merged(again, tune.entries_of(few, Tiles(low(256, 3), low(256, 3))), few)
    assert len(replaced) == 6
    assert replaced[0]["stages"] == 3
    assert len(tune.merged(replaced, [], few)) == 4  # measured again, and the default is as good
    tune.write_entries(path, [])
    assert json.loads(path.read_text()) == []
    path.write_text('[{"experts": 3}]')
    with pytest.raises(ValueError, match=r"table\.json is no table of tiles: KeyError"):
        tune.read_entries(path)


def test_what_has_no_kernel_is_said():
    with pytest.raises(ValueError, match="w13 has no kernel to tune: K=2880"):
        cell_of(FEW, "fp8_block128", "gpt-oss-20b")


def test_matmuls_among_the_kernels():
    names = ("sort", "grouped_matmul_8bit_mosaic_gpu_kernel", "quantize", "grouped_matmul_8bit_mosaic_gpu_kernel")
    assert tuner.matmul_us(timing.Kernels(names, (1.0, 2.0, 3.0, 4.0))) == (2.0, 4.0)
    assert tuner.matmul_us(timing.Kernels(("grouped_matmuls_8bit", "x"), (5.0, 1.0))) == (5.0,)
    with pytest.raises(RuntimeError, match="0 matmuls among the kernels sort"):
        tuner.matmul_us(timing.Kernels(("sort",), (1.0,)))


class Trial:
    """In place of a GPU: 10 us less for each stage that a config has less."""

    reason, made = None, ()

    def __init__(self, case, problem):
        self.cell = cell_of(case.tokens, case.scheme_name, "qwen3-30b")
        Trial.made += (case.name,)

    def measure(self, tiles):
        us = 100.0 + 10 * tiles.w13.stages, 50.0 + 10 * tiles.w2.stages
        return (sum(us),) if self.cell.in_one_launch(tiles) else us

    def compare(self, tiles):
        return sum(self.measure(tiles)), sum(self.measure(self.cell.default)), self.reason


@pytest.fixture
def on_gpu(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

    monkeypatch.setattr(tuner.jax, "devices", lambda: [Device])
    monkeypatch.setattr(tuner, "unsupported_here", lambda: None)
    monkeypatch.setattr(tuner, "Trial", Trial)
    monkeypatch.setattr(tuner, "LayerWeights", lambda case: None)
    monkeypatch.setattr(tuner, "make_layer_problem", lambda case, weights: None)
    monkeypatch.setattr(Trial, "made", ())


def run(out, *arguments):
    options = ["--models", "tiny", "--schemes", "fp8_block128", "--tokens", "16", "--out", str(out)]
    return command.main(["tune", *options, *arguments])


def test_the_command(tmp_path, on_gpu, capsys, monkeypatch):
    out = tmp_path / "table.json"
    assert run(out, "--tokens", "16,4096") == 0
    entries = json.loads(out.read_text())
    assert {entry["stages"] for entry in entries} == {3}
    assert {(entry["m"], entry["block_m"]) for entry in entries} == {(128, 64), (32768, 128)}
    for entry in entries:
        assert entry["us"] < entry["default_us"]
        assert (entry["device"], entry["jax"]) == ("NVIDIA H200", jax.__version__)
    said = capsys.readouterr().err
    assert "tiny_fp8_block128_T16: tiles 1/" in said
    assert "taken" in said
    assert "done: 2 of 2 cells" in said
    monkeypatch.setattr(Trial, "reason", "wrong: relative L2 1.0e+00 between the two")
    assert run(out) == 0
    assert [entry["m"] for entry in json.loads(out.read_text())] == [32768] * 2
    assert "wrong: relative L2" in capsys.readouterr().err


def test_no_time(tmp_path, on_gpu, capsys):
    out = tmp_path / "table.json"
    assert run(out, "--limit-s", "0") == 1
    assert "tiny_fp8_block128_T16: no time left" in capsys.readouterr().err
    assert not out.exists()
    assert Trial.made == ()


def test_a_cell_that_fails_leaves_the_others(tmp_path, on_gpu, capsys, monkeypatch):
    def broken(case, weights):
        if case.tokens == 16:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(tuner, "make_layer_problem", broken)
    assert run(tmp_path / "table.json", "--tokens", "16,64") == 0
    said = capsys.readouterr().err
    assert "tiny_fp8_block128_T16: not tuned: RuntimeError: out of memory" in said
    assert "done: 1 of 2 cells" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "tuning needs an NVIDIA Hopper GPU, and this is cpu"),
        (["--models", "gpt", "--schemes", "fp3"], "unknown models 'gpt'.*\n.*unknown schemes 'fp3'"),
        (["--tokens", "0"], "must be positive"),
    ],
)
def test_bad_arguments(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "table.json", *arguments)
    assert error.value.code == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
def test_the_path_of_a_gpu(scheme, monkeypatch):
    """The real trial on a CPU: XLA, which takes no config, stands in for the kernels, and a made-up clock for CUPTI."""
    seen, real = [], tuner.pallas_kernels.run_experts

    def by_xla(*args, implementation, config):
        seen.append((implementation, config))
        return real(*args, implementation="xla")

    def recorder():
        return lambda run: timing.Kernels(("plan", "grouped_matmuls"), (1.0, timing.wall_us(lambda _: run(), 1)))

    monkeypatch.setattr(tuner.pallas_kernels, "run_experts", by_xla)
    monkeypatch.setattr(timing, "kernel_recorder", recorder)
    monkeypatch.setattr(timing, "l2_flush", lambda: lambda: None)
    (case,) = layer.select(["tiny"], [scheme], [4])
    trial = tuner.Trial(case, tuner.make_layer_problem(case, LayerWeights(case)))
    other = Tiles(low(128, 3), low(128, 3))
    (us,) = trial.measure(other)
    assert us > 0
    assert trial.measure(other)
    assert seen == [("mosaic_gpu", other.config)]  # compiled once
    times = trial.compare(other)
    assert min(times[:2]) > 0
    assert times[2] is None or "side by side" in times[2]
    real_errors = tuner.gate.errors_of
    monkeypatch.setattr(tuner.gate, "errors_of", lambda out, expected: real_errors(jnp.roll(out, 1, axis=0), expected))
    assert "wrong: relative L2" in trial.compare(other)[2]
