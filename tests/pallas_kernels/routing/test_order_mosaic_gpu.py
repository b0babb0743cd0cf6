"""Hopper's sort by expert, interpreted on a CPU: the stable order, and the tiles that XLA plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul.mosaic_gpu.work import NUM_TILES, plan_work
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from pallas_kernels.routing import sort_by_expert
from quick import few_cases
from races import no_races

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        jax.__version_info__[:2] < FIRST_JAX, reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels"
    ),
]
# Tokens, slots, experts, pairs that are sorted in one launch: filled up or not, more experts than a side, several
# chunks, most pairs in one expert.
CASES = [(64, 2, 8, 2048), (50, 2, 70, 2048), (23, 3, 3, 32), (300, 2, 130, 32), (128, 2, 5, 32), (1, 1, 1, 2048)]
QUICK = [(50, 2, 70, 2048), (23, 3, 3, 32)]


@pytest.mark.parametrize("skewed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "at_once"), few_cases(CASES, QUICK))
def test_order_and_tiles(tokens, top_k, num_experts, at_once, skewed, monkeypatch):
    from pallas_kernels.routing.mosaic_gpu import kernel

    monkeypatch.setattr(kernel, "AT_ONCE", at_once)
    kernel.sort.clear_cache()  # its keys do not have that number
    rng = np.random.default_rng(tokens)
    ids = rng.integers(-1, num_experts + 1, (tokens, top_k)).astype(np.int32)  # those at both ends: of no expert
    if skewed:
        ids[: tokens * 3 // 4] = num_experts // 2
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads="uninitialized"):
        found = jax.tree.map(np.asarray, sort_by_expert(jnp.asarray(ids), num_experts))
    kernel.sort.clear_cache()
    keys = np.where((ids >= 0) & (ids < num_experts), ids, num_experts).ravel()
    order = np.argsort(keys, kind="stable")
    assert np.array_equal(found.rows.ravel()[order], np.arange(keys.size))
    assert np.array_equal(found.tokens, order // top_k)
    sizes = np.bincount(keys, minlength=num_experts + 1)[:num_experts].astype(np.int32)
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)
    assert np.array_equal(found.group_sizes, sizes)
    assert np.array_equal(found.metadata.group_starts, starts)
    plan = found.metadata.plan
    shape = {"num_rows": keys.size, "num_experts": num_experts, "group_offset": None, "block_m": plan.block_m}
    expected = np.asarray(plan_work(jnp.asarray(starts), jnp.asarray(sizes), **shape))
    number = expected[NUM_TILES, 0]
    assert np.array_equal(plan.tiles[:, :number], expected[:, :number])
    assert plan.num_rows == keys.size


def test_xla_is_what_was_asked_for():
    with interpreted("mosaic_gpu"):
        assert sort_by_expert(jnp.zeros((4, 1), jnp.int32), 2, implementation="xla").metadata.plan is None
