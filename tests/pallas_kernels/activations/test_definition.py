"""Activations against the formulas, computed in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import Activation, deinterleave, get_activation
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
    "MiniMax-M3's": (
        Activation("swigluoai_uninterleave", alpha=1.702, beta=1.0, limit=3.0),
        {"alpha": 1.702, "beta": 1.0, "limit": 3.0},
    ),
    "swiglustep": (Activation("swiglustep"), {"limit": 7.0}),
    "swiglustep with a limit": (Activation("swiglustep", limit=2.0), {"limit": 2.0}),
    "situ": (Activation("situ", beta=1.5), {"beta": 1.5}),
    "situ with a linear beta": (Activation("situ", beta=1.5, linear_beta=3.0), {"beta": 1.5, "linear_beta": 3.0}),
}
NOT_GATED = ("silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul")


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


@pytest.mark.parametrize("name", NOT_GATED)
def test_not_gated(name):
    x, _ = problem()
    activation = Activation(name)
    assert not activation.gated
    expected = definition.activation(name, x.astype(np.float64))
    for actual in (activation(jnp.asarray(x)), activation.of_rows(jnp.asarray(x))):
        assert actual.dtype == jnp.float32
        assert_close(actual, expected, batch=1e-6, worst_row=2e-6)
    others = {other: definition.activation(other, x.astype(np.float64)) for other in NOT_GATED if other != name}
    for other in others.values():
        with pytest.raises(AssertionError):
            assert_close(actual, other, batch=1e-5, worst_row=1e-5)
    with pytest.raises(ValueError, match=f"'{name}' takes one array"):
        activation(jnp.asarray(x), jnp.asarray(x))


def test_rows_hold_gate_and_then_up():
    gate, up = problem()
    rows = jnp.asarray(np.concatenate([gate, up], axis=1))
    assert np.array_equal(Activation("silu").of_rows(rows), Activation("silu")(jnp.asarray(gate), jnp.asarray(up)))
    with pytest.raises(ValueError, match="'silu' takes gate and up"):
        Activation("silu")(rows)
    with pytest.raises(ValueError, match="must be the same"):  # not one row for all
        Activation("silu")(rows, rows[:1])
    with pytest.raises(ValueError, match="even width for 'silu'"):
        Activation("silu").of_rows(rows[:, 1:])


@pytest.mark.parametrize(("shape", "axis"), [((3, 8, 5), -2), ((3, 8), -1), ((8, 2), 0)])
def test_gate_and_up_in_turn_come_apart(shape, axis):
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    expected = np.concatenate([np.take(w, range(start, 8, 2), axis) for start in (0, 1)], axis)
    assert np.array_equal(deinterleave(jnp.asarray(w), axis=axis), expected)
    with pytest.raises(ValueError, match="must be even"):
        deinterleave(jnp.zeros((7, 2)), axis=0)


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
    with pytest.raises(
        ValueError, match="'swish'; valid names: gelu, gelu_no_mul, gelu_pytorch_tanh, gelu_tanh, gelu_tanh_no_mul"
    ):
        get_activation("swish")
    with pytest.raises(TypeError, match="int"):
        get_activation(3)
    with pytest.raises(ValueError, match=r"'gelu' takes no parameters; drop limit=1.0"):
        Activation("gelu", limit=1.0)
    with pytest.raises(ValueError, match=r"'silu' takes limit; drop alpha=2.0"):
        Activation("silu", alpha=2.0)
    with pytest.raises(ValueError, match="needs limit"):
        get_activation("swigluoai_uninterleave")
    with pytest.raises(ValueError, match="'situ' needs beta"):
        get_activation("situ")
    for bad in (
        {"name": "silu", "limit": 0.0},
        {"name": "situ", "beta": -1.0},
        {"name": "silu", "limit": float("nan")},
    ):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            Activation(**bad)
    with pytest.raises(ValueError, match="'relu2_no_mul' takes no parameters"):
        Activation("relu2_no_mul", beta=1.0)
