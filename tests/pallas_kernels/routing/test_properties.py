"""What holds of `route` whatever the numbers: ties, symmetries, padding, NaN, gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpy_router
from pallas_kernels import route
from pallas_kernels.routing import sort_by_expert
from tolerance import assert_close, assert_same_bits

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUPS = {"num_expert_group": 4, "topk_group": 2}
ULPS = {"batch": 1e-6, "worst_row": 2e-6}  # sums in another order

LOGITS = np.random.default_rng(0).permuted(np.arange(24 * 16).reshape(24, 16) % 16 / 4 - 2, axis=1).astype(np.float32)
BIAS = np.random.default_rng(1).normal(0, 0.3, 16).astype(np.float32)


@functools.partial(
    jax.jit, static_argnames=("top_k", "scoring", "renormalize", "num_expert_group", "topk_group", "factor")
)
def run(logits, bias=None, *, top_k=3, token_mask=None, factor=1.0, **options):
    return route(
        logits,
        top_k=top_k,
        e_score_correction_bias=bias,
        token_mask=token_mask,
        routed_scaling_factor=factor,
        **options,
    )


@pytest.mark.smoke
def test_of_equal_scores_the_lower_id_wins():
    _, ids = run(np.zeros((3, 16), jnp.bfloat16), top_k=4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    row = np.array([[0, 1.0, 0, 3.0, 2.0, 3.0]], np.float32)
    assert run(row, top_k=2)[1].tolist() == [[3, 5]]
    assert run(row, top_k=2, num_expert_group=3, topk_group=1)[1].tolist() == [[3, 2]]


@pytest.mark.parametrize("experts", [8, 60, 256, 2048])
@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_ties_are_stable(experts, groups):
    logits = np.round(np.random.default_rng(experts).normal(0, 1, (40, experts)) * 2) / 2
    options = {} if groups is None else GROUPS
    found = run(logits.astype(jnp.bfloat16), top_k=4, scoring="sigmoid", **options)[1]
    assert np.array_equal(found, numpy_router.stable_choice(logits, 4, groups))
    with pytest.raises(AssertionError):  # the higher id wins
        assert np.array_equal(found, experts - 1 - numpy_router.stable_choice(logits[:, ::-1], 4, groups))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_experts_may_be_renamed(scoring):
    order = np.random.default_rng(2).permutation(16)
    weights, ids = run(LOGITS, BIAS, scoring=scoring)
    renamed_weights, renamed_ids = run(LOGITS[:, order], BIAS[order], scoring=scoring)
    assert np.array_equal(order[renamed_ids], ids)
    assert_close(renamed_weights, weights, **ULPS)
    assert not np.array_equal(renamed_ids, ids)


def test_groups_may_be_renamed():
    order = np.arange(16).reshape(4, 4)[[2, 0, 3, 1]][:, [1, 3, 0, 2]].ravel()  # groups, and experts within them
    weights, ids = run(LOGITS, BIAS, scoring="sigmoid", **GROUPS)
    renamed_weights, renamed_ids = run(LOGITS[:, order], BIAS[order], scoring="sigmoid", **GROUPS)
    assert np.array_equal(order[renamed_ids], ids)
    assert_close(renamed_weights, weights, **ULPS)


def test_order_of_tokens_does_not_matter():
    order = np.random.default_rng(3).permutation(len(LOGITS))
    (weights, ids), (moved_weights, moved_ids) = (run(x, BIAS, **GROUPS) for x in (LOGITS, LOGITS[order]))
    assert np.array_equal(moved_ids, ids[order])
    assert_close(moved_weights, weights[order], **ULPS)


def test_factor_scales_weights():
    (weights, ids), (scaled, same_ids) = (run(LOGITS, factor=factor) for factor in (1.0, 4.0))
    assert np.array_equal(scaled, 4 * weights)
    assert np.array_equal(same_ids, ids)


@pytest.mark.parametrize(("scoring", "options"), [("softmax", {}), ("sigmoid", GROUPS), ("sqrtsoftplus", {})])
def test_nan_stays_with_its_token(scoring, options):
    broken = LOGITS.copy()
    broken[3, 5], broken[7] = np.nan, np.nan
    others = np.delete(np.arange(len(LOGITS)), [3, 7])
    whole, found = (run(x, BIAS, scoring=scoring, **options) for x in (LOGITS, broken))
    for expected, array in zip(whole, found, strict=True):
        assert_same_bits(array[others], expected[others])
    assert np.isnan(found[0][7]).all()
    assert ((found[1] >= 0) & (found[1] < 16)).all()
    first = lambda x: jnp.sum(run(x, BIAS, scoring=scoring, **options)[0][others, 0])  # noqa: E731
    gradient = jax.jit(jax.grad(first))(broken)
    assert np.isfinite(gradient[others]).all()


@pytest.mark.smoke
@pytest.mark.parametrize("scoring", SCORINGS)
def test_padding_has_no_expert(scoring):
    mask = np.arange(len(LOGITS)) % 3 != 1
    padded = np.where(mask[:, None], LOGITS, np.nan).astype(np.float32)
    whole, found = run(LOGITS, BIAS, scoring=scoring), run(padded, BIAS, scoring=scoring, token_mask=mask)
    for expected, array in zip(whole, found, strict=True):
        assert array.dtype == expected.dtype
        assert_same_bits(array[mask], expected[mask])
    assert (found[1][~mask] == -1).all()
    assert (found[0][~mask] == 0).all()
    assert sort_by_expert(found[1], 16).group_sizes.sum() == 3 * mask.sum()
    first = lambda x: jnp.sum(run(x, BIAS, scoring=scoring, token_mask=mask)[0][:, 0])  # noqa: E731
    gradient = jax.jit(jax.grad(first))(padded)
    assert not gradient[~mask].any()
    assert np.isfinite(gradient).all()
    assert gradient[mask].any(axis=1).all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("scoring", "options"), [("softmax", {}), ("sigmoid", {}), ("sqrtsoftplus", {}), ("sigmoid", GROUPS)]
)
def test_gradient(scoring, options, renormalize):
    logits, into = LOGITS[:4], np.random.default_rng(4).normal(size=(4, 3)).astype(np.float32)
    call = {"scoring": scoring, "renormalize": renormalize}

    def loss(x, bias):
        return jnp.sum(into * route(x, top_k=3, e_score_correction_bias=bias, **call, **options)[0])

    found, of_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, BIAS)
    assert not of_bias.any()
    oracle = functools.partial(numpy_router.route, top_k=3, bias=BIAS, groups=(4, 2) if options else None, **call)
    expected = np.zeros(logits.shape)
    for place in np.ndindex(logits.shape):
        step = np.zeros(logits.shape)
        step[place] = 1e-5
        expected[place] = np.sum(into * (oracle(logits + step).weights - oracle(logits - step).weights)) / 2e-5
    assert_close(found, expected, batch=1e-5, worst_row=1e-4)  # differences of f32 sums; those of float64 have 1e-9
    with pytest.raises(AssertionError):
        assert_close(found, expected[:, ::-1], batch=1e-1, worst_row=1e-1)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_finite_at_very_low_logits(scoring, renormalize, top_k):
    low = np.array([-20.0, -60.0, -87.0, -90.0, -140.0, -176.0, -1e4, -np.inf], np.float32)
    logits = low[:, None] * np.array([1, 1.01, 1.02, 1.5], np.float32)

    def first(x):
        weights, _ = route(x, top_k=top_k, scoring=scoring, renormalize=renormalize)
        return jnp.sum(weights[:, 0])

    weight, gradient = jax.jit(jax.value_and_grad(first))(logits)
    assert np.isfinite(weight)
    assert np.isfinite(gradient).all()


def test_weights_are_zero_where_every_score_underflows():
    weights, ids = run(np.full((2, 4), -1e4, np.float32), top_k=2, scoring="sigmoid")
    assert not weights.any()
    assert ids.tolist() == [[0, 1]] * 2


def test_sqrtsoftplus_is_accurate_everywhere():
    logits = np.linspace(-160, 100, 2081, dtype=np.float32)
    found, _ = run(logits[:, None], top_k=1, scoring="sqrtsoftplus", renormalize=False)
    expected = [[math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x))))] for x in logits.tolist()]
    assert_close(found, expected, batch=1e-6, worst_row=1e-5)  # exp(-80) of f32 has 5e-6
