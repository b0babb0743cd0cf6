"""`quotient` against the IEEE division of numpy."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.quantize.quotient import divide, divisor, quotient
from tolerance import assert_same_bits

MODULE = importlib.import_module("pallas_kernels.quantize.quotient")
jitted = jax.jit(quotient)
TINY = np.finfo(np.float32).tiny


def random_pairs(count=1_000_000):
    """All signs and mantissas, exponents whose quotient is a normal number."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**23, (2, count), np.uint32) | np.uint32(127 << 23)
    x, scale = np.ldexp(bits.view(np.float32), rng.integers(-62, 62, (2, count), np.int32))
    return x * rng.choice(np.float32([-1, 1]), count), scale


def hardest_pairs(count=10_000):
    """Mantissas whose quotient is as close to a rounding midpoint as can be: `m * 2**shift = q * n + c` with q odd.

    `q / 2**shift` is the midpoint (25 bits), n odd is drawn, and m follows from a small c modulo n.
    """
    pairs = set()
    for n in map(int, np.random.default_rng(0).integers(2**22, 2**23, count) * 2 + 1):
        for shift in (24, 25):  # quotients in [1, 2) and in [0.5, 1)
            inverse = pow(2, -shift, n)
            for c in (1, -1, 2, -2, 3, -3):
                m = c * inverse % n
                m = m if m >= 2**23 else m + n
                q = ((m << shift) - c) // n
                if m < 2**24 and q % 2 and 2**24 <= q < 2**25:
                    pairs.add((m, n))
    assert len(pairs) > 2 * count
    return np.array(sorted(pairs), np.float32).T


def by_divisor(x, scale):
    return divide(jnp.asarray(x), divisor(jnp.asarray(scale)))


def where_codes_need_it(run):
    """`run`, and below 2**-60, where residuals would be subnormal, the quotient itself."""

    def checked(x, scale):
        return np.where(np.abs(x / scale) < 2.0**-60, x / scale, run(x, scale))

    return checked


RUNS = {
    "eager": quotient,
    "jitted": pytest.param(jitted, marks=pytest.mark.smoke),
    "by a divisor, eager": where_codes_need_it(by_divisor),
    "by a divisor, jitted": pytest.param(where_codes_need_it(jax.jit(by_divisor)), marks=pytest.mark.smoke),
}


@pytest.mark.parametrize("pairs", [random_pairs, hardest_pairs])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_ieee_quotient(run, pairs):
    x, scale = pairs()
    assert_same_bits(run(x, scale), x / scale)


def test_broadcast_scales():
    x, scale = hardest_pairs()
    rows = jax.jit(lambda x, scale: quotient(jnp.broadcast_to(x[:, None], (x.size, 8)), scale[:, None]))
    assert_same_bits(rows(x, scale), np.repeat((x / scale)[:, None], 8, axis=1))
    for value in scale[:20]:
        assert_same_bits(jitted(x, value), x / value)


@pytest.mark.parametrize("first", [-2, -1, 1, 2])
@pytest.mark.parametrize("second", [-2, 0, 2])
def test_a_divide_that_is_units_off(monkeypatch, first, second):
    """As an accelerator's may be."""
    errors = [first, second]

    def divide(m, n):
        bits = lax.bitcast_convert_type(m / n, jnp.int32) + errors.pop(0)
        return lax.bitcast_convert_type(bits, jnp.float32)

    monkeypatch.setattr(MODULE, "_divide", divide)
    x, scale = hardest_pairs(2000)
    assert_same_bits(quotient(x, scale), x / scale)
    assert not errors


@pytest.mark.parametrize("off", [-2, -1, 1, 2])
def test_a_reciprocal_that_is_units_off(monkeypatch, off):
    def reciprocal(m, n):
        return lax.bitcast_convert_type(lax.bitcast_convert_type(m / n, jnp.int32) + off, jnp.float32)

    monkeypatch.setattr(MODULE, "_divide", reciprocal)
    x, scale = hardest_pairs(2000)
    assert_same_bits(by_divisor(x, scale), x / scale)


def test_a_shared_divisor_over_the_whole_range():
    """From the smallest normal number to a large one, where the quotient is a normal number."""
    x, _ = random_pairs(2000)
    for scale in np.float32([TINY, 2.0**-60 * 1.1, 0.7, 1, 448, 2.0**100 * 1.9]):
        with np.errstate(over="ignore"):
            expected = x / scale
        keep = (np.abs(expected) >= 2.0**-60) & np.isfinite(expected)
        assert keep.any()
        assert_same_bits(np.asarray(by_divisor(x, scale * np.ones_like(x)))[keep], expected[keep])


def test_the_pairs_notice_other_divisions():
    x, scale = hardest_pairs()
    reciprocal = x * (np.float32(1) / scale)
    near = np.nextafter(x / scale, np.float32(2))
    residual = x.astype(np.float64) - near.astype(np.float64) * scale.astype(np.float64)
    one_newton_step = near + residual.astype(np.float32) / scale  # of a quotient that is one unit off
    for wrong in (reciprocal, one_newton_step):
        with pytest.raises(AssertionError):
            assert_same_bits(wrong, x / scale)


@pytest.mark.parametrize("run", [quotient, jitted], ids=["eager", "jitted"])
def test_ends_of_the_range(run):
    largest, nan, inf = np.finfo(np.float32).max, np.nan, np.inf
    cases = [  # x, scale, quotient
        (0.0, 3.0, 0.0),
        (1e-40, TINY, 0.0),  # subnormals count as zero
        (-1e-40, 1.0, 0.0),
        (TINY, TINY, 1.0),
        (-TINY, 1.0, -TINY),
        (largest, largest, 1.0),
        (largest, 1.0, largest),
        (1.0, TINY, 2.0**126),
        (largest, 0.5, inf),
        (nan, 1.0, nan),
        (inf, 2.0, nan),
    ]
    x, scale, expected = np.array(cases, np.float32).T
    result = np.asarray(run(x, scale))
    assert np.array_equal(result, expected, equal_nan=True)
    assert not np.any(np.asarray(run(np.float32([TINY, -TINY]), np.float32([3.0, 3.0]))) > TINY)  # flushed or subnormal
