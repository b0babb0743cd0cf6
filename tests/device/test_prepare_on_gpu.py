"""Pairs sorted and tokens sent at once on a GPU: the order and the tiles of numpy, the bits of `quantize`."""

import functools

import jax
import jax.numpy as jnp
import pytest

import prepared
from by_name import by_name
from pallas_kernels import prepare

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
FORMATS = (None, "fp8_per_group", "fp8_per_token", "int8_per_token", "fp8_per_tensor_dynamic")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "k"),
    [
        (1, 8, 128, 2048),
        (16, 8, 256, 7168),
        (50, 6, 64, 1024),
        (512, 8, 128, 2048),
        (300, 2, 8, 4096),
        (4099, 8, 256, 1024),
    ],
)
def test_order_tiles_and_rows(tokens, top_k, num_experts, k, name):
    x, ids = prepared.problem(tokens, top_k, num_experts, k)
    run = functools.partial(prepare, num_experts=num_experts, activation_format=name)
    found = jax.jit(run)(x, jnp.ones(ids.shape, jnp.float32), ids)
    prepared.check(found, x, ids, num_experts, None if name is None else by_name(name))
