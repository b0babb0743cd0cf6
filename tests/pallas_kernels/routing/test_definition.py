"""`route` against numpy: every scoring with and without bias, groups and renormalization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numpy_router
from pallas_kernels import route
from tolerance import assert_close

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
FACTOR = 2.5


def problem(tokens, experts, *, seed=0, with_bias=False):
    """Logits and biases on a coarse grid: what is not equal is far enough apart for f32, nearly everywhere."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 2, (tokens, experts)) * 8) / 8
    bias = np.round(rng.normal(0, 0.5, experts) * 8) / 8 if with_bias else None
    return logits.astype(np.float32), bias if bias is None else bias.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("top_k", "scoring", "renormalize", "groups"))
def run(logits, bias=None, *, top_k, scoring="softmax", renormalize=True, groups=None):
    total, kept = groups or (None, None)
    return route(
        logits,
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        num_expert_group=total,
        topk_group=kept,
        e_score_correction_bias=bias,
        routed_scaling_factor=FACTOR,
    )


def assert_routed(found, expected):
    """Where the choice hangs on the last bits of a score, f32 may choose otherwise than float64: not compared."""
    weights, ids = found
    clear = expected.clear
    assert np.mean(clear) >= 0.75
    assert np.array_equal(ids[clear], expected.ids[clear])
    assert_close(weights[clear], expected.weights[clear], batch=1e-6, worst_row=2e-6)  # a few ulps: exp, sum, quotient


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("groups", [None, (4, 2)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_matches_definition(scoring, with_bias, groups, renormalize):
    logits, bias = problem(48, 32, with_bias=with_bias)
    options = {"top_k": 5, "scoring": scoring, "groups": groups}
    found = run(logits, bias, renormalize=renormalize, **options)
    assert (found[0].dtype, found[1].dtype) == (jnp.float32, jnp.int32)
    oracle = functools.partial(numpy_router.route, logits, factor=FACTOR, **options)
    assert_routed(found, oracle(bias=bias, renormalize=renormalize))
    wrong = [oracle(bias=bias, renormalize=not renormalize)]
    if with_bias:
        expected = oracle(bias=bias, renormalize=renormalize)
        biased = expected.weights + FACTOR * bias[expected.ids]
        wrong += [oracle(renormalize=renormalize), expected._replace(weights=biased)]
    if groups:
        best = 1 if with_bias else 2  # the rule of the other case
        wrong += [oracle(bias=bias, renormalize=renormalize, best_of_group=best)]
    for control in wrong:
        with pytest.raises(AssertionError):
            assert_routed(found, control)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "groups"),
    [
        pytest.param(37, 8, 2, None, marks=pytest.mark.smoke),
        pytest.param(9, 256, 8, (8, 4), marks=pytest.mark.smoke),  # DeepSeek-V3
        (1, 5, 5, None),
        (16, 64, 8, None),
        (21, 12, 3, (6, 3)),
    ],
)
def test_shapes(tokens, experts, top_k, groups):
    logits, bias = problem(tokens, experts, with_bias=True)
    options = {"top_k": top_k, "scoring": "sigmoid", "groups": groups}
    assert_routed(run(logits, bias, **options), numpy_router.route(logits, bias=bias, factor=FACTOR, **options))


@pytest.mark.parametrize("groups", [None, (2, 1)])
def test_no_tokens(groups):
    weights, ids = run(np.zeros((0, 4), np.float32), np.zeros(4, np.float32), top_k=2, groups=groups)
    assert weights.shape == ids.shape == (0, 2)


@st.composite
def calls(draw):
    total = draw(st.integers(1, 6))
    kept = draw(st.integers(1, total))
    experts = total * draw(st.integers(1, 8))
    reachable = experts if experts <= total else kept * (experts // total)
    return {
        "tokens": draw(st.integers(1, 20)),
        "experts": experts,
        "top_k": draw(st.integers(1, reachable)),
        "groups": (total, kept),
        "scoring": draw(st.sampled_from(SCORINGS)),
        "renormalize": draw(st.booleans()),
        "with_bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(deadline=None, max_examples=12)
@given(calls())
def test_any_shape(call):
    seed, with_bias, tokens, experts = (call.pop(name) for name in ("seed", "with_bias", "tokens", "experts"))
    logits, bias = problem(tokens, experts, seed=seed, with_bias=with_bias)
    weights, ids = run(logits, bias, **call)
    if experts <= call["groups"][0]:
        call["groups"] = None  # one expert per group: plain top-k
    expected = numpy_router.route(logits, bias=bias, factor=FACTOR, **call)
    assert np.array_equal(ids[expected.clear], expected.ids[expected.clear])
    assert_close(weights[expected.clear], expected.weights[expected.clear], batch=1e-6, worst_row=2e-6)


@pytest.mark.parametrize("groups", [(3, 3), (8, 2), (3, 2)])
def test_groups_that_cannot_be_made_are_plain(groups):
    logits, bias = problem(16, 8, with_bias=True)
    for found, plain in zip(run(logits, bias, top_k=5, groups=groups), run(logits, bias, top_k=5), strict=True):
        assert np.array_equal(found, plain)
    assert not np.array_equal(run(logits, bias, top_k=4, groups=(4, 2))[1], run(logits, bias, top_k=4)[1])


def test_arithmetic_is_f32():
    logits, _ = problem(16, 8)
    half = jnp.asarray(logits).astype(jnp.bfloat16)
    for found, expected in zip(run(half, top_k=2), run(half.astype(jnp.float32), top_k=2), strict=True):
        assert np.array_equal(found, expected)
