"""Matrices `[..., N, K]` as rows of blocks, `[..., N, K blocks, bk]`, and what blocks share, spread over their rows.

So what an element needs of its block lies beside its row, which XLA:CPU computes several times as fast as by index.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def in_blocks(x: jax.Array, bk: int | None) -> jax.Array:
    """`[..., N, K]` as `[..., N, K blocks, bk]`; a ragged end is filled with zeros. None: one block of all of K."""
    *lead, k = x.shape
    size = k if bk is None else bk
    blocks = 1 if bk is None else math.ceil(k / size)
    if blocks * size != k:
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, blocks * size - k)])
    return x.reshape(*lead, blocks, size)


def joined(x: jax.Array, k: int) -> jax.Array:
    """`[..., N, K blocks, bk]` as `[..., N, K]`, without what filled a ragged end."""
    whole = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return whole if whole.shape[-1] == k else whole[..., :k]


def by_row(blocks: jax.Array, n: int, bn: int | None) -> jax.Array:
    """One value per block, `[..., N blocks, K blocks]`, as one for each row of it, `[..., N, K blocks, 1]`.

    Where one value is for all rows, their axis has size 1.
    """
    if bn is not None and bn > 1:
        *lead, blocks_n, blocks_k = blocks.shape
        wide = jnp.broadcast_to(blocks[..., :, None, :], (*lead, blocks_n, bn, blocks_k))
        blocks = wide.reshape(*lead, blocks_n * bn, blocks_k)[..., :n, :]
    return blocks[..., None]
