"""The order of the rows against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.routing import sort_by_expert
from pallas_kernels.routing.groups import counted


@pytest.mark.parametrize("with_map", [False, True])
def test_rows_sorted_by_expert(with_map):
    rng = np.random.default_rng(1)
    ids = rng.integers(-1, 8, (23, 3)).astype(np.int32)
    expert_map = np.array([2, -1, 0, -1, 1, -1], np.int32) if with_map else None
    order = sort_by_expert(jnp.asarray(ids), 3, expert_map=None if expert_map is None else jnp.asarray(expert_map))
    local = ids if expert_map is None else np.where((ids >= 0) & (ids < 6), expert_map[np.clip(ids, 0, 5)], -1)
    routed = (local >= 0) & (local < 3)
    pairs = sorted((int(local[t, j]), t, j) for t, j in zip(*np.nonzero(routed), strict=True))
    used = len(pairs)
    assert np.array_equal(order.routed, routed)
    assert np.array_equal(order.group_sizes, np.bincount(local[routed], minlength=3))
    assert np.array_equal(order.metadata.group_starts, np.cumsum([0, *order.group_sizes])[:3])
    assert order.tokens[:used].tolist() == [t for _, t, _ in pairs]
    assert [int(order.rows[t, j]) for _, t, j in pairs] == list(range(used))
    assert sorted(order.rows.reshape(-1).tolist()) == list(range(ids.size))  # each pair has a row of its own


@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 5000, 6144])
@pytest.mark.parametrize("num_experts", [1, 5, 130])
def test_counting_is_a_stable_sort(size, num_experts):
    """What GPUs do in place of a sort, keys of no expert last."""
    rng = np.random.default_rng(size)
    keys = rng.integers(0, num_experts + 1, size).astype(np.int32)
    if size > 4096:
        keys[: size // 2] = num_experts // 2  # more of one than a part holds
    rows, bounds = jax.jit(counted, static_argnums=1)(keys, num_experts)
    order = np.argsort(keys, kind="stable")
    assert np.array_equal(np.asarray(rows)[order], np.arange(size))
    assert np.array_equal(bounds, np.searchsorted(keys[order], np.arange(num_experts + 1)))
