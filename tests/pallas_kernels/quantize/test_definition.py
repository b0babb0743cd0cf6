"""Codes and scales of every format, bit for bit, against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from numpy_quantizer import ACTIVATIONS, E4M3, WEIGHTS, dequantize_numpy, quantize_numpy
from pallas_kernels import get_format, quantize
from tolerance import assert_same_bits

NAMES = (*WEIGHTS, *ACTIVATIONS)
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
SMOKE_BF16 = [pytest.param(ml_dtypes.bfloat16, marks=pytest.mark.smoke), np.float16, np.float32]
SHAPES = [(7, 5), (130, 300), (3, 96, 260), (2, 2, 129, 257)]
jitted = jax.jit(quantize, static_argnames="format")


def normal(*shape, seed=0):
    """Normal numbers whose size changes from row to row, so that no two scales are equal."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * rng.uniform(0.01, 1, (*shape[:-1], 1))).astype(np.float32)


def cast(x, dtype):
    """`x` in `dtype`; what is too large for it becomes its largest number."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -largest, largest).astype(dtype)


def midpoints(codes, largest):
    """Numbers exactly between two neighbouring codes, under a scale of exactly 1, with both signs."""
    codes = np.unique(codes[codes >= 0])
    middle = (codes[1:] + codes[:-1]) / 2
    row = np.resize(np.concatenate([middle, -middle]), (3, 260))
    row[:, ::64] = largest  # in every block
    return row.astype(np.float32)


E4M3_CODES = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float64)
X = normal(3, 260, seed=1)
SPECIAL = {
    "zeros": 0 * np.abs(X),
    "negative zeros": -0.0 * np.abs(X),
    "one zero row": X * np.array([[1], [0], [1]], np.float32),
    "zero blocks": X * (np.arange(260) // 128 == 1),
    "subnormal": X / np.abs(X).max() * np.float32(1e-39),
    "partly subnormal": X * np.float32(2.0**-125),
    "tiny": X * np.float32(1e-36),
    "below the floors": X * np.float32(1e-11),
    "around the floors": X * np.float32(10) ** np.linspace(-12, 0, 260, dtype=np.float32),
    "huge": X / np.abs(X).max() * np.float32(3.4e38),
    "the largest numbers": np.sign(X) * np.finfo(np.float32).max,
    "next to the largest code": np.resize(
        np.array([448, -448, 447.99997, 449, 464, 127, 126.99999], np.float32), X.shape
    ),
    "midpoints of e4m3": midpoints(E4M3_CODES, 448),
    "midpoints of int8": midpoints(np.arange(128), 127),
    "one large element": np.where(np.arange(260) == 200, np.float32(1e6), X),
}


def special():
    """All cases along the leading axis, where each has scales of its own."""
    return np.stack([np.asarray(case, np.float32) for case in SPECIAL.values()])


def check(run, x, name):
    codes, scales = quantize_numpy(x, name)
    q = run(jnp.asarray(x), name)
    assert_same_bits(q.scales, scales)
    assert_same_bits(q.values, codes)
    return q


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales(name, shape, dtype):
    q = check(jitted, cast(normal(*shape), dtype), name)
    assert q.shape == shape
    assert q.format is get_format(name)


@pytest.mark.parametrize("dtype", SMOKE_BF16, ids=DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_special_numbers(name, dtype):
    q = check(jitted, cast(special(), dtype), name)
    values, scales = np.asarray(q.values).astype(np.float32), np.asarray(q.scales)
    assert np.isfinite(values).all()
    assert (np.abs(values) <= q.format.code_max).all()
    assert (np.isfinite(scales) & (scales >= 2.0**-126)).all()  # normal, so 1 / scale is finite too
    cases = dict(zip(SPECIAL, np.asarray(q.dequantize()), strict=True))
    assert not cases["zeros"].any()
    assert not cases["negative zeros"].any()
    assert not cases["subnormal"].any()
    assert not cases["one zero row"][1].any()


BY_HAND = {  # a row [1, 3] or the like: its codes and its scale
    "int8_per_channel": ([1, -0.5, 0.003], [127, -64, 0], 1 / 127),  # -63.5 goes to the even neighbour
    "int8_per_token": ([0, 0, 0], [0, 0, 0], 1e-10 / 127),
    "fp8_per_channel": ([448, 17, -18.9], [448, 16, -18], 1),  # e4m3 steps by 2 between 16 and 32
    "fp8_per_token": ([0, 0, 0], [0, 0, 0], 4.359654e-06),
    "fp8_per_block": ([0, 0, 0], [0, 0, 0], 2.2321429e-07),
    "fp8_per_group": ([2, -1, 0], [448, -224, 0], 2 / 448),
}


@pytest.mark.parametrize(("name", "case"), BY_HAND.items(), ids=BY_HAND)
def test_by_hand(name, case):
    x, codes, scale = (np.array(part, np.float32) for part in case)
    for values, scales in (quantize_numpy(x[None], name), jax.tree.leaves(jitted(x[None], name))):
        assert np.array_equal(np.asarray(values).astype(np.float32), codes[None])
        assert np.allclose(scales, scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_error_of_normal_weights(name):
    """The level that the mantissa (or the range) of the codes gives; one bit less would double it."""
    x = np.random.default_rng(0).normal(size=(256, 2048)).astype(np.float32)
    error = np.linalg.norm(np.asarray(jitted(x, name).dequantize()) - x) / np.linalg.norm(x)
    expected = 0.0087 if name == "int8_per_channel" else 0.0265
    assert abs(error - expected) < 0.05 * expected


@pytest.mark.parametrize("name", NAMES)
def test_eager_as_jitted(name):
    x = cast(special(), ml_dtypes.bfloat16)
    check(quantize, x, name)
    check(functools.partial(quantize, implementation="xla"), normal(2, 130, 200), name)


@pytest.mark.parametrize("name", NAMES)
def test_under_vmap_and_scan(name):
    x = normal(3, 40, 200)
    codes, scales = quantize_numpy(x, name)
    _, scanned = jax.lax.scan(lambda _, w: (None, quantize(w, name)), None, jnp.asarray(x))
    for q in (jax.jit(jax.vmap(lambda w: quantize(w, name)))(x), scanned):
        assert_same_bits(q.values, codes)
        assert_same_bits(q.scales, scales)


@pytest.mark.parametrize("name", NAMES)
def test_dequantized(name):
    x = special()
    q = jitted(x, name)
    exact = dequantize_numpy(np.asarray(q.values), np.asarray(q.scales), name)
    with np.errstate(over="ignore"):  # 127 * (the largest number / 127) may round to infinity
        expected = exact.astype(np.float32)
    assert_same_bits(q.dequantize(), expected)  # the product of code and scale, rounded once
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    rolled = dataclasses.replace(q, scales=jnp.roll(q.scales, 1, axis=0))
    with pytest.raises(AssertionError):
        assert_same_bits(rolled.dequantize(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_notices_other_arithmetic(name):
    """A quotient replaced by a product with a reciprocal, or the reverse, gives other codes."""
    fmt = get_format(name)
    other = {"divide": "reciprocal", "reciprocal": "divide", "inverse_amax": "divide"}[fmt.arithmetic]
    x = jnp.asarray(cast(normal(8, 256, 384), ml_dtypes.bfloat16))
    changed = jitted(x, dataclasses.replace(fmt, arithmetic=other))
    codes, scales = quantize_numpy(x, name)
    assert_same_bits(changed.scales, scales)
    with pytest.raises(AssertionError):
        assert_same_bits(changed.values, codes)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rewriting of divisions by XLA:CPU is the subject")
def test_the_comparison_notices_the_division_that_xla_makes():
    @jax.jit
    def naive(x):
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return jnp.round(x / scale).astype(jnp.int8), jnp.swapaxes(scale, -1, -2)

    x = jnp.asarray(cast(normal(8, 256, 384), ml_dtypes.bfloat16)).astype(jnp.float32)
    codes, scales = quantize_numpy(x, "int8_per_channel")
    naive_codes, naive_scales = naive(x)
    with pytest.raises(AssertionError):
        assert_same_bits(naive_scales, scales)
    with pytest.raises(AssertionError):
        assert_same_bits(naive_codes, codes)


def test_a_bad_token_spoils_no_other():
    x = normal(5, 2048)  # wide enough for a vectorized maximum, which drops NaN on a CPU
    for name in ACTIVATIONS:
        clean = jitted(x, name).dequantize()
        for bad in (np.nan, np.inf):
            spoiled = jitted(jnp.asarray(x).at[2, 7].set(bad), name).dequantize()
            assert_same_bits(np.delete(spoiled, 2, axis=0), np.delete(clean, 2, axis=0))
            assert not np.isfinite(spoiled[2]).all(), f"{bad} is lost in {name}"


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(np.float32, (2, 3, 130), elements=FLOATS, fill=FLOATS)
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(x=MATRICES)
def test_any_matrix(name, x):
    check(jitted, x, name)


@pytest.mark.parametrize("name", ["int8_per_channel", "fp8_per_channel"])
@FEW
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 100))
def test_a_power_of_two_changes_scales_only(name, seed, exponent):
    """Above the floors and in range."""
    x = np.random.default_rng(seed).uniform(1, 4, (3, 130)).astype(np.float32)
    once, scaled = jitted(x, name), jitted(np.ldexp(x, exponent), name)
    assert_same_bits(scaled.values, once.values)
    assert_same_bits(scaled.scales, np.ldexp(np.asarray(once.scales), exponent))
