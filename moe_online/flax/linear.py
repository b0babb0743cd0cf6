"""`Linear` for flax.nnx: a dense layer whose kernel may be quantized while it is loaded."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_online.dense import DenseKernel
from pallas_kernels import matmul


class Linear(nnx.Linear):
    """`nnx.Linear`, whose kernel `moe_online.load` can quantize: `linear(x) -> y`, `[..., K]` to `[..., N]`.

    Arguments and parameters are those of `nnx.Linear`, `in_features` K and `out_features` N, and until it is quantized
    it computes the same. Made inside `nnx.eval_shape` it is only declared. A kernel that was loaded with a scheme is a
    `moe_online.dense.DenseKernel` `[N, K]`; sums are then in f32 and rounded once, after the bias, to the dtype that
    `nnx.Linear` would return, and `precision`, `dot_general` and `preferred_element_type` have no effect.

    >>> linear = nnx.eval_shape(lambda: Linear(4096, 1024, use_bias=False, rngs=nnx.Rngs(0)))
    >>> linear.kernel.shape
    (4096, 1024)
    """

    def __call__(self, inputs: Float[Array, "*batch K"], out_sharding: Any = None) -> Float[Array, "*batch N"]:
        """Returns `inputs @ kernel + bias`.

        Raises:
          ValueError: `out_sharding`, where the kernel is quantized.
          UnsupportedError: differentiation, where inputs are quantized.
        """
        kernel = self.kernel.get_value()
        if not isinstance(kernel, DenseKernel):
            return super().__call__(inputs, out_sharding)
        if out_sharding is not None:
            raise ValueError(f"{out_sharding=}: a quantized layer's output lies as its operands do; leave it out")
        declared = jnp.zeros((), self.param_dtype)  # stands for the kernel, whose codes say nothing of the result
        bias = None if self.bias is None else self.bias[...]
        x, _, bias = self.promote_dtype((inputs, declared, bias), dtype=self.dtype)
        rows = x.reshape(-1, x.shape[-1])
        y = matmul(rows, kernel.weight, bias=bias, activation_format=kernel.activation_format)
        return y.reshape(*x.shape[:-1], y.shape[-1])
