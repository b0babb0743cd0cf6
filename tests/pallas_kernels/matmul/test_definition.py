"""The dense matmul against the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import UnsupportedError, matmul, quantize
from quick import few
from tolerance import assert_close


def problem():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(37, 384)), rng.normal(size=(200, 384)) * 8.0 ** (np.arange(384) // 128)
    bias = rng.normal(size=200)
    return (jnp.asarray(v, jnp.float32).astype(jnp.bfloat16) for v in (x, w, bias))


@pytest.mark.parametrize(
    "activation", few([None, "int8_per_token", "fp8_per_group", "mxfp8", "nvfp4_per_token"], (None, "mxfp8"))
)
@pytest.mark.parametrize("weight", [None, "int8_per_channel", "fp8_per_block", "int4_per_group", "mxfp4", "nvfp4"])
def test_matches_definition(weight, activation):
    x, w, bias = problem()
    expected = definition.real(x, activation) @ definition.real(w, weight).T + definition.real(bias)

    packed = w if weight is None else jax.jit(quantize, static_argnums=1)(w, weight)
    run = jax.jit(lambda x, bias: matmul(x, packed, bias=bias, activation_format=activation))
    assert_close(run(x, bias), expected, batch=2.5e-3, worst_row=4e-3)
    with pytest.raises(AssertionError):
        assert_close(run(jnp.roll(x, 128, axis=1), bias), expected, batch=1e-1, worst_row=1e-1)


@pytest.mark.parametrize("activation", [None, "int8_per_token", "mxfp8"])
@pytest.mark.parametrize("weight", [None, "int8_per_channel", pytest.param("fp8_per_block", marks=pytest.mark.smoke)])
def test_gradients(weight, activation):
    x, w, bias = problem()
    packed = w if weight is None else quantize(w, weight)

    def total(x, w, bias):
        return matmul(x, packed if weight else w, bias=bias, activation_format=activation).astype(jnp.float32).sum()

    by_x, by_w, by_bias = jax.jit(jax.grad(total, (0, 1, 2)))(x, w, bias)
    expected = np.broadcast_to(definition.real(w, weight).sum(0), x.shape)
    assert_close(by_x, expected, batch=4e-3, worst_row=4e-3)
    assert_close(by_bias[None], np.full((1, len(bias)), len(x)), batch=4e-3, worst_row=4e-3)
    if weight is None:
        by_codes = np.broadcast_to(definition.real(x, activation).sum(0), w.shape)
        assert_close(by_w, by_codes, batch=4e-3, worst_row=4e-3)


def test_errors():
    x, w, bias = problem()
    with pytest.raises(ValueError, match="same K"):
        matmul(x[:, :100], w)
    with pytest.raises(ValueError, match=r"bias.shape=\(5,\) must be \[N\]"):
        matmul(x, w, bias=bias[:5])
    with pytest.raises(ValueError, match="drop one"):
        matmul(quantize(x, "fp8_per_token"), w, activation_format="fp8_per_token")
    with pytest.raises(UnsupportedError, match="no kernel for it yet"):
        matmul(x, w, implementation="mosaic_gpu")
    packed = quantize(w, "int8_per_channel")
    for activation in (None, "fp8_per_token"):
        with pytest.raises(UnsupportedError, match="no gradient"):
            jax.grad(
                lambda s, a=activation: matmul(x, dataclasses.replace(packed, scales=s), activation_format=a).sum()
            )(packed.scales)
