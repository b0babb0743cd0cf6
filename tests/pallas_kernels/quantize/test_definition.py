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

from by_name import assert_same_parts, by_name, whole_blocks
from numpy_quantizer import ACTIVATIONS, BLOCKS, WEIGHTS, dequantize_numpy, quantize_numpy, unpacked
from pallas_kernels import get_format, quantize
from pallas_kernels.quantize import matrix_amax
from quick import few
from special_numbers import SPECIAL, cast, normal, special
from tolerance import assert_same_bits

NAMES = tuple(BLOCKS)
TINY = np.float32(2.0**-126)
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
SMOKE_BF16 = [pytest.param(ml_dtypes.bfloat16, marks=pytest.mark.smoke), np.float16, np.float32]
SHAPES = [(7, 5), (130, 300), (3, 96, 260), (2, 2, 129, 257)]
jitted = jax.jit(quantize, static_argnames=("format", "shared_axes"))


def check(run, x, name):
    q = run(jnp.asarray(x), by_name(name))
    assert_same_parts(q, quantize_numpy(x, name))
    return q


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", few(NAMES))
def test_codes_and_scales(name, shape, dtype):
    shape = whole_blocks(name, shape)
    q = check(jitted, cast(normal(*shape), dtype), name)
    assert q.shape == shape
    assert q.format == by_name(name)


@pytest.mark.parametrize("name", ["fp8_per_tensor", "nvfp4"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=["bf16", "f32"])
def test_a_scale_shared_by_gate_and_up(name, dtype):
    x = cast(normal(3, 2, 40, 96), dtype)
    x[1, 0] *= 7
    q = jitted(x, name, shared_axes=(1,))
    assert_same_parts(q, quantize_numpy(x, name, shared_axes=(1,)))
    whole = np.asarray(q.scales if name == "fp8_per_tensor" else q.global_scale).reshape(3, 2)
    assert_same_bits(whole[:, 0], whole[:, 1])
    assert not np.array_equal(jax.tree.leaves(jitted(x, name))[-1], jax.tree.leaves(q)[-1])
    parts = [jitted(x[:, half], name, amax=jnp.max(matrix_amax(jnp.asarray(x)), axis=1)) for half in (0, 1)]
    assert_same_bits(np.stack([part.values for part in parts], axis=1), q.values)  # a part, told the whole's maximum
    with pytest.raises(ValueError, match=r"amax.shape=.* must be"):
        quantize(jnp.asarray(x), name, amax=jnp.ones(3))
    with pytest.raises(ValueError, match="a format with a scale of the whole"):
        quantize(jnp.asarray(x), "fp8_per_block", amax=jnp.ones((3, 2)))


@pytest.mark.parametrize("dtype", SMOKE_BF16, ids=DTYPES)
@pytest.mark.parametrize("name", few(NAMES))
def test_special_numbers(name, dtype):
    q = check(jitted, cast(special(), dtype), name)
    values = unpacked(np.asarray(q.values), name).astype(np.float32)
    assert np.isfinite(values).all()
    assert (np.abs(values) <= q.format.code_max).all()
    for scales in (np.asarray(part) for part in jax.tree.leaves(q)[1:]):
        if scales.dtype == np.float32:
            assert (np.isfinite(scales) & (scales >= TINY)).all()  # normal, so 1 / scale is finite too
        elif scales.dtype == np.uint8:
            assert ((scales >= 1) & (scales <= 254)).all()
        else:
            assert np.isfinite(scales.astype(np.float32)).all()
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
    "fp8_per_tensor": ([2, -1, 0], [448, -224, 0], 2 / 448),
    "fp8_per_tensor_dynamic": ([0, 0, 0], [0, 0, 0], 1),
    "int4_per_group_32": ([0.7, -0.35, 0.25, 0.04], [7, -4, 2, 0], 0.1),  # -3.5 and 2.5 go to the even neighbours
    "mxfp8": ([448, 17, -18.9], [448, 16, -18], 127),
    "mxfp4": ([6, -2.5, 0.25], [6, -2, 0], 127),
}


