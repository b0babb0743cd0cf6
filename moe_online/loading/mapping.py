"""Which stored tensor becomes which leaf: the rules of `mapping=`.

A mapping goes from the names of stored tensors to what they are::

    {
        "*.w_gate": "E K N -> *.experts.w13_weight.gate",  # its axes, and the leaf that it becomes
        "*.w_up": "E K N -> *.experts.w13_weight.up",
        "*.w_down": "E K N -> *.experts.w2_weight",
        "*.router": "-> *.router.kernel",  # another name, nothing else
        "*.experts.w13": "E N K",  # the same name; the axes say that these are experts
    }

Each `*` on the right stands for what the `*` in the same place on the left matched. Axes describe the stored tensor:
E expert, S gate or up, N output, K contraction. Leaves have them in the order E S N K. Several in parentheses are one
stored axis, the first of them the slowest, and 1 is an axis of one element::

    "*.gate_up_proj": "E (S N) K -> *.experts.w13_weight",  # [E, 2I, H]: gate rows, then up rows
    "*.experts.gate_up_proj": "E K (N S) -> *.experts.w13_weight",  # [E, H, 2I]: in turn, as GPT-OSS has them
    "*.w1": "(E N) K -> *.experts.w13_weight.gate",  # [E * I, H]
    "*.shared_expert_gate": "1 K -> *.experts.shared.gate_weight",  # [1, H]

An E of size 1, that of shared experts, may be left out. Experts whose activation is not
gated have one matrix where others have gate and up: its S may be left out, and it has no halves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_online.errors import ConfigError, MissingWeights, ShapeMismatch, UnexpectedWeights
from moe_online.loading.messages import listed
from moe_online.loading.source import CheckpointSource, Index, StoredTensor
from moe_online.loading.tree import HALVES, Leaf

AXES = "ESNK"
AXIS = re.compile(r"\([^()]*\)|[^\s()]")  # one stored axis in a rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a mapping, parsed."""

    pattern: str
    axes: str | None  # letters, in the order in which they are stored
    target: str | None  # None: the same name
    groups: tuple[str, ...] = ()  # the letters of each stored axis

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """Matches whole names; one group for each `*`."""
        return re.compile("(.*)".join(re.escape(piece) for piece in self.pattern.split("*")))

    def apply(self, name: str) -> str | None:
        """The leaf that the stored tensor of this name becomes; None where the rule is about others."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        if self.target is None:
            return name
        first, *pieces = self.target.split("*")
        return first + "".join(captured + piece for captured, piece in zip(match.groups(), pieces, strict=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A stored tensor that becomes a leaf, or the gate or up half of one."""

    stored: StoredTensor
    axes: str | None  # as stored; None: those of the leaf
    half: int | None = None  # 0 gate, 1 up
    groups: tuple[str, ...] | None = None  # letters of each axis in the file, where `stored` has them taken apart

    def read(self, source: CheckpointSource, index: Index) -> Any:
        """Its region `index`, of whose axes in the file only the first letter may be cut."""
        if self.groups is None:
            return source.read(self.stored.name, index)
        of_letter = dict(zip(self.axes or "", index, strict=True))
        sizes = dict(zip(self.axes or "", self.stored.shape, strict=True))
        merged = []
        for group in self.groups:
            inner = math.prod(sizes[letter] for letter in group[1:])
            first = of_letter[group[0]] if group else slice(0, 1)
            merged.append(slice(first.start * inner, first.stop * inner))
        return source.read(self.stored.name, tuple(merged)).reshape([s.stop - s.start for s in index])


