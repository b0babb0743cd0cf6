"""The Hopper grouped matmul of 8-bit codes, interpreted on a CPU with race detection, against the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from by_name import by_name
from codes import PAIRS, real
from pallas_kernels import Activation, QuantizedArray, fused_moe, grouped_matmul, quantize
from pallas_kernels.grouped_matmul.call import Call, dispatch
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from pallas_kernels.routing import make_group_metadata
from quick import few, few_cases
from races import no_races
from tolerance import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        jax.__version_info__[:2] < FIRST_JAX,
        reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels",
    ),
]
CONFIGS = {  # each way to share a tile among the warpgroups
    "rows": MosaicGpuConfig(block_m=128, block_n=256, stages=2),
    "narrow": MosaicGpuConfig(block_m=128, block_n=128, stages=3),
    "columns": MosaicGpuConfig(block_m=64, block_n=128, stages=3),
    "wide columns": MosaicGpuConfig(block_m=64, block_n=256, stages=2, band=1),
    "weights": MosaicGpuConfig(block_m=16, block_n=256, stages=3, weights_on_m=True),
    "narrow weights": MosaicGpuConfig(block_m=48, block_n=128, stages=2, weights_on_m=True),
    "weights, chunks of rows": MosaicGpuConfig(block_m=80, block_n=256, stages=2, weights_on_m=True),
}
QUICK = [(PAIRS[0], "rows"), (PAIRS[5], "wide columns"), (PAIRS[1], "weights")]
SIZES = (70, 0, 127, 3)
EXACT = {"batch": 2e-6, "worst_row": 4e-6}  # sums of exact products in f32, in another order
ROUNDED = {"batch": 4.5e-3, "worst_row": 7e-3}  # gate, up and their product are rounded to bf16


def problem(pair, m=208, e=4, n=256, k=384, halves=()):
    """Rows and weights whose scales differ from row to row and block to block, as codes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, k)) * np.exp2(rng.integers(-4, 4, (m, -(-k // 128))).repeat(128, axis=1)[:, :k])
    w = rng.standard_normal((e, *halves, n, k)) * np.exp2(rng.integers(-4, 4, (e, *halves, n, 1))) / np.sqrt(k)
    x, w = (jnp.asarray(a, jnp.float32).astype(jnp.bfloat16) for a in (x, w))
    return quantize(x, by_name(pair[1])), quantize(w, by_name(pair[0]))


def run(lhs, rhs, sizes=SIZES, **options):
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads="uninitialized"):
        out = grouped_matmul(lhs, rhs, jnp.array(sizes, jnp.int32), implementation="mosaic_gpu", **options)
        return np.asarray(out)


def expected_of(lhs, rhs, sizes=SIZES, **options):
    return definition.grouped_matmul(real(lhs), real(rhs), sizes, **options)


@pytest.mark.parametrize(
    ("pair", "config"), few_cases([(p, c) for p in PAIRS for c in ("rows", "weights")], [(PAIRS[5], "weights")])
)
def test_k_ends_within_a_step(pair, config):
    """What the TMA reads past it is zero, as the interpreter's memory is here."""
    lhs, rhs, sizes = *problem(pair, m=50, e=2, k=192), (0, 41)
    zeros = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
    with no_races(), interpreted("mosaic_gpu", detect_races=True, **zeros):
        found = grouped_matmul(
            lhs,
            rhs,
            jnp.array(sizes, jnp.int32),
            config=CONFIGS[config],
            out_dtype=jnp.float32,
            implementation="mosaic_gpu",
        )
    assert_close(np.asarray(found), expected_of(lhs, rhs, sizes), **EXACT)


CASES = [(pair, config) for pair in PAIRS for config in CONFIGS]


@pytest.mark.parametrize(("pair", "config"), few_cases(CASES, QUICK), ids=str)
def test_matches_definition(pair, config):
    lhs, rhs = problem(pair)
    found = run(lhs, rhs, config=CONFIGS[config], out_dtype=jnp.float32)
    assert_close(found, expected_of(lhs, rhs), **EXACT)
    assert not found[sum(SIZES) :].any()
    turned = QuantizedArray(values=rhs.values, scales=jnp.roll(rhs.scales, 1, axis=0), format=rhs.format)
    with pytest.raises(AssertionError):  # the scales of another expert
        assert_close(found, expected_of(lhs, turned), batch=0.1, worst_row=0.1)


@pytest.mark.parametrize("apart", few([False, True], [True]), ids=["together", "apart"])
@pytest.mark.parametrize(
    ("pair", "config"), few_cases([c for c in CASES if c[1] in ("rows", "wide columns", "weights")], QUICK[:1])
)
def test_gate_and_up(pair, config, apart):
    """One after the other in `[E, 2I, K]`, and apart in `[E, 2, I, K]`, whose scales are stored otherwise."""
    lhs, rhs = problem(pair, n=256 if apart else 512, halves=(2,) if apart else ())
    sizes, rng = jnp.array(SIZES, jnp.int32), np.random.default_rng(1)
    bias = jnp.asarray(rng.standard_normal((4, *rhs.shape[1:-1])), jnp.float32).astype(jnp.bfloat16)
    call = Call(
        lhs=lhs,
        rhs=rhs,
        group_sizes=sizes,
        metadata=make_group_metadata(sizes),
        bias=bias,
        epilogue=Activation("silu"),
        out_dtype=np.dtype(jnp.bfloat16),
        config=CONFIGS[config],
    )
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads="uninitialized"):
        found = np.asarray(dispatch(call, "mosaic_gpu"))
    whole = real(rhs).reshape(4, -1, rhs.shape[-1])
    sums = definition.grouped_matmul(real(lhs), whole, SIZES, bias=definition.real(bias).reshape(4, -1))
    gate, up = np.split(definition.rounded(sums, jnp.bfloat16), 2, axis=1)
    expected = definition.activation("silu", gate, up)
    expected[sum(SIZES) :] = 0
    assert_close(found, expected, **ROUNDED)
    with pytest.raises(AssertionError):
        assert_close(found, definition.activation("silu", up, gate), batch=0.1, worst_row=0.1)


def in_order(codes):
    """e4m3 codes as integers, neighbours next to each other."""
    bits = codes.view(np.uint8).astype(int)
    return np.where(bits >= 128, 128 - bits, bits)


TOO_NARROW = ("narrow", "columns", "narrow weights")  # with gate and up: for a block of the results in one tile
REQUANTIZED = [(c, gated) for c in CONFIGS for gated in (False, True) if not (gated and c in TOO_NARROW)]


@pytest.mark.parametrize(("config", "gated"), few_cases(REQUANTIZED, [("weights", True)]))
def test_results_in_blocks_of_fp8(config, gated):
    """The scales of what the kernel itself says without a format, and its codes but where a quotient is a midpoint."""
    lhs, rhs = problem(PAIRS[0], n=512)
    sizes = jnp.array(SIZES, jnp.int32)
    call = Call(
        lhs=lhs,
        rhs=rhs,
        group_sizes=sizes,
        metadata=make_group_metadata(sizes),
        epilogue=Activation("silu") if gated else None,
        out_dtype=np.dtype(jnp.bfloat16),
        config=CONFIGS[config],
    )
    fmt = by_name("fp8_per_group")
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads="uninitialized"):
        real = dispatch(call, "mosaic_gpu")
        found = dispatch(dataclasses.replace(call, out_format=fmt), "mosaic_gpu")
    used = sum(SIZES)
    wanted = quantize(real, fmt)
    assert_same_bits(found.scales, wanted.scales)
    codes, right = (in_order(np.asarray(q.values)[:used]) for q in (found, wanted))
    assert np.abs(codes - right).max() <= 1
    assert np.mean(codes != right) < 1e-3
    assert not np.asarray(found.values)[used:].astype(np.float32).any()
    assert len(np.unique(np.asarray(found.scales))) > 100  # they are not all alike


@pytest.mark.parametrize("pair", few(PAIRS[:2], PAIRS[:1]), ids=str)
@pytest.mark.parametrize(
    ("m", "sizes"), few_cases([(203, (1, 0, 100, 63)), (6, (1, 0, 2, 2)), (8, (0, 0, 0, 0))], [(6, (1, 0, 2, 2))])
)
def test_rows_that_fill_no_tile(pair, m, sizes):
    lhs, rhs = problem(pair, m=m, n=384)
    found = run(lhs, rhs, sizes, out_dtype=jnp.float32)
    assert_close(found, expected_of(lhs, rhs, sizes), **EXACT)


def test_group_offset():
    lhs, rhs = problem(PAIRS[0], m=64, e=3, k=256)
    sizes = (9, 8, 30, 0, 3, 5)
    found = run(lhs, rhs, sizes, group_offset=jnp.int32(2), out_dtype=jnp.float32)
    assert_close(found, expected_of(lhs, rhs, sizes, offset=2), **EXACT)


@pytest.mark.slow  # each half a minute; in blocks both matmuls are one launch
@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_a_whole_layer(pair):
    """Rows quantized on the way, and the hidden values between the two matmuls."""
    rng = np.random.default_rng(2)
    tokens, e, h, i = 40, 4, 256, 256
    x = jnp.asarray(rng.standard_normal((tokens, h)), jnp.bfloat16)
    w13 = quantize(jnp.asarray(rng.standard_normal((e, 2 * i, h)) / 16, jnp.bfloat16), by_name(pair[0]))
    w2 = quantize(jnp.asarray(rng.standard_normal((e, h, i)) / 16, jnp.bfloat16), by_name(pair[0]))
    ids = jnp.asarray(np.stack([rng.permutation(e)[:2] for _ in range(tokens)]), jnp.int32)
    weights = jnp.asarray(rng.random((tokens, 2)), jnp.float32)
    arguments = (x, w13, w2, weights, ids)
    options = {"activation_format": pair[1]}
    expected = np.asarray(fused_moe(*arguments, implementation="xla", **options))
    with interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = np.asarray(fused_moe(*arguments, implementation="mosaic_gpu", **options))
    assert_close(found, expected.astype(np.float64), batch=5e-3, worst_row=2e-2)  # some hidden codes round otherwise
    with pytest.raises(AssertionError):
        assert_close(found, np.roll(expected, 1, axis=0).astype(np.float64), batch=0.1, worst_row=0.1)
