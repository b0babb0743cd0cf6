"""No array over all experts and all tokens, no dequantized copy of all experts."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import fused_moe, get_format, quantize

T, E, TOP_K, H, WIDTH = 64, 16, 2, 512, 1024


def temporary_bytes(run, weight, dtype=jnp.bfloat16):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    w13, w2 = array(E, 2, WIDTH, H), array(E, H, WIDTH)
    if weight is not None:
        w13, w2 = (jax.eval_shape(lambda w: quantize(w, weight), w) for w in (w13, w2))
    ids, weights = jax.ShapeDtypeStruct((T, TOP_K), jnp.int32), jax.ShapeDtypeStruct((T, TOP_K), jnp.float32)
    return jax.jit(run).lower(array(T, H), w13, w2, weights, ids).compile().memory_analysis().temp_size_in_bytes


def bound(dtype):
    """One expert in the dtype of the contraction and the rows that are really routed, in f32, three times over."""
    one_expert = 2 * WIDTH * H * jnp.dtype(dtype).itemsize
    rows = T * TOP_K * (H + 3 * WIDTH + H) * 4
    return one_expert + 3 * rows


@pytest.mark.parametrize(
    ("weight", "activation", "dtype"),
    [
        (None, None, jnp.bfloat16),
        (None, None, jnp.float16),
        ("int8_per_channel", None, jnp.bfloat16),
        ("int8_per_channel", "int8_per_token", jnp.bfloat16),
        ("fp8_per_channel", None, jnp.float32),
        ("fp8_per_channel", "fp8_per_token", jnp.bfloat16),
        ("fp8_per_block", None, jnp.bfloat16),
        ("fp8_per_block", "fp8_per_group", jnp.bfloat16),
    ],
)
def test_temporaries_do_not_grow_with_the_experts(weight, activation, dtype):
    run = functools.partial(fused_moe, activation_format=activation)
    assert temporary_bytes(run, weight, dtype) <= bound(dtype)


@pytest.mark.parametrize("weight", ["int8_per_channel", "fp8_per_block"])
def test_the_bound_notices_dequantized_experts(weight):
    def naive(x, w13, w2, weights, ids):
        w13, w2 = (jax.lax.optimization_barrier(w.dequantize(x.dtype)) for w in (w13, w2))
        return fused_moe(x, w13, w2, weights, ids)

    assert get_format(weight).bits == 8
    assert temporary_bytes(naive, weight) > 2 * bound(jnp.bfloat16)


def test_the_bound_notices_an_array_over_experts_and_tokens():
    def naive(x, w13, w2, weights, ids):
        hidden = jnp.einsum("th,esih->etsi", x, w13)
        return jnp.einsum("eti,ehi->th", jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1], w2)

    assert temporary_bytes(naive, None) > bound(jnp.bfloat16)
