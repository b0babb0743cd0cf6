"""Gradients of the grouped matmul against sums over rows in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from by_name import by_name
from pallas_kernels import get_activation, grouped_matmul, make_group_metadata, quantize
from pallas_kernels.grouped_matmul.call import Call, dispatch
from tolerance import assert_close

SIZES = (0, 9, 1, 22)
EXACT = {"batch": 2e-6, "worst_row": 2e-5}  # f32 sums
ROUNDED = {"batch": 5e-3, "worst_row": 1.2e-2}  # bf16: the gradient of the sums, the result


CHOSEN = [("int8_per_channel", "int8_per_token"), ("fp8_per_block", None), ("nvfp4", None)]  # not slow


def problem(dtype=jnp.float32, e=4):
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(40, 96)),
        rng.normal(size=(e, 128, 96)),
        rng.normal(size=(e, 128)),
        rng.normal(size=(40, 128)),
    )
    return [jnp.asarray(a, jnp.float32).astype(dtype) for a in arrays]


def expected(x, w, seen, cotangent, offset=0):
    """By rows, weights and bias; `seen` are the rows as the product sees them."""
    by_x, by_w, by_bias = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[:2])
    start = 0
    for group, size in enumerate(SIZES):
        rows, expert = slice(start, start + size), group - offset
        start += size
        if 0 <= expert < len(w):
            by_x[rows] = cotangent[rows] @ w[expert]
            by_w[expert] = cotangent[rows].T @ seen[rows]
            by_bias[expert] = cotangent[rows].sum(0)
    return by_x, by_w, by_bias


def gradients(x, w, bias, cotangent, **options):
    def total(x, w, bias):
        out = grouped_matmul(x, w, jnp.array(SIZES, jnp.int32), bias=bias, out_dtype=jnp.float32, **options)
        return jnp.sum(out * cotangent.astype(jnp.float32))

    return jax.jit(jax.grad(total, (0, 1, 2)))(x, w, bias)


@pytest.mark.parametrize(
    "activation", [pytest.param(None, marks=pytest.mark.smoke), "int8_per_token", "fp8_per_tensor_dynamic"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, EXACT), (jnp.bfloat16, ROUNDED)], ids=["f32", "bf16"])
def test_of_everything_real(dtype, tolerance, activation):
    x, w, bias, cotangent = problem(dtype)
    used = sum(SIZES)
    seen = definition.real(x.at[used:].set(0), activation)  # rows of no group have no say in a scale of all
    wanted = expected(*map(definition.real, (x, w)), seen, definition.real(cotangent))
    found = gradients(x, w, bias, cotangent, activation_format=activation)
    for actual, right, like in zip(found, wanted, (x, w, bias), strict=True):
        assert actual.dtype == like.dtype
        assert_close(actual, right, **tolerance)
    assert not np.asarray(found[0][used:]).any()  # rows of no expert
    rotated = expected(definition.real(x), definition.real(jnp.roll(w, 1, 0)), seen, definition.real(cotangent))
    with pytest.raises(AssertionError):
        assert_close(found[0], rotated[0], batch=0.1, worst_row=0.1)


@pytest.mark.parametrize("offset", [1, jnp.int32(1)], ids=["static", "traced"])
def test_of_some_experts(offset):
    x, w, bias, cotangent = problem(e=2)
    wanted = expected(*map(definition.real, (x, w, x, cotangent)), offset=1)
    for actual, right in zip(gradients(x, w, bias, cotangent, group_offset=offset), wanted, strict=True):
        assert_close(actual, right, **EXACT)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        pytest.param(weight, activation, marks=() if (weight, activation) in CHOSEN else pytest.mark.slow)
        for weight in (
            "int8_per_channel",
            "fp8_per_block",
            "int4_per_group_32",
            "mxfp8",
            "mxfp4",
            "nvfp4",
            "fp8_per_tensor",
        )
        for activation in (None, "int8_per_token")
    ],
)
def test_through_quantized_weights(weight, activation):
    x, w, bias, cotangent = problem()
    packed = quantize(w, by_name(weight))

    def total(x, bias):
        out = grouped_matmul(x, packed, jnp.array(SIZES, jnp.int32), bias=bias, activation_format=activation)
        return jnp.sum(out * cotangent)

    by_x, by_bias = jax.jit(jax.grad(total, (0, 1)))(x, bias)
    wanted = expected(definition.real(x), definition.real(w, weight), definition.real(x), definition.real(cotangent))
    assert_close(by_x, wanted[0], **EXACT)
    assert_close(by_bias, wanted[2], **EXACT)
    with pytest.raises(AssertionError):  # the source's values are not the codes'
        assert_close(by_x, expected(*map(definition.real, (x, w, x, cotangent)))[0], **EXACT)


@pytest.mark.parametrize("name", ["silu", "gelu", "swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("halves", [pytest.param(False, marks=pytest.mark.slow), True])
def test_through_an_epilogue(name, halves):
    """Against differences of the definition, along random directions."""
    x, w, bias, cotangent = problem()
    gated = not name.endswith("no_mul")
    cotangent = cotangent[:, :64] if gated else cotangent
    if halves:  # `[E, S, I, K]`, as the layer has it
        shape = (4, 2, 64) if gated else (4, 1, 128)
        w, bias = w.reshape(*shape, 96), bias.reshape(shape)
    act = functools.partial(definition.activation, name, limit=7.0 if name == "swigluoai" else None)

    def value(x, w, bias):
        sums = definition.grouped_matmul(x, w.reshape(4, 128, 96), SIZES, bias.reshape(4, 128))
        out = act(*np.split(sums, 2, axis=1)) if gated else act(sums)
        return np.sum((out * definition.real(cotangent))[: sum(SIZES)])

    def total(x, w, bias):
        sizes = jnp.array(SIZES, jnp.int32)
        call = Call(
            lhs=x,
            rhs=w,
            bias=bias,
            group_sizes=sizes,
            metadata=make_group_metadata(sizes),
            epilogue=get_activation(name),
            out_dtype=np.dtype("f4"),
        )
        return jnp.sum(dispatch(call, None) * cotangent)

    found = jax.jit(jax.grad(total, (0, 1, 2)))(x, w, bias)
    operands = [definition.real(a) for a in (x, w, bias)]
    rng = np.random.default_rng(1)
    for i, gradient in enumerate(found):
        direction = rng.normal(size=gradient.shape)
        ahead, behind = (
            value(*[a + step * direction if j == i else a for j, a in enumerate(operands)]) for step in (1e-6, -1e-6)
        )
        right = (ahead - behind) / 2e-6
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - right) <= 1e-5 * size


def test_no_rows_and_no_groups():
    x, w, bias, cotangent = problem()
    for found in gradients(x[:0], w, bias, cotangent[:0]):
        assert not np.asarray(found).any()
