"""`MoE` for flax.nnx."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights
from moe_online.layer import moe_layer
from moe_online.method import get_method


class MoE(nnx.Module):
    """A layer of routed experts: `moe(x) -> y`, both `[..., H]`.

    Its parameters are `router` `[H, E]` (an `nnx.Linear`, with a bias where the config says so, computed in f32) and
    `experts`, one `ExpertWeights`, shared experts included. Made inside `nnx.eval_shape` it is only declared;
    `moe_online.load` fills and quantizes it.

    Args:
      config: The layer.
      rngs: Initialises the parameters.
      dtype: Of the computation: inputs are cast to it. None keeps theirs.
      param_dtype: Of the parameters; default `config.params_dtype`.

    >>> config = MoEConfig(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
    >>> moe = nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)))  # 22 GB of weights, declared
    >>> moe.experts.w13_weight.shape
    (256, 2, 2048, 7168)
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
    ):
        param_dtype = config.params_dtype if param_dtype is None else param_dtype
        self.router = nnx.Linear(
            config.hidden_size,
            config.num_experts,
            use_bias=config.router_bias,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            kernel_init=init_kernel,
            rngs=rngs,
        )
        self.experts = nnx.Param(_init_experts(rngs.params(), config, jnp.dtype(param_dtype)))
        self.config, self.dtype = config, None if dtype is None else jnp.dtype(dtype)

    def __call__(
        self, x: Float[Array, "*batch H"], *, token_mask: Bool[Array, "*batch"] | None = None
    ) -> Float[Array, "*batch H"]:
        """Returns the weighted sum of the chosen experts' outputs, plus the shared experts', in `dtype`.

        Args:
          x: The tokens.
          token_mask: False for tokens that are padding: they come out as zeros and change nothing for others.
        """
        x = x if self.dtype is None else x.astype(self.dtype)
        kernel, bias = self.router.kernel[...], None if self.router.bias is None else self.router.bias[...]
        return moe_layer(x, kernel, self.experts.get_value(), self.config, router_bias=bias, token_mask=token_mask)


# As one function each: flax looks through all operations traced so far for every parameter that it declares.
init_kernel = jax.jit(nnx.initializers.lecun_normal(), static_argnums=(1, 2, 3))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _init_experts(key: jax.Array, config: MoEConfig, dtype: Any) -> ExpertWeights:
    declared = get_method(None, config).create_weights(
        config.num_experts, config.hidden_size, config.intermediate_size, dtype
    )
    leaves, structure = jax.tree_util.tree_flatten_with_path(declared)
    keys = jax.random.split(key, len(leaves))
    made = [_init(path, leaf, each) for (path, leaf), each in zip(leaves, keys, strict=True)]
    experts: ExpertWeights = jax.tree.unflatten(structure, made)
    return experts


def _init(path: Any, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """Zeros for biases; weights and gates as `nnx.Linear` has them, each matrix by itself."""
    name, ndim = path[-1].name, len(leaf.shape)
    if name.endswith("bias"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    if ndim == 1:  # the gate of shared experts, a matrix of one output
        gate: jax.Array = init_kernel(key, (*leaf.shape, 1), leaf.dtype).reshape(leaf.shape)
        return gate
    batch = tuple(range(ndim - 2))
    init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=batch)
    weight: jax.Array = init(key, leaf.shape, leaf.dtype)
    return weight
