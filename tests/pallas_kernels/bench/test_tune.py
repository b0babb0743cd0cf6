"""The search for tiles without a GPU: what is tried, what is taken, what is written, with a clock that is made up."""

import dataclasses
import functools
import itertools
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
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig, tuned
from pallas_kernels.grouped_matmul.mosaic_gpu.config import MOST_TOKENS, MOST_TOKENS_IN_BLOCKS, heuristic

FEW, SOME, MANY = 16, 512, 4096  # tokens: of Qwen3-30B 1, 32 and 256 rows for each expert


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


def flat(block_n=256, stages=6, band=1, block_m=16):
    """Weights on M; the heuristic's for few rows."""
    return MosaicGpuConfig(block_m=block_m, block_n=block_n, stages=stages, band=band, weights_on_m=True)


def low(block_n=256, stages=4, band=2):
    """Tokens on M; the heuristic's for some rows, in one launch."""
    return MosaicGpuConfig(block_m=64, block_n=block_n, stages=stages, band=band)


def tall(block_n=256, stages=4, band=4):
    return MosaicGpuConfig(block_m=128, block_n=block_n, stages=stages, band=band)


def test_the_default_is_what_runs_without_a_table():
    assert cell_of(FEW).default == Tiles(flat(), flat())  # one launch
    assert cell_of(FEW, "bf16").default == Tiles(flat(), flat())
    assert cell_of(SOME).default == Tiles(low(), low())
    rows_apart = cell_of(SOME, "fp8_channel")  # quantized between the matmuls: two launches
    assert rows_apart.default == Tiles(low(), low(128, 6))
    assert cell_of(MANY).default == Tiles(tall(), tall())
    assert cell_of(MANY, "bf16").default == Tiles(*[flat(256, 4, 2, block_m=144)] * 2)
    assert [shape.operands for shape, _ in rows_apart.keys] == ["fp8_row"] * 2
    assert cell_of(FEW).keys == [
        (tuned.Shape(128, 1536, 2048, True, "fp8_block"), 128), (tuned.Shape(128, 2048, 768, False, "fp8_block"), 128),
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", layer.SCHEMES)
@pytest.mark.parametrize("tokens", [FEW, SOME, MANY])
def test_candidates(tokens, scheme):
    cell = cell_of(tokens, scheme)
    found = tune.candidates(cell)
    assert len(set(found)) == len(found) < 20
    assert cell.default not in found
    for block_m in tune.blocks_m(cell):
        w13, w2 = (tune.of_a_matmul(call, block_m, cell.default.w13.band) for call in cell.matmuls)
        pairs = [Tiles(*pair) for pair in itertools.product(w13, w2)]
        assert {tiles for tiles in pairs if cell.in_one_launch(tiles)} <= {*found, cell.default}
        apart, tried = ([t for t in some if not cell.in_one_launch(t)] for some in (pairs, [*found, cell.default]))
        for i in range(2):
            assert {tiles[i] for tiles in apart} <= {tiles[i] for tiles in tried}
    own = cell.default.w13
    differ = [(tiles.w13.block_m != own.block_m, tiles.w13.weights_on_m != own.weights_on_m) for tiles in found]
    assert differ == sorted(differ)
    assert all(tiles.w13.block_m == tiles.w2.block_m for tiles in found)
    assert {(tiles.w13.weights_on_m, tiles.w13.block_m) for tiles in found} >= {(False, 64), (False, 128), (True, 64)}
    assert len({tiles.w13.block_m for tiles in found if tiles.w13.weights_on_m} - {64, 128}) >= 1
    shared = [tiles for tiles in found if cell.in_one_launch(tiles)]
    few_bytes = tokens < 4096  # of rows, which a launch of both keeps to its end
    assert bool(shared) == (few_bytes and scheme in ("bf16", "fp8_block128"))
    assert all(tiles.w13 == tiles.w2 for tiles in shared)


@pytest.mark.parametrize(
    ("tokens", "scheme", "expected"),
    [
        (FEW, "fp8_block128", [16, 32, 64, 128]),
        (SOME, "fp8_block128", [64, 48, 32, 128]),
        (SOME, "bf16", [64, 48, 32, 128]),
        (MANY, "fp8_block128", [128, 80, 64]),  # no 144: scales of blocks take registers
        (MANY, "bf16", [144, 128, 160, 96, 64]),  # 256 rows, and some for chance, in two parts or in three
    ],
)
def test_rows_of_tiles(tokens, scheme, expected):
    assert tune.blocks_m(cell_of(tokens, scheme)) == expected


def test_rows_of_tiles_follow_the_heuristic():
    seen = 0
    for m in range(0, 512 * 8, 5):
        config = heuristic(m=m, num_experts=8, n=256, gated=False, in_blocks=False)
        if config.weights_on_m:
            assert config.block_m == tune.rows_of_tiles(m / 8, MOST_TOKENS)[0], m
            seen += 1
    assert seen > 700
    for mean, most in itertools.product((0, 1 / 32, 7, 33, 700, 1e5), (MOST_TOKENS, MOST_TOKENS_IN_BLOCKS)):
        found = tune.rows_of_tiles(mean, most)
        assert 2 <= len(found) <= 4
        assert all(rows % 16 == 0 < rows <= most for rows in found)


def test_tiles_of_a_matmul_are_those_that_fit():
    first, second = cell_of().matmuls
    assert tune.of_a_matmul(first, 16, 1) == [flat()]  # gated it has 256 columns
    assert tune.of_a_matmul(second, 16, 1) == [flat(128, 11), flat()]
    assert tune.of_a_matmul(first, 64, 2) == [flat(256, 4, 2, block_m=64), low()]
    assert tune.of_a_matmul(second, 128, 4) == [flat(128, 5, 4, block_m=128), tall(128, 5), tall(256, 4)]
    without_blocks = cell_of(scheme="fp8_channel").matmuls[1]  # one more stage fits without scales of rows, or more
    assert tune.of_a_matmul(without_blocks, 128, 4) == [
        flat(128, 6, 4, block_m=128), flat(256, 4, 4, block_m=128), tall(128, 6), tall(256, 4),
    ]  # fmt: skip
    for call, block_m in itertools.product((first, second, without_blocks), (16, 48, 64, 128)):
        for config in tune.of_a_matmul(call, block_m, 1):
            one_more = dataclasses.replace(config, stages=config.stages + 1)
            assert mosaic_gpu.unsupported_anywhere(dataclasses.replace(call, config=config)) is None
            assert "bytes of shared" in mosaic_gpu.unsupported_anywhere(dataclasses.replace(call, config=one_more))


def test_pairs_are_two_launches():
    cell = cell_of()
    assert tune.in_pairs([low()], [low()], cell.in_one_launch) == []
    assert tune.in_pairs([low()], [], cell.in_one_launch) == []
    assert tune.in_pairs([tall()], [tall()], cell.in_one_launch) == [Tiles(tall(), tall())]
    crossed = tune.in_pairs([low(), low(256, 3)], [low(), low(256, 3)], cell.in_one_launch)
    assert crossed == [Tiles(low(), low(256, 3)), Tiles(low(256, 3), low())]
    turned = flat(256, 4, 2, block_m=64)  # but for its side the same
    assert tune.in_pairs([low()], [turned], cell.in_one_launch) == [Tiles(low(), turned)]


def test_the_best_of_two_launches_is_put_together():
    cell = cell_of(SOME)
    one = Tiles(low(), low())
    a, b = Tiles(low(), low(128, 6)), Tiles(low(256, 3), low(128, 8))
    measured = [Measured(one, (100.0,)), Measured(a, (60.0, 38.0)), Measured(b, (65.0, 30.0))]
    assert tune.best(cell, measured) == [(Tiles(low(), low(128, 8)), 90.0), (one, 100.0)]
    same = Measured(Tiles(low(256, 3), low()), (70.0, 20.0))  # its w2 with the first w13 would be one launch
    assert tune.best(cell, [*measured, same])[0] == (Tiles(low(256, 3), low()), 85.0)
    turned = Measured(Tiles(flat(256, 5, 2, block_m=64), low(128, 4)), (50.0, 40.0))  # of the same rows
    assert tune.best(cell, [*measured, turned])[0] == (Tiles(turned.tiles.w13, low(128, 8)), 80.0)
    apart = Measured(Tiles(flat(256, 5, 2, block_m=48), flat(128, 5, 2, block_m=48)), (50.0, 45.0))
    assert tune.best(cell, [*measured, apart]) == [
        (Tiles(low(), low(128, 8)), 90.0), (apart.tiles, 95.0), (one, 100.0),
    ]  # fmt: skip


def test_the_best_tiles_are_varied():
    cell = cell_of(SOME)
    one, other = Tiles(low(), low()), Tiles(flat(256, 5, block_m=48), flat(128, 9, block_m=48))
    measured = [Measured(one, (100.0,)), Measured(other, (60.0, 30.0)), Measured(Tiles(tall(), tall()), (95.0, 1.0))]
    measured += [Measured(Tiles(low(band=4), low(band=4)), (101.0,)), Measured(Tiles(flat(), flat()), (94.0,))]
    assert tune.varied(cell, measured) == [
        *(Tiles(low(band=band), low(band=band)) for band in (1, 8)),  # of the heuristic's rows, the others are known
        Tiles(low(256, 3), low(256, 3)),
        *(Tiles(flat(256, 5, band, 48), flat(128, 9, band, 48)) for band in (2, 4, 8)),
        *(Tiles(flat(256, 5 - fewer, 1, 48), flat(128, 9 - fewer, 1, 48)) for fewer in (1, 2)),
        *(Tiles(flat(band=band), flat(band=band)) for band in (2, 4, 8)),
        *(Tiles(flat(stages=stages), flat(stages=stages)) for stages in (5, 4)),
    ]  # and none of the tall ones


def test_what_is_chosen():
    cell = cell_of(SOME)
    default, better, other = Tiles(low(), low()), Tiles(low(256, 3), low(256, 3)), Tiles(tall(), tall())

    def chosen(default_us, better_us, *other_us, better=better):
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
    turned, flatter = (Tiles(*[flat(256, 4, 2, block_m)] * 2) for block_m in (64, 48))
    assert chosen(100, 97, better=turned) == turned  # with the same plan
    assert chosen(100, 97, better=flatter) is None
    assert chosen(100, 94, better=flatter) == flatter


def test_search(monkeypatch):
    cell, lines, clock = cell_of(), [], iter(range(100, 0, -1))

    def measure(tiles):
        if tiles.w13.block_m == 128:
            raise RuntimeError("ptxas:\nno registers")
        times = [100.0 + config.stages - config.band + config.block_m for config in tiles]
        return (sum(times),) if cell.in_one_launch(tiles) else tuple(times)

    measured = tune.search(cell, measure, left_s=lambda: next(clock), log=lines.append)
    assert measured[0].tiles == cell.default
    assert len({each.tiles for each in measured}) == len(measured)
    assert tune.best(cell, measured)[0] == (Tiles(flat(band=8), flat(band=8)), 228.0)  # not with fewer stages too
    assert lines[0] == "default: 16x256, weights on M, 6 stages, band 1: 242.0 us"
    of_default = "16x256, weights on M, 6 stages, band 1 | 16x128, weights on M, 11 stages, band 1: 121.0 + 126.0 us"
    assert lines[1] == f"tiles 1/{len(tune.candidates(cell))}, 100 s left: {of_default}"
    assert any("64x256, tokens on M, 4 stages, band 1: " in line for line in lines)
    assert any("left out: RuntimeError: ptxas: no registers" in line for line in lines)
    assert any(line.startswith("variants ") for line in lines)


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
    assert [(e["block_m"], e["weights_on_m"]) for e in again[:2]] == [(16, True), (128, False)]
    replaced = tune.merged(again, tune.entries_of(few, Tiles(low(256, 3), low(256, 3))), few)
    assert len(replaced) == 6
    assert (replaced[0]["stages"], replaced[0]["weights_on_m"]) == (3, False)
    assert len(tune.merged(replaced, [], few)) == 4  # measured again, and the default is as good
    tune.write_entries(path, [])
    assert json.loads(path.read_text()) == []
    path.write_text('[{"experts": 3}]')
    with pytest.raises(ValueError, match=r"table\.json is no table of tiles: KeyError"):
        tune.read_entries(path)


def test_what_has_no_kernel_is_said():
    with pytest.raises(ValueError, match="w13 has no kernel to tune: N=2880"):
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
    found = {(entry["m"], entry["block_m"], entry["weights_on_m"]) for entry in entries}
    assert found == {(128, 64, True), (32768, 128, False)}
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
