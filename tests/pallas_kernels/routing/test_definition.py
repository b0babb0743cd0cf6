"""Routing and the order of the rows against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import UnsupportedError, route
from pallas_kernels.routing import sort_by_expert
from tolerance import assert_close


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [pytest.param(37, 8, 2, marks=pytest.mark.smoke), (1, 5, 5), (16, 64, 8), (0, 4, 2)]
)
def test_matches_definition(scoring, renormalize, tokens, experts, top_k):
    logits = np.random.default_rng(0).normal(0, 2, (tokens, experts)).astype(np.float32)
    options = {"scoring": scoring, "renormalize": renormalize}
    weights, ids = jax.jit(lambda x: route(x, top_k=top_k, routed_scaling_factor=2.5, **options))(logits)
    assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)
    if not tokens:
        assert weights.shape == ids.shape == (0, top_k)
        return
    expected_weights, expected_ids = definition.route(logits, top_k, factor=2.5, **options)
    assert np.array_equal(ids, expected_ids)
    assert_close(weights, expected_weights, batch=1e-6, worst_row=2e-6)
    other, _ = definition.route(logits, top_k, factor=2.5, scoring=scoring, renormalize=not renormalize)
    if top_k < experts or scoring == "sigmoid":
        with pytest.raises(AssertionError):
            assert_close(weights, other, batch=1e-3, worst_row=1e-3)


def test_of_equal_scores_the_lower_id_wins():
    _, ids = route(jnp.zeros((3, 16), jnp.bfloat16), top_k=4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    _, ids = route(jnp.array([[1.0, 5.0, 0.0, 5.0, 5.0]]), top_k=2)
    assert ids.tolist() == [[1, 3]]


def test_weights_stay_finite_where_every_score_underflows():
    weights, _ = route(jnp.full((2, 4), -1e4), top_k=2, scoring="sigmoid")
    assert not weights.any()


def test_weights_have_a_gradient():
    logits = jnp.array([[0.0, 1.0, 2.0]])
    gradient = jax.grad(lambda x: route(x, top_k=2)[0][0, 0])(logits)
    assert np.allclose(gradient, [[0, -0.19661, 0.19661]], atol=1e-4)  # s(1 - s) of sigmoid(1)


@pytest.mark.parametrize("with_map", [False, True])
def test_rows_sorted_by_expert(with_map):
    rng = np.random.default_rng(1)
    ids = rng.integers(-1, 8, (23, 3)).astype(np.int32)
    expert_map = np.array([2, -1, 0, -1, 1, -1], np.int32) if with_map else None
    order = sort_by_expert(jnp.asarray(ids), 3, expert_map=None if expert_map is None else jnp.asarray(expert_map))
    local = ids if expert_map is None else np.where((ids >= 0) & (ids < 6), expert_map[np.clip(ids, 0, 5)], -1)
    routed = (local >= 0) & (local < 3)
    pairs = sorted((int(local[t, j]), t, j) for t, j in zip(*np.nonzero(routed), strict=True))
    used = len(pairs)
    assert np.array_equal(order.routed, routed)
    assert np.array_equal(order.group_sizes, np.bincount(local[routed], minlength=3))
    assert np.array_equal(order.metadata.group_starts, np.cumsum([0, *order.group_sizes])[:3])
    assert order.tokens[:used].tolist() == [t for _, t, _ in pairs]
    assert [int(order.rows[t, j]) for _, t, j in pairs] == list(range(used))
    assert sorted(order.rows.reshape(-1).tolist()) == list(range(ids.size))  # each pair has a row of its own


def test_errors():
    logits = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match=r"'tanh'; valid names: sigmoid, softmax"):
        route(logits, top_k=2, scoring="tanh")
    with pytest.raises(ValueError, match="top_k=5 must be between 1 and the 4 experts"):
        route(logits, top_k=5)
    with pytest.raises(ValueError, match="flatten"):
        route(logits[None], top_k=2)
    with pytest.raises(TypeError, match="int32"):
        route(logits.astype(jnp.int32), top_k=2)
    with pytest.raises(UnsupportedError, match="grouped top-k"):
        route(logits, top_k=2, num_expert_group=2, topk_group=1)
    with pytest.raises(UnsupportedError, match="e_score_correction_bias"):
        route(logits, top_k=2, e_score_correction_bias=jnp.zeros(4))
