"""One line of a mapping, parsed: `"PATTERN": "AXES -> TARGET"`. The module `mapping` says what they mean."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

from moe_online.errors import ConfigError

LAYER, EXPERT, HALF, OUTPUT, CONTRACTION = "LESNK"
AXES = LAYER + EXPERT + HALF + OUTPUT + CONTRACTION
BYTES = "B"  # an axis of the file that continues K: the bytes of one block
COUNTED = LAYER + EXPERT  # axes whose index may be a number in a name
SKIP, OPTIONAL = "skip", "?"

_AXIS = re.compile(r"\([^()]*\)|[^\s()]")  # one axis of the file
_WILD = re.compile(r"\*|\{[^{}]*\}")
_NUMBER = re.compile(r"\{(.)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """What a rule makes of one name."""

    target: str  # may hold `{L}`, where L is an axis of the tensor
    at: tuple[tuple[str, int], ...] = ()  # its place along axes of the leaf that the tensor does not have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a mapping, parsed."""

    pattern: str
    axes: str | None = None  # letters, in the order in which they are stored; None: those of the leaf
    groups: tuple[str, ...] = ()  # the letters of each axis in the file
    target: str | None = None  # None: the same name
    leaf_axes: str | None = None  # of the target, where it is no leaf of ours
    skip: bool = False
    optional: bool = False

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """Matches whole names; one group for each `*`, a named one for each `{X}`."""
        pieces = _WILD.split(self.pattern)
        wild = [f"(?P<{token[1]}>[0-9]+)" if token != "*" else "(.*)" for token in _WILD.findall(self.pattern)]
        return re.compile("".join(re.escape(piece) + then for piece, then in zip(pieces, [*wild, ""], strict=True)))

    @property
    def split_along(self) -> str | None:
        """The axis of the tensor that the target's name counts: each index along it is a leaf."""
        found = set(_NUMBER.findall(self.target or "")) - set(_NUMBER.findall(self.pattern))
        return found.pop() if found else None

    def apply(self, name: str) -> Match | None:
        """What the stored tensor of this name becomes; None where the rule is about others."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        numbers = match.groupdict()
        captured = iter([text for i, text in enumerate(match.groups(), 1) if i not in self.regex.groupindex.values()])
        target = self.target
        if target is None:  # the same name, in which only what is no place along an axis stays
            target = _NUMBER.sub(lambda number: numbers[number[1]], self.pattern)
            target = re.sub(r"\*", lambda _: next(captured), target)
            return Match(target=target)
        named = set(_NUMBER.findall(target))
        target = re.sub(r"\*", lambda _: next(captured), target)
        target = _NUMBER.sub(lambda number: numbers.get(number[1], number[0]), target)
        return Match(target=target, at=tuple((key, int(text)) for key, text in numbers.items() if key not in named))


def parse_rule(pattern: str, text: str) -> Rule:
    """Reads one line of a mapping.

    Raises:
      ConfigError: it says nothing, names an unknown or repeated axis, or has more `*` on the right than on the left.
    """
    where = f"mapping rule {pattern!r}: {text!r}"
    if not isinstance(text, str):
        raise ConfigError(f"{where} must be a string: 'AXES', '-> TARGET', 'AXES -> TARGET' or 'skip'")
    wrong = [token for token in _WILD.findall(pattern) if token != "*" and token[1:-1] not in (*COUNTED,)]
    if wrong:
        raise ConfigError(f"{where} has {', '.join(wrong)} in its pattern; numbers of a name are {{L}} or {{E}}")
    if text.strip() == SKIP:
        return Rule(pattern=pattern, skip=True, optional=True)
    said, optional = (text.strip()[:-1], True) if text.strip().endswith(OPTIONAL) else (text, False)
    axes_text, arrow, rest = (part.strip() for part in said.partition("->"))
    target, _, leaf_axes_text = (part.strip() for part in rest.partition(" as "))
    groups = tuple(re.sub(r"[() 1]", "", token) for token in _AXIS.findall(axes_text))
    axes = "".join(groups).replace(BYTES, "")
    if _AXIS.sub("", axes_text).strip() or (arrow and not target) or not (axes or target):
        raise ConfigError(f"{where} must be 'AXES', '-> TARGET', 'AXES -> TARGET' or 'skip'")
    leaf_axes = leaf_axes_text.replace(" ", "")
    _check_letters(where, axes_text, axes)
    if leaf_axes:
        _check_letters(where, leaf_axes_text, leaf_axes)
    if any(EXPERT in group[1:] and group != LAYER + EXPERT for group in groups):
        raise ConfigError(f"{where}: axes {axes_text!r} must have E first within its parentheses")
    if BYTES in "".join(groups) and groups[-2:] != (CONTRACTION, BYTES):
        raise ConfigError(
            f"{where}: axes {axes_text!r} may have B, the bytes of a block, right behind K at the end only"
        )
    if target.count("*") > pattern.count("*"):
        raise ConfigError(
            f"{where}: {target!r} has more * than the pattern, so some match nothing; "
            f"begin the pattern with '*.' where the name has a path before it"
        )
    rule = Rule(
        pattern=pattern,
        axes=axes or None,
        groups=groups,
        target=target or None,
        leaf_axes=leaf_axes or None,
        optional=optional,
    )
    _check_numbers(where, rule)
    return rule


def _check_letters(where: str, text: str, axes: str) -> None:
    if set(axes) - set(AXES) or len(set(axes)) != len(axes):
        raise ConfigError(
            f"{where}: axes {text!r} must be distinct letters of {' '.join(AXES)}: layer, expert, gate/up, output, "
            "contraction. For another name write '-> NAME'"
        )


def _check_numbers(where: str, rule: Rule) -> None:
    """Raises ConfigError where a `{X}` is repeated, or stands for nothing."""
    here, there = _NUMBER.findall(rule.pattern), _NUMBER.findall(rule.target or "")
    if len(set(here)) != len(here) or len(set(there)) != len(there):
        raise ConfigError(f"{where} has one of {{L}} and {{E}} twice in a name; write * for numbers that mean no axis")
    nothing = [letter for letter in there if letter not in here and letter not in (rule.axes or "")]
    if nothing or any(letter not in COUNTED for letter in there):
        raise ConfigError(
            f"{where}: {{{''.join(nothing or there)}}} of {rule.target!r} is neither in the pattern nor an axis"
        )
    both = [letter for letter in here if letter in (rule.axes or "")]
    if both:
        raise ConfigError(
            f"{where}: {both[0]} is an axis of the tensor, and a number in its name; it can be one of them"
        )
    if len([letter for letter in there if letter not in here]) > 1:
        raise ConfigError(f"{where} takes a tensor apart along two axes; it can be one")


def parse_rules(mapping: Mapping[str, str]) -> list[Rule]:
    """All lines of a mapping.

    Raises:
      ConfigError: one that is malformed, or a mapping that is no dict.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"mapping must be a dict of rules, not {type(mapping).__name__}: {{'*.w_in': 'E K N'}}")
    return [parse_rule(pattern, text) for pattern, text in mapping.items()]


def choose_rules(names: list[str], rules: list[Rule], said: dict[str, str]) -> list[Rule | None]:
    """The rule for each stored tensor: an exact name wins over `skip`, that over patterns, of which one may match.

    Args:
      names: Of stored tensors.
      rules: All of a mapping.
      said: Filled with what is ambiguous: the name, and the rules that match it.
    """
    exact = {rule.pattern: rule for rule in rules if not _WILD.search(rule.pattern)}
    patterns = [rule for rule in rules if rule.pattern not in exact]
    chosen: list[Rule | None] = []
    for name in names:
        if name in exact:
            chosen.append(exact[name])
            continue
        matching = [rule for rule in patterns if rule.regex.fullmatch(name)]
        matching = [rule for rule in matching if rule.skip][:1] or matching
        chosen.append(matching[0] if matching else None)
        if len(matching) > 1:
            said[name] = ", ".join(repr(rule.pattern) for rule in matching)
    return chosen
