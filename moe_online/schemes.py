"""Which formats a layer gets: `QuantSpec`, and the shorthands that name one for each kind of layer.

Names follow vLLM (vllm/config/quantization.py), whose spellings of formats are accepted as aliases; those with `w8a8`,
`w8a16` or `w4a16` are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moe_online.errors import ConfigError
from pallas_kernels import Format, get_format

LayerKind = Literal["moe", "linear"]

FORMAT_ALIASES: dict[str, str] = {
    "fp8_per_tensor_static": "fp8_per_tensor",
    "fp8_per_channel_static": "fp8_per_channel",
    "fp8_per_block_static": "fp8_per_block",
    "fp8_per_block_dynamic": "fp8_per_group",
    "int8_per_channel_static": "int8_per_channel",
}
DEFAULT_ACTIVATIONS: dict[str, str | None] = {  # of a weight format whose spec does not say
    "fp8_per_tensor": "fp8_per_tensor_dynamic",
    "fp8_per_channel": "fp8_per_token",
    "fp8_per_block": "fp8_per_group",
    "int8_per_channel": None,
    "int4_per_group": None,
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4_per_token",
}


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class QuantSpec:
    """How one layer is quantized; hashable.

    Args:
      weight: Format of the weights or its name; None keeps them as they are.
      activation: Format of the matmuls' inputs or its name; None keeps bf16 or f16.

    Raises:
      TypeError: something that is neither a name, a Format nor None.
      ConfigError: an unknown format, or one for the other role; the message lists the valid names.

    >>> print(QuantSpec("fp8_per_block", "fp8_per_group"))
    fp8_per_block / fp8_per_group
    """

    weight: Format | None
    activation: Format | None

    def __init__(self, weight: Format | str | None, activation: Format | str | None):
        object.__setattr__(self, "weight", _format(weight, "weight"))
        object.__setattr__(self, "activation", _format(activation, "activation"))

    def __str__(self) -> str:
        return " / ".join("none" if fmt is None else str(fmt) for fmt in (self.weight, self.activation))

    def __repr__(self) -> str:
        weight, activation = (fmt and str(fmt) for fmt in (self.weight, self.activation))
        return f"QuantSpec({weight=}, {activation=})"


def _format(value: Format | str | None, role: Literal["weight", "activation"]) -> Format | None:
    if value is None:
        return None
    try:
        return get_format(FORMAT_ALIASES.get(value, value) if isinstance(value, str) else value, role=role)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shorthand:
    """What one name stands for, per kind of layer; None where it says nothing about that kind."""

    linear: QuantSpec | None
    moe: QuantSpec | None


def _everywhere(weight: str, activation: str | None) -> Shorthand:
    spec = QuantSpec(weight, activation)
    return Shorthand(linear=spec, moe=spec)


def _experts(weight: str, activation: str | None) -> Shorthand:
    return Shorthand(linear=None, moe=QuantSpec(weight, activation))


SHORTHANDS: dict[str, Shorthand] = {
    "fp8_per_tensor": _everywhere("fp8_per_tensor", "fp8_per_tensor_dynamic"),
    "fp8_per_channel": _everywhere("fp8_per_channel", "fp8_per_token"),
    "fp8_per_block": _everywhere("fp8_per_block", "fp8_per_group"),
    "fp8_w8a16": _everywhere("fp8_per_channel", None),
    "int8_w8a8": _everywhere("int8_per_channel", "int8_per_token"),
    "int8_w8a16": _everywhere("int8_per_channel", None),
    "int8_per_channel_weight_only": _experts("int8_per_channel", None),
    "experts_int8": _experts("int8_per_channel", None),  # vLLM's older spelling
    "mxfp8": _everywhere("mxfp8", "mxfp8"),
    "mxfp4": _everywhere("mxfp4", "mxfp4"),
    "nvfp4_per_token": _experts("nvfp4", "nvfp4_per_token"),
    "int4_w4a16": _everywhere("int4_per_group", None),
    "mxfp4_w4a16": _everywhere("mxfp4", None),
    "nvfp4_w4a16": _everywhere("nvfp4", None),
}
OTHER_METHODS: dict[str, str] = {}  # names of registered methods that are no pair of formats, and their class


def register_shorthand(name: str, *, moe: QuantSpec | None, linear: QuantSpec | None = None) -> None:
    """Makes `name` stand for these formats wherever a shorthand is taken.

    Raises:
      ConfigError: the name is taken, or stands for nothing.
    """
    check_free(name)
    if moe is None and linear is None:
        raise ConfigError(f"scheme {name!r} stands for nothing; give moe=, linear= or both")
    SHORTHANDS[name] = Shorthand(linear=linear, moe=moe)


def check_free(name: str) -> None:
    """Raises ConfigError where a scheme of this name exists."""
    if name in {*SHORTHANDS, *DEFAULT_ACTIVATIONS, *FORMAT_ALIASES, *OTHER_METHODS}:
        raise ConfigError(f"there is a scheme {name!r} already; choose another name")


SchemeLike = str | QuantSpec | Mapping[str, Any]


def parse_scheme(scheme: SchemeLike, *, kind: LayerKind = "moe", base: QuantSpec | None = None) -> QuantSpec:
    """The formats that `scheme` gives to a layer of this kind.

    Args:
      scheme: A shorthand, else the name of a weight format; a dict with `weight`, `activation` or both; or a
        QuantSpec, which is returned as it is. An activation that is not said is that of `DEFAULT_ACTIVATIONS`; in a
        dict None says that there is none.
      kind: `"moe"` or `"linear"`.
      base: Gives what a dict leaves out.

    Raises:
      TypeError: `scheme`, or a format in it, has another type.
      ConfigError: an unknown name or key, a shorthand without a spec for this kind, or no weight format.

    >>> parse_scheme("int8_w8a8")
    QuantSpec(weight='int8_per_channel', activation='int8_per_token')
    >>> parse_scheme({"weight": "fp8_per_block", "activation": None})
    QuantSpec(weight='fp8_per_block', activation=None)
    """
    if isinstance(scheme, str):
        return _named(scheme, kind)
    if isinstance(scheme, Mapping):
        return _from_fields(scheme, base)
    if not isinstance(scheme, QuantSpec):
        raise TypeError(
            "a scheme is a name, a QuantSpec or a dict of weight and activation, "
            f"not {type(scheme).__name__} ({scheme!r})"
        )
    if scheme.weight is None:
        raise ConfigError(f"{scheme!r} has no weight format; leave the scheme out, or list the layers in `ignore`")
    return scheme


def _named(name: str, kind: LayerKind) -> QuantSpec:
    if name in SHORTHANDS:
        spec: QuantSpec | None = getattr(SHORTHANDS[name], kind)
        if spec is None:
            valid = sorted(key for key, value in SHORTHANDS.items() if getattr(value, kind) is not None)
            raise ConfigError(
                f"online shorthand {name!r} does not define a {kind} spec; those that do: {', '.join(valid)}"
            )
        return spec
    if name in OTHER_METHODS:
        raise ConfigError(
            f"scheme {name!r} is the method {OTHER_METHODS[name]}, which only get_method makes: load without "
            "quantization, then call its process_weights_after_loading"
        )
    weight = FORMAT_ALIASES.get(name, name)
    if weight not in DEFAULT_ACTIVATIONS:
        valid = sorted({*SHORTHANDS, *DEFAULT_ACTIVATIONS})
        raise ConfigError(f"unknown quantization scheme {name!r}; valid names: {', '.join(valid)}")
    return QuantSpec(weight, DEFAULT_ACTIVATIONS[weight])


def _from_fields(fields: Mapping[str, Any], base: QuantSpec | None) -> QuantSpec:
    unknown = [key for key in fields if key not in ("weight", "activation")]
    if unknown:
        raise ConfigError(f"unknown keys {unknown} in the scheme {dict(fields)}; valid keys: weight, activation")
    weight = _format(fields.get("weight", base and base.weight), "weight")
    if weight is None:
        raise ConfigError(
            f"the scheme {dict(fields)} has no weight format; valid names: {', '.join(sorted(DEFAULT_ACTIVATIONS))}"
        )
    default = base.activation if base else DEFAULT_ACTIVATIONS.get(weight.name)
    return QuantSpec(weight, fields.get("activation", default))
