"""What stands between the two matmuls of an expert: `Activation(gate, up)`, computed in f32.

Gate and up come apart, or as packed halves (gate rows first). Checkpoints that interleave them are de-interleaved
while they load (`deinterleave`), so `swigluoai` and `swigluoai_uninterleave` differ in their defaults only.
Activations that are not gated take one argument.
Source: vllm/model_executor/layers/fused_moe/activation.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

PARAMETERS = ("alpha", "beta", "limit", "linear_beta")


def _silu(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    if act.limit is not None:
        gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
    return jax.nn.silu(gate) * up


def _swigluoai(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    assert act.alpha is not None  # __post_init__ saw to all three
    assert act.beta is not None
    assert act.limit is not None
    gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
    return gate * jax.nn.sigmoid(act.alpha * gate) * (up + act.beta)


def _swiglustep(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    assert act.limit is not None
    return jnp.minimum(jax.nn.silu(gate), act.limit) * jnp.clip(up, -act.limit, act.limit)


def _situ(act: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    assert act.beta is not None
    up = up if act.linear_beta is None else act.linear_beta * jnp.tanh(up / act.linear_beta)
    return act.beta * jnp.tanh(gate / act.beta) * jax.nn.sigmoid(gate) * up


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.maximum(x, 0))


_gelu, _gelu_tanh = (functools.partial(jax.nn.gelu, approximate=approximate) for approximate in (False, True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    gated: Callable[[Activation, jax.Array, jax.Array], jax.Array] | None = None
    alone: Callable[[jax.Array], jax.Array] | None = None  # of one that is not gated
    defaults: Mapping[str, float | None] = dataclasses.field(default_factory=dict)  # the parameters it takes
    required: tuple[str, ...] = ()  # those of them that None does not serve
    positive: tuple[str, ...] = ("limit",)


_RULES: dict[str, _Rule] = {
    "silu": _Rule(gated=_silu, defaults={"limit": None}),
    "gelu": _Rule(gated=lambda act, gate, up: _gelu(gate) * up),
    "gelu_tanh": _Rule(gated=lambda act, gate, up: _gelu_tanh(gate) * up),
    "relu2": _Rule(gated=lambda act, gate, up: _relu2(gate) * up),
    "swigluoai": _Rule(
        gated=_swigluoai,
        defaults={"alpha": 1.702, "beta": 1.0, "limit": 7.0},
        required=("alpha", "beta", "limit"),
    ),
    "swigluoai_uninterleave": _Rule(
        gated=_swigluoai,
        defaults={"alpha": 1.0, "beta": 0.0, "limit": None},
        required=("alpha", "beta", "limit"),
    ),
    "swiglustep": _Rule(gated=_swiglustep, defaults={"limit": 7.0}, required=("limit",)),
    "situ": _Rule(gated=_situ, defaults={"beta": None, "linear_beta": None}, required=("beta",), positive=PARAMETERS),
    "silu_no_mul": _Rule(alone=jax.nn.silu),
    "gelu_no_mul": _Rule(alone=_gelu),
    "gelu_tanh_no_mul": _Rule(alone=_gelu_tanh),
    "relu2_no_mul": _Rule(alone=_relu2),
}
_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation and its parameters; hashable, so it can be a static argument.

    | name | value, of gate g and up u |
    |---|---|
    | `silu` | `silu(g) * u`; with a limit L: `silu(min(g, L)) * clip(u, -L, L)` |
    | `gelu` | `gelu(g) * u`, with erf |
    | `gelu_tanh`, `gelu_pytorch_tanh` | `gelu(g) * u`, with tanh |
    | `relu2` | `relu(g)**2 * u` |
    | `swigluoai` | `g' * sigmoid(alpha * g') * (u' + beta)`, `g' = min(g, L)`, `u' = clip(u, -L, L)` |
    | `swigluoai_uninterleave` | the same; `swigluoai` defaults to 1.702, 1, 7, this one to 1, 0 and no limit: give it |
    | `swiglustep` | `min(silu(g), L) * clip(u, -L, L)`; the limit L is 7 by default |
    | `situ` | `beta * tanh(g / beta) * sigmoid(g) * v`, `v = linear_beta * tanh(u / linear_beta)`, or u without one |
    | `silu_no_mul`, `gelu_no_mul`, `gelu_tanh_no_mul`, `relu2_no_mul` | not gated: the same functions of one x |

    Aliases and defaults are filled in at birth, so two spellings of one activation are equal.

    Raises:
      ValueError: an unknown name, a parameter that the activation does not take, or a missing one.

    >>> Activation("swigluoai")
    Activation(name='swigluoai', alpha=1.702, beta=1.0, limit=7.0, linear_beta=None)
    """

    name: str
    alpha: float | None = dataclasses.field(default=None, kw_only=True)
    beta: float | None = dataclasses.field(default=None, kw_only=True)
    limit: float | None = dataclasses.field(default=None, kw_only=True)
    linear_beta: float | None = dataclasses.field(default=None, kw_only=True)

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
            if value is not None and not (math.isfinite(value) and (value > 0 or parameter not in rule.positive)):
                above = " above 0" if parameter in rule.positive else ""
                raise ValueError(f"activation {name!r}: {parameter}={value} must be a finite number{above}")

    @property
    def gated(self) -> bool:
        """Whether it takes gate and up, and so halves the width of what it is given."""
        return _RULES[self.name].gated is not None

    def __call__(
        self, gate: Float[Array, "*shape"], up: Float[Array, "*shape"] | None = None
    ) -> Float[Array, "*shape"]:
        """The activation, in f32, of `gate` and `up`, or of one array where it is not gated.

        Raises:
          ValueError: a gated activation without `up`, or another with it; two shapes.
        """
        rule = _RULES[self.name]
        if (up is None) == self.gated:
            takes = "gate and up" if self.gated else "one array: it is not gated"
            raise ValueError(f"activation {self.name!r} takes {takes}")
        if up is not None and gate.shape != up.shape:
            raise ValueError(f"{gate.shape=} and {up.shape=} must be the same")
        gate = gate.astype(jnp.float32)
        if rule.alone is not None:
            return rule.alone(gate)
        assert rule.gated is not None
        assert up is not None
        return rule.gated(self, gate, up.astype(jnp.float32))

    def of_rows(self, x: Float[Array, "M N"]) -> Float[Array, "M N_out"]:
        """The activation, in f32, of rows that hold gate and then up, or one value where it is not gated.

        Raises:
          ValueError: rows of an odd width, of which there are no halves.
        """
        if not self.gated:
            return self(x)
        if x.shape[1] % 2:
            raise ValueError(f"{x.shape=} must have an even width for {self.name!r}: gate, then up")
        return self(*jnp.split(x, 2, axis=1))


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


def deinterleave(w: Float[Array, "..."], *, axis: int = -2) -> Float[Array, "..."]:
    """Gate and up rows that alternate (GPT-OSS: gate first) as gate rows and then up rows: `w13` as kernels want it.

    Args:
      w: `[..., 2I, H]`, or a bias `[..., 2I]` with `axis=-1`.
      axis: The one on which they alternate.

    Raises:
      ValueError: an odd number of rows.

    >>> deinterleave(jnp.array([0, 10, 1, 11]), axis=-1).tolist()
    [0, 1, 10, 11]
    """
    if w.shape[axis] % 2:
        raise ValueError(f"axis {axis} of {w.shape=} must be even: gate and up rows in turn")
    halves = [lax.slice_in_dim(w, start, w.shape[axis], stride=2, axis=axis % w.ndim) for start in (0, 1)]
    return lax.concatenate(halves, dimension=axis % w.ndim)