@pytest.mark.parametrize(("name", "case"), BY_HAND.items(), ids=BY_HAND)
def test_by_hand(name, case):
    x, codes, scale = (np.array(part, np.float32) for part in case)
    x = np.pad(x[None], ((0, 0), (0, whole_blocks(name, x.shape)[-1] - len(x))))
    for values, scales, *_ in (quantize_numpy(x, name), jax.tree.leaves(jitted(x, by_name(name)))):
        values, scales = np.asarray(values), np.asarray(scales)
        assert np.array_equal(unpacked(values, name).astype(np.float32)[:, : len(codes)], codes[None])
        assert np.allclose(scales.astype(np.float32), scale, rtol=1e-5, atol=0)
        if name == "int4_per_group_32":
            assert values[0, :2].tolist() == [0xC7, 0x02]


@pytest.mark.parametrize(
    ("name", "largest", "byte"),
    [("mxfp8", a, e + 127) for a, e in ((1, -8), (3.5, -7), (448, 0), (449, 1), (896, 1), (0, 0))]
    + [
        ("mxfp4", a, e + 127)
        for a, e in ((1, -2), (1.74, -2), (1.75, -1), (2, -1), (3.49, -1), (3.5, 0), (6, 0), (0, 0))
    ],
)
def test_exponents_by_hand(name, largest, byte):
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = largest
    assert jitted(x, name).scales.tolist() == quantize_numpy(x, name)[1].tolist() == [[byte]]


def test_nvfp4_by_hand():
    x = np.zeros((2, 16), np.float32)
    x[0, :4], x[1, 0] = (0.3, 0.1, 0.05, -0.02), 1
    q = jitted(x, "nvfp4")
    assert q.scales.astype(jnp.float32).tolist() == [[128, 448]]
    assert np.allclose(q.dequantize()[0, :4], (0.285714, 0.095238, 0.047619, -0.023810), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_keeps_its_value(name):
    """All codes of a format, as numbers in units of a scale, come back as they were."""
    fmt = by_name(name)
    codes = np.arange(256 if fmt.bits == 8 else 16, dtype=np.uint8)
    if fmt.code == np.int8:
        units = np.arange(-127, 128, dtype=np.float32)
    elif name.startswith("int4"):
        units = np.arange(-7, 8, dtype=np.float32)
    else:
        units = codes.view(fmt.code).astype(np.float32)
    units = np.unique(units[np.isfinite(units)])
    if name.startswith(("fp8_per_b", "fp8_per_g")):  # floors
        units = units * np.float32(2)
    row = np.resize(units, whole_blocks(name, (1, len(units))))
    row = np.concatenate([row, np.zeros((1, -row.shape[-1] % 128), np.float32)], axis=1)
    row[:, ::16] = np.abs(units).max()
    found = np.asarray(jitted(row, fmt).dequantize())
    assert np.allclose(found, row, rtol=1e-6 if fmt.two_level else 0, atol=0)  # two levels: two products


@pytest.mark.parametrize("name", WEIGHTS)
def test_error_of_normal_weights(name):
    """The level that the mantissa (or the range) of the codes gives; one bit less would double it."""
    x = np.random.default_rng(0).normal(size=(256, 2048)).astype(np.float32)
    error = np.linalg.norm(np.asarray(jitted(x, by_name(name)).dequantize()) - x) / np.linalg.norm(x)
    expected = {
        "int8_per_channel": 0.0087, "int4_per_group": 0.117, "int4_per_group_64": 0.108, "int4_per_group_32": 0.097,
        "mxfp4": 0.112, "nvfp4": 0.095,
    }.get(name, 0.0265)  # fmt: skip
    assert abs(error - expected) < 0.05 * expected


@pytest.mark.parametrize("name", few(NAMES))
def test_eager_as_jitted(name):
    x = cast(special(), ml_dtypes.bfloat16)
    check(quantize, x, name)
    check(functools.partial(quantize, implementation="xla"), normal(2, 130, 256), name)


@pytest.mark.parametrize("name", NAMES)
def test_under_vmap_and_scan(name):
    x = normal(*whole_blocks(name, (3, 40, 200)))
    fmt, expected = by_name(name), quantize_numpy(x, name)
    _, scanned = jax.lax.scan(lambda _, w: (None, quantize(w, fmt)), None, jnp.asarray(x))
    for q in (jax.jit(jax.vmap(lambda w: quantize(w, fmt)))(x), scanned):
        assert_same_parts(q, expected)


@pytest.mark.parametrize("name", NAMES)
def test_dequantized(name):
    x = special()
    q = jitted(x, by_name(name))
    values, scales, *second = (np.asarray(part) for part in jax.tree.leaves(q))
    exact = dequantize_numpy((values, scales), name)
    with np.errstate(over="ignore"):  # 127 * (the largest number / 127) may round to infinity
        expected = exact.astype(np.float32)
        if second:
            expected = expected * second[0].reshape(*x.shape[:-2], -1, 1)
    found = np.asarray(q.dequantize())
    found, expected = (np.where(np.abs(v) < TINY, np.float32(0), v) for v in (found, expected))  # backends disagree
    assert_same_bits(found, expected)  # products, each rounded once
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    rolled = dataclasses.replace(q, scales=jnp.roll(q.scales, 1, axis=0))
    with pytest.raises(AssertionError):
        assert_same_bits(rolled.dequantize(), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("mx", "nv"))])
