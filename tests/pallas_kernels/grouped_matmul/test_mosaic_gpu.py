"""The Hopper grouped matmul, interpreted on a CPU with race detection, against the definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import Activation, UnsupportedError, grouped_matmul, make_group_metadata, quantize
from pallas_kernels.grouped_matmul.call import Call, dispatch
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig
from pallas_kernels.grouped_matmul.mosaic_gpu.work import NUM_TILES, max_tiles, plan_work
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from quick import few_cases
from races import no_races
from tolerance import assert_close


def needs_interpreter(test):
    lacking = jax.__version_info__[:2] < FIRST_JAX
    reason = f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels"
    return pytest.mark.interpreted(pytest.mark.skipif(lacking, reason=reason)(test))


TALL = MosaicGpuConfig(block_m=128, block_n=256, stages=2)
LOW = MosaicGpuConfig(block_m=64, block_n=128, stages=3)
LOW_WIDE = MosaicGpuConfig(block_m=64, block_n=256, stages=2, band=1)
WEIGHTS_ON_M = MosaicGpuConfig(block_m=96, block_n=256, stages=2, weights_on_m=True)
SIDES = {"tall": TALL, "low": LOW, "weights on M": WEIGHTS_ON_M}
GROUPS = {
    "even": (64,) * 4,
    "one takes all": (0, 256, 0, 0),
    "ragged, short": (1, 0, 127, 63),
    "first and last": (9, 0, 0, 100),
    "none": (0, 0, 0, 0),
}
ROUNDING = {"batch": 2.5e-3, "worst_row": 4e-3}  # rounding the output to bf16 costs 1.7e-3 and 2.0e-3
ACTIVATED = {"batch": 4.5e-3, "worst_row": 7e-3}  # gate, up and their product are rounded
EXACT = {"batch": 2e-6, "worst_row": 4e-6}  # f32 sums


def problem(m=256, e=4, n=256, k=192, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((m, k)), rng.standard_normal((e, n, k)) / np.sqrt(k) * np.arange(1, e + 1)[:, None, None]
    return jnp.asarray(x, jnp.float32).astype(dtype), jnp.asarray(w, jnp.float32).astype(dtype)


def run(x, w, sizes, *, outside="raise", **options):
    """Interpreted with all checks; `outside="uninitialized"` lets loads reach past the last row, as the TMA may."""
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads=outside):
        out = grouped_matmul(x, w, jnp.array(sizes, jnp.int32), implementation="mosaic_gpu", **options)
        return np.asarray(out)


def expected_of(x, w, sizes, **options):
    return definition.grouped_matmul(definition.real(x), definition.real(w), sizes, **options)


@needs_interpreter
@pytest.mark.parametrize(
    ("groups", "config"),
    few_cases([(g, c) for g in GROUPS for c in SIDES], [("ragged, short", c) for c in SIDES] + [("none", "low")]),
)
def test_matches_definition(groups, config):
    sizes, config = GROUPS[groups], SIDES[config]
    x, w = problem()
    found, used = run(x, w, sizes, config=config), sum(sizes)
    expected = expected_of(x, w, sizes)
    assert_close(found, expected, **ROUNDING)
    assert not found[used:].any()  # rows of no expert are zero, not leftovers
    if used:
        with pytest.raises(AssertionError):
            assert_close(found, expected_of(x, jnp.roll(w, 1, axis=0), sizes), batch=0.1, worst_row=0.1)


@needs_interpreter
@pytest.mark.smoke
@pytest.mark.parametrize("offset", [2, jnp.int32(2)], ids=["static", "traced"])
def test_group_offset(offset):
    x, w = problem(m=64, e=3, n=192, k=128)
    sizes = (9, 8, 30, 0, 3, 5)
    expected = expected_of(x, w, sizes, offset=2)
    assert_close(run(x, w, sizes, config=LOW, group_offset=offset), expected, **ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(run(x, w, sizes, config=LOW, group_offset=1), expected, batch=0.1, worst_row=0.1)


@needs_interpreter
@pytest.mark.parametrize(("m", "sizes"), [(203, (1, 0, 100, 63)), (6, (1, 0, 2, 2)), (1, (0, 0, 1, 0))])
def test_rows_that_fill_no_tile(m, sizes):
    x, w = problem(m=m, n=320)
    assert_close(run(x, w, sizes, outside="uninitialized"), expected_of(x, w, sizes), **ROUNDING)


@needs_interpreter
def test_dtypes_and_shapes():
    x, w = problem(dtype=jnp.float16)
    sizes = (100, 3, 0, 70)
    expected = expected_of(x, w, sizes)
    assert_close(run(x, w, sizes, out_dtype=jnp.float32), expected, **EXACT)
    groups = jnp.array(sizes, jnp.int32)
    apart = Call(
        lhs=x,
        rhs=w.reshape(4, 2, 128, 192),
        group_sizes=groups,
        metadata=make_group_metadata(groups),
        out_dtype=np.dtype(np.float16),
    )
    with interpreted("mosaic_gpu"):
        assert_close(dispatch(apart, None), expected, batch=4e-4, worst_row=6e-4)
        empty = grouped_matmul(np.asarray(x[:0]), w, jnp.zeros(4, jnp.int32), epilogue="silu")
    assert empty.shape == (0, 128)


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "config", "biased"),
    [
        ("silu", TALL, False),
        ("silu", LOW_WIDE, True),
        ("gelu_tanh", TALL, True),
        ("relu2", None, False),
        ("swigluoai", None, True),
        pytest.param("swiglustep", None, False, marks=pytest.mark.slow),
        pytest.param("situ", None, True, marks=pytest.mark.slow),
        ("gelu", None, True),
        pytest.param("silu", WEIGHTS_ON_M, True, marks=pytest.mark.slow),
        ("silu_no_mul", LOW, True),
        ("relu2_no_mul", TALL, False),
        pytest.param("gelu_no_mul", None, False, marks=pytest.mark.slow),
    ],
)
def test_epilogue(name, config, biased):
    x, w = problem(n=512)
    sizes = (70, 0, 127, 40)
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.standard_normal((4, 512)), jnp.float32).astype(jnp.bfloat16) if biased else None
    parameters = {"swigluoai": {"limit": 7.0}, "swiglustep": {"limit": 7.0}, "situ": {"beta": 1.5}}.get(name, {})
    found = run(x, w, sizes, config=config, epilogue=Activation(name, **parameters), bias=bias)
    sums = definition.rounded(
        expected_of(x, w, sizes, bias=None if bias is None else definition.real(bias)), jnp.bfloat16
    )
    if name.endswith("no_mul"):
        halves, wrong = (sums,), (np.roll(sums, 1, axis=1),)
    else:
        halves = np.split(sums, 2, axis=1)
        wrong = halves[::-1]
    expected = definition.activation(name, *halves, **parameters)
    expected[sum(sizes) :] = 0
    assert_close(found, expected, **ACTIVATED)
    with pytest.raises(AssertionError):
        assert_close(found, definition.activation(name, *wrong, **parameters), batch=0.1, worst_row=0.1)


@needs_interpreter
def test_bias_alone():
    x, w = problem(m=64, n=128, k=64)
    sizes = (10, 0, 20, 7)
    bias = jnp.asarray(np.arange(4 * 128).reshape(4, 128) / 100, jnp.float32)
    expected = expected_of(x, w, sizes, bias=np.asarray(bias, np.float64))
    assert_close(run(x, w, sizes, bias=bias, out_dtype=jnp.float32), expected, **EXACT)


plan = jax.jit(plan_work, static_argnames=("num_rows", "num_experts", "block_m"))


@pytest.mark.smoke
def test_work_covers_each_row_once():
    rng = np.random.default_rng(0)
    patterns = list(itertools.product((0, 1), repeat=6))  # which groups are empty
    for pattern, block_m in itertools.product(patterns, (16, 64, 128, 144)):
        sizes = rng.integers(1, 200, 6).astype(np.int32) * pattern
        rows, offset = int(sizes.sum() + rng.integers(0, 90)), int(rng.integers(0, 3))
        if not rows:
            continue
        rows = -(-rows // 256) * 256  # few shapes, so few compilations
        starts = np.cumsum(sizes) - sizes
        options = {"num_rows": rows, "num_experts": 3, "block_m": block_m}
        work = plan(jnp.asarray(starts, jnp.int32), jnp.asarray(sizes, jnp.int32), group_offset=offset, **options)
        count = int(work[NUM_TILES, 0])
        assert count <= max_tiles(rows, 3, block_m) == work.shape[1]
        owner = np.full(rows, -9)
        for expert, row, first, last, is_expert, _ in np.asarray(work)[:, :count].T:
            assert is_expert == (expert >= 0)
            assert row <= rows - block_m
            assert row % 8 == 0
            assert row <= first < last <= row + block_m
            assert (owner[first:last] == -9).all()
            owner[first:last] = expert
        group = np.repeat(np.arange(6), sizes) - offset
        expected = np.full(rows, -1)
        expected[: len(group)] = np.where((group >= 0) & (group < 3), group, -1)
        np.testing.assert_array_equal(owner, expected)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("says", "options"),
    [
        ("quantized weights with quantized rows only", {"activation_format": "fp8_per_token"}),
        ("quantized weights with quantized rows only", {"weights": "fp8_per_channel"}),
        (
            "not int8_per_token with fp8_per_channel",
            {"activation_format": "int8_per_token", "weights": "fp8_per_channel"},
        ),
        ("not fp8_per_token with fp8_per_block", {"activation_format": "fp8_per_token", "weights": "fp8_per_block"}),
        ("not mxfp8 with mxfp8", {"activation_format": "mxfp8", "weights": "mxfp8"}),
        ("K=160 .* 64", {"activation_format": "fp8_per_token", "weights": "fp8_per_channel", "k": 160}),
        ("N=192 .* 128x128", {"activation_format": "fp8_per_group", "weights": "fp8_per_block", "n": 192}),
        ("float32 with float32", {"dtype": jnp.float32}),
        ("N=200", {"n": 200}),
        ("K=100", {"k": 100}),
        ("MosaicGpuConfig, not 3", {"config": 3}),
        ("bytes of shared memory", {"config": MosaicGpuConfig(block_m=128, block_n=256, stages=5)}),
        ("above N=128", {"config": TALL, "n": 128}),
        ("gated it needs 128, gate and up", {"config": LOW, "epilogue": "silu"}),
    ],
)
def test_reasons(says, options):
    options = dict(options)
    x, w = problem(m=16, n=options.pop("n", 256), k=options.pop("k", 128), dtype=options.pop("dtype", jnp.bfloat16))
    if "weights" in options:
        w = quantize(w, options.pop("weights"))
    with pytest.raises(UnsupportedError, match=f"'mosaic_gpu' cannot serve this call: .*{says}.*; use 'xla'"):
        grouped_matmul(x, w, jnp.array((4,) * 4, jnp.int32), implementation="mosaic_gpu", **options)


@needs_interpreter
def test_a_cpu_is_no_gpu():
    x, w = problem(m=16)
    with pytest.raises(UnsupportedError, match="runs on a gpu and this call is traced for a cpu"):
        grouped_matmul(x, w, jnp.array((4,) * 4, jnp.int32), implementation="mosaic_gpu")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "sizes", [{"block_m": 96}, {"block_n": 64}, {"block_m": 128, "block_n": 512}, {"stages": 1}, {"band": 0}]
)
def test_config_is_checked_at_birth(sizes):
    with pytest.raises(ValueError, match="must be"):
        MosaicGpuConfig(**{"block_m": 64, "block_n": 128} | sizes)
