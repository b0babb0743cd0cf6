"""The order of the rows against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.routing import sort_by_expert


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
