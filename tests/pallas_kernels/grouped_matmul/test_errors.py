"""Each message names the value and the remedy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, grouped_matmul, make_group_metadata, quantize

X, W = jnp.ones((6, 16), jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
SIZES = jnp.array([2, 3], jnp.int32)

BAD_VALUES = {
    "K differs": ({"lhs": X[:, :8]}, r"lhs.shape=\(6, 8\).*same K"),
    "rank of lhs": ({"lhs": X[None]}, r"lhs.shape=\(1, 6, 16\) must be \[M, K\]"),
    "rank of rhs": ({"rhs": W[0]}, r"must be \[E, N, K\]"),
    "groups are int32": ({"group_sizes": SIZES.astype(jnp.float32)}, "must be int32"),
    "too many groups": ({"group_sizes": jnp.ones(3, jnp.int32)}, "3 group_sizes for 2 experts.*give group_offset"),
    "too few groups": ({"group_sizes": jnp.ones(1, jnp.int32), "group_offset": 0}, "every expert needs its group"),
    "offset": ({"group_offset": 1}, "group_offset=1"),
    "metadata": ({"metadata": make_group_metadata(jnp.ones(3, jnp.int32))}, "other groups"),
    "bias": ({"bias": jnp.ones((2, 4))}, r"bias.shape=\(2, 4\) must be \[E, N\] = \(2, 8\)"),
    "odd N": ({"rhs": W[:, :7], "epilogue": "silu"}, "N=7.*must be even"),
    "activation": ({"epilogue": "swish"}, "valid names: gelu"),
    "activation format": ({"activation_format": "fp8_per_block"}, "no activation format; valid names"),
    "weight format": ({"rhs": quantize(W, "fp8_per_token")}, "no weight format; valid names"),
    "output format": ({"out_format": "fp8"}, "valid names: fp8_per_group"),
    "quantized twice": (
        {"lhs": quantize(X, "fp8_per_token"), "activation_format": "int8_per_token"},
        "'int8_per_token'.*already, as 'fp8_per_token'; drop one",
    ),
    "implementation": ({"implementation": "cuda"}, "'xla', 'mosaic_gpu', 'mosaic_tpu'"),
}


def call(**changes):
    arguments = {"lhs": X, "rhs": W, "group_sizes": SIZES, **changes}
    return grouped_matmul(arguments.pop("lhs"), arguments.pop("rhs"), arguments.pop("group_sizes"), **arguments)


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_bad_dtypes():
    with pytest.raises(TypeError, match="codes go in a QuantizedArray"):
        call(rhs=W.astype(jnp.int8))
    with pytest.raises(TypeError, match="must be bfloat16, float16 or float32"):
        call(out_dtype=jnp.int8)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_a_kernel_that_cannot_serve_says_why(implementation):
    with pytest.raises(UnsupportedError, match=f"'{implementation}' cannot serve.*use 'xla'"):
        call(implementation=implementation)


def test_a_gradient_that_there_is_not_is_an_error_not_zero():
    packed = quantize(W, "fp8_per_channel")
    with pytest.raises(UnsupportedError, match="no gradient"):
        jax.grad(lambda scales: call(rhs=dataclasses.replace(packed, scales=scales)).sum())(packed.scales)
    with pytest.raises(UnsupportedError, match="no gradient"):
        jax.grad(lambda x: call(lhs=x, out_format="fp8_per_token").scales.sum())(X)
    rows = quantize(X, "fp8_per_token")
    with pytest.raises(UnsupportedError, match="no gradient"):
        jax.grad(lambda scales: call(lhs=dataclasses.replace(rows, scales=scales)).sum())(rows.scales)


def test_numpy_arrays_are_arrays():
    found = grouped_matmul(np.asarray(X), np.asarray(W), np.asarray(SIZES))
    assert (found == grouped_matmul(X, W, SIZES)).all()
