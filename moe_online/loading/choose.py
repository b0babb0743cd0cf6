"""Which scheme each leaf of a model gets, and the rule that says so; what a config says in vain is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from moe_online.config import OnlineQuantConfig
from moe_online.errors import ConfigError
from moe_online.loading.mapping import Part
from moe_online.loading.messages import SHOWN, listed
from moe_online.loading.tree import WEIGHTS, Leaf
from moe_online.quant_config import Kind, matches
from moe_online.schemes import QuantSpec

KINDS = {"linear": "moe_online.flax.Linear", "moe": "moe_online.flax.MoE"}  # and the layers that are of them
Choice = tuple[QuantSpec | None, str]  # None: stored as it is declared; and the rule, for people


def choose_specs(
    leaves: Sequence[Leaf], parts: Mapping[str, tuple[Part, ...]], config: OnlineQuantConfig | None
) -> dict[str, Choice]:
    """The scheme of each leaf and the rule that chose it.

    Raises:
      ConfigError: the config contradicts itself about a layer, targets what cannot be quantized, or reaches no leaf
        with all or with a part of what it says.
    """
    if config is None:
        return {leaf.name: (None, "as declared") for leaf in leaves}
    chosen: dict[str, Choice] = {}
    refused: dict[str, None] = {}  # once each, though a layer has several leaves
    for leaf in leaves:
        try:
            chosen[leaf.name] = _choose(leaf, parts[leaf.name], config)
        except ConfigError as error:
            refused[str(error)] = None
    if refused:
        more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise ConfigError("; ".join([*refused][:SHOWN]) + more)
    _check_patterns(config, leaves, parts)
    _check_reach(config, {rule for spec, rule in chosen.values() if spec is not None}, leaves)
    return chosen


def _choose(leaf: Leaf, parts: Sequence[Part], config: OnlineQuantConfig) -> Choice:
    kind, names = _meant_by(leaf, parts)
    what = _what(leaf, parts)
    if leaf.layer is not None and leaf.field not in WEIGHTS:  # a bias: what a pattern says of its layer is not about it
        return None, f"dense: {what}"
    if kind != "other":
        return config.resolve_with_rule(names[0], kind)
    for name in names:
        try:
            _, rule = config.resolve_with_rule(name, kind)
        except ConfigError as error:
            raise ConfigError(f"{error} ({what}; only {' and '.join(KINDS.values())} hold quantized weights)") from None
        if rule.startswith("ignore: "):
            return None, rule
    return None, f"dense: {what}"


def _meant_by(leaf: Leaf, parts: Sequence[Part]) -> tuple[Kind, tuple[str, ...]]:
    """The kind of layer that a leaf belongs to, and the names by which patterns can mean it."""
    if leaf.layer is not None and leaf.kind is not None:
        return leaf.kind, (leaf.layer,)
    if any(set("ENK") <= set(part.axes or "") for part in parts):  # experts, for a mapping rule says so
        return "moe", (leaf.name,)
    return "other", leaf.names


def _what(leaf: Leaf, parts: Sequence[Part]) -> str:
    """What a leaf is that no scheme can reach."""
    if leaf.what is not None:
        return leaf.what
    if leaf.aval.ndim < 2:
        return f"rank {leaf.aval.ndim}"
    return "axes without E" if any(part.axes for part in parts) else "axes not stated"


def _check_patterns(config: OnlineQuantConfig, leaves: Sequence[Leaf], parts: Mapping[str, tuple[Part, ...]]) -> None:
    """Raises ConfigError for patterns that match no layer: a slip in one would go unnoticed."""
    found = [_meant_by(leaf, parts[leaf.name]) for leaf in leaves]
    for said, patterns, kinds in (
        ("targets match no experts or linear layers", [key for key, _ in config.targets], ("linear", "moe")),
        ("ignore matches no layers", config.ignore, get_args(Kind)),
    ):
        names = dict.fromkeys(name for kind, names in found for name in names if kind in kinds)
        idle = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
        if idle:
            raise ConfigError(f"{said}: {', '.join(idle)}; {_reachable(leaves)}")


def _check_reach(config: OnlineQuantConfig, rules: set[str], leaves: Sequence[Leaf]) -> None:
    """Raises ConfigError where nothing is quantized, or an explicit scheme for one kind of layer reaches none."""
    if not rules:
        deep = [f"{leaf.name} {tuple(leaf.aval.shape)}" for leaf in leaves if leaf.aval.ndim >= 3]
        raise ConfigError(
            f"quantization reaches no leaf; {_reachable(leaves)}. Of rank 3 and more there are "
            f"{listed(deep, 'tensor')}. Experts are the weights of moe_online.flax.MoE, or leaves whose mapping rule "
            'states their axes: {"*.w_in": "E K N"}; linear layers are those of moe_online.flax.Linear'
        )
    for kind in config.explicit:
        if kind not in rules:
            raise ConfigError(
                f"{kind}={getattr(config, kind)} reaches no {kind} layer that can hold quantized weights; leave it "
                f"out, or use {KINDS[kind]}: {_reachable(leaves)}"
            )


def _reachable(leaves: Sequence[Leaf]) -> str:
    """What a scheme can reach by its kind or by the name of the layer."""
    names = {kind: list(dict.fromkeys(str(leaf.layer) for leaf in leaves if leaf.kind == kind)) for kind in KINDS}
    return "the model has " + " and ".join(
        f"{listed(found, 'layer') if found else 'no layer'} of kind {kind!r}" for kind, found in names.items()
    )
