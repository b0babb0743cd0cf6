"""What `prepare` must give, in numpy: tokens, their order, and the tiles over it."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import quantize
from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT, NUM_TILES
from tolerance import assert_same_bits


def problem(tokens, top_k, num_experts, k):
    """Magnitudes differ from token to token and group to group; ids at both ends are of no expert."""
    rng = np.random.default_rng(tokens + top_k + k)
    x = rng.standard_normal((tokens, k)) * np.exp2(rng.integers(-9, 9, (tokens, -(-k // 128)))).repeat(128, 1)[:, :k]
    x[tokens // 2] = 0
    ids = rng.integers(-1, num_experts + 1, (tokens, top_k)).astype(np.int32)
    ids[: tokens // 3] = num_experts // 2  # more in one expert than in others
    return jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), jnp.asarray(ids)


def check(found, x, ids, num_experts, fmt):
    """Order, tiles, and the bits of every row."""
    ids = np.asarray(ids)
    routed = (ids >= 0) & (ids < num_experts)
    keys = np.where(routed, ids, num_experts).ravel()
    pairs = np.argsort(keys, kind="stable")
    order, tokens = found.order, pairs // ids.shape[1]
    assert np.array_equal(np.asarray(order.rows).ravel()[pairs], np.arange(keys.size))
    assert np.array_equal(order.tokens, tokens)
    assert np.array_equal(order.routed, routed)
    sizes = np.bincount(keys, minlength=num_experts + 1)
    starts = np.cumsum(sizes) - sizes
    assert np.array_equal(order.group_sizes, sizes[:-1])
    assert np.array_equal(order.metadata.group_starts, starts[:-1])
    plan = order.metadata.plan
    assert plan.num_rows == keys.size
    wanted = tiles(starts, sizes, keys.size, plan.block_m)
    assert (np.asarray(plan.tiles)[NUM_TILES] == len(wanted)).all()
    assert np.array_equal(np.asarray(plan.tiles)[:NUM_TILES, : len(wanted)], wanted.T)
    if fmt is None:
        assert_same_bits(found.rows, np.asarray(x)[tokens])
        return
    whole = quantize(jnp.where(routed.any(1)[:, None], x, 0) if fmt.whole_matrix else x, fmt)
    assert_same_bits(found.rows.values, np.asarray(whole.values)[tokens])
    assert_same_bits(found.rows.scales, whole.scales if fmt.whole_matrix else np.asarray(whole.scales)[:, tokens])


def tiles(starts, sizes, num_rows, block_m):
    """Expert, first row loaded, first and last row owned, whether it has an expert: of each tile."""
    found, most = [], max(-(-num_rows // ALIGNMENT) * ALIGNMENT - block_m, 0)
    for expert, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        known = expert < len(sizes) - 1
        for row in range(start // ALIGNMENT * ALIGNMENT, start + size if size else 0, block_m):
            owned = max(row, start), min(row + block_m, start + size)
            found.append((expert if known else -1, min(row, most), *owned, int(known)))
    return np.array(found, np.int32).reshape(-1, NUM_TILES)
