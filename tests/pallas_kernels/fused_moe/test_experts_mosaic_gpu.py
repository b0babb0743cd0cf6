"""Both matmuls of experts in one launch on Hopper, interpreted on a CPU: whole layers against the definition.

The waits are those of `tests/support/waits.py`, since jax's interpreter passes over the kernel's own, and its race
detector would not see them; the same code in two launches is watched in `tests/pallas_kernels/grouped_matmul`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from by_name import by_name
from codes import PAIRS
from pallas_kernels import (
    UnsupportedError,
    finalize,
    fused_ffn,
    fused_moe,
    get_activation,
    prepare,
    quantize,
    run_experts,
)
from pallas_kernels.fused_moe.experts import ExpertsCall
from pallas_kernels.fused_moe.pipeline import first_call
from pallas_kernels.grouped_matmul.mosaic_gpu import both
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from quick import few, few_cases
from tolerance import assert_close
from waits import real_waits

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        jax.__version_info__[:2] < FIRST_JAX, reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels"
    ),
]
# Roundings to 16 bits: of the hidden values, of each expert's outputs and of the result. Of fp8 also single codes of
# the hidden values that land on the other side of a midpoint.
REAL, CODES = {"batch": 5e-3, "worst_row": 1.2e-2}, {"batch": 8e-3, "worst_row": 2e-2}
FORMATS = {"bf16": (None, None), "blocks": ("fp8_per_block", "fp8_per_group")}  # weights, rows
TOLERANCES = {"bf16": REAL, "blocks": CODES}
ONE_LAUNCH = {"bf16": "grouped_matmuls_16bit", "blocks": "grouped_matmuls_8bit"}
OPTIONS = ("activation", "activation_format", "implementation")
T, K, E, H, INNER = 65, 2, 4, 256, 256  # of 130 rows, no multiple of 8: three tiles where one expert has them all


def problem(t=T, k=K, e=E, h=H, i=INNER, shards=2, dtype=jnp.bfloat16):
    rng = np.random.default_rng(t)
    x = rng.standard_normal((t, h)) * np.exp2(rng.integers(-3, 4, (t, 1)))
    w13 = rng.standard_normal((e, shards, i, h)) / h**0.5 * np.exp2(np.arange(e) % 3)[:, None, None, None]
    w2 = rng.standard_normal((e, h, i)) / i**0.5 * np.exp2(rng.integers(-2, 3, (e, h, 1)))
    x, w13, w2 = (jnp.asarray(a, jnp.float32).astype(dtype) for a in (x, w13, w2))
    return x, w13, w2, jnp.asarray(rng.random((t, k)), jnp.float32), jnp.asarray(ROUTINGS["ragged"](rng, t, k, e))


ROUTINGS = {
    "ragged": lambda rng, t, k, e: rng.integers(-1, e + 1, (t, k)).astype(np.int32),  # of no expert at both ends
    "one takes all": lambda rng, t, k, e: np.full((t, k), e - 2, np.int32),
    "none of most": lambda rng, t, k, e: rng.choice([e - 1, -1], (t, k)).astype(np.int32),
    "of no expert": lambda rng, t, k, e: np.full((t, k), e, np.int32),
}


@functools.partial(jax.jit, static_argnames=OPTIONS)  # shared: equal shapes compile once
def served(*arrays, **options):
    return fused_moe(*arrays, implementation="mosaic_gpu", **options)


def run(*arrays, **options):
    with real_waits(), interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        return np.asarray(served(*arrays, **options))


def packed(w, name):
    return w if name is None else jax.jit(quantize, static_argnums=1)(w, by_name(name))


def expect(x, w13, w2, weights, ids, weight=None, **options):
    codes = (definition.real(w, weight) for w in (w13, w2))
    return definition.fused_moe(np.asarray(x), *codes, np.asarray(weights), np.asarray(ids), **options)


def launches(function, *arrays):
    """The names of the grouped matmuls that are launched, in turn."""
    with interpreted("mosaic_gpu"):
        return re.findall(r"name=(grouped_matmuls?_\d+bit)\b", str(jax.make_jaxpr(function)(*arrays)))


CASES = [(scheme, routing) for scheme in FORMATS for routing in ROUTINGS]
QUICK = [("bf16", "ragged"), ("blocks", "ragged"), ("blocks", "one takes all")]


@pytest.mark.parametrize(("scheme", "routing"), few_cases(CASES, QUICK))
def test_matches_definition(scheme, routing):
    x, w13, w2, weights, _ = problem()
    ids = ROUTINGS[routing](np.random.default_rng(1), T, K, E)
    weight, fmt = FORMATS[scheme]
    expected = expect(x, w13, w2, weights, ids, weight, act_format=fmt)
    arrays = x, packed(w13, weight), packed(w2, weight), weights, ids
    found = run(*arrays, activation_format=fmt)
    assert found.dtype == jnp.bfloat16
    assert_close(found, expected, **TOLERANCES[scheme])
    assert launches(functools.partial(fused_moe, activation_format=fmt), *arrays) == [ONE_LAUNCH[scheme]]
    if routing == "of no expert":
        assert not found.any()
        return
    before = (np.roll(w, 1, axis=0) for w in (w13, w2))
    with pytest.raises(AssertionError):  # of the experts before them
        assert_close(found, expect(x, *before, weights, ids, weight, act_format=fmt), batch=0.1, worst_row=0.1)


@pytest.mark.parametrize("scheme", few(FORMATS, ["bf16"]))
def test_it_waits_for_all_of_a_row_tile(scheme):
    """With few row tiles, the second matmul's first rows are asked for while the first one's last are multiplied."""
    x, w13, w2, weights, _ = problem(t=20, h=512)
    ids = jnp.asarray([[1, 3], *[[1, E]] * 19], jnp.int32)  # 20 rows of one expert, 1 of another, 19 of none
    weight, fmt = FORMATS[scheme]
    arrays = x, packed(w13, weight), packed(w2, weight), weights, ids
    with real_waits() as waits, interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = np.asarray(served(*arrays, activation_format=fmt))
    assert_close(found, expect(x, w13, w2, weights, ids, weight, act_format=fmt), **TOLERANCES[scheme])
    assert sorted(waits.values()) == [2, 2]  # 512 columns in tiles of 256, of the rows of each expert
    assert {number for _, number in waits} == {0, 1}


VARIANTS = {  # activation, dtype, tokens, I
    "one matrix": ("relu2_no_mul", jnp.bfloat16, 12, 128),
    "f16": ("silu", jnp.float16, 12, 128),
    "with a limit": ("swigluoai", jnp.bfloat16, 9, 192),
}


@pytest.mark.parametrize("variant", few(VARIANTS, ["one matrix"]))
def test_activations_and_biases(variant):
    name, dtype, tokens, inner = VARIANTS[variant]
    gated = not name.endswith("_no_mul")
    x, w13, w2, weights, ids = problem(t=tokens, i=inner, shards=1 + gated, dtype=dtype)
    rng = np.random.default_rng(7)
    b13 = jnp.asarray(rng.normal(size=(E, 1 + gated, inner)), jnp.float32)
    b2 = jnp.asarray(rng.normal(0, 20, (E, H)), jnp.float32)
    act = functools.partial(definition.activation, name, **({"limit": 7.0} if name == "swigluoai" else {}))
    expected = expect(x, w13, w2, weights, ids, b13=np.asarray(b13), b2=np.asarray(b2), act=act)
    call = functools.partial(fused_moe, activation=name)
    assert launches(call, x, w13, w2, weights, ids) == [ONE_LAUNCH["bf16"]]

    def run_with(b13, b2):
        return run(x, w13, w2, weights, ids, activation=name, w13_bias=b13, w2_bias=b2)

    found = run_with(b13, b2)
    assert found.dtype == dtype
    assert_close(found, expected, **REAL)
    with pytest.raises(AssertionError):
        assert_close(run_with(jnp.roll(b13, 1, axis=0), b2), expected, **REAL)
    with pytest.raises(AssertionError):
        assert_close(run_with(b13, jnp.roll(b2, 1, axis=0)), expected, **REAL)


@pytest.mark.slow
def test_biases_of_blocks():
    x, w13, w2, weights, ids = problem(t=9)
    rng = np.random.default_rng(7)
    b13, b2 = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((E, 2 * INNER), (E, H)))
    biases = {"b13": np.asarray(b13).reshape(E, 2, INNER), "b2": np.asarray(b2)}
    weight, fmt = FORMATS["blocks"]
    expected = expect(x, w13, w2, weights, ids, weight, act_format=fmt, **biases)
    w13, w2 = (packed(w, weight) for w in (w13, w2))

    def call(b13):
        return run(x, w13, w2, weights, ids, activation_format=fmt, w13_bias=b13, w2_bias=b2)

    assert_close(call(b13), expected, **CODES)
    with pytest.raises(AssertionError):
        assert_close(call(jnp.roll(b13, INNER, axis=1)), expected, **CODES)  # of up before that of gate


@pytest.mark.slow
def test_one_plan_for_two_layers():
    """Each launch counts from zero."""
    x, w13, w2, weights, ids = problem(t=9)
    narrow = w13[:, :, :128], w2[:, :, :128]

    @jax.jit
    def layers(x, *pairs):
        prepared = prepare(x, weights, ids, E)
        return [finalize(run_experts(prepared, *pair), prepared) for pair in pairs]

    with real_waits(), interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = layers(x, (w13, w2), narrow)
    for out, pair in zip(found, ((w13, w2), narrow), strict=True):
        assert_close(out, expect(x, *pair, weights, ids), **REAL)


@pytest.mark.slow
def test_gradients_are_those_of_xla():
    x, w13, w2, weights, ids = problem(t=9, i=128)
    x = x / jnp.max(jnp.abs(x), axis=1, keepdims=True)
    cotangent = jnp.asarray(np.random.default_rng(3).standard_normal((9, H)), jnp.float32)

    def total(x, w13, w2, weights, implementation):
        y = fused_moe(x, w13, w2, weights, ids, out_dtype=jnp.float32, implementation=implementation)
        return jnp.sum(y * cotangent)

    arguments = x, w13, w2, weights
    gradients = jax.jit(jax.grad(total, (0, 1, 2, 3)), static_argnums=4)
    wanted = gradients(*arguments, "xla")
    with real_waits(), interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = jax.tree.map(np.asarray, gradients(*arguments, "mosaic_gpu"))
    for actual, right in zip(found, wanted, strict=True):
        rows = actual.shape[-1]
        assert_close(actual.reshape(-1, rows), right.reshape(-1, rows), batch=8e-3, worst_row=3e-2)
    with pytest.raises(AssertionError):
        assert_close(found[0], gradients(x, w13, jnp.roll(w2, 1, 0), weights, "xla")[0], batch=0.1, worst_row=0.1)


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_device_without_experts(scheme):
    x, w13, w2, weights, ids = problem()
    weight, fmt = FORMATS[scheme]
    none = (packed(w[:0], weight) for w in (w13, w2))
    with interpreted("mosaic_gpu"):
        found = fused_moe(x, *none, weights, ids, activation_format=fmt)
    assert found.shape == x.shape
    assert not np.asarray(found).any()


def test_a_second_derivative_is_an_error_not_zero():
    x, w13, w2, weights, ids = problem()

    def total(x):
        return jnp.sum(fused_moe(x, w13, w2, weights, ids).astype(jnp.float32))

    with interpreted("mosaic_gpu"):
        assert "sort_by_expert" in str(jax.make_jaxpr(jax.grad(total))(x))
        with pytest.raises(UnsupportedError, match="no second derivative"):
            jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jax.grad(total)(x).astype(jnp.float32))))(x)


@pytest.mark.slow
def test_the_one_expert_of_a_dense_layer():
    x, w13, w2, _, _ = problem(t=11, e=1)
    with real_waits(), interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = np.asarray(jax.jit(functools.partial(fused_ffn, implementation="mosaic_gpu"))(x, w13, w2))
    expected = expect(x, w13, w2, np.ones((11, 1)), np.zeros((11, 1), int))
    assert_close(found, expected, **REAL)


WEIGHTS_FOR = {activation: weight for weight, activation in PAIRS[::-1]}


@pytest.mark.parametrize(
    ("reason", "options", "sizes"),
    [
        (None, {}, {}),
        (None, {"activation_format": "fp8_per_group"}, {}),
        (None, {}, {"t": 9}),  # few rows: weights on M
        (None, {"activation_format": "fp8_per_group"}, {"t": 9}),
        (None, {}, {"t": 321}),  # 642 rows of 4 experts: weights on M
        (None, {"activation": "gelu_tanh"}, {}),
        ("gelu is applied between the matmuls", {"activation": "gelu"}, {}),
        ("quantized to .* between the matmuls", {"activation_format": "fp8_per_token"}, {}),
        ("quantized to .* between the matmuls", {"activation_format": "int8_per_token"}, {}),
        ("block_m=128 tensor cores bind", {}, {"t": 1025}),
        ("block_m=128 tensor cores bind", {"activation_format": "fp8_per_group"}, {"t": 321}),
        ("block_n=256 is above N=128", {}, {"h": 128}),
    ],
)
def test_what_it_serves(reason, options, sizes):
    """The rest takes two launches."""
    x, w13, w2, weights, ids = jax.eval_shape(lambda: problem(**sizes))
    name = options.get("activation_format")
    if name is not None:
        w13, w2 = (jax.eval_shape(functools.partial(quantize, format=WEIGHTS_FOR[name]), w) for w in (w13, w2))
    with interpreted("mosaic_gpu"):
        rows = jax.eval_shape(functools.partial(prepare, num_experts=E, activation_format=name), x, weights, ids)
        first = first_call(rows, w13, None, get_activation(options.get("activation", "silu")), rows.activation_format)
        said = both.unsupported(ExpertsCall(first=first, w2=w2, bias=None, dtype=rows.dtype))
    assert (said is None) == (reason is None)
    assert reason is None or re.search(reason, said)
    bits = 16 if name is None else 8
    expected = [f"grouped_matmuls_{bits}bit"] if reason is None else [f"grouped_matmul_{bits}bit"] * 2
    assert launches(functools.partial(fused_moe, **options), x, w13, w2, weights, ids) == expected
    by_xla = functools.partial(fused_moe, implementation="xla", **options)
    assert launches(by_xla, x, w13, w2, weights, ids) == []


def test_why_no_kernel_serves_is_still_said():
    x, w13, w2, weights, ids = problem(t=3)
    with interpreted("mosaic_gpu"), pytest.raises(UnsupportedError, match="quantized weights with quantized rows"):
        fused_moe(x, packed(w13, "fp8_per_block"), w2, weights, ids, implementation="mosaic_gpu")
