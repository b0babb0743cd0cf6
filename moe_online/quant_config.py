"""`OnlineQuantConfig`: the one place where the scheme of each layer is decided.

Rules after vLLM (vllm/config/quantization.py, vllm/model_executor/layers/quantization/online/base.py).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from moe_online.errors import ConfigError
from moe_online.schemes import (
    LayerKind,
    QuantSpec,
    SchemeLike,
    find_shorthand,
    format_names,
    parse_scheme,
    shorthand_names,
)

Kind = Literal["moe", "linear", "other"]  # "other": norms, embeddings, routers and the like, never quantized

FIELDS = ("linear", "moe", "ignore", "targets")
NO_CONFIG = "online"  # the shorthand that says: look only at the config


@dataclasses.dataclass(frozen=True, init=False)
class OnlineQuantConfig:
    """Schemes for kinds of layers (`linear`, `moe`) or for layers by name (`targets`); hashable.

    A pattern, in `ignore` and `targets`, is the exact name of a layer, `re:` and a regular expression that matches
    from the start of the name, or a shell pattern such as `*mlp.experts*`.

    Args:
      linear: Scheme of linear layers: whatever `parse_scheme` takes; None leaves them as they are.
      moe: Scheme of routed experts, likewise.
      ignore: Patterns of layers that stay as they are.
      targets: Patterns and the scheme of the layers that each matches; all others stay as they are.
      explicit: Which of `linear` and `moe` must reach a layer of the model; None: those that are given. `parse` leaves
        out what a shorthand brought along. It does not count where configs are compared.

    Raises:
      TypeError: a scheme that is no name, dict or QuantSpec.
      ConfigError: nothing to quantize, `targets` beside `linear` or `moe`, an unknown scheme, a bad pattern.

    >>> config = OnlineQuantConfig(moe="fp8_per_block", ignore=["re:.*layers[.]0[.]"])
    >>> print(config.resolve("model.layers.1.mlp.experts", "moe"))
    fp8_per_block / fp8_per_group
    >>> print(config.resolve("model.layers.0.mlp.experts", "moe"))
    None
    """

    linear: QuantSpec | None
    moe: QuantSpec | None
    ignore: tuple[str, ...]
    targets: tuple[tuple[str, str | QuantSpec], ...]  # pattern and a shorthand or spec; empty: none given
    explicit: tuple[str, ...] = dataclasses.field(compare=False, repr=False)

    def __init__(
        self,
        linear: SchemeLike | None = None,
        moe: SchemeLike | None = None,
        ignore: Iterable[str] = (),
        targets: Mapping[str, SchemeLike] | Iterable[tuple[str, SchemeLike]] | None = None,
        explicit: Iterable[str] | None = None,
    ):
        pairs = dict(targets or ())
        if linear is None and moe is None and not pairs:
            raise ConfigError("online quantization requires at least one of linear, moe, targets")
        if pairs and not (linear is None and moe is None):
            raise ConfigError(
                "targets cannot stand beside linear or moe (a shorthand sets those): "
                "name every layer in targets, or leave targets out"
            )
        if isinstance(ignore, str):
            raise ConfigError(f"{ignore=} must be a list of patterns: [{ignore!r}]")
        object.__setattr__(self, "linear", None if linear is None else parse_scheme(linear, kind="linear"))
        object.__setattr__(self, "moe", None if moe is None else parse_scheme(moe, kind="moe"))
        object.__setattr__(self, "ignore", tuple(ignore))
        object.__setattr__(self, "targets", tuple((key, _target(value)) for key, value in pairs.items()))
        for pattern in (*self.ignore, *pairs):
            _check_pattern(pattern)
        given = [kind for kind in get_args(LayerKind) if getattr(self, kind) is not None]
        named = given if explicit is None else set(explicit)
        object.__setattr__(self, "explicit", tuple(kind for kind in given if kind in named))

    @classmethod
    def parse(
        cls, config: str | Mapping[str, Any] | OnlineQuantConfig | None, *, shorthand: str | None = None
    ) -> OnlineQuantConfig:
        """Makes a config of what a user gives.

        Args:
          config: A shorthand, a dict with some of `linear`, `moe`, `ignore`, `targets`, or a config.
          shorthand: Gives the fields that `config` leaves out; of a field that is a dict, also the `weight` or
            `activation` that it leaves out, whereas a name leaves out nothing. `"online"` gives nothing.

        Raises:
          TypeError: an argument, or a scheme in it, has another type.
          ConfigError: as the constructor, and an unknown shorthand or key, or two shorthands.

        >>> print(OnlineQuantConfig.parse({"moe": {"weight": "int8_per_channel"}}, shorthand="fp8_per_block").moe)
        int8_per_channel / fp8_per_group
        >>> print(OnlineQuantConfig.parse({"moe": "int8_per_channel"}, shorthand="fp8_per_block").moe)
        int8_per_channel / none
        """
        if isinstance(config, str):
            if shorthand is not None:
                raise ConfigError(f"{config=} and {shorthand=} both name a scheme; give one of them")
            config, shorthand = None, config
        base = {} if shorthand is None else _shorthand_fields(shorthand)
        if config is None:
            return cls(**base, explicit=())
        explicit = None
        if isinstance(config, OnlineQuantConfig):
            explicit = config.explicit
            config = {name: getattr(config, name) for name in FIELDS}
        if not isinstance(config, Mapping):
            raise TypeError(
                f"a quantization config is a shorthand, a dict or an OnlineQuantConfig, not {type(config).__name__} "
                f"({config!r}); a scheme goes into its place: OnlineQuantConfig(moe=...)"
            )
        unknown = [key for key in config if key not in FIELDS]
        if unknown:
            raise ConfigError(f"unknown keys {unknown} in the quantization config; valid keys: {', '.join(FIELDS)}")
        given = {name: value for name, value in config.items() if value is not None}
        for kind in get_args(LayerKind):
            if kind in given:
                given[kind] = parse_scheme(given[kind], kind=kind, base=base.get(kind))
        return cls(**{**base, **given}, explicit=given if explicit is None else explicit)

    def resolve(
        self, name: str, kind: Kind, *, shards: Sequence[str] = (), prequantized: bool = False
    ) -> QuantSpec | None:
        """The scheme of one layer; None leaves it unquantized. See `resolve_with_rule`."""
        return self.resolve_with_rule(name, kind, shards=shards, prequantized=prequantized)[0]

    def resolve_with_rule(
        self, name: str, kind: Kind, *, shards: Sequence[str] = (), prequantized: bool = False
    ) -> tuple[QuantSpec | None, str]:
        """The scheme of one layer and the rule that chose it.

        Args:
          name: The layer's name.
          kind: `"moe"` for routed experts, `"linear"`, or `"other"` for what cannot be quantized.
          shards: Of a fused layer such as `qkv_proj` the names of its parts, whole or the last component only. A
            pattern matches it by its own name or by those of all parts.
          prequantized: The checkpoint has this layer quantized already.

        Returns:
          The scheme, or None for a layer that stays as it is, and the rule: `"moe"`, `"linear"`,
          `"targets: <pattern>"`, `"ignore: <pattern>"`, or why nothing applies.

        Raises:
          ConfigError: the layer matches both `ignore` and `targets`, several targets, or patterns match only some of
            its shards or give them different schemes; a target matches what cannot be quantized or has no scheme for
            this kind; the scheme touches a pre-quantized layer.
          ValueError: an unknown `kind`.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"unknown {kind=}; valid kinds: {', '.join(get_args(Kind))}")
        parent = name.rpartition(".")[0]
        shards = [f"{parent}.{shard}" if parent and "." not in shard else shard for shard in shards]
        ignored = _matching(self.ignore, name, shards, several=True)
        targets = dict(self.targets)
        hits = _matching(targets, name, shards, several=False)
        if ignored and hits:
            raise ConfigError(f"layer {name!r} matches both ignore ({ignored[0]!r}) and targets ({hits[0]!r})")
        if ignored:
            return None, f"ignore: {ignored[0]}"
        if self.targets:
            spec, rule = _from_targets(name, kind, {pattern: targets[pattern] for pattern in hits})
        elif kind == "other":
            spec, rule = None, "neither linear nor moe"
        else:
            spec = self.moe if kind == "moe" else self.linear
            rule = kind if spec else f"no {kind} scheme"
        if spec is not None and prequantized:
            raise ConfigError(
                f"{rule!r} would quantize {name!r} to {spec}, a pre-quantized layer; add it to ignore, "
                "or give a checkpoint that has it unquantized"
            )
        return spec, rule


