"""Which formats a layer gets: `QuantSpec`, and the shorthands that name one for each kind of layer.

Names follow vLLM (vllm/config/quantization.py), whose spellings of formats are accepted as aliases; those with `w8a8`,
`w8a16` or `w4a16` are ours.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from moe_online.errors import ConfigError
from pallas_kernels import Format, get_format
from pallas_kernels.formats import FORMATS, Role

if TYPE_CHECKING:
    from moe_online.method import OnlineMoEMethodBase

LayerKind = Literal["moe", "linear"]
SPEC_FIELDS = ("weight", "group", "activation")  # of a spec that is a dict

FORMAT_ALIASES: dict[str, str] = {
    "fp8_per_tensor_static": "fp8_per_tensor",
    "fp8_per_channel_static": "fp8_per_channel",
    "fp8_per_block_static": "fp8_per_block",
    "fp8_per_block_dynamic": "fp8_per_group",
    "int8_per_channel_static": "int8_per_channel",
}
NAMED_FORMATS: dict[str, Format] = FORMATS | {  # also `int4_per_group_64`, as it prints
    str(sized): sized for fmt in FORMATS.values() for sized in (get_format(fmt.name, group=g) for g in fmt.groups)
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


def _format(value: Format | str | None, role: Role, group: int | None = None) -> Format | None:
    if value is None:
        return None
    if isinstance(value, str):
        name = FORMAT_ALIASES.get(value, value)
        if name not in NAMED_FORMATS:
            raise ConfigError(f"unknown {role} format {value!r}; valid names: {', '.join(format_names(role))}")
        value = NAMED_FORMATS[name]
    try:
        return get_format(value, role=role, group=group)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def format_names(role: Role) -> list[str]:
    """The names that a spec takes for weights or for activations, vLLM's left out."""
    return sorted(name for name, fmt in NAMED_FORMATS.items() if role in fmt.roles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shorthand:
    """What one name stands for, per kind of layer; None where it says nothing about that kind."""

    linear: QuantSpec | None = None
    moe: QuantSpec | None = None
    method: type[OnlineMoEMethodBase] | None = None  # registered in the place of formats; for `get_method` alone


def _usual(weight: str) -> QuantSpec:
    """A weight format and the activations that it has unless said."""
    return QuantSpec(weight, DEFAULT_ACTIVATIONS[NAMED_FORMATS[weight].name])


def _everywhere(spec: QuantSpec) -> Shorthand:
    return Shorthand(linear=spec, moe=spec)


SHORTHANDS: dict[str, Shorthand] = {  # and what users register; of several names for the same, the first is shown
    "fp8_per_tensor": _everywhere(_usual("fp8_per_tensor")),
    "fp8": _everywhere(_usual("fp8_per_tensor")),  # vLLM's older spelling
    "fp8_per_channel": _everywhere(_usual("fp8_per_channel")),
    "fp8_per_block": _everywhere(_usual("fp8_per_block")),
    "fp8_w8a16": _everywhere(QuantSpec("fp8_per_channel", None)),
    "int8_w8a8": _everywhere(QuantSpec("int8_per_channel", "int8_per_token")),
    "int8_w8a16": _everywhere(QuantSpec("int8_per_channel", None)),
    "int8_per_channel_weight_only": Shorthand(moe=QuantSpec("int8_per_channel", None)),
    "experts_int8": Shorthand(moe=QuantSpec("int8_per_channel", None)),  # vLLM's older spelling
    "mxfp8": _everywhere(_usual("mxfp8")),
    "mxfp4": _everywhere(_usual("mxfp4")),
    "nvfp4_per_token": Shorthand(moe=_usual("nvfp4")),
    "int4_w4a16": _everywhere(QuantSpec("int4_per_group", None)),
    "mxfp4_w4a16": _everywhere(QuantSpec("mxfp4", None)),
    "nvfp4_w4a16": _everywhere(QuantSpec("nvfp4", None)),
}
BUILT_IN = frozenset(SHORTHANDS)
RESERVED = ("all", "auto", "bf16", "none", "online")  # they stand where a scheme could, and name none


def add_shorthand(name: str, shorthand: Shorthand, *, replace: bool) -> None:
    """Makes `name` stand for this in the present process; see `moe_online.method.register_scheme`.

    Raises:
      TypeError: a name that is no string.
      ConfigError: a name that is taken, or cannot be one.
    """
    if not isinstance(name, str):
        raise TypeError(f"a scheme is named by a string, not {type(name).__name__} ({name!r})")
    if not name or re.search(r"[\s,]", name) or name.lower() in RESERVED:
        raise ConfigError(
            f"no scheme can have the name {name!r}: it must have letters but no comma or space, and be none of "
            f"{', '.join(RESERVED)}"
        )
    if name in BUILT_IN or name in NAMED_FORMATS or name in FORMAT_ALIASES:
        raise ConfigError(f"there is a scheme or format {name!r} already; choose another name")
    if name in SHORTHANDS and not replace:
        raise ConfigError(f"there is a scheme {name!r} already; choose another name, or give replace=True")
    SHORTHANDS[name] = shorthand


def find_shorthand(name: str) -> Shorthand | None:
    """The formats of a shorthand; None where there is none of this name.

    Raises:
      ConfigError: a registered method, which is no pair of formats.
    """
    shorthand = SHORTHANDS.get(name)
    if shorthand is not None and shorthand.method is not None:
        raise ConfigError(
            f"scheme {name!r} is the method {shorthand.method.__name__}, and loading and configs take formats only: "
            f"load without quantization, then call get_method({name!r}, ...).process_weights_after_loading"
        )
    return shorthand


def shorthand_names(kind: LayerKind | None = None) -> list[str]:
    """The names that stand for formats, of a kind of layer or of any."""
    kinds = get_args(LayerKind) if kind is None else (kind,)
    return sorted(name for name, value in SHORTHANDS.items() if any(getattr(value, each) for each in kinds))


SchemeLike = str | QuantSpec | Mapping[str, Any]


def parse_scheme(scheme: SchemeLike, *, kind: LayerKind = "moe", base: QuantSpec | None = None) -> QuantSpec:
    """The formats that `scheme` gives to a layer of this kind.

    Args:
      scheme: A shorthand, else the name of a weight format, which brings the activations of `DEFAULT_ACTIVATIONS`;
        a dict with `weight` (and `group`, of formats that leave it open), `activation` or both, where None means
        that activations are kept; or a QuantSpec, which is returned as it is.
      kind: `"moe"` or `"linear"`.
      base: Gives what a dict leaves out; without it, an activation that is left out is that of
        `DEFAULT_ACTIVATIONS`. A name leaves nothing out.

    Raises:
      TypeError: `scheme`, or a format in it, has another type.
      ConfigError: an unknown name or key, a shorthand without a spec for this kind, or no weight format.

    >>> parse_scheme("int8_w8a8")
    QuantSpec(weight='int8_per_channel', activation='int8_per_token')
    >>> parse_scheme({"weight": "int4_per_group_64"})
    QuantSpec(weight='int4_per_group_64', activation=None)
    >>> parse_scheme({"weight": "int8_per_channel"}, base=QuantSpec("fp8_per_block", "fp8_per_group"))
    QuantSpec(weight='int8_per_channel', activation='fp8_per_group')
    >>> parse_scheme("int8_per_channel", base=QuantSpec("fp8_per_block", "fp8_per_group"))
    QuantSpec(weight='int8_per_channel', activation=None)
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
    shorthand = find_shorthand(name)
    if shorthand is not None:
        spec: QuantSpec | None = getattr(shorthand, kind)
        if spec is None:
            raise ConfigError(
                f"online shorthand {name!r} does not define a {kind} spec; those that do: "
                f"{', '.join(shorthand_names(kind))}"
            )
        return spec
    weight = FORMAT_ALIASES.get(name, name)
    if weight not in format_names("weight"):
        valid = sorted({*shorthand_names(), *format_names("weight")})
        raise ConfigError(f"unknown quantization scheme {name!r}; valid names: {', '.join(valid)}")
    return _usual(weight)


def _from_fields(fields: Mapping[str, Any], base: QuantSpec | None) -> QuantSpec:
    unknown = [key for key in fields if key not in SPEC_FIELDS]
    if unknown:
        raise ConfigError(f"unknown keys {unknown} in the scheme {dict(fields)}; valid keys: {', '.join(SPEC_FIELDS)}")
    group = fields.get("group")
    if not isinstance(group, int | None):
        raise TypeError(f"group is a whole number, not {type(group).__name__} ({group!r})")
    named = fields.get("weight", base and base.weight)
    weight = _format(named, "weight", group)
    if group is not None and isinstance(named, str) and named not in FORMATS and str(weight) != named:
        raise ConfigError(f"the weight {named!r} names another group than {group=}; leave one out")
    if weight is None:
        raise ConfigError(
            f"the scheme {dict(fields)} has no weight format; valid names: {', '.join(format_names('weight'))}"
        )
    default = base.activation if base else DEFAULT_ACTIVATIONS.get(weight.name)
    return QuantSpec(weight, fields.get("activation", default))
