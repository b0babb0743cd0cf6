"""What users would put together instead of `fused_moe`: a sort, two grouped matmuls of somebody else, a combine."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.layer_problem import LayerProblem, layer_call
from pallas_kernels.bench.problem import Call, GroupedMatmul

XLA = "xla"  # our own, without kernels
MATMULS = ("ragged_dot", "tokamax")  # of `peers.PEERS`; they have bf16 only
EVERYTHING = (*MATMULS, XLA)


def prepare(
    name: str, problem: LayerProblem, expected: jax.Array, *, xla_seconds: float, limit_seconds: float
) -> peers.Ready:
    """The fastest right variant of a peer.

    Args:
      name: Of `EVERYTHING`.
      problem: What it has to compute.
      expected: The result.
      xla_seconds: What our own implementation in XLA takes.
      limit_seconds: What it may take.

    Raises:
      RuntimeError: it cannot take part; the message says why.
    """
    limits = problem.case.scheme.limits
    if name == XLA:
        if xla_seconds > limit_seconds:
            raise RuntimeError(f"not tried: a call took {xla_seconds:.1f} s, and the limit is {limit_seconds:g} s")
        return peers.fastest([peers.Variant("", layer_call(problem.case, "xla"))], problem.inputs, expected, limits)
    if problem.case.scheme.weights is not None:
        raise RuntimeError("it takes part in bf16 only")
    peer = peers.PEERS[name]
    assert peer.layout == "kn"
    peer.refuse(*problem.case.matmuls)
    return peers.fastest(_variants(peer, problem), problem.inputs_kn, expected, limits)


def _variants(peer: peers.Peer, problem: LayerProblem) -> Iterator[peers.Variant]:
    """Both matmuls with the same config."""
    for first, second in zip(*(peer.variants(case) for case in problem.case.matmuls), strict=True):
        note = first.note if first.note == second.note else f"{first.note}; {second.note}"
        yield peers.Variant(note, pipeline(first.call, second.call))


def pipeline(first: GroupedMatmul, second: GroupedMatmul) -> Call:
    """The layer out of two grouped matmuls with weights `[E, K, N]`, everything else in XLA."""

    def call(tokens: tuple[jax.Array, jax.Array], weights: tuple[jax.Array, jax.Array], ids: jax.Array) -> jax.Array:
        (x, topk_weights), (w13, w2) = tokens, weights
        by_expert = jnp.argsort(ids.reshape(-1))
        sizes = jnp.bincount(ids.reshape(-1), length=w13.shape[0]).astype(jnp.int32)
        both = first(x[by_expert // ids.shape[1]], w13, sizes)
        gate_rows, up_rows = jnp.split(both.astype(jnp.float32), 2, axis=1)
        hidden = (jax.nn.silu(gate_rows) * up_rows).astype(x.dtype)
        outputs = second(hidden, w2, sizes)[jnp.argsort(by_expert)].reshape(*ids.shape, -1)
        return jnp.sum(outputs.astype(jnp.float32) * topk_weights[..., None], axis=1).astype(x.dtype)

    return call