def _shorthand_fields(name: str) -> dict[str, Any]:
    if not isinstance(name, str):
        raise TypeError(f"a shorthand is a string, not {type(name).__name__} ({name!r})")
    if name == NO_CONFIG:
        return {}
    shorthand = find_shorthand(name)
    if shorthand is None:
        is_format = name in format_names("weight")
        hint = f"; as a weight format it goes into a config: {{'moe': {name!r}}}" if is_format else ""
        raise ConfigError(f"unknown quantization scheme {name!r}{hint}; valid names: {', '.join(shorthand_names())}")
    return {kind: getattr(shorthand, kind) for kind in get_args(LayerKind)}


def _target(value: SchemeLike) -> str | QuantSpec:
    """A shorthand stays a name, because its meaning depends on the kind of the layer."""
    return value if isinstance(value, str) and find_shorthand(value) is not None else parse_scheme(value)


def _check_pattern(pattern: str) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"a pattern in ignore or targets is a string, not {type(pattern).__name__} ({pattern!r})")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `ignore` or `targets` covers a layer of this name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def _matching(patterns: Iterable[str], name: str, shards: Sequence[str], *, several: bool) -> list[str]:
    """The patterns that cover the layer: by its own name, or one or more for each of its shards.

    Raises:
      ConfigError: only some of the shards match; or, unless `several`, one name matches more than one pattern.
    """
    found = {key: [pattern for pattern in patterns if matches(pattern, key)] for key in (name, *shards)}
    for key, hits in found.items():
        if len(hits) > 1 and not several:
            raise ConfigError(f"layer {key!r} matches more than one target: {', '.join(map(repr, hits))}")
    unmatched = [shard for shard in shards if not found[shard]]
    if not found[name] and 0 < len(unmatched) < len(shards):
        raise ConfigError(
            f"Found unmatched shards of the fused layer {name!r}: {', '.join(map(repr, unmatched))}; "
            "match all of its shards, or the layer itself"
        )
    return list(dict.fromkeys(pattern for hits in found.values() for pattern in hits))


def _from_targets(name: str, kind: Kind, hits: dict[str, str | QuantSpec]) -> tuple[QuantSpec | None, str]:
    """The scheme of the targets that cover a layer: they must agree."""
    if not hits:
        return None, "no target matches"
    patterns = ", ".join(map(repr, hits))
    if kind == "other":
        raise ConfigError(f"target {patterns} matches {name!r}, which is neither a linear layer nor routed experts")
    specs = {parse_scheme(value, kind=kind) for value in hits.values()}
    if len(specs) > 1:
        raise ConfigError(f"the targets {patterns} give different schemes to the fused layer {name!r} and its shards")
    return specs.pop(), f"targets: {next(iter(hits))}"