def parse_rule(pattern: str, text: str) -> Rule:
    """Reads one line of a mapping.

    Raises:
      ConfigError: it says nothing, names an unknown or repeated axis, or has more `*` on the right than on the left.
    """
    if not isinstance(text, str):
        raise ConfigError(
            f"mapping rule {pattern!r}: {text!r} must be a string: 'AXES', '-> TARGET' or 'AXES -> TARGET'"
        )
    axes_text, arrow, target = (part.strip() for part in text.partition("->"))
    groups = tuple(re.sub(r"[() 1]", "", token) for token in AXIS.findall(axes_text))
    axes = "".join(groups)
    if AXIS.sub("", axes_text).strip() or (arrow and not target) or not (axes or target):
        raise ConfigError(f"mapping rule {pattern!r}: {text!r} must be 'AXES', '-> TARGET' or 'AXES -> TARGET'")
    if any("E" in group[1:] for group in groups):
        raise ConfigError(f"mapping rule {pattern!r}: axes {axes_text!r} must have E first within its parentheses")
    if set(axes) - set(AXES) or len(set(axes)) != len(axes):
        raise ConfigError(
            f"mapping rule {pattern!r}: axes {axes_text!r} must be distinct letters of {' '.join(AXES)}: "
            "expert, gate/up, output, contraction. For another name write '-> NAME'"
        )
    if target.count("*") > pattern.count("*"):
        raise ConfigError(
            f"mapping rule {pattern!r}: {target!r} has more * than the pattern, so some match nothing; "
            f"begin the pattern with '*.' where the name has a path before it"
        )
    return Rule(pattern=pattern, axes=axes or None, target=target or None, groups=groups)


