"""The bench of a whole layer on a CPU, the path that a GPU takes with a clock that stands in for CUPTI, its parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import cases, fused_moe, gate, layer, layer_peers, peers, runner, timing
from pallas_kernels.bench.floors import EIGHT_BIT_SPEED, Floors
from pallas_kernels.bench.layer_problem import LayerWeights, layer_call, make_layer_problem, reference
from pallas_kernels.bench.problem import Inputs
from quick import few_cases
from tolerance import assert_close


def case_of(scheme, tokens=4, model="tiny", routing="uniform"):
    (case,) = layer.select([model], [scheme], [tokens], routing=routing)
    return case


def problem_of(case):
    return make_layer_problem(case, LayerWeights(case))


def test_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--models", "tiny", "--schemes", "bf16,fp8_block128", "--tokens", "4", "--commit", "abc"]
    assert command.main(["fused_moe", *arguments, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["tiny_bf16_T4", "tiny_fp8_block128_T4"]
    for row in rows:
        assert row["us"] is row["us_loop"] is row["roofline_us"] is row["kernels"] is None  # no device time
        assert row["wall_us"] > 0
        assert 1e-3 < row["error"] < 2.5e-3  # both are XLA here: the rounding of the result
        assert row["temp_bytes"] > 0
        assert (row["commit"], row["op"], row["impl"], row["failure"]) == ("abc", "fused_moe", "xla", None)
    assert rows[1]["shape"] == {
        "model": "tiny", "scheme": "fp8_block128", "tokens": 4, "num_experts": 4, "top_k": 2, "hidden": 128,
        "intermediate": 128, "experts_hit": rows[0]["shape"]["experts_hit"], "routing": "uniform", "seed": 0,
    }  # fmt: skip
    assert rows[0]["temp_limit_bytes"] == 8 * 2 * (128 + 128) + (32 << 20)
    assert rows[1]["temp_limit_bytes"] == 8 * (128 + 2 * 128) + (32 << 20)
    assert "host clock" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scheme", "speed"), few_cases([("bf16", 1.0), ("int8_w8a8", EIGHT_BIT_SPEED)], [("bf16", 1.0)])
)
def test_the_path_of_a_gpu(scheme, speed, monkeypatch):
    def recorder():
        return lambda run: timing.Kernels(("plan", "main"), (1.0, timing.wall_us(lambda _: run(), 1)))

    monkeypatch.setattr(timing, "kernel_recorder", recorder)
    monkeypatch.setattr(timing, "REPETITIONS", 3)
    monkeypatch.setattr(timing, "LOOP_US", 500)
    monkeypatch.setattr(timing, "l2_flush", lambda: lambda: None)
    monkeypatch.setattr(runner, "measure_floors", lambda: Floors(1e9, 1e6))
    monkeypatch.setattr(peers, "installed", lambda package: False)
    bench = fused_moe.LayerBench(layer_peers.EVERYTHING, xla_seconds=10, log=lambda line: None, commit=None)
    bench._platform = "gpu"
    case = case_of(scheme)
    ((row,),) = bench.run([case])
    assert (row.failure, row.best, row.num_kernels) == (None, True, 2)
    assert [name for name, _ in json.loads(row.to_json())["kernels"]] == ["plan", "main"]
    assert row.us_p10 <= row.us <= row.us_p90
    assert row.us_loop > 0
    assert row.roofline_us == pytest.approx(2 * 8 * 3 * 128 * 128 / speed)  # flops bind
    assert row.peers["xla"] > 0
    assert row.peers["tokamax"] is None
    if scheme == "bf16":
        assert row.peers["ragged_dot"] > 0
        assert "not installed" in row.peer_notes["tokamax"]
    else:
        assert row.peer_notes["ragged_dot"] == "RuntimeError: it takes part in bf16 only"


@pytest.mark.parametrize("scheme", layer.SCHEMES)
def test_each_scheme_is_what_the_definition_says(scheme):
    """The reference of the bench, against numpy with the dequantized weights; activations are quantized in one only."""
    problem = problem_of(case_of(scheme, tokens=9))
    (x, topk_weights), (w13, w2), ids = problem.inputs.x, problem.inputs.weights[0], problem.inputs.integers
    w13, w2 = (np.asarray(w.dequantize() if scheme != "bf16" else w).astype(np.float64) for w in (w13, w2))
    expected = np.zeros(x.shape)
    for token, (row, experts, shares) in enumerate(zip(x, ids, topk_weights, strict=True)):
        for expert, share in zip(np.asarray(experts), np.asarray(shares), strict=True):
            gate_value, up = w13[expert] @ np.asarray(row).astype(np.float64)
            expected[token] += share * (w2[expert] @ (gate_value / (1 + np.exp(-gate_value)) * up))
    found, seconds = reference(problem)
    assert seconds > 0
    far = {"bf16": 5e-3, "int8_w8a8": 3e-2}.get(scheme, 8e-2)  # two roundings to 8 bits, and half as much again
    assert_close(found, expected, batch=far, worst_row=2 * far)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel"])
def test_a_wrong_result_is_not_timed(scheme, monkeypatch):
    def rotated(case, implementation):
        call = layer_call(case, implementation)
        return lambda x, weights, ids: call(x, weights, (ids + 1) % 4)

    monkeypatch.setattr(fused_moe, "layer_call", rotated)
    bench = fused_moe.LayerBench([], xla_seconds=0, log=lambda line: None, commit=None)
    ((row,),) = bench.run([case_of(scheme)])
    assert "relative L2 error" in row.failure
    assert (row.wall_us, row.best) == (None, False)


def test_peers_are_refused_for_a_reason(monkeypatch):
    problem = problem_of(case_of("fp8_channel"))
    with pytest.raises(RuntimeError, match=r"a call took 3.0 s, and the limit is 1 s"):
        layer_peers.prepare("xla", problem, jnp.zeros(()), xla_seconds=3.0, limit_seconds=1)
    monkeypatch.setattr(peers, "free_bytes", lambda: 100 * 10**9)
    small, huge = (layer.select([name], ["bf16"], [4096])[0].matmuls for name in ("qwen3-30b", "dsv3-tp8"))
    peers.PEERS["ragged_dot"].refuse(*small)
    with pytest.raises(RuntimeError, match=r"may take .* GB, and 100 GB are free"):
        peers.PEERS["ragged_dot"].refuse(*huge)


def test_pipeline_of_others_is_the_layer():
    problem = problem_of(case_of("bf16", tokens=9))

    def matmul(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.bfloat16)

    expected, _ = reference(problem)
    run = problem.inputs_kn.turns(layer_peers.pipeline(matmul, matmul))
    gate.check(run, expected, problem.case.scheme.limits)
    swapped = problem.inputs_kn.turns(layer_peers.pipeline(lambda *a: jnp.roll(matmul(*a), 128, axis=1), matmul))
    with pytest.raises(gate.WrongResult):
        gate.check(swapped, expected, problem.case.scheme.limits)


@pytest.mark.parametrize(
    ("scheme", "num_bytes"),
    [
        ("bf16", 3 * 768 * 2048 * 2),
        ("fp8_tensor", 3 * 768 * 2048 + 4 * 3),
        ("fp8_channel", 3 * 768 * 2048 + 4 * (2 * 768 + 2048)),
        ("fp8_block128", 3 * 768 * 2048 + 4 * 3 * 6 * 16),
        ("int8_w8a8", 3 * 768 * 2048 + 4 * (2 * 768 + 2048)),
    ],
)
def test_bytes_of_an_expert(scheme, num_bytes):
    (case,) = layer.select(["qwen3-30b"], [scheme], [1])
    assert case.experts_hit == 8
    assert case.hit_weight_bytes == 8 * num_bytes
    assert case.min_bytes == 8 * num_bytes + 2 * 2048 * 2


def test_weights_on_the_device_are_as_large_as_the_floor_says():
    for scheme in layer.SCHEMES:
        case = case_of(scheme, tokens=64)
        assert case.experts_hit == 4
        first, second = LayerWeights(case).copies(case)[:2]
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(first)) == case.hit_weight_bytes
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            assert bool(jnp.all(jnp.roll(a, 1, axis=0).astype(jnp.float32) == b.astype(jnp.float32)))


def test_floors_by_hand():
    floors = Floors(copy_bytes_per_s=4e12, matmul_flops_per_s=800e12)
    few, many = layer.select(["mixtral"], ["fp8_tensor"], [64, 16384])
    assert few.experts_hit == 8
    nbytes = 8 * (3 * 14336 * 4096 + 12) + 64 * 4096 * 4
    assert floors.roofline_us(few, speed=few.scheme.matmul_speed) == pytest.approx(nbytes / 4e6)
    flops = 2 * 16384 * 2 * 3 * 14336 * 4096
    assert floors.roofline_us(many, speed=many.scheme.matmul_speed) == pytest.approx(flops / 800e6 * 792 / 1457)
    assert case_of("bf16", 16384, "mixtral").scheme.matmul_speed == 1


def test_ids_are_those_of_the_matmuls():
    for routing in cases.ROUTINGS:
        case = case_of("bf16", 64, "qwen3-30b", routing)
        assert case.ids.shape == (64, 8)
        assert case.ids.dtype == np.int32
        assert all(len(set(row)) == 8 for row in case.ids.tolist())
        sizes = cases.route(case.model, 64, routing, 0)
        assert [matmul.group_sizes for matmul in case.matmuls] == [sizes, sizes]
    assert case.name == "qwen3-30b_bf16_T64_equal"


def test_loop_shares_nothing_that_depends_on_x_alone():
    """Each call of the loop does it again, as it would in a program of one call."""
    calls = []

    def of_x_alone(x):
        calls.append(1)
        return x * 2

    def call(x, weights, integers):
        doubled = jax.pure_callback(of_x_alone, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return doubled * weights + integers[0].astype(jnp.float32)

    inputs = Inputs(x=jnp.ones((2, 2)), weights=(jnp.ones(()), jnp.ones(())), integers=jnp.zeros(1, jnp.int32))
    assert timing.loop_us(call, inputs, expected_us=timing.LOOP_US / 6) > 0
    assert len(calls) == 3 * 2 * (timing.LOOP_RUNS + 1)  # one to warm up


def test_bad_names_all_at_once(tmp_path, capsys):
    bad = ["--models", "gpt,tiny,claude", "--schemes", "fp3", "--peers", "magic"]
    with pytest.raises(SystemExit) as error:
        command.main(["fused_moe", *bad, "--out", str(tmp_path / "rows")])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "unknown models 'gpt', 'claude'; there are qwen3-30b" in said
    assert "unknown schemes 'fp3'; there are bf16, fp8_tensor" in said
    assert "unknown peers 'magic'; there are ragged_dot, tokamax, xla" in said
