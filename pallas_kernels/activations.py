"""What stands between the two matmuls of an expert: `Activation(gate, up)`, computed in f32.

Gate and up come apart, or as packed halves (gate rows first). Checkpoints that interleave them are de-interleaved
while they load, so `swigluoai` and `swigluoai_uninterleave` differ in their defaults only.
Source: vllm/model_executor/layers/fused_moe/activation.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PARAMETERS = ("alpha", "beta", "limit")


def _silu(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    if act.limit is not None:
        gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
    return jax.nn.silu(gate) * up


def _gelu(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.gelu(gate, approximate=False) * up


def _gelu_tanh(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.gelu(gate, approximate=True) * up


def _relu2(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    return jnp.square(jnp.maximum(gate, 0)) * up


def _swigluoai(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    assert act.alpha is not None  # __post_init__ saw to all three
    assert act.beta is not None
    assert act.limit is not None
    gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
    return gate * jax.nn.sigmoid(act.alpha * gate) * (up + act.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    function: Callable[[Activation, jax.Array, jax.Array], jax.Array]
    defaults: Mapping[str, float | None] = dataclasses.field(default_factory=dict)  # the parameters it takes
    required: tuple[str, ...] = ()  # those of them that None does not serve


_RULES: dict[str, _Rule] = {
    "silu": _Rule(function=_silu, defaults={"limit": None}),
    "gelu": _Rule(function=_gelu),
    "gelu_tanh": _Rule(function=_gelu_tanh),
    "relu2": _Rule(function=_relu2),
    "swigluoai": _Rule(function=_swigluoai, defaults={"alpha": 1.702, "beta": 1.0, "limit": 7.0}, required=PARAMETERS),
    "swigluoai_uninterleave": _Rule(
        function=_swigluoai, defaults={"alpha": 1.0, "beta": 0.0, "limit": None}, required=PARAMETERS
    ),
}
_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Activation:
    """A gated activation and its parameters; hashable, so it can be a static argument.

    | name | value |
    |---|---|
    | `silu` | `silu(g) * u`; with a limit L: `silu(min(g, L)) * clip(u, -L, L)` |
    | `gelu` | `gelu(g) * u`, with erf |
    | `gelu_tanh`, `gelu_pytorch_tanh` | `gelu(g) * u`, with tanh |
    | `relu2` | `relu(g)**2 * u` |
    | `swigluoai` | `g' * sigmoid(alpha * g') * (u' + beta)`, `g' = min(g, L)`, `u' = clip(u, -L, L)` |
    | `swigluoai_uninterleave` | the same; `swigluoai` defaults to 1.702, 1, 7, this one to 1, 0 and no limit: give it |

    Aliases and defaults are filled in at birth, so two spellings of one activation are equal.

    Raises:
      ValueError: an unknown name, a parameter that the activation does not take, or a missing one.

    >>> Activation("swigluoai")
    Activation(name='swigluoai', alpha=1.702, beta=1.0, limit=7.0)
    """

    name: str
    alpha: float | None = dataclasses.field(default=None, kw_only=True)
    beta: float | None = dataclasses.field(default=None, kw_only=True)
    limit: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        name = _ALIASES.get(self.name, self.name)
        if name not in _RULES:
            raise ValueError(
                f"unknown activation {self.name!r}; valid names: {', '.join(sorted({*_RULES, *_ALIASES}))}"
            )
        object.__setattr__(self, "name", name)
        rule = _RULES[name]
        for parameter in PARAMETERS:
            value = getattr(self, parameter)
            if value is not None and parameter not in rule.defaults:
                takes = ", ".join(rule.defaults) or "no parameters"
                raise ValueError(f"activation {name!r} takes {takes}; drop {parameter}={value}")
            if value is None:
                value = rule.defaults.get(parameter)
                object.__setattr__(self, parameter, value)
            if value is None and parameter in rule.required:
                raise ValueError(f"activation {name!r} needs {parameter}: give Activation({name!r}, {parameter}=...)")

    def __call__(self, gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The activation of `gate` and `up`, in f32."""
        return _RULES[self.name].function(self, gate.astype(jnp.float32), up.astype(jnp.float32))


def get_activation(activation: str | Activation) -> Activation:
    """The activation of this name with its default parameters; an `Activation` is returned as it is.

    Raises:
      TypeError: neither a string nor an Activation.
      ValueError: unknown; the message lists the valid names.
    """
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"an activation is named by a string, not {type(activation).__name__} ({activation!r})")
    return Activation(activation)
