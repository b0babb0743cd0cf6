"""Text generation: one compiled prefill, one compiled step, a KV cache of fixed size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from moe_online.models.decoder import Decoder, KVCache

Sampling = tuple[Array, Array, Array]  # temperature f32, top_k int32, top_p f32: traced, so that no value recompiles


def generate(
    model: Decoder,
    tokens: Integer[Array | np.ndarray, "B S"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    stop: Sequence[int] = (),
    seed: int = 0,
    stream: Callable[[np.ndarray], None] | None = None,
) -> Int[Array, "B max_new_tokens"]:
    """Continues `tokens`.

    Compiles two functions for a model and a shape (B, S, max_new_tokens), whatever the sampling values; temperature 0
    has its own two. The weights are arguments of both, not constants in them.

    Args:
      model: The decoder.
      tokens: Prompts `[B, S]`, all of one length.
      max_new_tokens: Tokens to add to each prompt.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
      top_p: Sample from the smallest set of likeliest tokens that holds this probability.
      top_k: Sample from this many likeliest tokens (more when the last of them ties). Applied before `top_p`.
      stop: Token ids that end a sequence. The rest of its row repeats the one it met; generation ends early when every
        row has met one.
      seed: Of the sampling.
      stream: Called with each new column of tokens, int32 `[B]`, as soon as it is there.

    Returns:
      The new tokens, int32 `[B, max_new_tokens]`.

    Raises:
      ValueError: an argument is out of its range.
    """
    vocab_size = model.config.vocab_size
    _check(np.shape(tokens), max_new_tokens, temperature, top_p, top_k, stop, vocab_size)
    sampling = None
    if temperature > 0:
        sampling = (
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(vocab_size if top_k is None else min(top_k, vocab_size), jnp.int32),
            jnp.asarray(1.0 if top_p is None else top_p, jnp.float32),
        )
    columns: list[np.ndarray] = []
    done = np.zeros(len(tokens), bool)
    for column in _columns(model, jnp.asarray(tokens, jnp.int32), max_new_tokens, sampling, jax.random.key(seed)):
        if columns:
            column = np.where(done, columns[-1], column)
        columns.append(column)
        done |= np.isin(column, stop)
        if stream is not None:
            stream(column)
        if done.all():
            break
    columns += [columns[-1]] * (max_new_tokens - len(columns))
    return jnp.asarray(np.stack(columns, axis=1))


def _columns(
    model: Decoder, tokens: jax.Array, count: int, sampling: Sampling | None, key: jax.Array
) -> Iterator[np.ndarray]:
    """Yields `count` columns of new tokens; the next step already runs while one is looked at."""
    graph, state = nnx.split(model)
    token, cache = _prefill(graph, state, tokens, tokens.shape[1] + count, sampling, key)
    for _ in range(count - 1):
        previous = token
        token, cache = _step(graph, state, previous, cache, sampling, key)
        yield np.asarray(previous)
    yield np.asarray(token)


@functools.partial(jax.jit, static_argnames=("graph", "size"))
def _prefill(
    graph: Any, state: Any, tokens: Int[Array, "B S"], size: int, sampling: Sampling | None, key: Array
) -> tuple[Int[Array, " B"], KVCache]:
    """Reads the prompts into a new cache of `size` positions and picks the first token."""
    model = nnx.merge(graph, state)
    cache = KVCache.empty(model.config, batch=tokens.shape[0], size=size, dtype=model.dtype)
    logits, cache = model(tokens, cache, last_only=True)
    return _pick(logits[:, 0], sampling, jax.random.fold_in(key, cache.position)), cache


@functools.partial(jax.jit, static_argnames=("graph",), donate_argnames=("cache",))
def _step(
    graph: Any, state: Any, token: Int[Array, " B"], cache: KVCache, sampling: Sampling | None, key: Array
) -> tuple[Int[Array, " B"], KVCache]:
    """Adds one token to the cache and picks the next."""
    logits, cache = nnx.merge(graph, state)(token[:, None], cache, last_only=True)
    return _pick(logits[:, 0], sampling, jax.random.fold_in(key, cache.position)), cache


def _pick(logits: Float[Array, "B V"], sampling: Sampling | None, key: Array) -> Int[Array, " B"]:
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p = sampling
    logits = logits / temperature
    ordered = jnp.sort(logits, axis=-1, descending=True)
    ordered = jnp.where(jnp.arange(logits.shape[-1])[None, :] < top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the likelier tokens; 0 for the first
    least = jnp.min(jnp.where((before < top_p) & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf), axis=-1).astype(jnp.int32)


def _check(
    shape: tuple[int, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    stop: Sequence[int],
    vocab_size: int,
) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"tokens of shape {shape} must be [B, S] with at least one token: pass tokens[None] for one")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{temperature=} must be finite and not negative; 0 takes the likeliest token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must be above 0 and at most 1; None samples from all tokens")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{top_k=} must be at least 1; None samples from all tokens")
    if temperature == 0 and (top_p is not None or top_k is not None):
        raise ValueError(f"{top_p=} and {top_k=} need a temperature above 0; temperature 0 takes the likeliest token")
    outside = [token for token in stop if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"stop={outside} must be token ids below vocab_size={vocab_size}; encode strings first")