def assign(
    leaves: Sequence[Leaf],
    tensors: Mapping[str, StoredTensor],
    mapping: Mapping[str, str],
    unexpected: str | Sequence[str],
    where: str,
) -> dict[str, tuple[Part, ...]]:
    """Finds the stored tensors of each leaf.

    Returns:
      For each leaf one part, or two: gate and up.

    Raises:
      ConfigError: a rule that is malformed or matches nothing, two rules for one tensor, two tensors for one leaf.
      UnexpectedWeights: a stored tensor that no leaf asks for, unless `unexpected` allows it.
      MissingWeights: a leaf, or a half of one, that no stored tensor fills.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"mapping must be a dict of rules, not {type(mapping).__name__}: {{'*.w_in': 'E K N'}}")
    rules = [parse_rule(pattern, text) for pattern, text in mapping.items()]
    by_name = {leaf.name: leaf for leaf in leaves}
    found: dict[str, list[Part]] = {leaf.name: [] for leaf in leaves}
    used, surplus = set(), {}
    for (name, stored), rule in zip(tensors.items(), _choose_rules(tensors, rules), strict=True):
        used.add(rule)
        target = name if rule is None else rule.apply(name)
        assert target is not None  # the rule was chosen because it matches
        owner, half = _owner(target, by_name)
        if owner is None:
            surplus[name] = name if target == name else f"{name} (mapped to {target})"
        else:
            axes = None if rule is None else rule.axes
            if axes is not None and "S" not in axes and _is_single(by_name[owner]):
                half = 0
            part = Part(stored=stored, axes=axes, half=half)
            found[owner].append(part if rule is None else _taken_apart(part, by_name[owner], rule.groups, where))
    unused = [rule.pattern for rule in rules if rule not in used]
    if unused:
        raise ConfigError(f"mapping rules match no tensor of {where}: {', '.join(unused)}; {_some_names(tensors)}")
    _check_missing(found, by_name, tensors, where, [said for name, said in surplus.items() if said != name])
    _check_surplus(surplus, unexpected, where)
    return {name: tuple(sorted(parts, key=lambda part: part.half or 0)) for name, parts in found.items()}


def _choose_rules(names: Iterable[str], rules: Sequence[Rule]) -> list[Rule | None]:
    """The rule for each stored tensor: an exact name wins over patterns, of which only one may match."""
    chosen, ambiguous = [], []
    for name in names:
        matching = [rule for rule in rules if rule.regex.fullmatch(name)]
        matching = [rule for rule in matching if rule.pattern == name] or matching
        chosen.append(matching[0] if matching else None)
        if len(matching) > 1:
            ambiguous.append(f"{name} ({', '.join(repr(rule.pattern) for rule in matching)})")
    if ambiguous:
        raise ConfigError(f"several mapping rules match {', '.join(ambiguous)}; make them exclusive")
    return chosen


def _owner(target: str, leaves: Mapping[str, Leaf]) -> tuple[str | None, int | None]:
    """The leaf of this name, or the leaf of which this is the gate or up half."""
    if target in leaves:
        return target, None
    base, _, half = target.rpartition(".")
    if half in HALVES and base in leaves and "S" in (leaves[base].axes or "") and not _is_single(leaves[base]):
        return base, HALVES.index(half)
    return None, None


def _taken_apart(part: Part, leaf: Leaf, groups: tuple[str, ...], where: str) -> Part:
    """A part whose axes in the file are several of the leaf's, or of one element, with those of the leaf."""
    letters = leaf.axes or "".join(letter for letter in AXES if part.axes and letter in part.axes)
    sizes = dict(zip(letters, leaf.aval.shape, strict=False))
    if part.axes is None or not set(part.axes) <= set(sizes):
        return part
    if "E" not in part.axes and sizes.get("E") == 1:
        groups = ("E" + groups[0], *groups[1:])
    if all(len(group) == 1 for group in groups):
        return part
    inner = [math.prod(sizes[letter] for letter in group[1:]) for group in groups]
    needed = tuple(math.prod(sizes[letter] for letter in group) for group in groups)
    stored = part.stored
    if stored.shape != needed:
        raise ShapeMismatch(
            f"{where} has another shape than the model in {stored.name} {stored.shape} (axes "
            f"{' '.join(group if len(group) == 1 else f'({group})' for group in groups)}), needed {needed}. Change the "
            "config of the model, or the axes in mapping={...}.",
            names=[stored.name],
        )
    chunks = {group[0]: -(-chunk // n) for group, chunk, n in zip(groups, stored.chunk, inner, strict=True) if group}
    axes = "".join(groups)
    stored = dataclasses.replace(
        stored,
        shape=tuple(sizes[letter] for letter in axes),
        chunk=tuple(chunks.get(letter, sizes[letter]) for letter in axes),
    )
    return dataclasses.replace(part, stored=stored, axes=axes, groups=groups)


def _is_single(leaf: Leaf) -> bool:
    """Whether it has one matrix, or bias, per expert where others have gate and up."""
    axes = leaf.axes or ""
    return "S" in axes and leaf.aval.shape[axes.index("S")] == 1


def _check_missing(
    found: Mapping[str, Sequence[Part]],
    leaves: Mapping[str, Leaf],
    tensors: Mapping[str, StoredTensor],
    where: str,
    astray: Sequence[str],
) -> None:
    missing, crowded = [], []
    for name, parts in found.items():
        halves = [part.half for part in parts]
        if sorted(str(half) for half in halves) not in ([], ["None"], ["0"], ["1"], ["0", "1"]):
            crowded.append(f"{name} ({', '.join(part.stored.name for part in parts)})")
        if not halves:
            missing.append(name)
        elif halves != [None] and not _is_single(leaves[name]):
            missing += [f"{name}.{half}" for i, half in enumerate(HALVES) if i not in halves]
    if crowded:
        raise ConfigError(f"several tensors of {where} become one leaf: {', '.join(crowded)}; change the mapping")
    if missing:
        raise MissingWeights(
            f"{where} lacks {listed(missing, 'tensor')} of the model. {_remedy(missing, leaves, tensors, astray)}",
            names=missing,
        )


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
    allow = [Rule(pattern=pattern, axes=None, target=None).regex for pattern in allowed]
    left = {name: said for name, said in surplus.items() if not any(regex.fullmatch(name) for regex in allow)}
    if left:
        raise UnexpectedWeights(
            f"{where} has {listed(list(left.values()), 'tensor')} that the model does not ask for. Give "
            'mapping={...} where they belong somewhere, unexpected=["pattern", ...] or unexpected="ignore" to leave '
            "them unread, or prefix=... to read a part of the checkpoint.",
            names=left,
        )
