"""The weighted sum of each token's outputs on Hopper, interpreted on a CPU, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import finalize, prepare
from pallas_kernels.fused_moe.combine_call import CombineCall
from pallas_kernels.fused_moe.mosaic_gpu import combine
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from quick import few, few_cases
from races import no_races

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        jax.__version_info__[:2] < FIRST_JAX, reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels"
    ),
]

SMALL, ODD = (16, 3, 5, 256, jnp.bfloat16), (5, 1, 3, 131, jnp.float32)


def problem(tokens, top_k, experts, hidden, dtype):
    """Outputs that are no numbers where no expert is, and there a weight that is none either."""
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, experts, (tokens, top_k)).astype(np.int32)
    ids[::3, 0], ids[1::4, -1] = experts, -1
    weights = rng.standard_normal((tokens, top_k)).astype(np.float32)
    weights[(ids < 0) | (ids >= experts)] = np.nan
    outputs = rng.standard_normal((tokens * top_k, hidden)).astype(np.float32)
    outputs[np.count_nonzero((ids >= 0) & (ids < experts)) :] = np.nan
    return jnp.asarray(ids), jnp.asarray(weights), jnp.asarray(outputs).astype(dtype)


def expected_of(ids, weights, outputs, experts):
    """The rows in the order of (expert, token, slot), added up in float64."""
    routed = ((ids >= 0) & (ids < experts)).ravel()
    order = np.argsort(np.where(routed, ids.ravel(), experts), kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(order.size)
    rows = np.asarray(outputs).astype(np.float64)[places].reshape(*ids.shape, -1)
    mine = routed.reshape(*ids.shape, 1)
    return np.where(mine, rows * np.asarray(weights, np.float64)[..., None], 0).sum(axis=1)


@pytest.mark.parametrize("with_table", few([True, False], [True]), ids=["sorted by a kernel", "sorted by XLA"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "dtype"),
    few_cases([SMALL, (7, 2, 70, 1160, jnp.float16), ODD], [SMALL, ODD]),
)
def test_weighted_sum(tokens, top_k, experts, hidden, dtype, with_table):
    ids, weights, outputs = problem(tokens, top_k, experts, hidden, dtype)
    expected = expected_of(ids, weights, outputs, experts)
    with no_races(), interpreted("mosaic_gpu", detect_races=True):
        prepared = prepare(jnp.zeros((tokens, hidden), dtype), weights, ids, experts)
        assert prepared.order.metadata.groups is not None
        if not with_table:
            tables = {"plan": None, "groups": None}
            metadata = type(prepared.order.metadata)(group_starts=prepared.order.metadata.group_starts, **tables)
            order = type(prepared.order)(**{**vars(prepared.order), "metadata": metadata})
            prepared = type(prepared)(**{**vars(prepared), "order": order})
        whole = jax.jit(functools.partial(finalize, dtype=jnp.float32))
        assert "combine" in str(whole.trace(outputs, prepared).jaxpr)
        found, rounded = np.asarray(whole(outputs, prepared)), np.asarray(finalize(outputs, prepared))
    assert np.abs(found - expected).max() <= 1e-6 * top_k * np.abs(expected).max()
    assert rounded.dtype == dtype
    assert np.array_equal(rounded, found.astype(dtype))
    other = expected_of(np.roll(ids, 1, axis=0), weights, outputs, experts)
    assert not np.abs(found - other).max() <= 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (None, {}),
        ("no rows", {"rows": jax.ShapeDtypeStruct((0, 256), jnp.bfloat16)}),
        ("bf16, f16 or f32, not int8", {"rows": jax.ShapeDtypeStruct((8, 256), jnp.int8)}),
        ("at most 32 slots, not 33", {"weights": jax.ShapeDtypeStruct((4, 33), jnp.float32)}),
        ("H=96 must be at least 128", {"rows": jax.ShapeDtypeStruct((8, 96), jnp.bfloat16)}),
    ],
)
def test_what_it_serves(reason, changes):
    order = prepare(jnp.zeros((4, 256)), jnp.zeros((4, 2)), jnp.zeros((4, 2), jnp.int32), 3).order
    fields = {
        "rows": jax.ShapeDtypeStruct((8, 256), jnp.bfloat16),
        "weights": jax.ShapeDtypeStruct((4, 2), jnp.float32),
        "order": order,
        "dtype": np.dtype(jnp.bfloat16),
    }
    said = combine.unsupported_anywhere(CombineCall(**fields | changes))
    assert said is None if reason is None else reason in said
