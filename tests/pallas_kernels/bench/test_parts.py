"""The parts of the bench on a CPU: cases, the check before timing, timing's arithmetic, floors, rows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import grouped_matmul
from pallas_kernels.bench import cases, gate, peers, rows, timing
from pallas_kernels.bench.floors import Floors
from pallas_kernels.bench.problem import MAX_COPIES, make_problem, num_copies
from pallas_kernels.bench.torch_peer import TorchPeer
from tolerance import assert_close


@pytest.fixture(scope="module")
def problem():
    """Groups that begin anywhere, one empty, one longer than a tile of the reference."""
    sizes = (3, 0, 150, 7)
    return make_problem(cases.Case(name="ragged", group_sizes=sizes, n=192, k=128, routing="uniform", seed=1))


@pytest.mark.parametrize(
    ("name", "m", "n", "k", "num_experts"),
    [
        ("qwen3-30b_w13", 512, 1536, 2048, 128),
        ("qwen3-30b_w2", 512, 2048, 768, 128),
        ("mixtral_w13", 128, 28672, 4096, 8),
        ("mixtral_w2", 128, 4096, 14336, 8),
        ("dsv3-tp8_w13", 512, 512, 7168, 256),
        ("dsv3-tp8_w2", 512, 7168, 256, 256),
        ("gpt-oss-20b_w13", 256, 5760, 2880, 32),
        ("gpt-oss-20b_w2", 256, 2880, 2880, 32),
    ],
)
def test_shapes_of_models(name, m, n, k, num_experts):
    (case,) = cases.select([name], [64])
    assert (case.m, case.n, case.k, len(case.group_sizes)) == (m, n, k, num_experts)
    assert case.name == f"{name}_T64"
    assert case.flops == 2 * m * n * k
    assert case.min_bytes == 2 * (case.experts_hit * n * k + m * k + m * n)


def test_selection():
    assert [case.name for case in cases.select(["mixtral", "8x1024"], [1, 2])] == [
        *(f"mixtral_{which}_T{tokens}" for which in ("w13", "w2") for tokens in (1, 2)),
        "8x1024",
    ]
    (equal,) = cases.select(["128x256"], [])
    assert equal.group_sizes == (256,) * 128
    with pytest.raises(ValueError, match=r"'nobody', 'w13'.*mixtral_w2"):
        cases.select(["nobody", "mixtral", "w13"], [1])


@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_routing(routing):
    model = cases.MODELS["qwen3-30b"]
    sizes = np.array(cases.route(model, 512, routing, 0))
    assert sizes.sum() == 512 * 8
    assert sizes.max() <= 512  # a token takes an expert once
    assert tuple(sizes) == cases.route(model, 512, routing, 0)
    if routing == "equal":
        assert sizes.min() == sizes.max()
    else:
        assert tuple(sizes) != cases.route(model, 512, routing, 1)
    if routing == "zipf":
        assert sizes.max() > 4 * sizes.mean()
    assert sum(size > 0 for size in cases.route(model, 1, routing, 0)) == 8


def test_weights_take_several_places():
    assert num_copies(1 << 30, 1 << 30, None) == 2
    assert num_copies(50 << 20, 1 << 30, None) == MAX_COPIES
    assert num_copies(50 << 20, 1 << 30, 12 << 30) == 3  # memory binds
    assert num_copies(50 << 20, 1 << 30, 1 << 30) == 2


def test_problem(problem):
    first, second = problem.weights[:2]
    np.testing.assert_array_equal(np.asarray(second), np.roll(np.asarray(first), 1, axis=0))
    assert problem.inputs_kn.weights[1].shape == (4, 128, 192)
    assert problem.inputs_kn is problem.inputs_kn
    assert 0.9 < float(jnp.std(problem.x.astype(jnp.float32))) < 1.1


def test_reference_is_the_definition(problem):
    x, w = (np.asarray(v).astype(np.float64) for v in (problem.x, problem.weights[0]))
    expected = definition.grouped_matmul(x, w, problem.case.group_sizes)
    assert_close(gate.reference(problem), expected, batch=1e-6, worst_row=2e-6)  # f32 sums of 128 products


def test_gate_passes_what_is_right(problem):
    errors = gate.check(problem.inputs.turns(jax.jit(grouped_matmul)), gate.reference(problem))
    assert 1e-3 < errors.batch <= gate.OF_A_MATMUL.batch  # the rounding of the output to bf16


def rotated(x, w, sizes):
    return grouped_matmul(x, jnp.roll(w, 1, axis=0), sizes)


def one_bad_row(x, w, sizes):
    return grouped_matmul(x, w, sizes).at[100].mul(jnp.bfloat16(1.02))


def one_nan(x, w, sizes):
    return grouped_matmul(x, w, sizes).at[2, 3].set(jnp.bfloat16(jnp.nan))


@pytest.mark.parametrize("wrong", [rotated, one_bad_row, one_nan])
def test_gate_notices(wrong, problem):
    with pytest.raises(gate.WrongResult, match="relative L2 error"):
        gate.check(problem.inputs.turns(wrong), gate.reference(problem))


def test_gate_knows_when_it_proves_nothing(problem):
    same = dataclasses.replace(problem.inputs, weights=(problem.weights[0],) * 2)
    with pytest.raises(gate.WrongResult, match="proves nothing"):
        gate.check(same.turns(grouped_matmul), gate.reference(problem))


def test_rows_that_should_be_zero():
    error, norm = np.array([0.0, 1e-9]), np.array([1.0, 0.0])
    assert gate.from_squares(error, norm).complaint() is not None
    assert gate.from_squares(np.zeros(2), norm).complaint() is None
    assert gate.from_squares(np.zeros(0), np.zeros(0)) == (0.0, 0.0)


def test_times_of_calls():
    samples = [timing.Kernels(("plan", "main", "plan"), (1.0, us, 2.0)) for us in (10.0, 30.0, 20.0)]
    times = timing.summary(samples)
    assert (times.us, times.us_kernel, times.kernel) == (23.0, 20.0, "main")
    assert (times.num_kernels, times.repetitions) == (3, 3)
    assert times.kernels == (("plan", 1.0), ("main", 20.0), ("plan", 2.0))  # of the middle call
    assert 13.0 < times.us_p10 < times.us < times.us_p90 < 33.0


def test_one_failing_call_does_not_stop_the_others(monkeypatch):
    def recorder():
        return lambda run: timing.Kernels(("k",), (float(run()),))

    monkeypatch.setattr(timing, "kernel_recorder", recorder)
    monkeypatch.setattr(timing, "l2_flush", lambda: lambda: None)

    def fails(turn):
        raise RuntimeError("no memory")

    times = timing.device_times({"bad": fails, "good": lambda turn: 5, "slow": lambda turn: 1e6})
    assert str(times["bad"]) == "no memory"
    assert (times["good"].us, times["good"].repetitions) == (5, timing.REPETITIONS)
    assert times["slow"].repetitions == timing.FEW


def test_without_a_profiler_each_call_has_the_reason(monkeypatch):
    def no_cupti():
        raise ImportError("no CUPTI")

    monkeypatch.setattr(timing, "kernel_recorder", no_cupti)
    monkeypatch.setattr(timing, "l2_flush", lambda: lambda: None)
    times = timing.device_times({"a": lambda turn: 1, "b": lambda turn: 2})
    assert [str(times[name]) for name in "ab"] == ["no CUPTI"] * 2


def test_loop_runs_each_call(problem):
    """Nothing is hoisted out of the loop or merged: the program that XLA made multiplies as often as asked."""
    small = dataclasses.replace(problem.inputs, weights=problem.weights[:2])
    calls = []

    def call(x, w, sizes):
        jax.debug.callback(lambda size: calls.append(int(size)), sizes[0])
        return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes)

    assert timing.loop_us(call, small, expected_us=timing.LOOP_US / 6) > 0
    jax.effects_barrier()
    runs = timing.LOOP_RUNS + 1  # one to warm up
    assert calls == [3] * (3 * 2 * runs)  # the first group's size, each time


def test_roofline():
    floors = Floors(copy_bytes_per_s=4e12, matmul_flops_per_s=800e12)
    few, many = cases.select(["mixtral_w2"], [64, 4096])
    assert few.experts_hit == 8
    assert floors.roofline_us(few) == pytest.approx(1e6 * few.min_bytes / 4e12)  # memory binds
    assert floors.roofline_us(many) == pytest.approx(1e6 * 2 * 8192 * 4096 * 14336 / 800e12)
    (one,) = cases.select(["mixtral_w2"], [1])
    assert floors.roofline_us(one) < floors.roofline_us(few) / 3  # two experts of eight


def test_row_is_json_with_null():
    row = rows.Row(case="c", op="grouped_matmul", impl="xla", shape={"m": 1}, us=123.456789, peers={"torch": None})
    found = json.loads(row.to_json())
    assert (found["us"], found["us_loop"], found["peers"]) == (123.46, None, {"torch": None})
    row.error = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        row.to_json()


def test_message_is_one_short_line():
    text = rows.message(ValueError("one\n  two " + "x" * 1000))
    assert text.startswith("ValueError: one two xxx")
    assert len(text) < 450


def test_choice_of_peers():
    assert peers.choose("none", peers.EVERYTHING) == []
    assert peers.choose("all", peers.EVERYTHING) == [*peers.PEERS, peers.TORCH]
    assert peers.choose("xla,them", peers.EVERYTHING) == ["xla", "them"]
    with pytest.raises(ValueError, match=r"unknown peers 'them', 'us'; there are a\nunknown models 'gpt'; there are b"):
        cases.refuse_unknown({"peers": (["them", "us"], ["a"]), "models": (["gpt"], ["b"]), "schemes": (["c"], "c")})


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU has a time to tell")
def test_torch_answers_from_its_own_process(problem):
    """Here it has no GPU, or is not installed; it says so each time, and so does one that dies."""
    torch = TorchPeer()
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"No module named 'torch'|torch sees no GPU"):
                torch.time(problem)
        torch._child.kill()
        torch._child.wait()
        with pytest.raises(RuntimeError, match="gave no answer"):
            torch.time(problem)
    finally:
        torch.close()
