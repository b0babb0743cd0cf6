"""The Hopper grouped matmul on a GPU: right for 200 random shapes, and the same bits from run to run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import grouped_matmul
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
    groups = int(rng.integers(1, 33))
    offset = int(rng.integers(0, groups)) if rng.random() < 0.3 else None
    experts = groups if offset is None else int(rng.integers(1, groups - offset + 1))
    share = rng.dirichlet(np.full(groups + 1, rng.choice([0.1, 1.0, 10.0])))
    sizes = np.bincount(rng.choice(groups + 1, size=m, p=share), minlength=groups + 1)[:groups].astype(np.int32)
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
