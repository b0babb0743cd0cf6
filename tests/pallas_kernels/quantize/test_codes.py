"""Casts to and from e4m3 as integer arithmetic, against ml_dtypes."""

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import codes
from pallas_kernels.devices import INTERPRETED, interpreting

E4M3 = ml_dtypes.float8_e4m3fn
EVERY = np.arange(256, dtype=np.uint8).view(E4M3)


def numbers():
    """Every code, what lies halfway between two, the f32 numbers next to that, and many others up to 448."""
    values = np.sort(EVERY[np.isfinite(EVERY.astype(np.float32))].astype(np.float32))
    halfway = (values[:-1] + values[1:]) / 2
    near = [np.nextafter(halfway, side, dtype=np.float32) for side in (np.float32(-np.inf), np.float32(np.inf))]
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, np.uint32).view(np.float32)
    every = np.concatenate([values, halfway, *near, np.ldexp(values, -7), bits])
    every = every[np.isfinite(every) & (np.abs(every) <= 448)]
    return np.where(np.abs(every) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), every), every)


@pytest.mark.parametrize("device", [None, INTERPRETED["gpu"]], ids=["cpu", "others"])
def test_they_are_those_of_ml_dtypes(device):
    x = numbers()
    token = interpreting.set(device)
    found = np.asarray(jax.jit(lambda x: codes.e4m3_codes(x))(x))
    back = np.asarray(jax.jit(lambda x: codes.e4m3_values(x))(EVERY))
    interpreting.reset(token)
    assert found.dtype == E4M3
    assert len(np.unique(found.view(np.uint8))) == 254  # all but NaN
    np.testing.assert_array_equal(found.view(np.uint8), x.astype(E4M3).view(np.uint8))
    expected = EVERY.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(expected))
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(back[real].view(np.uint32), expected[real].view(np.uint32))


def test_nan_stays():
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32)
    found = np.asarray(jax.jit(lambda x: codes.e4m3_codes(x))(bits.view(np.float32)))
    assert np.isnan(found.astype(np.float32)).all()


def test_gradients_pass_as_through_the_cast():
    x = np.linspace(-3, 3, 64, dtype=np.float32)

    def loss(there, back):
        return jax.grad(lambda x: (back(there(x)) * x).sum())(x)

    found = loss(codes.e4m3_codes, codes.e4m3_values)
    expected = loss(lambda x: x.astype(E4M3), lambda x: x.astype(np.float32))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found).sum() > 1.9 * np.abs(np.asarray(codes.e4m3_values(codes.e4m3_codes(x)))).sum()
