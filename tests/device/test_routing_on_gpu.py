"""`route` on a GPU: of equal scores the lower id wins, among experts and among groups, whatever XLA sorts with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpy_router
from pallas_kernels import route
from pallas_kernels.routing import llama4_routing
from pallas_kernels.routing.reference import SCORING
from tolerance import assert_close

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
EXPERTS = (8, 60, 128, 256, 2048)
CALLS = [
    (experts, top_k, groups)
    for experts in EXPERTS
    for top_k in (1, 2, 8)
    for groups in (None, (4, 2))
    if groups is None or experts // 2 >= top_k
]


def few_values(tokens, experts):
    """bf16 logits and f32 biases: each token's best score is that of several experts, mostly."""
    rng = np.random.default_rng(experts)
    logits = (np.round(rng.normal(0, 1, (tokens, experts)) * 2) / 2).astype(jnp.bfloat16)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, 3, experts) / 4, jnp.float32)


@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "groups"), CALLS)
def test_ties(experts, top_k, groups, with_bias, tokens):
    logits, bias = few_values(tokens, experts)
    total, kept = groups or (None, None)
    for scoring, score in SCORING.items():
        call = functools.partial(route, top_k=top_k, scoring=scoring, num_expert_group=total, topk_group=kept)
        scores = np.asarray(jax.jit(score)(logits.astype(jnp.float32)))
        if with_bias:
            _, found = jax.jit(lambda x, b, call=call: call(x, e_score_correction_bias=b))(logits, bias)
            scores = scores + np.asarray(bias)
        else:
            _, found = jax.jit(call)(logits)
        expected = numpy_router.stable_choice(scores, top_k, groups, 2 if with_bias else 1)
        assert np.array_equal(found, expected), scoring


@pytest.mark.parametrize("experts", EXPERTS)
def test_ties_of_llama4(experts):
    logits, _ = few_values(1024, experts)
    _, found = jax.jit(llama4_routing, static_argnums=(2, 3))(logits, logits, 2, False)
    assert np.array_equal(found, numpy_router.stable_choice(np.asarray(logits).astype(np.float32), 2))


@pytest.mark.parametrize("scoring", SCORING)
def test_weights(scoring):
    logits, bias = few_values(64, 256)
    weights, ids = jax.jit(
        functools.partial(
            route, top_k=8, scoring=scoring, num_expert_group=8, topk_group=4, e_score_correction_bias=bias
        )
    )(logits)
    expected = numpy_router.route(logits, 8, scoring=scoring, groups=(8, 4), bias=bias)
    assert expected.clear.mean() > 0.75
    assert np.array_equal(ids[expected.clear], expected.ids[expected.clear])
    assert_close(weights[expected.clear], expected.weights[expected.clear], batch=2e-6, worst_row=4e-6)
