"""Which stored tensor becomes which leaf: the rules of `mapping=`.

A mapping goes from the names of stored tensors to what they are::

    {
        "*.w_gate": "E K N -> *.experts.w13_weight.gate",  # its axes, and the leaf that it becomes
        "*.w_up": "E K N -> *.experts.w13_weight.up",
        "*.w_down": "E K N -> *.experts.w2_weight",
        "*.router": "-> *.router.kernel",  # another name, nothing else
        "*.experts.w13": "E N K",  # the same name; the axes say that these are experts
        "*.q_proj.weight": "N K -> *.q_proj.kernel as K N",  # turned: the leaf's own axes come last
        "*.inv_freq": "skip",  # not wanted
        "*.q_norm.weight": "-> *.q_norm.scale ?",  # ? at the end: the rule may match nothing
    }

Each `*` on the right stands for what the `*` in the same place on the left matched. Axes describe the stored tensor:
L layer, E expert, S gate or up, N output, K contraction. Leaves have them in the order L E S N K, but where `as` says
another. Several in parentheses are one stored axis, the first of them the slowest, and 1 is an axis of one element::

    "*.gate_up_proj": "E (S N) K -> *.experts.w13_weight",  # [E, 2I, H]: gate rows, then up rows
    "*.experts.gate_up_proj": "E K (N S) -> *.experts.w13_weight",  # [E, H, 2I]: in turn, as GPT-OSS has them
    "*.w1": "(E N) K -> *.experts.w13_weight.gate",  # [E * I, H]
    "*.shared_expert_gate": "1 K -> *.experts.shared.gate_weight",  # [1, H]

An E of size 1, that of shared experts, may be left out. Experts whose activation is not
gated have one matrix where others have gate and up: its S may be left out, and it has no halves.

`{E}` and `{L}` are numbers in names. On the left they count an axis of the leaf that the tensor does not have; one that
is on the right as well is a part of the leaf's name. One that is on the right only takes a tensor apart along that
axis, one leaf for each index::

    "layers.{L}.experts.{E}.w1.weight": "N K -> layers.{L}.experts.w13_weight.gate",  # a tensor for each expert
    "params.layers.moe.wi_0": "L E K N -> layers.{L}.experts.w13_weight.gate",  # scanned: all layers in one tensor
    "layers.{L}.experts.w_down": "E K N -> layers.experts.w2_weight",  # the other way: into a leaf [L, E, N, K]

Where the checkpoint is quantized already, codes and scales are the `.values` and `.scales` of a leaf; scales have the
axes of the codes, one element for each block. B is an axis of the bytes of one block of K::

    "*.experts.{E}.down_proj.weight": "N K -> *.experts.w2_weight.values",
    "*.experts.{E}.down_proj.weight_scale_inv": "N K -> *.experts.w2_weight.scales",
    "*.experts.gate_up_proj_blocks": "E (N S) K B -> *.experts.w13_weight.values",
    "*.experts.gate_up_proj_scales": "E (N S) K -> *.experts.w13_weight.scales",

An exact name wins over `skip`, and that over patterns, of which one may match. Mappings for the names of well-known
models are in `moe_online.loading.mappings`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_online.errors import ConfigError, MissingWeights, ShapeMismatch, UnexpectedWeights
from moe_online.loading.assemble import Claim, Findings, assemble, is_single, with_axes
from moe_online.loading.messages import listed
from moe_online.loading.parts import CHILDREN, Child, Part
from moe_online.loading.rules import HALF, Rule, choose_rules, parse_rules
from moe_online.loading.source import StoredTensor
from moe_online.loading.tree import HALVES, Leaf
from pallas_kernels import Format


class Assigned(NamedTuple):
    """A leaf, with axes where a rule says them, and what is stored of it."""

    leaf: Leaf
    parts: tuple[Part, ...]
    stored_format: Format | None  # where it is stored quantized


def assign(
    leaves: Sequence[Leaf],
    tensors: Mapping[str, StoredTensor],
    mapping: Mapping[str, str],
    unexpected: str | Sequence[str],
    where: str,
    stored_formats: Mapping[str, Format] | None = None,
) -> list[Assigned]:
    """Finds the stored tensors of each leaf.

    Args:
      leaves: Of the model.
      tensors: Of the source, by name.
      mapping: Rules.
      unexpected: What surplus tensors are: "error", "ignore", or patterns of those that may be left.
      where: The source, for messages.
      stored_formats: Of leaves that the source says are stored quantized.

    Returns:
      Every leaf, in their order.

    Raises:
      ConfigError: a rule that is malformed or matches nothing, two rules for one tensor, two tensors for one place.
      UnexpectedWeights: a stored tensor that no leaf asks for, unless `unexpected` allows it.
      MissingWeights: a leaf, or a half or an expert of one, that no stored tensor fills.
      ShapeMismatch, DtypeMismatch: tensors of one leaf that do not fit together.
    """
    by_name = {leaf.name: leaf for leaf in leaves}
    rules, findings = parse_rules(mapping), Findings()
    claims: dict[str, list[Claim]] = collections.defaultdict(list)
    ambiguous: dict[str, str] = {}
    chosen = choose_rules(list(tensors), rules, ambiguous)
    if ambiguous:
        said = [f"{name} ({which})" for name, which in ambiguous.items()]
        raise ConfigError(f"several mapping rules match {', '.join(said)}; make them exclusive")
    for stored, rule in zip(tensors.values(), chosen, strict=True):
        if rule is not None and rule.skip:
            continue
        for target, claim in _claims(stored, rule, where):
            owner, half, child = _owner(target, by_name)
            if owner is None:
                same = target == stored.name
                findings.surplus[stored.name] = stored.name if same else f"{stored.name} (mapped to {target})"
                continue
            if half is None and rule is not None and rule.axes and HALF not in rule.axes and is_single(by_name[owner]):
                half = 0
            claims[owner].append(claim._replace(half=half, child=child))
    used = {rule.pattern for rule in chosen if rule is not None}
    unused = [rule.pattern for rule in rules if not rule.optional and rule.pattern not in used]
    if unused:
        raise ConfigError(f"mapping rules match no tensor of {where}: {', '.join(unused)}; {_some_names(tensors)}")
    found = []
    for leaf in leaves:
        said_leaf = with_axes(leaf, claims[leaf.name])
        parts, fmt = assemble(said_leaf, claims[leaf.name], (stored_formats or {}).get(leaf.name), findings)
        found.append(Assigned(said_leaf, parts, fmt))
    if findings.crowded:
        raise ConfigError(
            f"several tensors of {where} become one leaf: {', '.join(findings.crowded)}; change the mapping"
        )
    findings.raise_shapes(where)
    if findings.missing:
        astray = [said for name, said in findings.surplus.items() if said != name]
        raise MissingWeights(
            f"{where} lacks {listed(findings.missing, 'tensor')} of the model. "
            f"{_remedy(findings.missing, by_name, tensors, astray)}",
            names=findings.missing,
        )
    _check_surplus(findings.surplus, unexpected, where)
    return found


def _claims(stored: StoredTensor, rule: Rule | None, where: str) -> Iterator[tuple[str, Claim]]:
    """What a stored tensor becomes: the names of leaves, or of halves and children of them."""
    if rule is None:
        yield stored.name, Claim(tensor=stored, rule=None)
        return
    match = rule.apply(stored.name)
    assert match is not None  # the rule was chosen because it matches
    split = rule.split_along
    if split is None:
        yield match.target, Claim(tensor=stored, rule=rule, at=match.at)
        return
    if len(rule.groups) != len(stored.shape) or split not in rule.groups:
        axes = " ".join(group if len(group) == 1 else f"({group})" for group in rule.groups)
        raise ShapeMismatch(
            f"{stored.name} {stored.shape} of {where} cannot be taken apart along {split} of its axes {axes}: there "
            f"must be {len(rule.groups)}, {split} one of its own",
            names=[stored.name],
        )
    for index in range(stored.shape[rule.groups.index(split)]):
        target = match.target.replace(f"{{{split}}}", str(index))
        yield target, Claim(tensor=stored, rule=rule, at=match.at, split=(split, index))


def _owner(target: str, leaves: Mapping[str, Leaf]) -> tuple[str | None, int | None, Child]:
    """The leaf of this name, or the leaf of which this is the gate or up half, or codes or scales, or those of it."""
    if target in leaves:
        return target, None, ""
    base, _, last = target.rpartition(".")
    child = ""
    if last in CHILDREN:
        if base in leaves:
            return base, None, last
        child = last
        base, _, last = base.rpartition(".")
    if last in HALVES and base in leaves and HALF in (leaves[base].axes or "") and not is_single(leaves[base]):
        return base, HALVES.index(last), child
    return None, None, ""


def _remedy(
    missing: Sequence[str], leaves: Mapping[str, Leaf], tensors: Mapping[str, StoredTensor], astray: Sequence[str]
) -> str:
    if astray:
        return f"Mapping rules lead to names that the model does not have: {listed(astray, 'tensor')}."
    for prefix in dict.fromkeys(name.partition(".")[0] for name in tensors):
        if any(f"{prefix}.{name}" in tensors for name in missing):
            return f"They are there below {prefix!r}: give prefix={prefix!r}."
    if any(name in leaves and leaves[name].kind == "moe" for name in missing):
        return (
            'Where the checkpoint has them by other names, give mapping={"*.their_name": "E K N -> *.our_name"} for '
            f'experts and {{"*.their_name": "-> *.our_name"}} for all else; {_some_names(tensors)}.'
        )
    return f"Give the checkpoint that belongs to this model, or mapping={{...}}; {_some_names(tensors)}."


def _some_names(tensors: Mapping[str, StoredTensor]) -> str:
    return f"it has {listed([f'{t.name} {t.shape}' for t in tensors.values()], 'tensor')}"


def _check_surplus(surplus: Mapping[str, str], unexpected: str | Sequence[str], where: str) -> None:
    if unexpected == "ignore":
        return
    allowed = [] if unexpected == "error" else [unexpected] if isinstance(unexpected, str) else unexpected
    allow = [Rule(pattern=pattern).regex for pattern in allowed]
    left = {name: said for name, said in surplus.items() if not any(regex.fullmatch(name) for regex in allow)}
    if left:
        raise UnexpectedWeights(
            f"{where} has {listed(list(left.values()), 'tensor')} that the model does not ask for. Give "
            'mapping={...} where they belong somewhere, unexpected=["pattern", ...] or unexpected="ignore" to leave '
            "them unread, or prefix=... to read a part of the checkpoint.",
            names=left,
        )
