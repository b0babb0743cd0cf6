"""The Hopper grouped matmul on a GPU: right for 200 random shapes, and the same bits from run to run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import Activation, fused_moe, grouped_matmul
from random_groups import random_groups
from tolerance import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
ROUNDING = {"batch": 2.5e-3, "worst_row": 4e-3}  # rounding the output to bf16 costs 1.7e-3 and 2.0e-3
EXACT = {"batch": 2e-5, "worst_row": 4e-5}  # f32 sums of the tensor cores


def random_problem(seed):
    """Shapes, sizes of groups (skewed, with empty ones and rows of no expert) and operands."""
    rng = np.random.default_rng(seed)
    m, n, k = int(rng.integers(1, 1500)), 64 * int(rng.integers(2, 17)), 64 * int(rng.integers(1, 17))
    experts, sizes, offset = random_groups(rng, m)
    x, w = (rng.standard_normal(shape).astype(jnp.bfloat16) for shape in ((m, k), (experts, n, k)))
    return x, w, sizes, offset


def expected_of(x, w, sizes, offset):
    return definition.grouped_matmul(x.astype(np.float64), w.astype(np.float64), sizes, offset=offset or 0)


@pytest.mark.parametrize("seed", range(200))
def test_random_shapes(seed):
    x, w, sizes, offset = random_problem(seed)
    out_dtype = (jnp.bfloat16, jnp.float32)[seed % 2]
    call = jax.jit(
        lambda x, w, sizes: grouped_matmul(
            x, w, sizes, group_offset=offset, out_dtype=out_dtype, implementation="mosaic_gpu"
        )
    )
    found = call(x, w, sizes)
    assert_close(found, expected_of(x, w, sizes, offset), **(EXACT if seed % 2 else ROUNDING))
    assert_same_bits(call(x, w, sizes), found)


PARAMETERS = {"swigluoai": {"limit": 7.0}, "swiglustep": {"limit": 7.0}, "situ": {"beta": 1.5, "linear_beta": 3.0}}
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu2", *PARAMETERS]
ACTIVATIONS += ["silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul"]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_epilogues(seed, name):
    rng = np.random.default_rng(seed)
    x, w, sizes, offset = random_problem(1000 + seed)
    w = (rng.standard_normal((len(w), 128 * int(rng.integers(1, 9)), x.shape[1])) / 16).astype(jnp.bfloat16)
    bias = rng.standard_normal(w.shape[:2]).astype(jnp.bfloat16)
    activation = Activation(name, **PARAMETERS.get(name, {}))
    found = jax.jit(
        lambda x, w, sizes, bias: grouped_matmul(
            x, w, sizes, bias=bias, epilogue=activation, group_offset=offset, implementation="mosaic_gpu"
        )
    )(x, w, sizes, bias)
    arrays = (array.astype(np.float64) for array in (x, w))
    sums = definition.grouped_matmul(*arrays, sizes, bias=bias.astype(np.float64), offset=offset or 0)
    rounded = definition.rounded(sums, jnp.bfloat16)
    halves = np.split(rounded, 2, axis=1) if activation.gated else (rounded,)
    expected = definition.activation(name, *halves, **PARAMETERS.get(name, {}))
    expected[~sums.any(axis=1)] = 0
    assert_close(found, expected, batch=4.5e-3, worst_row=1e-2)


@pytest.mark.parametrize("tokens", [1, 3, 64, 700])
def test_whole_layer(tokens):
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 256)).astype(jnp.bfloat16)
    w13 = (rng.standard_normal((16, 2, 192, 256)) / 16).astype(jnp.bfloat16)
    w2 = (rng.standard_normal((16, 256, 192)) / 14).astype(jnp.bfloat16)
    ids = np.stack([rng.permutation(17)[:4] - 1 for _ in range(tokens)]).astype(np.int32)  # -1: of no expert
    weights = rng.random((tokens, 4)).astype(np.float32)
    found = jax.jit(lambda *arrays: fused_moe(*arrays, implementation="mosaic_gpu"))(x, w13, w2, weights, ids)
    expected = definition.fused_moe(x, w13.astype(np.float64), w2.astype(np.float64), weights, ids)
    assert_close(found, expected, batch=6e-3, worst_row=1.2e-2)
    rotated = definition.fused_moe(x, np.roll(w13, 1, 0).astype(np.float64), w2.astype(np.float64), weights, ids)
    with pytest.raises(AssertionError):
        assert_close(found, rotated, batch=0.1, worst_row=0.1)


def test_a_shifted_expert_is_noticed():
    x, w, sizes, offset = random_problem(4)
    expected = expected_of(x, w, sizes, offset)
    assert np.linalg.norm(expected) > 0
    found = grouped_matmul(
        jnp.asarray(x),
        jnp.roll(jnp.asarray(w), 1, axis=0),
        jnp.asarray(sizes),
        group_offset=offset,
        implementation="mosaic_gpu",
    )
    with pytest.raises(AssertionError):
        assert_close(found, expected, batch=0.1, worst_row=0.1)


def test_it_is_what_runs_by_itself():
    x, w, sizes = jnp.ones((64, 128), jnp.bfloat16), jnp.ones((4, 128, 128), jnp.bfloat16), jnp.full(4, 16, jnp.int32)
    traced = jax.jit(grouped_matmul).trace(x, w, sizes)
    assert "grouped_matmul_16bit" in str(traced.jaxpr)
