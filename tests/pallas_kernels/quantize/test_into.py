"""Experts quantized into a finished leaf: the bits of numpy, in their places, and what was lost."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from by_name import assert_same_parts
from leaves import amax_of, check_loss, leaf, weights
from numpy_quantizer import WEIGHTS, quantize_numpy
from pallas_kernels import UnsupportedError
from pallas_kernels.quantize import quantize_into
from quick import few
from tolerance import assert_same_bits

run = jax.jit(quantize_into, static_argnames=("half", "implementation"))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("name", few(WEIGHTS))
def test_bits_and_places(name, dtype):
    x = (weights() / 64).astype(dtype)
    out, expected = leaf(name), quantize_numpy(x, name, shared_axes=(1,))
    for start, stop in ((1, 3), (0, 1), (3, 4)):
        before = out
        out, loss = run(out, x[start:stop], jnp.int32(start), amax=amax_of(out, x[start:stop]))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(out), strict=True):  # the others stay
            assert_same_bits(np.delete(new, slice(start, stop), axis=0), np.delete(old, slice(start, stop), axis=0))
        check_loss(loss, x[start:stop], name)
    assert_same_parts(out, expected)


@pytest.mark.parametrize("name", few(WEIGHTS))
def test_halves(name):
    x = weights()
    out = leaf(name)
    for half in (1, 0):
        out, loss = run(out, x[:, half], 0, half=half, amax=amax_of(out, x))
        np.testing.assert_allclose(loss.norm, np.square(x[:, half].astype(np.float64)).sum(axis=(1, 2)), rtol=1e-4)
    assert_same_parts(out, quantize_numpy(x, name, shared_axes=(1,)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told(value):
    x = weights()
    x[2, 1, 100, 200] = value
    _, loss = run(leaf("fp8_per_channel"), x, 0)
    assert np.asarray(loss.finite).tolist() == [True, True, False, True]


def test_bad_arguments():
    out, x = leaf("fp8_per_tensor"), jnp.asarray(weights())
    call = functools.partial(quantize_into, out)
    with pytest.raises(ValueError, match=r"x.shape=\(4, 2, 128, 128\) with half=None must be \[e, \*\(2, 128, 256\)\]"):
        call(x[..., :128])
    with pytest.raises(ValueError, match=r"with half=0 must be \[e, \*\(128, 256\)\]"):
        call(x, half=0)
    with pytest.raises(ValueError, match=r"has more experts than the leaf, which has 4"):
        call(jnp.concatenate([x, x]), amax=jnp.ones(8))
    with pytest.raises(TypeError, match=r"x.dtype=.* must be bfloat16, float16 or float32"):
        call(x.astype(jnp.int8), amax=jnp.ones(4))
    with pytest.raises(ValueError, match=r"with half=2 must be"):
        call(x[:, 0], half=2)
    with pytest.raises(ValueError, match=r"amax must be \(4,\) for 'fp8_per_tensor', not None"):
        call(x)
    with pytest.raises(ValueError, match=r"amax must be left out for 'mxfp8', not \(4,\)"):
        quantize_into(leaf("mxfp8"), x, amax=jnp.ones(4))
    with pytest.raises(ValueError, match="implementation='cuda' must be None or one of"):
        call(x, amax=jnp.ones(4), implementation="cuda")
    with pytest.raises(
        UnsupportedError, match=r"quantize_into: 'mosaic_tpu' cannot serve this call: there is no kernel"
    ):
        call(x, amax=jnp.ones(4), implementation="mosaic_tpu")
    with pytest.raises(UnsupportedError, match=r"'mosaic_gpu' cannot serve this call: it reads bfloat16, not float32"):
        call(x.astype(jnp.float32), amax=jnp.ones(4), implementation="mosaic_gpu")
