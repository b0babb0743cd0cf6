"""Tiles for the two matmuls of a layer: they reach the kernels, as one launch or two, or are an error.

On a CPU: calls are traced for an interpreted Hopper GPU, and not run.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import FusedMoeConfig, UnsupportedError, fused_moe, implementations, prepare, quantize, run_experts
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig, tuned
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__[:2] < FIRST_JAX, reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels"
)
E, H, INNER = 4, 256, 256
LOW = MosaicGpuConfig(block_m=64, block_n=256, stages=3, band=4)
NARROW = MosaicGpuConfig(block_m=64, block_n=128, stages=5, band=1)
TALL = MosaicGpuConfig(block_m=128, block_n=128, stages=3, band=2)
FLAT = MosaicGpuConfig(block_m=48, block_n=256, stages=3, band=4, weights_on_m=True)
TURNED = dataclasses.replace(LOW, weights_on_m=True)
BY_HEURISTIC = MosaicGpuConfig(block_m=16, block_n=256, stages=6, band=1, weights_on_m=True)
TOO_LARGE = MosaicGpuConfig(block_m=128, block_n=256, stages=5)
TOO_LARGE_IN_BLOCKS = MosaicGpuConfig(block_m=96, block_n=256, stages=4, weights_on_m=True)
TOO_MANY_SUMS = dataclasses.replace(TOO_LARGE_IN_BLOCKS, stages=3)


def arrays(tokens=9, codes=False, dtype=jnp.bfloat16):
    def make():
        w13, w2 = jnp.ones((E, 2, INNER, H), dtype), jnp.ones((E, H, INNER), dtype)
        if codes:
            w13, w2 = (quantize(w, "fp8_per_block") for w in (w13, w2))
        return jnp.ones((tokens, H), dtype), w13, w2, jnp.ones((tokens, 2)), jnp.zeros((tokens, 2), jnp.int32)

    return jax.eval_shape(make)


def tiles_of(monkeypatch, function, *args):
    """The tiles of each launch, in turn; both matmuls of one launch are a "both"."""
    from pallas_kernels.grouped_matmul.mosaic_gpu import sm90

    seen, real = [], sm90.grouped_matmuls_sm90

    def watched(lhs, lhs_scales, weights, plan, *, config, num_programs):
        seen.append(("both", config) if len(weights) > 1 else config)
        return real(lhs, lhs_scales, weights, plan, config=config, num_programs=num_programs)

    monkeypatch.setattr(sm90, "grouped_matmuls_sm90", watched)
    with interpreted("mosaic_gpu"):
        jax.eval_shape(function, *args)
    return seen


def config_of(w13, w2):
    return FusedMoeConfig(w13=w13, w2=w2)


LAUNCHES = {
    "none": (None, [("both", BY_HEURISTIC)]),
    "neither": (config_of(None, None), [("both", BY_HEURISTIC)]),
    "both the same": (config_of(LOW, LOW), [("both", LOW)]),
    "of the first": (config_of(LOW, None), [("both", LOW)]),
    "of the second, the heuristic's": (config_of(None, BY_HEURISTIC), [("both", BY_HEURISTIC)]),
    "of the second, others": (config_of(None, NARROW), [BY_HEURISTIC, NARROW]),
    "other columns": (config_of(LOW, NARROW), [LOW, NARROW]),
    "another band": (config_of(BY_HEURISTIC, LOW), [BY_HEURISTIC, LOW]),
    "two heights": (config_of(LOW, TALL), [LOW, TALL]),
    "tall": (config_of(TALL, TALL), [TALL, TALL]),
    "weights on M": (config_of(FLAT, FLAT), [("both", FLAT)]),
    "weights on M, of the first": (config_of(FLAT, None), [("both", FLAT)]),
    "weights on M, then tokens": (config_of(FLAT, TALL), [FLAT, TALL]),
    "two sides of one height": (config_of(TURNED, LOW), [TURNED, LOW]),
}


@needs_interpreter
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("config", "expected"), LAUNCHES.values(), ids=LAUNCHES)
def test_it_reaches_the_kernels(config, expected, codes, monkeypatch):
    fmt = "fp8_per_group" if codes else None
    function = functools.partial(fused_moe, activation_format=fmt, implementation="mosaic_gpu", config=config)
    seen = tiles_of(monkeypatch, function, *arrays(codes=codes))
    assert seen == expected


@needs_interpreter
def test_it_reaches_them_from_the_steps(monkeypatch):
    x, w13, w2, weights, ids = arrays()

    def steps(x, w13, w2, weights, ids):
        return run_experts(prepare(x, weights, ids, E), w13, w2, config=config_of(LOW, NARROW))

    assert tiles_of(monkeypatch, steps, x, w13, w2, weights, ids) == [LOW, NARROW]


@needs_interpreter
@pytest.mark.parametrize("codes", [False, True])
def test_gradients_compute_the_rest_with_tiles_of_their_own(codes, monkeypatch):
    """A transposed matmul has other shapes, and a dequantized one other operands: no config is for them."""

    def total(x, w13, w2, weights, ids):
        fmt = "fp8_per_group" if codes else None
        return jnp.sum(fused_moe(x, w13, w2, weights, ids, activation_format=fmt, config=config_of(LOW, NARROW)))

    with pytest.warns(UserWarning, match="runs through XLA") if codes else monkeypatch.context():
        seen = tiles_of(monkeypatch, jax.grad(total, (0, 3)), *arrays(codes=codes))
    assert seen[:2] == [LOW, NARROW]
    assert not {LOW, NARROW} & set(seen[2:])
    assert bool(seen[2:]) != codes


@needs_interpreter
@pytest.mark.parametrize(
    ("config", "codes", "says"),
    [
        (config_of(TOO_LARGE, None), False, "278608 bytes of shared memory of 232448; use fewer stages"),
        (config_of(None, TOO_LARGE), False, "278608 bytes of shared memory of 232448; use fewer stages"),
        (config_of(TOO_LARGE, None), True, "281680 bytes of shared memory of 232448; use fewer stages"),
        (config_of(TOO_LARGE_IN_BLOCKS, None), True, "233536 bytes of shared memory of 232448; use fewer stages"),
        (config_of(TOO_MANY_SUMS, None), True, "block_m=96, block_n=256, .* needs more registers .* at most 20480"),
        (config_of(NARROW, None), False, "gives a warpgroup 64 columns; gated it needs 128"),
        (config_of(None, 3), False, "MosaicGpuConfig, not 3"),
    ],
)
def test_what_does_not_fit_is_said_with_the_numbers(config, codes, says, monkeypatch):
    """Before anything is compiled: while it is traced."""
    monkeypatch.setattr(implementations, "_warned", set())  # it is said once
    call = functools.partial(fused_moe, config=config, activation_format="fp8_per_group" if codes else None)
    with interpreted("mosaic_gpu"):
        with pytest.raises(UnsupportedError, match=says):
            jax.eval_shape(functools.partial(call, implementation="mosaic_gpu"), *arrays(codes=codes))
        with pytest.warns(UserWarning, match=says), pytest.raises(ValueError, match="XLA serves this call"):
            jax.eval_shape(call, *arrays(codes=codes))


@needs_interpreter
@pytest.mark.parametrize("config", [TOO_LARGE_IN_BLOCKS, TOO_MANY_SUMS])
def test_scales_of_blocks_take_the_room(config, monkeypatch):
    """What does not fit with them does without."""
    function = functools.partial(fused_moe, config=config_of(config, config))
    assert tiles_of(monkeypatch, function, *arrays()) == [("both", config)]


@pytest.mark.parametrize("config", [config_of(LOW, None), config_of(None, LOW), config_of(LOW, LOW)])
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("fmt", [None, "fp8_per_group"])
def test_xla_takes_none(config, implementation, fmt):
    call = functools.partial(fused_moe, activation_format=fmt, implementation=implementation, config=config)
    with pytest.raises(ValueError, match=r"config=MosaicGpuConfig\(block_m=64.* is for a kernel, and XLA serves"):
        jax.eval_shape(call, *arrays(codes=fmt is not None))


def test_it_is_a_config_of_both():
    x, w13, w2, weights, ids = arrays()
    with pytest.raises(TypeError, match=r"MosaicGpuConfig.* must be a FusedMoeConfig, with w13= and w2="):
        jax.eval_shape(functools.partial(fused_moe, config=LOW), x, w13, w2, weights, ids)
    with pytest.raises(TypeError, match="must be a FusedMoeConfig"):
        jax.eval_shape(lambda *a: run_experts(prepare(a[0], *a[3:], E), *a[1:3], config=LOW), x, w13, w2, weights, ids)


M = 18  # rows of 9 tokens
FIRST = tuned.Shape(E, 2 * INNER, H, True, "bf16")
SECOND = tuned.Shape(E, H, INNER, False, "bf16")


@needs_interpreter
@pytest.mark.parametrize(
    ("found", "config", "expected"),
    [
        ({FIRST: {M: LOW}}, None, [("both", LOW)]),
        ({FIRST: {M: LOW}, SECOND: {M: LOW}}, None, [("both", LOW)]),
        ({FIRST: {M: LOW}, SECOND: {M: NARROW}}, None, [LOW, NARROW]),
        ({FIRST: {2 * M: TALL}, SECOND: {M // 2: NARROW}}, None, [TALL, NARROW]),
        ({FIRST: {M: FLAT}, SECOND: {M: FLAT}}, None, [("both", FLAT)]),
        ({FIRST: {M: TURNED}, SECOND: {M: LOW}}, None, [TURNED, LOW]),
        ({FIRST: {2 * M + 1: TALL}}, None, [("both", BY_HEURISTIC)]),
        ({FIRST._replace(operands="f16"): {M: TALL}}, None, [("both", BY_HEURISTIC)]),
        ({FIRST: {M: TALL}, SECOND: {M: NARROW}}, config_of(LOW, LOW), [("both", LOW)]),
        ({FIRST: {M: TALL}, SECOND: {M: NARROW}}, config_of(LOW, None), [("both", LOW)]),
        ({FIRST: {M: LOW}, SECOND: {M: NARROW}}, config_of(None, TALL), [LOW, TALL]),
    ],
)
def test_measured_tiles_are_taken(found, config, expected, monkeypatch):
    monkeypatch.setattr(tuned, "table", lambda: found)
    assert tiles_of(monkeypatch, functools.partial(fused_moe, config=config), *arrays()) == expected


def test_look_up_takes_the_nearest_rows():
    found = {FIRST: {100: LOW, 400: NARROW, 3000: TALL}}
    for m, expected in {0: None, 49: None, 50: LOW, 150: LOW, 199: LOW, 200: LOW, 201: NARROW, 800: NARROW}.items():
        assert tuned.look_up(found, FIRST, m) is expected, m
    for m, expected in {801: None, 1499: None, 1500: TALL, 6000: TALL, 6001: None}.items():
        assert tuned.look_up(found, FIRST, m) is expected, m
    assert tuned.look_up(found, SECOND, 100) is None


@pytest.mark.parametrize("config", [LOW, FLAT])
def test_entries_are_read_as_they_were_written(config):
    entry = json.loads(json.dumps(tuned.write(FIRST, 128, config, us=1.5, device="H200")))
    assert (entry["us"], entry["weights_on_m"]) == (1.5, config.weights_on_m)
    assert tuned.read(entry) == (FIRST, 128, config)
