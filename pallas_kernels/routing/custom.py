"""Routing of one's own: any `RoutingFunction`, where `route` does not say what a model does."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.routing.checks import check_logits


@runtime_checkable
class RoutingFunction(Protocol):
    """Chooses experts: `(hidden_states, router_logits, top_k, renormalize) -> (weights, ids)`.

    Called by position, so the parameters may have any names. `hidden_states` are `[T, H]`, `router_logits` `[T, E]`;
    weights are f32 `[T, top_k]`, ids int32 `[T, top_k]`, and an id of -1 is no expert. It runs under `jit`.

    Source: `custom_routing_function` of vllm/model_executor/layers/fused_moe/router/custom_routing_router.py.
    """

    def __call__(
        self,
        hidden_states: Float[Array, "T H"],
        router_logits: Float[Array, "T E"],
        top_k: int,
        renormalize: bool,
        /,
    ) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
        """The weights and ids of the chosen experts."""
        ...


def llama4_routing(
    hidden_states: Float[Array, "T H"], router_logits: Float[Array, "T E"], top_k: int, renormalize: bool
) -> tuple[Float[Array, "T top_k"], Int32[Array, "T top_k"]]:
    """Llama 4: the `top_k` largest logits, then the sigmoid of each in f32; a `RoutingFunction`.

    Args:
      hidden_states: Not looked at.
      router_logits: `[T, E]`, any floating dtype; of equal ones the lower id wins.
      top_k: Experts per token; 1 in Llama 4.
      renormalize: Ignored, as in vLLM.

    Raises:
      TypeError: logits that are no floats.
      ValueError: a `top_k` outside 1..E, or logits that are not `[T, E]`.

    Source: `Llama4MoE.custom_routing_function` of vllm/model_executor/models/llama4.py.

    >>> import jax.numpy as jnp
    >>> weights, ids = llama4_routing(jnp.zeros((1, 8)), jnp.array([[-1.0, 2.0, 0.0]]), 2, True)
    >>> ids.tolist(), [f"{weight:.3f}" for weight in weights[0]]
    ([[1, 2]], ['0.881', '0.500'])
    """
    check_logits(router_logits, top_k)
    logits = jnp.asarray(router_logits).astype(jnp.float32)
    ranked = jnp.where(logits == 0, jnp.zeros_like(logits), logits)  # to top_k -0 is less than 0
    _, ids = lax.top_k(lax.stop_gradient(ranked), top_k)
    chosen = jnp.take_along_axis(logits, ids, axis=1, mode="promise_in_bounds")
    return jax.nn.sigmoid(chosen), ids.astype(jnp.int32)