def test_the_comparison_notices_other_arithmetic(name):
    """A quotient replaced by a product with a reciprocal, or the reverse, gives other codes."""
    fmt = by_name(name)
    other = {"divide": "reciprocal", "reciprocal": "divide", "inverse_amax": "divide"}[fmt.arithmetic]
    x = jnp.asarray(cast(normal(64, 32, 384), ml_dtypes.bfloat16))  # many matrices: one may have no code at a midpoint
    changed = jitted(x, dataclasses.replace(fmt, arithmetic=other))
    codes, scales = quantize_numpy(x, name)
    assert_same_bits(changed.scales, scales)
    with pytest.raises(AssertionError):
        assert_same_bits(changed.values, codes)


@pytest.mark.parametrize(("name", "limit"), [("mxfp8", 512.0), ("mxfp4", 6.0)])
def test_the_comparison_notices_another_exponent(name, limit):
    """OCP's own rule, the exponent of the largest number, or dividing by 6 first, gives other scales."""
    x = jnp.asarray(normal(8, 256, 384))
    with pytest.raises(AssertionError):
        assert_same_parts(jitted(x, dataclasses.replace(get_format(name), amax_limit=limit)), quantize_numpy(x, name))


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
        if name == "fp8_per_tensor_dynamic":
            continue  # one scale for all tokens
        clean = jitted(x, name).dequantize()
        for bad in (np.nan, np.inf):
            spoiled = jitted(jnp.asarray(x).at[2, 7].set(bad), name).dequantize()
            assert_same_bits(np.delete(spoiled, 2, axis=0), np.delete(clean, 2, axis=0))
            assert not np.isfinite(spoiled[2]).all(), f"{bad} is lost in {name}"


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(np.float32, (2, 3, 256), elements=FLOATS, fill=FLOATS)
MAGNITUDES = st.tuples(st.integers(0, 2**32 - 1), st.integers(-126, 118), st.integers(0, 40))
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(x=MATRICES)
def test_any_matrix(name, x):
    check(jitted, x, name)


@pytest.mark.parametrize("name", few(NAMES))
@settings(FEW, max_examples=15)  # each shape is compiled anew
@given(magnitudes=MAGNITUDES, rows=st.integers(1, 4), k=st.integers(1, 300))
def test_any_magnitude_and_shape(name, magnitudes, rows, k):
    seed, exponent, spread = magnitudes
    rng = np.random.default_rng(seed)
    shape = whole_blocks(name, (rows, k))
    exponents = np.clip(exponent + rng.integers(-spread, spread + 1, shape), -149, 120)
    check(jitted, np.ldexp(rng.uniform(-2, 2, shape), exponents).astype(np.float32), name)


@pytest.mark.parametrize("name", ["int8_per_channel", "fp8_per_channel", "mxfp8", "mxfp4"])
@FEW
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 100))
def test_a_power_of_two_changes_scales_only(name, seed, exponent):
    """Above the floors and in range."""
    x = np.random.default_rng(seed).uniform(1, 4, (3, 160)).astype(np.float32)
    once, scaled = jitted(x, name), jitted(np.ldexp(x, exponent), name)
    assert_same_bits(scaled.values, once.values)
    scales = np.asarray(once.scales)
    expected = scales + np.uint8(exponent % 256) if scales.dtype == np.uint8 else np.ldexp(scales, exponent)
    assert_same_bits(scaled.scales, expected)
