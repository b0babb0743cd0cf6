"""Activations against the formulas, computed in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import Activation, get_activation
from tolerance import assert_close

CASES = {
    "silu": (Activation("silu"), {}),
    "silu with a limit": (Activation("silu", limit=1.5), {"limit": 1.5}),
    "gelu": (Activation("gelu"), {}),
    "gelu_tanh": (Activation("gelu_tanh"), {}),
    "relu2": (Activation("relu2"), {}),
    "swigluoai": (Activation("swigluoai"), {"limit": 7.0}),
    "swigluoai_uninterleave": (
        Activation("swigluoai_uninterleave", limit=2.0),
        {"alpha": 1.0, "beta": 0.0, "limit": 2.0},
    ),
}


def problem():
    rng = np.random.default_rng(0)
    return (rng.normal(0, 4, (64, 96)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(("activation", "parameters"), CASES.values(), ids=CASES)
def test_matches_definition(activation, parameters):
    gate, up = problem()
    expected = definition.activation(activation.name, gate.astype(np.float64), up.astype(np.float64), **parameters)
    actual = activation(jnp.asarray(gate), jnp.asarray(up))
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, batch=1e-6, worst_row=2e-6)
    with pytest.raises(AssertionError):  # gate and up in the wrong order
        assert_close(activation(jnp.asarray(up), jnp.asarray(gate)), expected, batch=1e-2, worst_row=1e-2)


def test_computes_in_f32():
    gate, up = (v.astype(jnp.bfloat16) for v in problem())
    assert Activation("silu")(jnp.asarray(gate), jnp.asarray(up)).dtype == jnp.float32


def test_names_and_parameters():
    assert get_activation("gelu_pytorch_tanh") == Activation("gelu_tanh")
    assert get_activation("swigluoai") == Activation("swigluoai", alpha=1.702, beta=1.0, limit=7.0)
    assert get_activation(Activation("silu", limit=3.0)).limit == 3.0
    assert len({Activation("silu"), Activation("silu"), Activation("silu", limit=1.0)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Activation("silu").name = "gelu"


def test_errors():
    with pytest.raises(ValueError, match="'swish'; valid names: gelu, gelu_pytorch_tanh, gelu_tanh, relu2, silu"):
        get_activation("swish")
    with pytest.raises(TypeError, match="int"):
        get_activation(3)
    with pytest.raises(ValueError, match=r"'gelu' takes no parameters; drop limit=1.0"):
        Activation("gelu", limit=1.0)
    with pytest.raises(ValueError, match=r"'silu' takes limit; drop alpha=2.0"):
        Activation("silu", alpha=2.0)
    with pytest.raises(ValueError, match="needs limit"):
        get_activation("swigluoai_uninterleave")
