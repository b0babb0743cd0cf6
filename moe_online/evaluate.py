"""How well a model predicts text, and how far it is from a reference: bits per byte, KL divergence, agreement."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from moe_online.models.decoder import Decoder

_Block = Float[Array | np.ndarray, "batch window V"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Per predicted token (a byte, for a byte-level model); `kl` and `agrees` only against a reference."""

    bits: np.ndarray  # f32 [P]: -log2 of the probability given to what came next
    kl: np.ndarray | None  # f32 [P]: KL(reference || model), in bits
    agrees: np.ndarray | None  # bool [P]: both find the same token likeliest

    @property
    def bits_per_byte(self) -> float:
        """Mean of `bits`."""
        return float(self.bits.mean(dtype=np.float64))

    @property
    def kl_per_byte(self) -> float | None:
        """Mean of `kl`, in bits."""
        return None if self.kl is None else float(self.kl.mean(dtype=np.float64))

    @property
    def top1_agreement(self) -> float | None:
        """Fraction of tokens for which both models find the same next token likeliest."""
        return None if self.agrees is None else float(self.agrees.mean(dtype=np.float64))


def evaluate(
    model: Decoder,
    tokens: Integer[Array | np.ndarray, " N"],
    *,
    window: int,
    batch: int,
    reference: Iterable[_Block] | None = None,
) -> Evaluation:
    """Predicts each of `tokens` but the first once, in windows that share no context.

    Holds the log-probabilities of one batch of windows (of both models) at a time, unless `reference` holds more.

    Args:
      model: The decoder.
      tokens: The text `[N]`, N >= 2.
      window: Tokens that are read together; the first is predicted from one token, the last from `window`.
      batch: Windows per call of the compiled forward pass.
      reference: `log_probabilities` of the reference model with the same tokens, window and batch: the iterator, or a
        list of its blocks to compare several models with.

    Returns:
      Figures of the P = N - 1 predictions, in the order of the text.

    Raises:
      ValueError: a size is out of its range, or `reference` has other blocks than the model.

    Example: `evaluate(quantized, text, window=512, batch=8, reference=log_probabilities(model, text, window=512,
    batch=8)).kl_per_byte`.
    """
    blocks = log_probabilities(model, tokens, window=window, batch=batch)
    return score(blocks, tokens, window=window, batch=batch, reference=reference)


def score(
    blocks: Iterable[_Block],
    tokens: Integer[Array | np.ndarray, " N"],
    *,
    window: int,
    batch: int,
    reference: Iterable[_Block] | None = None,
) -> Evaluation:
    """`evaluate` for a model that has read the text already: `blocks` are its `log_probabilities`.

    Raises:
      ValueError: as `evaluate`.
    """
    targets = [block[:, 1:] for block in _windows(tokens, window, batch)]
    pairs = ((block, None) for block in blocks) if reference is None else _pairs(blocks, reference)
    # fetched one by one: otherwise every block could be in flight at once
    rows = [jax.device_get(_scores(*pair, target)) for pair, target in zip(pairs, targets, strict=True)]
    bits, *distances = (
        np.concatenate([part.ravel() for part in parts])[: len(tokens) - 1] for parts in zip(*rows, strict=True)
    )
    kl, agrees = distances or (None, None)
    return Evaluation(bits=bits, kl=kl, agrees=agrees)


def log_probabilities(
    model: Decoder, tokens: Integer[Array | np.ndarray, " N"], *, window: int, batch: int
) -> Iterator[Float[Array, "batch window V"]]:
    """Yields f32 log-probabilities of the next token, one batch of windows after the other.

    Row w, position i of all blocks taken together predicts token `w * window + i + 1`. The end of the last block is
    padding, so that every block has one shape and the forward pass is compiled once.

    Raises:
      ValueError: a size is out of its range.
    """
    blocks = _windows(tokens, window, batch)
    graph, state = nnx.split(model)
    return (_forward(graph, state, jnp.asarray(block[:, :-1])) for block in blocks)


def _windows(tokens: Integer[Array | np.ndarray, " N"], window: int, batch: int) -> list[np.ndarray]:
    """Cuts the text into int32 blocks [batch, window + 1]; a window ends with the token that starts the next."""
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens predict nothing: give at least 2")
    if window < 1 or batch < 1:
        raise ValueError(f"{window=} and {batch=} must be at least 1")
    num_blocks = -(-(len(tokens) - 1) // (window * batch))
    padded = np.zeros(num_blocks * batch * window + 1, np.int32)
    padded[: len(tokens)] = tokens
    rows = np.lib.stride_tricks.sliding_window_view(padded, window + 1)[::window]
    return list(rows.reshape(num_blocks, batch, window + 1))


@functools.partial(jax.jit, static_argnames=("graph",))
def _forward(graph: Any, state: Any, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
    return jax.nn.log_softmax(nnx.merge(graph, state)(tokens), axis=-1)


def _pairs(blocks: Iterable[_Block], reference: Iterable[_Block]) -> Iterator[tuple[_Block, _Block]]:
    """Checks that both models saw the same windows."""
    for i, (block, other) in enumerate(itertools.zip_longest(blocks, reference)):
        found, needed = (None if b is None else b.shape for b in (other, block))
        if found != needed:
            raise ValueError(
                f"block {i} of reference has shape {found}, that of the model {needed}: "
                "make it with log_probabilities and the same tokens, window and batch"
            )
        yield block, other


@jax.jit
def _scores(
    block: Float[Array | np.ndarray, "B S V"],
    reference: Float[Array | np.ndarray, "B S V"] | None,
    targets: Int[Array | np.ndarray, "B S"],
) -> tuple[Array, ...]:
    """Bits of each target; with a reference also KL in bits and whether the likeliest tokens agree."""
    chosen = jnp.take_along_axis(block, targets[:, :, None], axis=-1)[:, :, 0]
    bits = -chosen / np.log(2)
    if reference is None:
        return (bits,)
    kl = jnp.sum(jnp.exp(reference) * (reference - block), axis=-1) / np.log(2)
    return bits, kl, jnp.argmax(block, axis=-1) == jnp.argmax(reference, axis=-1)
