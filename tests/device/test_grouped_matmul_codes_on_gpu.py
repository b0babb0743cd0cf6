"""The Hopper grouped matmul of 8-bit codes on a GPU: right for random shapes, and the same bits from run to run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from by_name import by_name
from codes import PAIRS, real
from pallas_kernels import QuantizedArray, fused_moe, grouped_matmul, quantize
from random_groups import random_groups
from tolerance import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
# Sums of each 128 of K are exact to about 14 bits on the tensor cores, and those of all of K are no better.
BLOCKS, WHOLE, INTEGERS = ({"batch": a, "worst_row": 3 * a} for a in (3e-4, 3e-3, 2e-6))


def tolerance_of(pair):
    if pair[0].startswith("int8"):
        return INTEGERS
    return BLOCKS if pair[0] == "fp8_per_block" else WHOLE


def random_problem(seed, pair):
    """Shapes, sizes of groups (skewed, with empty ones and rows of no expert) and codes."""
    rng = np.random.default_rng(seed)
    m, n, k = int(rng.integers(1, 1500)), 128 * int(rng.integers(1, 13)), 64 * int(rng.integers(2, 25))
    experts, sizes, offset = random_groups(rng, m)
    x = rng.standard_normal((m, k)) * np.exp2(rng.integers(-4, 4, (m, -(-k // 128))).repeat(128, axis=1)[:, :k])
    w = rng.standard_normal((experts, n, k)) * np.exp2(rng.integers(-4, 4, (experts, n, 1))) / np.sqrt(k)
    x, w = (jnp.asarray(a, jnp.float32).astype(jnp.bfloat16) for a in (x, w))
    return quantize(x, by_name(pair[1])), quantize(w, by_name(pair[0])), sizes, offset


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_random_shapes(pair, seed):
    lhs, rhs, sizes, offset = random_problem(seed, pair)
    call = jax.jit(
        functools.partial(grouped_matmul, group_offset=offset, out_dtype=jnp.float32, implementation="mosaic_gpu")
    )
    found = call(lhs, rhs, sizes)
    assert_close(
        found, definition.grouped_matmul(real(lhs), real(rhs), sizes, offset=offset or 0), **tolerance_of(pair)
    )
    assert_same_bits(call(lhs, rhs, sizes), found)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_scales_of_another_expert_are_noticed(pair):
    lhs, rhs, sizes, offset = random_problem(4, pair)
    turned = QuantizedArray(values=rhs.values, scales=jnp.roll(rhs.scales, 1, axis=0), format=rhs.format)
    found = grouped_matmul(lhs, turned, jnp.asarray(sizes), group_offset=offset, implementation="mosaic_gpu")
    expected = definition.grouped_matmul(real(lhs), real(rhs), sizes, offset=offset or 0)
    with pytest.raises(AssertionError):
        assert_close(found, expected, batch=0.1, worst_row=0.1)


@pytest.mark.parametrize("tokens", [1, 3, 64, 700])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_whole_layer(pair, tokens):
    rng = np.random.default_rng(tokens)
    x, w13, w2 = (
        jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-1]) ** (len(shape) > 2), jnp.bfloat16)
        for shape in ((tokens, 256), (16, 2, 384, 256), (16, 256, 384))
    )
    q13, q2 = (quantize(w, by_name(pair[0])) for w in (w13, w2))
    ids = np.stack([rng.permutation(17)[:4] - 1 for _ in range(tokens)]).astype(np.int32)  # -1: of no expert
    weights = rng.random((tokens, 4)).astype(np.float32)
    run = {
        name: jax.jit(functools.partial(fused_moe, activation_format=pair[1], implementation=name))
        for name in ("xla", "mosaic_gpu")
    }
    arrays = x, q13, q2, weights, ids
    found, expected = (np.asarray(run[name](*arrays)) for name in ("mosaic_gpu", "xla"))
    # Some hidden codes round otherwise, each a step of 9 %: 1.9e-2 of three tokens.
    assert_close(found, expected.astype(np.float64), batch=3e-2, worst_row=5e-2)
    assert_same_bits(run["mosaic_gpu"](*arrays), found)
    turned = jax.tree.map(lambda a: jnp.roll(a, 1, 0), q13)
    rotated = np.asarray(run["xla"](x, turned, q2, weights, ids)).astype(np.float64)
    with pytest.raises(AssertionError):
        assert_close(found, rotated, batch=0.1, worst_row=0.1)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_it_is_what_runs_by_itself(pair):
    lhs, rhs, sizes, offset = random_problem(0, pair)
    call = jax.jit(functools.partial(grouped_matmul, group_offset=offset))
    assert "grouped_matmul_8bit" in str(call.trace(lhs, rhs, jnp.asarray(sizes)).jaxpr)
