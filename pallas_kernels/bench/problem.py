"""The arrays of a case, on the device: random, and with weights in several places so that the L2 cache is cold."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels.bench.cases import Case

L2_BYTES = 60 << 20  # of an H200, rounded up
COLD_BYTES = 3 * L2_BYTES  # reading so much else leaves nothing of an array in the cache
MAX_COPIES = 4
WEIGHTS_SHARE = 0.25  # of the device's memory that the copies may take; the peers' layout takes as much again

# x, weights, integers that say which weights are whose -> result; x and weights may be of several arrays
Call = Callable[[Any, Any, jax.Array], jax.Array]
GroupedMatmul = Call  # x, weights, group sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a `Call` is given: the weights of the first turn, or, in later ones, others in other places."""

    x: Any
    weights: tuple[Any, ...]
    integers: Int32[Array, "..."]

    def turns(self, call: Call) -> Callable[[int], jax.Array]:
        """Runs a call on the weights of a turn."""
        return lambda turn: call(self.x, self.weights[turn % len(self.weights)], self.integers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """`weights[i]` are the same experts, rotated by i: other places, and other values for each expert."""

    case: Case
    x: BFloat16[Array, "M K"]
    weights: tuple[BFloat16[Array, "E N K"], ...]
    group_sizes: Int32[Array, " E"]

    @property
    def inputs(self) -> Inputs:
        """Of a call."""
        return Inputs(x=self.x, weights=self.weights, integers=self.group_sizes)

    @functools.cached_property
    def inputs_kn(self) -> Inputs:
        """With weights in the layout of `jax.lax.ragged_dot`, `[E, K, N]`."""
        weights = tuple(jax.block_until_ready(jnp.swapaxes(w, 1, 2)) for w in self.weights)
        return dataclasses.replace(self.inputs, weights=weights)


def make_problem(case: Case) -> Problem:
    """Draws `x` and weights from a normal distribution, the weights' scaled so that results are of size one."""
    x_key, w_key = jax.random.split(jax.random.key(case.seed))
    num_experts = len(case.group_sizes)
    x = normal(x_key, (case.m, case.k), 1.0)
    first = normal(w_key, (num_experts, case.n, case.k), 1 / math.sqrt(case.k))
    copies = num_copies(case.hit_weight_bytes, first.nbytes, memory_limit_bytes())
    weights = (first, *(jnp.roll(first, shift, axis=0) for shift in range(1, copies)))
    problem = Problem(case=case, x=x, weights=weights, group_sizes=jnp.array(case.group_sizes, jnp.int32))
    jax.block_until_ready((problem.x, problem.weights))
    return problem


def num_copies(hit_bytes: int, weight_bytes: int, limit_bytes: int | None) -> int:
    """Places for the weights: at least two, and as many as make the cache cold where memory allows."""
    wanted = 1 + math.ceil(COLD_BYTES / max(1, hit_bytes))
    affordable = MAX_COPIES if limit_bytes is None else int(WEIGHTS_SHARE * limit_bytes // weight_bytes)
    return max(2, min(wanted, affordable, MAX_COPIES))


def memory_limit_bytes() -> int | None:
    """What the process may take of the device's memory; None where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def free_bytes() -> int | None:
    """What is left of it."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> BFloat16[Array, "..."]:
    """Draws from a normal distribution of this standard deviation."""
    drawn: jax.Array = jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)
    return drawn
