"""Grouped matmul against the definition, for every pair of formats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
import numpy_quantizer
from by_name import by_name
from pallas_kernels import Activation, QuantizedArray, grouped_matmul, make_group_metadata, quantize
from pallas_kernels.grouped_matmul.reference import TILE_OVERHEAD, tile_sizes
from quick import few
from special_numbers import normal
from tolerance import assert_close

GROUPS = {
    "even": (64,) * 4,
    "one takes all": (0, 256, 0, 0),
    "ragged, short": (1, 0, 127, 63),
    "first and last": (9, 0, 0, 100),
    "none": (0, 0, 0, 0),
}
WEIGHTS = (None, *numpy_quantizer.WEIGHTS)
ACTIVATIONS = (None, *numpy_quantizer.ACTIVATIONS)
ROUNDING = {"batch": 2.5e-3, "worst_row": 4e-3}  # rounding the output to bf16 costs 1.7e-3 and 2.0e-3
EXACT = {"batch": 2e-6, "worst_row": 4e-6}  # f32 sums


def problem(m=256, e=4, n=200, k=384, dtype=jnp.bfloat16, seed=0):
    """Rows and weights whose scale changes by a factor of 8 from block to block, so that a wrong scale shows."""
    rng = np.random.default_rng(seed)
    steps = (
        8.0 ** (np.arange(k) // 128 % 3) * 2.0 ** (np.arange(k) // 16 % 2) * 3.0 ** (np.arange(n)[:, None] // 64 % 3)
    )
    x, w = rng.normal(size=(m, k)), rng.normal(size=(e, n, k)) * steps / k * np.arange(1, e + 1)[:, None, None]
    return jnp.asarray(x, jnp.float32).astype(dtype), jnp.asarray(w, jnp.float32).astype(dtype)


OPTIONS = ("activation_format", "out_format", "epilogue", "out_dtype")
run = jax.jit(grouped_matmul, static_argnames=OPTIONS)  # shared: equal shapes compile once


def packed(w, name):
    return w if name is None else jax.jit(quantize, static_argnums=1)(w, by_name(name))


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("weight", "activation"), [(None, None), ("fp8_per_block", "fp8_per_group")])
def test_groups(weight, activation, sizes):
    check_definition(weight, activation, sizes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", few(WEIGHTS, ("fp8_per_block",)))
def test_every_pair_of_formats(weight, activation):
    check_definition(weight, activation, GROUPS["ragged, short"])


def test_ragged_blocks():
    check_definition("fp8_per_block", "fp8_per_group", GROUPS["ragged, short"], k=300)


def check_definition(weight, activation, sizes, k=384):
    x, w = problem(k=k)
    expected, used = (
        definition.grouped_matmul(definition.real(x, activation), definition.real(w, weight), sizes),
        sum(sizes),
    )
    groups = jnp.array(sizes, jnp.int32)

    def call(w):
        return run(x, w, groups, activation_format=activation, out_dtype=jnp.float32)

    actual = call(packed(w, weight))
    assert_close(actual[:used], expected[:used], **EXACT)
    assert not actual[used:].any()  # rows of no expert are zero, not leftovers
    if used:
        rotated = jax.tree.map(lambda v: jnp.roll(v, 1, axis=0), packed(w, weight))
        with pytest.raises(AssertionError):
            assert_close(call(rotated)[:used], expected[:used], batch=0.3, worst_row=0.3)


@pytest.mark.smoke
@pytest.mark.parametrize("shift", [{"axis": -1}, {"axis": -2}], ids=["along N", "along K"])
def test_a_scale_shifted_by_one_block_is_noticed(shift):
    x, w = problem()
    sizes = (100, 3, 0, 70)
    expected = definition.grouped_matmul(definition.real(x), definition.real(w, "fp8_per_block"), sizes)
    q = quantize(w, "fp8_per_block")
    actual = run(x, q, jnp.array(sizes, jnp.int32))
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, expected, **ROUNDING)
    shifted = dataclasses.replace(q, scales=jnp.roll(q.scales, 1, **shift))
    with pytest.raises(AssertionError):
        assert_close(run(x, shifted, jnp.array(sizes, jnp.int32)), expected, batch=5e-2, worst_row=5e-2)


@pytest.mark.parametrize(
    ("m", "weight", "dtype"),
    [(m, weight, jnp.bfloat16) for m in (1, 7) for weight in (None, "int8_per_channel", "fp8_per_block", "nvfp4")]
    + [(40, weight, dtype) for weight in (None, "fp8_per_block", "mxfp4") for dtype in (jnp.float16, jnp.float32)],
)
def test_dtypes_and_small_batches(m, weight, dtype):
    x, w = problem(m=m, e=3, n=34, k=130 if weight in (None, "fp8_per_block") else 160, dtype=dtype)
    sizes = (0, m - m // 3, m // 3)
    expected = definition.grouped_matmul(definition.real(x), definition.real(w, weight), sizes)
    actual = run(x, packed(w, weight), jnp.array(sizes, jnp.int32))
    assert actual.dtype == dtype
    tolerance = {jnp.float32: EXACT, jnp.float16: {"batch": 4e-4, "worst_row": 6e-4}, jnp.bfloat16: ROUNDING}[dtype]
    assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("weight", few([None, "int8_per_channel", "fp8_per_block", "nvfp4"], ("fp8_per_block",)))
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_a_quantized_left_side(activation, weight):
    """The same bits as with `activation_format`; bf16 unless said otherwise."""
    x, w = problem(m=40)
    x = x.at[34:].set(0)  # rows of no group, which a scale of all rows leaves out
    sizes, w = jnp.array((11, 0, 3, 20), jnp.int32), packed(w, weight)
    actual = run(packed(x, activation), w, sizes)
    assert actual.dtype == jnp.bfloat16
    assert np.array_equal(actual, run(x, w, sizes, activation_format=activation))


def test_operands_of_two_real_dtypes_are_not_rounded():
    x, w = problem(dtype=jnp.float32)
    expected = definition.grouped_matmul(definition.real(x), definition.real(w.astype(jnp.bfloat16)), GROUPS["even"])
    actual = run(x, w.astype(jnp.bfloat16), jnp.array(GROUPS["even"], jnp.int32))
    assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("weight", [None, "fp8_per_block"])
def test_bias_epilogue_and_output_format(weight):
    x, w = problem()
    bias = jnp.asarray(np.random.default_rng(3).normal(size=(4, 200)), jnp.bfloat16)
    sizes, activation = (70, 0, 31, 11), Activation("swigluoai", limit=2.0)
    sums = definition.grouped_matmul(definition.real(x), definition.real(w, weight), sizes, definition.real(bias))
    gate, up = np.split(definition.rounded(sums, jnp.bfloat16), 2, axis=1)
    expected = definition.rounded(definition.activation("swigluoai", gate, up, limit=2.0), jnp.bfloat16)
    expected[sum(sizes) :] = 0  # not the activation of 0, not the bias

    def call(b, **options):
        return run(x, packed(w, weight), jnp.array(sizes, jnp.int32), bias=b, epilogue=activation, **options)

    assert_close(call(bias), expected, **ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(call(jnp.roll(bias, 1, axis=1)), expected, batch=2e-2, worst_row=2e-2)
    q = call(bias, out_format="fp8_per_group")
    assert isinstance(q, QuantizedArray)
    again = quantize(call(bias), "fp8_per_group")  # rounded to bf16 first, then quantized
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True))


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("weight", [None, "fp8_per_block"])
def test_group_offset(weight, offset):
    x, w = problem(e=2)
    sizes = (30, 17, 0, 100)
    expected = definition.grouped_matmul(definition.real(x), definition.real(w, weight), sizes, offset=offset)
    groups = jnp.array(sizes, jnp.int32)

    def call(at):
        return run(x, packed(w, weight), groups, group_offset=at)

    assert_close(call(jnp.int32(offset)), expected, **ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(call(jnp.int32((offset + 1) % 3)), expected, **ROUNDING)
    eager = grouped_matmul(x, packed(w, weight), groups, group_offset=offset, metadata=make_group_metadata(groups))
    assert np.array_equal(eager, call(jnp.int32(offset)))


def test_a_bad_row_spoils_no_other():
    x, w = problem()
    sizes = jnp.array((100, 3, 0, 70), jnp.int32)
    clean = run(x, quantize(w, "fp8_per_block"), sizes)
    for row in (0, 99, 101, 172, 200):  # the last one belongs to no expert
        spoiled = run(x.at[row].set(jnp.nan), quantize(w, "fp8_per_block"), sizes)
        assert np.isnan(spoiled[row]).all() == (row < 173)
        others = np.arange(256) != row
        assert np.array_equal(spoiled[others], clean[others])


@pytest.mark.parametrize("padding", [1e4, np.nan, np.inf])
def test_padding_has_no_say_in_a_scale_of_all_rows(padding):
    x, w = jnp.asarray(normal(24, 64), jnp.bfloat16), jnp.asarray(normal(2, 128, 64), jnp.bfloat16)
    sizes = jnp.array([9, 7], jnp.int32)
    padded = x.at[16:].set(padding)
    found, clean = (run(v, w, sizes, activation_format="fp8_per_tensor_dynamic") for v in (padded, x.at[16:].set(0)))
    assert np.array_equal(found, clean)
    inside = run(x.at[15].set(1e4), w, sizes, activation_format="fp8_per_tensor_dynamic")
    assert not np.array_equal(inside[:15], clean[:15])  # a row of a group has


def test_no_rows():
    x, w = problem(m=0)
    assert run(x, w, jnp.zeros(4, jnp.int32), epilogue="silu").shape == (0, 100)
    out = run(x, w, jnp.zeros(4, jnp.int32), activation_format="fp8_per_group", out_format="fp8_per_token")
    assert out.shape == (0, 200)


@pytest.mark.parametrize(("rows", "groups"), [(1, 8), (2, 8), (33, 8), (1024, 8), (1024, 2), (300, 1)])
def test_tiles_cover_every_group_at_little_more_than_the_least_cost(rows, groups):
    tiles = tile_sizes(rows, groups)
    assert tiles[-1][1] == 0
    assert all(size <= rows for size, _ in tiles)
    least = [0]
    for group in range(1, rows + 1):
        least.append(min(size + TILE_OVERHEAD + least[max(0, group - size)] for size, _ in tiles))
        left, cost = group, 0
        for size, worth in tiles:
            while left > worth:
                left, cost = left - size, cost + size + TILE_OVERHEAD
        assert left <= 0
        assert cost <= 1.3 * least[group]
