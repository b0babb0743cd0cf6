"""Which scheme each leaf of a model gets, and the rule that says so; what a config says in vain is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from moe_online.config import OnlineQuantConfig
from moe_online.errors import ConfigError
from moe_online.loading.mapping import Assigned
from moe_online.loading.messages import SHOWN, listed
from moe_online.loading.parts import Part
from moe_online.loading.tree import WEIGHTS, Leaf
from moe_online.quant_config import Kind, matches
from moe_online.schemes import QuantSpec
from pallas_kernels import Format, get_format

KINDS = {"linear": "moe_online.flax.Linear", "moe": "moe_online.flax.MoE"}  # and the layers that are of them
USUAL_ACTIVATION = {"fp8_per_block": get_format("fp8_per_group")}  # of checkpoints that say nothing: DeepSeek-V3
Choice = tuple[QuantSpec | None, str]  # None: stored as it is declared; and the rule, for people


def choose_specs(
    assigned: Sequence[Assigned],
    config: OnlineQuantConfig | None,
    *,
    requantize: bool = False,
    activations: Mapping[str, Format | None] | None = None,
) -> dict[str, Choice]:
    """The scheme of each leaf and the rule that chose it.

    Args:
      assigned: The leaves, and what is stored of them.
      config: What the user says; None: nothing.
      requantize: Whether codes of the checkpoint may become other codes, or real numbers.
      activations: Formats of inputs that the checkpoint says of its quantized leaves.

    Raises:
      ConfigError: the config contradicts itself about a layer, targets what cannot be quantized, or reaches no leaf
        with all or with a part of what it says; it asks for another format than the one that a leaf is stored in.
    """
    leaves, parts = [each.leaf for each in assigned], {each.leaf.name: each.parts for each in assigned}
    chosen: dict[str, Choice] = {}
    reached: set[str] = set()  # by what the config says
    refused: dict[str, dict[str, None]] = {}  # what is said, and of which leaves, if that begins with their names
    for leaf, of_leaf, stored in assigned:
        try:
            choice: Choice = (None, "as declared") if config is None else _choose(leaf, of_leaf, config)
            reached |= {choice[1]} if choice[0] is not None else set()
            if stored is not None:
                choice = of_stored(
                    leaf,
                    of_leaf,
                    choice,
                    stored,
                    activation=(USUAL_ACTIVATION if activations is None else activations).get(
                        stored.name if activations is None else leaf.name
                    ),
                    requantize=requantize,
                    says_nothing=config is None,
                )
            chosen[leaf.name] = choice
        except ConfigError as error:
            said = str(error)
            name = leaf.name if said.startswith(leaf.name) else ""
            refused.setdefault(said.removeprefix(name), {})[name] = None
    if refused:
        more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        reasons = [_named(list(names)) + said for said, names in refused.items()]
        raise ConfigError("; ".join(reasons[:SHOWN]) + more)
    if config is None:
        return chosen
    _check_patterns(config, leaves, parts)
    _check_reach(config, reached | {rule for spec, rule in chosen.values() if spec is not None}, leaves)
    return chosen


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else listed(names, "tensor")


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


def of_stored(
    leaf: Leaf,
    parts: Sequence[Part],
    choice: Choice,
    stored: Format,
    *,
    activation: Format | None = None,
    requantize: bool,
    says_nothing: bool = False,
) -> Choice:
    """The scheme of a leaf that is stored quantized: as it is stored, or another where that is allowed.

    Args:
      leaf: Of the model.
      parts: What is stored of it.
      choice: The scheme that it would get otherwise.
      stored: Its format in the checkpoint.
      activation: Of its inputs, where the stored format is taken over unasked.
      requantize: Whether another is allowed.
      says_nothing: Whether the user gave no config.

    Raises:
      ConfigError: another format was asked for, or the leaf cannot be quantized.
    """
    spec, rule = choice
    can_hold = leaf.kind is not None or _meant_by(leaf, parts)[0] == "moe"
    if spec is not None and spec.weight == stored:
        return spec, f"{rule}, as stored"
    if requantize and (spec is not None or says_nothing or not can_hold):
        return spec, f"{rule}, requantized from {stored}"
    if spec is None and can_hold:
        return QuantSpec(stored, activation), f"as stored: {stored}"
    wanted = spec.weight if spec is not None else f"real numbers, for it is no {' or '.join(KINDS.values())}"
    raise ConfigError(
        f"{leaf.name}: pre-quantized, the checkpoint has it as {stored}, and {wanted} was asked for "
        f"({rule}). Ask for {stored}, or give requantize=True (on the command line --requantize), which turns its "
        "codes into others at a loss"
    )


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
