"""Whole layers on a GPU: gradients through the kernels, and the same bits from run to run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_ffn, fused_moe, quantize, route
from tolerance import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
E, H, INNER, TOP_K = 8, 256, 192, 2
TOLERANCE = {"batch": 1.5e-2, "worst_row": 6e-2}  # bf16: sums, activation, gradients of both


def problem(tokens):
    rng = np.random.default_rng(tokens)
    x, w13, w2, router = (
        jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-1]) ** (len(shape) > 2), jnp.float32).astype(
            jnp.bfloat16
        )
        for shape in ((tokens, H), (E, 2, INNER, H), (E, H, INNER), (tokens, E))
    )
    return x, w13, w2, router.astype(jnp.float32), jnp.asarray(rng.standard_normal((tokens, H)), jnp.float32)


def ours(x, w13, w2, logits, cotangent, **options):
    weights, ids = route(logits, top_k=TOP_K)
    return jnp.sum(fused_moe(x, w13, w2, weights, ids, out_dtype=jnp.float32, **options) * cotangent)


def dense(x, w13, w2, logits, cotangent):
    """Every token to every expert, in f32."""
    x, w13, w2 = (a.astype(jnp.float32) for a in (x, w13, w2))
    weights, ids = route(logits, top_k=TOP_K)
    share = jnp.sum(jax.nn.one_hot(ids, E, dtype=jnp.float32) * weights[..., None], axis=1)
    einsum = functools.partial(jnp.einsum, precision="highest")
    gate, up = (einsum("th,eih->tei", x, w13[:, s]) for s in (0, 1))
    return jnp.sum(einsum("tei,ehi,te->th", jax.nn.silu(gate) * up, w2, share) * cotangent)


def check(found, wanted):
    for actual, right in zip(found, wanted, strict=True):
        by_row(actual, right, **TOLERANCE)


def by_row(actual, right, **tolerance):
    """By token or expert; the router's logits as a whole, since of two equal experts a token's are differences."""
    rows = 1 if actual.shape[-1] == E else len(actual)
    assert_close(actual.reshape(rows, -1), right.reshape(rows, -1), **tolerance)


@pytest.mark.parametrize("tokens", [5, 600])
def test_gradients_of_everything(tokens):
    arrays = problem(tokens)
    run = jax.jit(jax.grad(functools.partial(ours, implementation="mosaic_gpu"), (0, 1, 2, 3)))
    found = run(*arrays)
    check(found, jax.jit(jax.grad(dense, (0, 1, 2, 3)))(*arrays))
    for again, first in zip(run(*arrays), found, strict=True):
        assert_same_bits(again, first)
    assert "grouped_matmul_16bit" in str(jax.jit(jax.grad(ours)).trace(*arrays).jaxpr)
    with pytest.raises(AssertionError):
        check(found[:1], jax.jit(jax.grad(dense, (0,)))(arrays[0], jnp.roll(arrays[1], 1, 0), *arrays[2:]))


@pytest.mark.parametrize("activation", [None, "fp8_per_group"])
def test_gradients_through_quantized_weights(activation):
    x, w13, w2, logits, cotangent = problem(100)
    q13, q2 = (quantize(w, "fp8_per_block") for w in (w13, w2))
    run = jax.jit(jax.grad(lambda x, logits: ours(x, q13, q2, logits, cotangent, activation_format=activation), (0, 1)))
    codes = [q.dequantize(jnp.float32) for q in (q13, q2)]
    wanted = jax.jit(jax.grad(lambda x, logits: dense(x, *codes, logits, cotangent), (0, 1)))(x, logits)
    found = run(x, logits)
    limit = {"batch": 0.06, "worst_row": 0.25} if activation else TOLERANCE  # what rounding to fp8 costs
    for actual, right in zip(found, wanted, strict=True):
        by_row(actual, right, **limit)
    rotated = [jnp.roll(code, 1, axis=0) for code in codes]
    wrong = jax.jit(jax.grad(lambda x: dense(x, *rotated, logits, cotangent)))(x)
    with pytest.raises(AssertionError):
        by_row(found[0], wrong, **limit)


def test_the_same_bits_from_run_to_run():
    x, w13, w2, logits, _ = problem(3000)
    run = jax.jit(lambda x, logits: fused_moe(x, w13, w2, *route(logits, top_k=TOP_K)))
    first = run(x, logits)
    assert all(np.array_equal(first, run(x, logits)) for _ in range(5))


def test_one_expert_for_all():
    x, w13, w2, _, _ = problem(300)
    found = jax.jit(functools.partial(fused_ffn, implementation="mosaic_gpu"))(x, w13[:1], w2[:1])
    x, gate, up, down = (a.astype(jnp.float32) for a in (x, w13[0, 0], w13[0, 1], w2[0]))
    product = functools.partial(jnp.matmul, precision="highest")
    expected = product(jax.nn.silu(product(x, gate.T)) * product(x, up.T), down.T)
    assert_close(found, expected, batch=6e-3, worst_row=1.2e-2)
