"""A decoder small enough for tests, and the error measure they share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_online.assets.train import EinsumMoE
from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights
from moe_online.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    moe=MoEConfig(num_experts=4, top_k=2, hidden_size=32, intermediate_size=48),
)


def decoder(seed=0, *, dtype=jnp.float32, moe=EinsumMoE, **changes) -> Decoder:
    """CONFIG with `changes`, random parameters; f32 unless said otherwise."""
    factory = functools.partial(moe, dtype=dtype, param_dtype=dtype)
    config = dataclasses.replace(CONFIG, **changes)
    return Decoder(config, moe=factory, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=dtype)


def experts(gate, up, down) -> ExpertWeights:
    """The `[E, K, N]` matrices of a training run as our layer holds them."""
    w13 = jnp.stack([jnp.swapaxes(w, 1, 2) for w in (gate, up)], axis=1)
    return ExpertWeights(w13_weight=w13, w2_weight=jnp.swapaxes(down, 1, 2), orig_dtype=w13.dtype)


def forward(model, *args, last_only=False):
    """`model(*args)` as one compiled function: eager operations would be compiled one by one."""
    graph, state = nnx.split(model)
    return _forward(graph, state, args, last_only)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _forward(graph, state, args, last_only):
    return nnx.merge(graph, state)(*args, last_only=last_only)


def random_tokens(*shape, seed=0, vocab_size=CONFIG.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)


def relative_l2(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(found).all() else float("inf")


def num_live_arrays() -> int:
    return len(jax.live_arrays())
