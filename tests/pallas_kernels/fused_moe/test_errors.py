"""Each message names the value and the remedy."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import UnsupportedError, fused_moe, quantize

GOOD = {
    "x": jnp.ones((3, 16)),
    "w13": jnp.ones((2, 2, 8, 16)),
    "w2": jnp.ones((2, 16, 8)),
    "topk_weights": jnp.ones((3, 2)),
    "topk_ids": jnp.zeros((3, 2), jnp.int32),
}
BAD_VALUES = {
    "w13": ({"w13": jnp.ones((2, 1, 8, 16))}, r"must be \(2, 2, 8, 16\) or \(2, 16, 16\)"),
    "w2": ({"w2": jnp.ones((16, 8))}, r"\[E, H, I\]"),
    "x": ({"x": jnp.ones((3, 8))}, "H=16"),
    "ids": ({"topk_ids": jnp.zeros((4, 2), jnp.int32)}, r"T=3, not int32 \(4, 2\)"),
    "dtype of ids": ({"topk_ids": jnp.zeros((3, 2), jnp.uint8)}, "uint8"),
    "weights": ({"topk_weights": jnp.ones((3, 1))}, r"topk_weights.shape=\(3, 1\) must be"),
    "w13 bias": ({"w13_bias": jnp.ones((2, 8))}, r"w13_bias.shape=\(2, 8\) must be \(2, 2, 8\) or \(2, 16\)"),
    "w2 bias": ({"w2_bias": jnp.ones((2, 8))}, r"must be \(2, 16\)"),
    "expert map": ({"expert_map": jnp.zeros((2, 2), jnp.int32)}, "expert_map must be int32"),
    "on input": ({"apply_router_weight_on_input": True}, "needs top_k 1, not 2"),
    "not gated": ({"activation": "silu_no_mul"}, r"must be \(2, 1, 8, 16\) or \(2, 8, 16\).* and 'silu_no_mul'"),
    "activation": ({"activation": "swish"}, "unknown activation 'swish'; valid names"),
    "format": ({"activation_format": "fp8_per_block"}, "no activation format"),
    "implementation": ({"implementation": "cuda"}, "one of 'xla'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        fused_moe(**{**GOOD, **changes})


def test_bad_dtypes():
    with pytest.raises(TypeError, match="give activation_format"):
        fused_moe(**{**GOOD, "x": quantize(GOOD["x"], "fp8_per_token")})
    with pytest.raises(TypeError, match=r"w2\.dtype=int8"):
        fused_moe(**{**GOOD, "w2": GOOD["w2"].astype(jnp.int8)})


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_a_kernel_that_cannot_serve_says_why(implementation):
    with pytest.raises(UnsupportedError, match=f"'{implementation}' cannot serve.*use 'xla'"):
        fused_moe(**GOOD, implementation=implementation)


@pytest.mark.parametrize("activation_format", [None, "int8_per_token"])
def test_quantized_weights_have_no_gradient(activation_format):
    """An error, not zeros."""
    w2 = quantize(GOOD["w2"], "fp8_per_channel")
    arguments = {**GOOD, "activation_format": activation_format}
    with pytest.raises(UnsupportedError, match="no gradient"):
        jax.grad(lambda v: fused_moe(**{**arguments, "w2": dataclasses.replace(w2, scales=v)}).sum())(w2.scales)
