"""The arrays of a layer, on the device; its weights are made once for all batches."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels.bench.layer import LayerCase
from pallas_kernels.bench.problem import Call, Inputs, memory_limit_bytes, normal, num_copies
from pallas_kernels.implementations import Implementation
from pallas_kernels.quantize import quantize

Weights = tuple[Any, Any]  # w13 [E, 2, I, H] and w2 [E, H, I], quantized or not


class LayerWeights:
    """The experts of a model in a scheme; others in other places are the same ones, rotated."""

    def __init__(self, case: LayerCase) -> None:
        self._key = case.model_name, case.scheme_name, case.seed
        e, _, hidden, width = case.model
        keys = jax.random.split(jax.random.key(case.seed))
        shapes = (e, 2, width, hidden), (e, hidden, width)
        w13, w2 = (_stored(key, shape, case) for key, shape in zip(keys, shapes, strict=True))
        self._copies: list[Weights] = [(w13, w2)]

    def fit(self, case: LayerCase) -> bool:
        """Whether these are the weights of a case."""
        return self._key == (case.model_name, case.scheme_name, case.seed)

    def copies(self, case: LayerCase) -> tuple[Weights, ...]:
        """In as many places as make the cache cold, at least two."""
        first = self._copies[0]
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
        wanted = num_copies(case.hit_weight_bytes, weight_bytes, memory_limit_bytes())
        for shift in range(len(self._copies), wanted):
            rotated = jax.tree.map(functools.partial(jnp.roll, shift=shift, axis=0), first)
            self._copies.append(jax.block_until_ready(rotated))
        return tuple(self._copies[:wanted])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """A case and what its calls are given: `(x, topk_weights)`, `(w13, w2)` and `topk_ids`."""

    case: LayerCase
    inputs: Inputs

    @functools.cached_property
    def inputs_kn(self) -> Inputs:
        """With bf16 weights as `jax.lax.ragged_dot` has them: `[E, H, 2I]`, gate columns first, and `[E, I, H]`."""

        def transposed(w: jax.Array) -> Any:
            return jax.block_until_ready(jnp.swapaxes(w.reshape(w.shape[0], -1, w.shape[-1]), 1, 2))

        return dataclasses.replace(self.inputs, weights=jax.tree.map(transposed, self.inputs.weights))


def make_layer_problem(case: LayerCase, weights: LayerWeights) -> LayerProblem:
    """Draws tokens from a normal distribution, and the weights of their experts, which add up to one."""
    x_key, weights_key = jax.random.split(jax.random.key(case.seed + 1))
    x = normal(x_key, (case.tokens, case.model.hidden), 1.0)
    topk_weights = jax.nn.softmax(jax.random.normal(weights_key, case.ids.shape, jnp.float32))
    inputs = Inputs(x=(x, topk_weights), weights=weights.copies(case), integers=jnp.asarray(case.ids))
    jax.block_until_ready((inputs.x, inputs.integers))
    return LayerProblem(case=case, inputs=inputs)


def layer_call(case: LayerCase, implementation: Implementation, out_dtype: Any = None) -> Call:
    """`fused_moe` on the inputs of a problem."""

    def call(tokens: tuple[jax.Array, jax.Array], weights: Weights, ids: jax.Array) -> jax.Array:
        (x, topk_weights), (w13, w2) = tokens, weights
        return pallas_kernels.fused_moe(
            x,
            w13,
            w2,
            topk_weights,
            ids,
            activation_format=case.scheme.activations,
            implementation=implementation,
            out_dtype=out_dtype,
        )

    return call


def reference(problem: LayerProblem) -> tuple[Float[Array, "T H"], float]:
    """The definition in XLA, one expert after the other, its result in f32; and the seconds that it ran."""
    inputs = problem.inputs
    arguments = inputs.x, inputs.weights[0], inputs.integers
    # Autotuned: without it XLA's products of int8 are wrong on an H200 (jax 0.11.2), 0.89 off in relative L2.
    compiled = jax.jit(layer_call(problem.case, "xla", jnp.float32)).lower(*arguments).compile()
    start = time.perf_counter()
    out: jax.Array = jax.block_until_ready(compiled(*arguments))
    return out, time.perf_counter() - start


def _stored(key: jax.Array, shape: tuple[int, ...], case: LayerCase) -> Any:
    """Weights whose products with normal rows are of size one, as the scheme stores them."""
    real = normal(key, shape, 1 / math.sqrt(shape[-1]))
    fmt = case.scheme.format
    if fmt is None:
        return jax.block_until_ready(real)
    shared = (1,) if len(shape) == 4 else ()  # gate and up share a scale of the whole
    return jax.block_until_ready(jax.jit(functools.partial(quantize, format=fmt, shared_axes=shared))(real))
