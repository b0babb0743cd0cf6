"""Leaves of experts to quantize into, and what goes there."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from by_name import by_name
from numpy_quantizer import dequantize_numpy, quantize_numpy
from pallas_kernels import QuantizedArray
from pallas_kernels.quantize import matrix_amax
from special_numbers import normal

SHAPE = (4, 2, 128, 256)


def leaf(name, shape=SHAPE):
    """Full of something else, to see what is written."""
    fmt = by_name(name)
    second = fmt.global_shape(shape)
    return QuantizedArray(
        values=jnp.full(fmt.values_shape(shape), 3, fmt.storage),
        scales=jnp.full(fmt.scales_shape(shape), 5, fmt.scale_dtype),
        global_scale=None if second is None else jnp.full(second, 7, jnp.float32),
        format=fmt,
    )


def weights(shape=SHAPE, dtype=ml_dtypes.bfloat16, seed=0):
    """Experts and halves of different sizes, so that no scale fits another."""
    return (normal(*shape, seed=seed) * 2.0 ** np.arange(shape[0] * 2).reshape(shape[0], 2, 1, 1)).astype(dtype)


def amax_of(out, x):
    """What `quantize_into` wants to know of whole matrices."""
    if not out.format.whole_matrix:
        return None
    found = matrix_amax(jnp.asarray(x))
    return found if found.ndim == 1 else jnp.max(found, axis=1)


def check_loss(loss, x, name):
    """What a call says it lost is what numpy loses."""
    x = x.astype(np.float64)
    real = dequantize_numpy(quantize_numpy(x.astype(np.float32), name, shared_axes=(1,)), name)
    axes = tuple(range(1, x.ndim))
    np.testing.assert_allclose(loss.error, np.square(real - x).sum(axis=axes), rtol=1e-4)
    np.testing.assert_allclose(loss.norm, np.square(x).sum(axis=axes), rtol=1e-4)
    assert np.asarray(loss.finite).all()
