"""The routed experts against the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from by_name import by_name
from pallas_kernels import QuantizedArray, fused_moe, quantize, route
from quick import few, few_cases
from tolerance import assert_close

# Rounding of the hidden activations and of the result to bf16, and single codes of the quantized activations that
# land on the other side of a rounding midpoint because the sum before them is f32 here and float64 there.
TOLERANCE = {"batch": 5e-3, "worst_row": 1.2e-2}
SCHEMES = [
    (None, None),
    ("int8_per_channel", None),
    ("int8_per_channel", "int8_per_token"),
    ("fp8_per_channel", "fp8_per_token"),
    ("fp8_per_block", None),
    ("fp8_per_block", "fp8_per_group"),
    ("fp8_per_tensor", "fp8_per_tensor_dynamic"),
    ("int4_per_group_32", None),
    ("int4_per_group_64", "int8_per_token"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", None),
    ("mxfp4", "mxfp4"),
    ("nvfp4", None),
    ("nvfp4", "nvfp4_per_token"),
]


def problem(t=29, e=5, k=2, h=192, i=192, seed=0):
    rng = np.random.default_rng(seed)

    def steps(size):
        return 4.0 ** (np.arange(size) // 128 % 2)

    x, logits = rng.normal(size=(t, h)), rng.normal(size=(t, e))
    w13 = rng.normal(size=(e, 2, i, h)) * steps(h) / h**0.5 * 2.0 ** np.arange(e)[:, None, None, None]
    w2 = rng.normal(size=(e, h, i)) * steps(i) / i**0.5
    x, w13, w2 = (jnp.asarray(v, jnp.float32).astype(jnp.bfloat16) for v in (x, w13, w2))
    weights, ids = route(jnp.asarray(logits, jnp.float32), top_k=k)
    return x, w13, w2, weights, ids


OPTIONS = ("activation", "activation_format", "apply_router_weight_on_input")
run = jax.jit(fused_moe, static_argnames=OPTIONS)  # shared: equal shapes compile once


def packed(w, name):
    return w if name is None else jax.jit(quantize, static_argnums=1)(w, by_name(name))


def expect(x, w13, w2, weights, ids, weight=None, **options):
    arrays = (np.asarray(v) for v in (weights, ids))
    return definition.fused_moe(
        np.asarray(x), definition.real(w13, weight), definition.real(w2, weight), *arrays, **options
    )


@pytest.mark.parametrize(("weight", "activation"), few_cases(SCHEMES, SCHEMES[::2]))
def test_matches_definition(weight, activation):
    x, w13, w2, weights, ids = problem()
    expected = expect(x, w13, w2, weights, ids, weight, act_format=activation)

    def call(w13, w2):
        return run(x, packed(w13, weight), packed(w2, weight), weights, ids, activation_format=activation)

    actual = call(w13, w2)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, expected, **TOLERANCE)
    for bad in ((w13[:, ::-1], w2), (w13, jnp.roll(w2, 1, axis=0))):  # up before gate; experts rotated
        with pytest.raises(AssertionError):
            assert_close(call(*bad), expected, batch=5e-2, worst_row=5e-2)


@pytest.mark.parametrize("padding", [1e4, np.nan])
def test_tokens_of_no_expert_have_no_say_in_a_scale_of_all_tokens(padding):
    x, w13, w2, weights, ids = problem()
    ids = ids.at[20:].set(-1)
    q13, q2 = (packed(w, "fp8_per_tensor") for w in (w13, w2))

    def call(x):
        return run(x, q13, q2, weights, ids, activation_format="fp8_per_tensor_dynamic")

    found = call(x.at[20:].set(padding))
    assert np.array_equal(found, call(x.at[20:].set(0)))
    assert not np.asarray(found[20:]).any()
    expected = expect(x, w13, w2, weights, ids, "fp8_per_tensor", act_format="fp8_per_tensor_dynamic")
    assert_close(found, expected, **TOLERANCE)
    assert not np.array_equal(call(x.at[19].set(1e4))[:19], found[:19])  # a routed token has


def test_a_scale_shifted_by_one_block_is_noticed():
    x, w13, w2, weights, ids = problem()
    expected = expect(x, w13, w2, weights, ids, "fp8_per_block")
    q13, q2 = (quantize(w, "fp8_per_block") for w in (w13, w2))

    def shift(q):
        return dataclasses.replace(q, scales=jnp.roll(q.scales, 1, axis=-2))

    assert_close(run(x, q13, q2, weights, ids), expected, **TOLERANCE)
    for bad in ((shift(q13), q2), (q13, shift(q2))):
        with pytest.raises(AssertionError):
            assert_close(run(x, *bad, weights, ids), expected, batch=5e-2, worst_row=5e-2)


@pytest.mark.parametrize("weight", few([None, "int8_per_channel", "fp8_per_block"], ("fp8_per_block",)))
def test_both_forms_of_w13(weight):
    """`[E, 2I, H]` may be quantized as one matrix; where I is a multiple of the block that is the same."""
    x, w13, w2, weights, ids = problem(h=136, i=256)

    def whole(w):
        return w.reshape(5, 512, 136)

    bias = jnp.asarray(np.random.default_rng(5).normal(size=(5, 2, 256)), jnp.bfloat16)

    def call(w13, b):
        return run(x, w13, packed(w2, weight), weights, ids, w13_bias=b)

    halves = call(packed(w13, weight), bias)
    assert np.array_equal(halves, call(packed(whole(w13), weight), bias.reshape(5, 512)))
    assert np.array_equal(halves, call(packed(whole(w13), weight), bias))
    q = packed(w13, weight)
    if isinstance(q, QuantizedArray) and weight == "fp8_per_block":  # K blocks come first: no free reshape
        assert q.scales.shape == (5, 2, 2, 2)
        assert packed(whole(w13), weight).scales.shape == (5, 2, 4)


ACTIVATIONS = {
    "silu": {},
    "gelu": {},
    "gelu_tanh": {},
    "relu2": {},
    "swigluoai": {"limit": 7.0},
    "swiglustep": {"limit": 7.0},
    "silu_no_mul": {},
    "gelu_no_mul": {},
    "gelu_tanh_no_mul": {},
    "relu2_no_mul": {},
}
SLOW = ("gelu_tanh", "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.smoke if name == "silu" else pytest.mark.slow if name in SLOW else ())
        for name in ACTIVATIONS
    ],
)
def test_activations_and_biases(name):
    x, w13, w2, weights, ids = problem(t=9)
    shards = 1 if name.endswith("no_mul") else 2
    w13 = w13[:, :shards]
    rng = np.random.default_rng(7)
    b13 = jnp.asarray(rng.normal(size=(5, shards, 192)), jnp.float32)
    b2 = jnp.asarray(rng.normal(0, 20, (5, 192)), jnp.float32)
    act = functools.partial(definition.activation, name, **ACTIVATIONS[name])
    expected = expect(x, w13, w2, weights, ids, b13=np.asarray(b13), b2=np.asarray(b2), act=act)

    def call(b13, b2):
        return run(x, w13, w2, weights, ids, activation=name, w13_bias=b13, w2_bias=b2)

    flat = run(x, w13.reshape(5, -1, 192), w2, weights, ids, activation=name, w13_bias=b13.reshape(5, -1), w2_bias=b2)
    assert np.array_equal(flat, call(b13, b2))

    assert_close(call(b13, b2), expected, **TOLERANCE)
    for bad in ((jnp.roll(b13, 1, axis=0), b2), (b13, jnp.roll(b2, 1, axis=0))):
        with pytest.raises(AssertionError):
            assert_close(call(*bad), expected, **TOLERANCE)


def test_roundings_are_those_of_the_definition_on_every_backend():
    """XLA:GPU drops a cast to bf16 that is followed by one to f32; not these."""
    x, w13, w2, weights, ids = problem(t=9)
    text = jax.jit(functools.partial(fused_moe, activation_format="int8_per_token")).lower(x, w13, w2, weights, ids)
    assert text.as_text().count("reduce_precision") >= 2  # of the sums and of the hidden values, for each size of tile


FORMATS = [
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "int8_per_channel",
    "int4_per_group_32",
    "mxfp8",
    "mxfp4",
]


@pytest.mark.parametrize("weight", ["nvfp4", *(pytest.param(name, marks=pytest.mark.slow) for name in FORMATS)])
def test_biases_with_every_weight_format(weight):
    x, w13, w2, weights, ids = problem(t=9)
    rng = np.random.default_rng(7)
    b13, b2 = (
        jnp.asarray(rng.normal(0, size, shape), jnp.float32) for size, shape in ((3, (5, 2, 192)), (20, (5, 192)))
    )
    expected = expect(x, w13, w2, weights, ids, weight, b13=np.asarray(b13), b2=np.asarray(b2))
    packs = packed(w13, weight), packed(w2, weight)
    assert_close(run(x, *packs, weights, ids, w13_bias=b13, w2_bias=b2), expected, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(run(x, *packs, weights, ids, w13_bias=b13), expected, **TOLERANCE)


@pytest.mark.parametrize("activation", [None, "fp8_per_group"])
def test_router_weight_on_input(activation):
    x, w13, w2, weights, ids = problem(k=1)
    weights = weights * jnp.linspace(0.1, 2.0, 29)[:, None]
    expected = expect(x, w13, w2, weights, ids, act_format=activation, on_input=True)

    def call(on):
        return run(x, w13, w2, weights, ids, activation_format=activation, apply_router_weight_on_input=on)

    assert_close(call(True), expected, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(call(False), expected, batch=5e-2, worst_row=5e-2)


def test_experts_that_are_elsewhere_contribute_nothing():
    x, w13, w2, _, _ = problem(e=3)
    rng = np.random.default_rng(2)
    ids = jnp.asarray(rng.integers(-2, 9, (29, 3)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(29, 3)), jnp.float32)
    expert_map = jnp.array([-1, 2, -1, 0, 1, -1, -1], jnp.int32)
    for mapping in (None, expert_map):
        expected = expect(x, w13, w2, weights, ids, expert_map=None if mapping is None else np.asarray(mapping))
        assert_close(run(x, w13, w2, weights, ids, expert_map=mapping), expected, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(run(x, w13, w2, weights, ids, expert_map=expert_map[::-1]), expected, **TOLERANCE)
    nowhere = run(x, w13, w2, jnp.full_like(weights, jnp.nan), jnp.full_like(ids, -1))
    assert not nowhere.any()  # exactly zero, even with a weight that is no number
    parts = [run(x, w13[e : e + 1], w2[e : e + 1], weights, ids - e) for e in range(3)]
    total = sum(np.asarray(p, np.float64) for p in parts)
    assert_close(total, expect(x, w13, w2, weights, ids), batch=5e-3, worst_row=1.2e-2)


@pytest.mark.parametrize("t", [0, 1, 3, 130])
@pytest.mark.parametrize("weight", [None, "fp8_per_block"])
def test_batch_sizes(t, weight):
    x, w13, w2, weights, ids = problem(t=t)
    actual = run(x, packed(w13, weight), packed(w2, weight), weights, ids)
    assert actual.shape == (t, 192)
    assert actual.dtype == x.dtype
    if t:
        assert_close(actual, expect(x, w13, w2, weights, ids, weight), **TOLERANCE)


def test_one_expert_takes_all():
    x, w13, w2, weights, _ = problem(t=70, k=1)
    ids = jnp.full((70, 1), 3, jnp.int32)
    assert_close(run(x, w13, w2, weights, ids), expect(x, w13, w2, weights, ids), **TOLERANCE)


def test_the_same_bits_from_run_to_run():
    arrays = problem(t=200)
    first = run(*arrays)
    assert all(np.array_equal(first, run(*arrays)) for _ in range(5))
    assert np.array_equal(first, jax.jit(lambda *arrays: fused_moe(*arrays))(*arrays))  # compiled once more


def test_a_bad_token_spoils_no_other():
    x, w13, w2, weights, ids = problem()
    clean = run(x, w13, w2, weights, ids)
    spoiled = run(x.at[11].set(jnp.nan), w13, w2, weights, ids)
    others = np.arange(29) != 11
    assert np.isnan(spoiled[11]).all()
    assert np.array_equal(spoiled[others], clean[others])
