"""Routing functions: Llama 4's, and the simulated ones by their statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.routing import SimulatedRouting, llama4_routing
from tolerance import assert_close

TOKENS, EXPERTS, TOP_K = 20_000, 8, 2
STRATEGIES = ("normal_routing", "uniform_random", "zipf")
HIDDEN, LOGITS = np.zeros((TOKENS, 4), np.float32), np.zeros((TOKENS, EXPERTS), np.float32)


@pytest.mark.smoke
@pytest.mark.parametrize("top_k", [1, 3])
def test_llama4(top_k):
    logits = np.random.default_rng(0).normal(size=(32, 16)).astype(jnp.bfloat16)
    found = [jax.jit(llama4_routing, static_argnums=(2, 3))(logits, logits, top_k, flag) for flag in (True, False)]
    real = logits.astype(np.float64)
    expected = np.argsort(-real, axis=1, kind="stable")[:, :top_k]
    for weights, ids in found:
        assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)
        assert np.array_equal(ids, expected)
        assert_close(weights, 1 / (1 + np.exp(-np.take_along_axis(real, expected, axis=1))), batch=1e-6, worst_row=2e-6)


def test_llama4_knows_one_zero_and_its_gradient():
    logits = np.array([[-0.0, -1.0, 0.0, -0.0]], np.float32)
    routed = lambda x: llama4_routing(x, x, 2, False)  # noqa: E731
    assert jax.jit(routed)(logits)[1].tolist() == [[0, 2]]
    assert jax.jit(jax.grad(lambda x: jnp.sum(routed(x)[0])))(logits).tolist() == [[0.25, 0, 0.25, 0]]


def simulate(strategy, seed=0):
    weights, ids = SimulatedRouting(strategy, seed=seed)(HIDDEN, LOGITS, TOP_K, True)
    assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)
    return np.asarray(weights), np.asarray(ids)


def expected_loads(strategy):
    """Mean and standard deviation of the tokens of each expert."""
    if strategy == "normal_routing":
        edges = [0.0, *(math.erf(math.log(e / (EXPERTS - e)) / 2**0.5) / 2 + 0.5 for e in range(1, EXPERTS)), 1.0]
        draws, chance = TOKENS * TOP_K, np.diff(edges)
    else:
        first = np.ones(EXPERTS) if strategy == "uniform_random" else 1 / np.arange(1, EXPERTS + 1)
        first /= first.sum()
        second = [first[e] * sum(p / (1 - p) for p in np.delete(first, e)) for e in range(EXPERTS)]
        draws, chance = TOKENS, first + second
    return draws * chance, np.sqrt(draws * chance * (1 - chance))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loads(strategy):
    _, ids = simulate(strategy)
    assert ids.min() >= 0
    loads = np.bincount(ids.ravel(), minlength=EXPERTS)
    for other in STRATEGIES:
        mean, sigma = expected_loads(other)
        assert np.isclose(mean.sum(), TOKENS * TOP_K)
        assert (np.abs(loads - mean).max() < 5 * sigma.max()) == (other == strategy)


@pytest.mark.parametrize("strategy", ["uniform_random", "zipf"])
def test_experts_of_a_token_are_distinct(strategy):
    weights, ids = simulate(strategy)
    assert (ids[:, 0] != ids[:, 1]).all()
    assert (weights == 1).all()


def test_weights_of_normal_routing():
    weights, ids = simulate("normal_routing")
    assert (ids[:, 0] == ids[:, 1]).any()  # drawn one by one, as in vLLM
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-6)
    chance = 2 / math.pi * math.atan(1 / 3)  # that of two half-normals the first is over 3/4 of the sum
    assert abs(np.mean(weights[:, 0] > 0.75) - chance) < 5 * math.sqrt(chance * (1 - chance) / TOKENS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seed_alone_decides(strategy):
    routing = SimulatedRouting(strategy, seed=3)
    rng = np.random.default_rng(0)
    hidden, logits = (rng.normal(size=array.shape).astype(jnp.bfloat16) for array in (HIDDEN, LOGITS))
    jitted = jax.jit(lambda function, *arrays: function(*arrays, TOP_K, False), static_argnums=0)
    expected = simulate(strategy, seed=3)
    for weights, ids in (routing(hidden, logits, TOP_K, False), jitted(routing, hidden, logits)):
        assert np.array_equal(ids, expected[1])
        assert_close(weights, expected[0], batch=1e-6, worst_row=1e-5)
    assert (simulate(strategy, seed=4)[1] != expected[1]).any()
    assert hash(routing) == hash(SimulatedRouting(strategy, seed=3))
    assert routing != SimulatedRouting(strategy)


def test_errors():
    with pytest.raises(ValueError, match="'random'; valid names: normal_routing, uniform_random, zipf"):
        SimulatedRouting("random")
    for function in (SimulatedRouting("zipf"), llama4_routing):
        with pytest.raises(ValueError, match="top_k=9 must be between 1 and the 8 experts"):
            function(HIDDEN, LOGITS, 9, True)
