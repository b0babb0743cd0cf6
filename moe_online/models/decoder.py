"""One generic decoder: pre-norm blocks of grouped-query attention and a Mixture-of-Experts layer.

Attention, normalization, residuals and rotary embedding follow Mixtral, so its Hugging Face weights map one to
one (a kernel here is the transposed `weight` there). The module holds parameters and nothing else: the KV cache is a
pytree that goes in and comes out. Parameters may be abstract (`nnx.eval_shape`) until they are loaded. Loading can
quantize the experts and the four projections of attention; embedding, norms, routers and the lm head stay as they are.

Letters: B sequences, S tokens of each, C positions of the cache, N query heads, G key and value heads, D head size.

Source: Mixtral of Experts (arXiv:2401.04088); rotary embedding in the half-rotation form of Llama.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_online.config import MoEConfig
from moe_online.errors import ConfigError
from moe_online.flax.linear import Linear
from moe_online.flax.nnx import MoE, init_kernel
from pallas_kernels import Activation

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any  # jax.tree.map may put a ShapeDtypeStruct or a sharding here

MoEFactory = Callable[..., nnx.Module]  # called as moe(config, rngs=rngs); the layer maps [..., H] to [..., H]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything static about a decoder; hashable, and JSON through `to_json` and `from_json`.

    Raises:
      ConfigError: sizes that do not fit together.
    """

    vocab_size: int  # V
    hidden_size: int  # H
    num_layers: int
    num_heads: int  # N, of queries
    num_kv_heads: int  # G, of keys and values; each serves N / G query heads
    head_dim: int  # D
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # the lm head is the transposed embedding
    moe: MoEConfig

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}: "
                "each key head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: rotary embedding rotates pairs")
        if self.moe.hidden_size != self.hidden_size:
            raise ConfigError(
                f"moe.hidden_size={self.moe.hidden_size} must equal hidden_size={self.hidden_size}: "
                "the experts read and write the residual stream"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns a dict that `json.dumps` takes; dtypes become their names.

        Raises:
          ConfigError: a function of one's own, which has no JSON.
        """
        if self.moe.custom_routing_function is not None:
            raise ConfigError(f"custom_routing_function={self.moe.custom_routing_function!r} cannot be written as JSON")
        values = dataclasses.asdict(self)
        values["moe"]["params_dtype"] = self.moe.params_dtype.name
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DecoderConfig:
        """Builds the config that `to_json` wrote.

        Raises:
          KeyError: there is no `moe`.
          TypeError: another key is missing, or one is unknown.
          ConfigError: a value is out of its range.
        """
        moe = {**values["moe"], "params_dtype": jnp.dtype(values["moe"]["params_dtype"])}
        if isinstance(moe.get("activation"), dict):
            moe["activation"] = Activation(**moe["activation"])
        return cls(**{**values, "moe": MoEConfig(**moe)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (rotated) and values of the first `position` tokens, in buffers of fixed size."""

    keys: tuple[Leaf, ...]  # per layer [B, C, G, D]
    values: tuple[Leaf, ...]  # per layer [B, C, G, D]
    position: Leaf  # int32 scalar: tokens seen so far, the same for every sequence

    @classmethod
    def empty(cls, config: DecoderConfig, *, batch: int, size: int, dtype: DTypeLike = jnp.bfloat16) -> KVCache:
        """Returns a cache for `batch` sequences of at most `size` tokens.

        Args:
          config: The decoder's config.
          batch: B.
          size: C. Tokens written past it overwrite the last ones: give prompt plus new tokens.
          dtype: The decoder's `dtype`.
        """
        shape = (batch, size, config.num_kv_heads, config.head_dim)

        def buffers() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(keys=buffers(), values=buffers(), position=jnp.zeros((), jnp.int32))


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, in f32, and multiplies with a learned scale."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Returns the normalized `x` in `dtype`."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x * scale).astype(self.dtype)


