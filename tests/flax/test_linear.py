"""`moe_online.flax.Linear`: an `nnx.Linear` until its kernel is quantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import definition
from moe_online.dense import DenseKernel
from moe_online.flax import Linear
from moe_online.schemes import QuantSpec
from quick import few_cases
from sources import BF16, quiet_load
from tolerance import assert_close, assert_same_bits

K, N = 256, 200
X = np.random.default_rng(0).standard_normal((2, 7, K), np.float32).astype(BF16)
SOURCE = {
    "kernel": (np.random.default_rng(1).standard_normal((K, N)) * 8.0 ** (np.arange(K)[:, None] // 128)).astype(BF16),
    "bias": np.random.default_rng(2).standard_normal(N).astype(BF16),
}
TOLERANCE = {"batch": 2.5e-3, "worst_row": 4e-3}  # rounding the output to bf16 costs 1.7e-3 and 2.0e-3
run = nnx.jit(lambda linear, x: linear(x))


def made(cls, *, use_bias=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16):
    options = {"bias_init": nnx.initializers.normal(), "use_bias": use_bias}
    return cls(K, N, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), **options)


def loaded(weight, activation, **options):
    abstract = nnx.eval_shape(lambda: made(Linear, **options))
    source = SOURCE if options.get("use_bias", True) else {"kernel": SOURCE["kernel"]}
    config = None if weight is None else {"linear": QuantSpec(weight, activation)}
    return quiet_load(abstract, source, quantization=config).params


def by_definition(x, weight, activation):
    w = definition.real(np.ascontiguousarray(SOURCE["kernel"].T), weight)
    tokens = np.asarray(x).reshape(-1, K)
    return (definition.real(tokens, activation) @ w.T + definition.real(SOURCE["bias"])).reshape(*x.shape[:-1], N)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype"),
    [(jnp.bfloat16, jnp.bfloat16, BF16), (jnp.bfloat16, jnp.float32, np.float32), (None, jnp.float32, np.float32)],
)
def test_is_an_nnx_linear_before_it_is_loaded(use_bias, dtype, param_dtype, x_dtype):
    ours, theirs = (made(cls, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype) for cls in (Linear, nnx.Linear))
    jax.tree.map(assert_same_bits, nnx.state(ours), nnx.state(theirs))  # the same tree, types included
    assert_same_bits(run(ours, X.astype(x_dtype)), run(theirs, X.astype(x_dtype)))
    nnx.update(ours, jax.tree.map(lambda leaf: 2 * leaf, nnx.state(theirs)))
    assert_same_bits(ours.kernel[...], 2 * theirs.kernel[...])


def test_is_only_declared_in_eval_shape():
    before = len(jax.live_arrays())
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Linear(K, N, rngs=nnx.Rngs(0)))))
    assert state == {
        "kernel": jax.ShapeDtypeStruct((K, N), jnp.float32),
        "bias": jax.ShapeDtypeStruct((N,), jnp.float32),
    }
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize(
    ("weight", "activation"),
    few_cases(
        [
            ("fp8_per_block", "fp8_per_group"),
            ("fp8_per_tensor", "fp8_per_tensor_dynamic"),
            ("int8_per_channel", None),
            ("int8_per_channel", "int8_per_token"),
            ("int4_per_group", None),
            ("mxfp8", "mxfp8"),
            ("nvfp4", "nvfp4_per_token"),
        ],
        [("fp8_per_block", "fp8_per_group"), ("nvfp4", "nvfp4_per_token")],
    ),
)
def test_quantized_matches_definition(weight, activation):
    linear = loaded(weight, activation)
    kernel = linear.kernel.get_value()
    assert kernel.weight.shape == (N, K)
    assert (kernel.activation_format and kernel.activation_format.name) == activation
    expected = by_definition(X, weight, activation)
    assert_close(run(linear, X), expected, **TOLERANCE)
    without = by_definition(X, weight, None if activation else "int8_per_token")
    with pytest.raises(AssertionError):  # inputs quantized, or not: it would show
        assert_close(run(linear, X), without, **TOLERANCE)
    rolled = dataclasses.replace(kernel.weight, values=jnp.roll(kernel.weight.values, 1, axis=0))
    linear.kernel.set_value(dataclasses.replace(kernel, weight=rolled))
    with pytest.raises(AssertionError):
        assert_close(run(linear, X), expected, batch=1e-1, worst_row=1e-1)


def test_dtypes_are_those_of_nnx():
    for dtype, param_dtype, x_dtype in (
        (jnp.bfloat16, jnp.float32, np.float32),
        (None, jnp.bfloat16, BF16),
        (None, jnp.float32, np.float32),
        (jnp.float16, jnp.bfloat16, BF16),
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype}
        x = X.astype(x_dtype)
        found = run(loaded("int8_per_channel", None, **options), x)
        assert found.dtype == run(made(nnx.Linear, **options), x).dtype
        assert_close(found, by_definition(x, "int8_per_channel", None), **TOLERANCE)


def test_one_token_and_no_bias():
    linear = loaded("fp8_per_channel", None, use_bias=False)
    assert linear.bias is None
    expected = by_definition(X[0, 0], "fp8_per_channel", None) - definition.real(SOURCE["bias"])
    assert_close(run(linear, X[0, 0]), expected, **TOLERANCE)


def test_split_merge_state_and_scan():
    linear = loaded("fp8_per_block", "fp8_per_group")
    graph, state = nnx.split(linear)
    assert isinstance(state["kernel"].get_value(), DenseKernel)
    assert_same_bits(run(nnx.merge(graph, state), X), run(linear, X))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    _, found = jax.jit(lambda x, layers: jax.lax.scan(lambda x, one: (x, nnx.merge(graph, one)(x)), x, layers))(
        X, stacked
    )
    for y in found:
        assert_same_bits(y, run(linear, X))


@pytest.mark.parametrize(
    ("weight", "activation"),
    [(None, None), ("int8_per_channel", None), ("fp8_per_block", None), ("fp8_per_block", "fp8_per_group")],
)
def test_gradient_of_inputs(weight, activation):
    graph, state = nnx.split(loaded(weight, activation))
    found = jax.jit(jax.grad(lambda x: nnx.merge(graph, state)(x).astype(jnp.float32).sum()))(jnp.asarray(X))
    w = definition.real(np.ascontiguousarray(SOURCE["kernel"].T), weight)
    assert_close(found, np.broadcast_to(w.sum(axis=0), X.shape), batch=4e-3, worst_row=4e-3)


def test_what_a_quantized_layer_refuses():
    linear = loaded("fp8_per_block", "fp8_per_group")
    with pytest.raises(ValueError, match=r"out_sharding=.*leave it out"):
        linear(X, out_sharding=jax.sharding.PartitionSpec())
