"""Routing that asks no router, for load tests: what a layer costs under a given spread of tokens over experts.

Source: vllm/model_executor/layers/fused_moe/router/routing_simulator_router.py; `zipf` is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.routing.checks import check_logits

Routed = tuple[jax.Array, jax.Array]  # weights f32 [T, top_k], ids int32 [T, top_k]


@dataclasses.dataclass(frozen=True)
class SimulatedRouting:
    """Draws experts at random; a `RoutingFunction`, hashable, so it can be a static argument.

    | strategy | experts of a token | weights |
    |---|---|---|
    | `uniform_random` | all alike, and distinct | 1 |
    | `normal_routing` | floor(sigmoid(N(0, 1)) * E), each drawn by itself: one may come twice | abs(N(0, 1)), sum 1 |
    | `zipf` | expert e with probability proportional to 1 / (e + 1), and distinct | 1 |

    Distinct experts are drawn one after the other without replacement. vLLM's `uniform_random` may repeat one; no
    real router does.

    A call gives the same result for the same seed, T, E and `top_k`, whatever is in the hidden states and logits;
    it ignores `renormalize`. Model outputs mean nothing under it.

    Raises:
      ValueError: an unknown strategy; when called, a `top_k` outside 1..E, or logits that are not `[T, E]`.
      TypeError: when called, logits that are no floats.

    >>> import jax.numpy as jnp
    >>> weights, ids = SimulatedRouting("zipf", seed=1)(jnp.zeros((5, 8)), jnp.zeros((5, 4)), 2, True)
    >>> ids.shape, weights[0].tolist()
    ((5, 2), [1.0, 1.0])
    """

    strategy: str
    seed: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}; valid names: {', '.join(sorted(STRATEGIES))}")

    def __call__(
        self,
        hidden_states: Float[Array, "T H"],
        router_logits: Float[Array, "T E"],
        top_k: int,
        renormalize: bool,
    ) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
        """Weights and ids; of the arrays only `router_logits.shape` counts."""
        check_logits(router_logits, top_k)
        num_tokens, num_experts = router_logits.shape
        return STRATEGIES[self.strategy](jax.random.key(self.seed), num_tokens, num_experts, top_k)


def _uniform(key: jax.Array, num_tokens: int, num_experts: int, top_k: int) -> Routed:
    return _distinct(key, num_tokens, jnp.zeros(num_experts, jnp.float32), top_k)


def _zipf(key: jax.Array, num_tokens: int, num_experts: int, top_k: int) -> Routed:
    return _distinct(key, num_tokens, -jnp.log(jnp.arange(1, num_experts + 1, dtype=jnp.float32)), top_k)


def _distinct(key: jax.Array, num_tokens: int, log_popularity: jax.Array, top_k: int) -> Routed:
    noise = jax.random.gumbel(key, (num_tokens, log_popularity.shape[0]), jnp.float32)
    _, ids = lax.top_k(noise + log_popularity[None], top_k)  # the largest are a sample without replacement
    return jnp.ones(ids.shape, jnp.float32), ids.astype(jnp.int32)


def _normal(key: jax.Array, num_tokens: int, num_experts: int, top_k: int) -> Routed:
    place, size = jax.random.normal(key, (2, num_tokens, top_k), jnp.float32)
    ids = jnp.minimum((jax.nn.sigmoid(place) * np.float32(num_experts)).astype(jnp.int32), num_experts - 1)
    weights = jnp.maximum(jnp.abs(size), np.finfo(np.float32).tiny)  # one in 2^23 is 0, and may be a token's only one
    return weights / jnp.sum(weights, axis=1, keepdims=True), ids


STRATEGIES: dict[str, Callable[[jax.Array, int, int, int], Routed]] = {
    "uniform_random": _uniform,
    "normal_routing": _normal,
    "zipf": _zipf,
}
