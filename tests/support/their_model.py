"""A Mixture-of-Experts model as someone else would write it: flax and jax, nothing of ours."""

import jax
import jax.numpy as jnp
from flax import nnx

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCAB = 256, 384, 8, 2, 64


class TheirMoE(nnx.Module):
    def __init__(self, *, rngs):
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.router = nnx.Linear(HIDDEN, EXPERTS, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)
        self.w_gate = nnx.Param(init(rngs.params(), (EXPERTS, HIDDEN, INTERMEDIATE), jnp.bfloat16))
        self.w_up = nnx.Param(init(rngs.params(), (EXPERTS, HIDDEN, INTERMEDIATE), jnp.bfloat16))
        self.w_down = nnx.Param(init(rngs.params(), (EXPERTS, INTERMEDIATE, HIDDEN), jnp.bfloat16))

    def __call__(self, x):
        kernel = self.router.kernel[...].astype(jnp.float32)
        weights, ids = jax.lax.top_k(jax.nn.softmax(x.astype(jnp.float32) @ kernel), TOP_K)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        combine = jnp.sum(jax.nn.one_hot(ids, EXPERTS) * weights[..., None], axis=-2).astype(x.dtype)
        hidden = jnp.einsum("...h,ehi->...ei", x, self.w_gate[...])
        hidden = jax.nn.silu(hidden) * jnp.einsum("...h,ehi->...ei", x, self.w_up[...])
        return jnp.einsum("...ei,eih->...h", hidden * combine[..., None], self.w_down[...])


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.RMSNorm(HIDDEN, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        self.mix = nnx.Linear(HIDDEN, HIDDEN, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        self.moe = TheirMoE(rngs=rngs)

    def __call__(self, x):
        x = x + self.mix(x)
        return x + self.moe(self.norm(x))


class Model(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(VOCAB, HIDDEN, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.List(Layer(rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(HIDDEN, VOCAB, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).astype(jnp.float32)