def rotate(x: Float[Array, "B S N D"], positions: Int[Array, " S"], *, theta: float) -> Float[Array, "B S N D"]:
    """Rotary embedding: pairs feature i with i + D/2 and turns the pair by `position * theta ** (-2 i / D)`.

    Args:
      x: Queries or keys; computed in f32, returned in its own dtype.
      positions: Position of each of the S tokens, from 0.
      theta: Base of the wavelengths.

    Source: RoFormer (arXiv:2104.09864), with the two halves of Hugging Face's Llama in place of adjacent pairs.
    """
    half = x.shape[-1] // 2
    frequencies = jnp.asarray(theta ** (-np.arange(half) / half), jnp.float32)
    angles = positions.astype(jnp.float32)[None, :, None, None] * frequencies[None, None, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    queries: Float[Array, "B S N D"],
    keys: Float[Array, "B C G D"],
    values: Float[Array, "B C G D"],
    mask: Bool[Array, "S C"],
) -> Float[Array, "B S N D"]:
    """Grouped-query attention: query head n reads key head `n // (N / G)`; scores and softmax in f32.

    `jax.nn.dot_product_attention` computes the same, but fails under strict dtype promotion (jax 0.11.2).
    """
    (b, s, n, d), g = queries.shape, keys.shape[2]
    queries = queries.reshape(b, s, g, n // g, d)
    scores = jnp.einsum("bsgrd,bcgd->bgrsc", queries, keys, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(mask[None, None, None], scores, -jnp.inf)  # a query always sees itself: no empty row
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bgrsc,bcgd->bsgrd", weights, values).reshape(b, s, n, d)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embedding."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        linear = functools.partial(
            Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=init_kernel, rngs=rngs
        )
        features, kv_features = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
        self.q_proj = linear(config.hidden_size, features)
        self.k_proj = linear(config.hidden_size, kv_features)
        self.v_proj = linear(config.hidden_size, kv_features)
        self.o_proj = linear(features, config.hidden_size)
        self.config = config

    def __call__(
        self, x: Float[Array, "B S H"], buffers: tuple[Array, Array] | None, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B S H"], tuple[Array, Array]]:
        """Attends to the tokens of `buffers` before `position` (if given) and, causally, to those of `x`.

        Returns:
          The output, and keys and values `[B, C, G, D]`: the updated buffers, or those of `x` alone (C = S).
        """
        c, (b, s, _) = self.config, x.shape
        positions = position + jnp.arange(s, dtype=jnp.int32)
        queries = rotate(self.q_proj(x).reshape(b, s, c.num_heads, c.head_dim), positions, theta=c.rope_theta)
        keys = rotate(self.k_proj(x).reshape(b, s, c.num_kv_heads, c.head_dim), positions, theta=c.rope_theta)
        values = self.v_proj(x).reshape(b, s, c.num_kv_heads, c.head_dim)
        if buffers is not None:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(buffer, new, position, axis=1)
                for buffer, new in zip(buffers, (keys, values), strict=True)
            )
        mask = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :] <= positions[:, None]
        y = attend(queries, keys, values, mask).reshape(b, s, c.num_heads * c.head_dim)
        return self.o_proj(y), (keys, values)


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(
        self, config: DecoderConfig, *, moe: MoEFactory, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.moe_norm = norm()
        self.moe = moe(config.moe, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S H"], buffers: tuple[Array, Array] | None, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B S H"], tuple[Array, Array]]:
        """Returns the new residual stream, and keys and values as `Attention` does."""
        y, buffers = self.attention(self.attention_norm(x), buffers, position)
        x = x + y
        return x + self.moe(self.moe_norm(x)), buffers


class Decoder(nnx.Module):
    """A decoder-only language model: `decoder(tokens) -> logits`.

    Args:
      config: Sizes; `config.moe` goes to the factory.
      moe: Makes the routed layer of each block, called as `moe(config.moe, rngs=rngs)`; the layer maps `[B, S, H]`
        to the same shape and dtype. `None` takes `moe_online.flax.MoE` with the dtypes given here.
      rngs: Initialises the parameters.
      dtype: Of activations and of the KV cache. Norms, softmax and logits are f32.
      param_dtype: Of the parameters.

    >>> moe = MoEConfig(num_experts=8, top_k=2, hidden_size=4096, intermediate_size=14336)
    >>> config = DecoderConfig(
    ...     vocab_size=32000, hidden_size=4096, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=128, moe=moe
    ... )
    >>> model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))  # declared: takes no memory
    >>> model.lm_head.kernel.shape
    (4096, 32000)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        moe: MoEFactory | None = None,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.bfloat16,
    ):
        if moe is None:
            moe = functools.partial(MoE, dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        self.layers = nnx.List(
            Block(config, moe=moe, rngs=rngs, dtype=dtype, param_dtype=param_dtype) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

    @overload
    def __call__(
        self, tokens: Int[Array, "B S"], cache: None = None, *, last_only: bool = False
    ) -> Float[Array, "B S V"]: ...

    @overload
    def __call__(
        self, tokens: Int[Array, "B S"], cache: KVCache, *, last_only: bool = False
    ) -> tuple[Float[Array, "B S V"], KVCache]: ...

    def __call__(self, tokens, cache=None, *, last_only=False):  # type: ignore[no-untyped-def]
        """Computes the logits of each next token.

        Args:
          tokens: Token ids `[B, S]`; with a cache, those that follow the cached ones.
          cache: Keys and values of the tokens before, from `KVCache.empty` or an earlier call. Its size must hold
            them all: this is not checked, because the position is known only at run time.
          last_only: Compute the logits of the last token only: `[B, 1, V]`. It decides a shape: under a `jit` that gets
            it as an argument, name it in `static_argnames`.

        Returns:
          f32 logits `[B, S, V]`; with a cache, the logits and the cache that now includes `tokens`.
        """
        x = self.embed.embedding[...][tokens].astype(self.dtype)  # cast after the lookup: gradients add up in f32
        position = jnp.zeros((), jnp.int32) if cache is None else cache.position
        buffers = []
        for i, layer in enumerate(self.layers):
            x, updated = layer(x, None if cache is None else (cache.keys[i], cache.values[i]), position)
            buffers.append(updated)
        x = self.norm(x[:, -1:] if last_only else x)
        logits = self._head(x).astype(jnp.float32)
        if cache is None:
            return logits
        keys, values = zip(*buffers, strict=True)
        return logits, KVCache(keys=keys, values=values, position=position + tokens.shape[1])

    def _head(self, x: Float[Array, "B S H"]) -> Float[Array, "B S V"]:
        if self.config.tie_embeddings:
            return x @ self.embed.embedding[...].astype(self.dtype).T
        logits: jax.Array = self.lm_head(x)
        return logits
