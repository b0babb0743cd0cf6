"""From stored tensors that claim to be of a leaf to the parts that fill it: each element exactly once."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_online.errors import CheckpointError, ConfigError, DtypeMismatch, ShapeMismatch
from moe_online.loading.messages import listed
from moe_online.loading.parts import CHILDREN, Child, Fragment, Part
from moe_online.loading.rules import AXES, CONTRACTION, EXPERT, HALF, OUTPUT, Rule
from moe_online.loading.source import StoredTensor
from moe_online.loading.tree import HALVES, WEIGHTS, Leaf
from pallas_kernels import Format, get_format

IN_WORDS = {"E": "expert", "L": "layer"}


class Claim(NamedTuple):
    """A stored tensor, or one index of it, that a rule or its name makes a part of a leaf."""

    tensor: StoredTensor
    rule: Rule | None
    half: int | None = None
    child: Child = ""
    at: tuple[tuple[str, int], ...] = ()  # its place along axes of the leaf that it does not have
    split: tuple[str, int] | None = None  # an axis of its own, and the index along it


@dataclasses.dataclass
class Findings:
    """What is wrong with the claims on all leaves; one error names them together."""

    missing: list[str] = dataclasses.field(default_factory=list)
    crowded: list[str] = dataclasses.field(default_factory=list)
    surplus: dict[str, str] = dataclasses.field(default_factory=dict)  # stored tensors, and how a message calls them
    shapes: dict[str, str] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)

    def raise_shapes(self, where: str) -> None:
        """Raises for tensors of one leaf that do not fit together."""
        if self.shapes:
            raise ShapeMismatch(
                f"{where} has another shape than the model in {listed(list(self.shapes.values()), 'tensor')}. Change "
                "the config of the model, or the axes in mapping={...}.",
                names=self.shapes,
            )
        if self.dtypes:
            raise DtypeMismatch(
                f"{where} stores parts of one leaf in several dtypes: {listed(list(self.dtypes.values()), 'tensor')}; "
                "save them alike",
                names=self.dtypes,
            )


def assemble(
    leaf: Leaf, claims: Sequence[Claim], stored_format: Format | None, findings: Findings
) -> tuple[tuple[Part, ...], Format | None]:
    """The parts of a leaf, and the format in which it is stored where it is stored quantized.

    Args:
      leaf: Of the model.
      claims: All that are made on it.
      stored_format: What the checkpoint says of itself; None: it is recognised.
      findings: What is wrong goes here.
    """
    by_child: dict[Child, list[Claim]] = collections.defaultdict(list)
    for claim in claims:
        by_child[claim.child].append(claim)
    if not by_child:
        findings.missing.append(leaf.name)
        return (), None
    plain = by_child.get("", [])
    is_codes = leaf.field in WEIGHTS and all(claim.tensor.dtype == jnp.float8_e4m3fn for claim in plain)
    if plain and "values" not in by_child and ("scales" in by_child or is_codes):
        by_child["values"] = by_child.pop("")  # what has scales is codes, by the name of the weight
    children = [child for child in by_child if child]
    if not children:
        return _parts(leaf, "", by_child[""], None, findings), None
    if "" in by_child:
        findings.crowded.append(f"{leaf.name} ({', '.join(claim.tensor.name for claim in claims)})")
        return (), None
    fmt = stored_format or _recognised(leaf, by_child)
    needed = [child for child in CHILDREN if child != "global_scale" or fmt.two_level]
    findings.missing += [f"{leaf.name}.{child}" for child in needed if child not in by_child]
    for child in children:
        for claim in by_child[child] if child not in needed else ():
            findings.surplus[claim.tensor.name] = f"{claim.tensor.name} ({fmt} has no {child})"
    parts = [part for child in needed for part in _parts(leaf, child, by_child.get(child, []), fmt, findings)]
    return tuple(parts), fmt


def with_axes(leaf: Leaf, claims: Sequence[Claim]) -> Leaf:
    """A leaf of the user's own, whose axes a rule says: by `as`, or as those of the tensor in the order of ours."""
    rules = [claim.rule for claim in claims if claim.rule is not None and claim.rule.axes is not None]
    for rule in rules:
        said = rule.leaf_axes
        if said is not None and (len(said) != leaf.aval.ndim if leaf.axes is None else not _agree(said, leaf.axes)):
            raise ConfigError(
                f"mapping rule {rule.pattern!r} says that {leaf.name} has the axes {' '.join(said)}, but it is "
                f"{tuple(leaf.aval.shape)}{'' if leaf.axes is None else f' (axes {chr(32).join(leaf.axes)})'}"
            )
    if leaf.axes is not None or not rules:
        return leaf
    said = rules[0].leaf_axes
    if said is None:
        letters = {*str(rules[0].axes), *(letter for letter, _ in claims[0].at)}
        letters -= {letter for claim in claims[:1] if claim.split for letter in claim.split[0]}
        said = "".join(letter for letter in AXES if letter in letters)
    return dataclasses.replace(leaf, axes=said) if len(said) == leaf.aval.ndim else leaf


def _agree(said: str, axes: str) -> bool:
    """Whether a rule says what is known; it may leave out gate and up, of which it is about one."""
    return said in (axes, axes.replace(HALF, ""))


def _recognised(leaf: Leaf, by_child: Mapping[Child, Sequence[Claim]]) -> Format:
    """The format of codes and scales that say nothing of themselves: fp8 in blocks of 128x128, or mxfp4."""
    dtypes = {child: np.dtype(claims[0].tensor.dtype) for child, claims in by_child.items()}
    values, scales = dtypes.get("values"), dtypes.get("scales")
    if values in (None, jnp.float8_e4m3fn) and (scales is None or jnp.issubdtype(scales, jnp.floating)):
        return get_format("fp8_per_block")
    if values in (None, np.uint8) and scales in (None, np.uint8):
        return get_format("mxfp4")
    found = ", ".join(f"{child} {dtype}" for child, dtype in dtypes.items())
    raise CheckpointError(
        f"{leaf.name} is stored quantized in a way that is not known: {found}. Known are float8_e4m3fn codes with real "
        "scales of 128x128 blocks, and mxfp4 (bytes of two codes, E8M0 scales)",
        names=[claim.tensor.name for claims in by_child.values() for claim in claims],
    )


def child_sizes(leaf: Leaf, child: Child, fmt: Format | None) -> dict[str, int]:
    """The size of each letter of a leaf, or of a child of it that is stored as `fmt`, in the checkpoint."""
    letters, shape = leaf.axes or "", leaf.source_shape
    sizes = dict(zip(letters, shape, strict=False))
    if fmt is None or not child:
        return sizes
    n, k = sizes.get(OUTPUT, 1), sizes.get(CONTRACTION, 1)
    if child == "values":
        return sizes | {CONTRACTION: k // fmt.codes_per_element}
    if child == "scales":
        blocks_n, blocks_k = fmt.grid(n, k)
        return sizes | {OUTPUT: blocks_n, CONTRACTION: blocks_k}
    return {letter: size for letter, size in sizes.items() if letter not in (OUTPUT, CONTRACTION)}


def _parts(
    leaf: Leaf, child: Child, claims: Sequence[Claim], fmt: Format | None, findings: Findings
) -> tuple[Part, ...]:
    by_half: dict[int | None, list[Claim]] = collections.defaultdict(list)
    for claim in claims:
        by_half[claim.half].append(claim)
    name = f"{leaf.name}.{child}" if child else leaf.name
    if not claims:
        return ()
    halves = set(by_half)
    if None in halves and len(halves) > 1:
        findings.crowded.append(f"{name} ({', '.join(claim.tensor.name for claim in claims)})")
        return ()
    if halves != {None} and not is_single(leaf):
        findings.missing += [
            f"{leaf.name}.{half}{child and '.'}{child}" for i, half in enumerate(HALVES) if i not in halves
        ]
    found = (_part(leaf, child, half, by_half[half], fmt, findings) for half in sorted(by_half, key=lambda h: h or 0))
    return tuple(part for part in found if part is not None)


def is_single(leaf: Leaf) -> bool:
    """Whether it has one matrix, or bias, per expert where others have gate and up."""
    axes = leaf.axes or ""
    return HALF in axes and leaf.aval.shape[axes.index(HALF)] == 1


def _part(
    leaf: Leaf, child: Child, half: int | None, claims: Sequence[Claim], fmt: Format | None, findings: Findings
) -> Part | None:
    """The tensors of one half, one child: one, or one for each index of the axes that names count."""
    counted = {letter for claim in claims for letter, _ in claim.at}
    outer = "".join(letter for letter in leaf.axes or AXES if letter in counted)
    sizes = child_sizes(leaf, child, fmt)
    unknown = [letter for letter in outer if letter not in sizes]
    if unknown:
        raise ConfigError(
            f"{claims[0].tensor.name} counts {' and '.join(unknown)} in its name, which {leaf.name} "
            f"{tuple(leaf.aval.shape)} does not have as an axis that is known; state its axes: '-> NAME as E N K'"
        )
    lengths = tuple(sizes[letter] for letter in outer)
    name = (
        leaf.name + (f".{HALVES[half]}" if half is not None and not is_single(leaf) else "") + (child and f".{child}")
    )
    places: dict[int, Claim] = {}
    for claim in claims:
        at = dict(claim.at)
        if set(at) != counted:
            findings.crowded.append(f"{name} ({claim.tensor.name} beside {claims[0].tensor.name})")
            return None
        if any(at[letter] >= length for letter, length in zip(outer, lengths, strict=True)):
            said = ", ".join(f"{IN_WORDS[k]} {at[k]} of {n}" for k, n in zip(outer, lengths, strict=True))
            findings.surplus[claim.tensor.name] = f"{claim.tensor.name} ({said})"
            continue
        place = int(np.ravel_multi_index([at[letter] for letter in outer], lengths)) if outer else 0
        if place in places:
            findings.crowded.append(f"{name} ({places[place].tensor.name}, {claim.tensor.name})")
        places[place] = claim
    for place in range(math.prod(lengths)):
        if place not in places:
            indices = zip(outer, np.unravel_index(place, lengths), strict=True)
            findings.missing.append(f"{name} [{', '.join(f'{IN_WORDS[letter]} {i}' for letter, i in indices)}]")
    if len(places) != math.prod(lengths):
        return None
    ordered = [places[place] for place in range(len(places))]
    fragments = tuple(_fragment(leaf, claim, sizes, findings) for claim in ordered)
    if not _alike(fragments, findings):
        return None
    rule = ordered[0].rule
    axes = fragments[0].letters or (rule and rule.axes) or None
    if outer:
        inner = axes or "".join(
            letter for letter in _child_axes(leaf, child) if letter not in outer and (half is None or letter != HALF)
        )
        axes = outer + inner
    return Part(fragments=fragments, outer=lengths, axes=axes, half=half, child=child)


def _child_axes(leaf: Leaf, child: Child) -> str:
    axes = leaf.axes or ""
    if child == "global_scale":
        return axes.replace(OUTPUT, "").replace(CONTRACTION, "")
    if not child:
        return axes
    lead = axes.replace(OUTPUT, "").replace(CONTRACTION, "")
    return lead + (OUTPUT + CONTRACTION if child == "values" else CONTRACTION + OUTPUT)


def _fragment(leaf: Leaf, claim: Claim, sizes: Mapping[str, int], findings: Findings) -> Fragment:
    """The tensor with axes that are several of the leaf's, or of one element, or counted by names, taken apart."""
    rule, tensor = claim.rule, claim.tensor
    if rule is None or rule.axes is None:
        return Fragment(tensor=tensor)
    groups = rule.groups
    letters = rule.axes.replace(claim.split[0], "") if claim.split else rule.axes
    if not set(letters) <= set(sizes):
        return Fragment(tensor=tensor)  # which has another shape than the leaf, as will be said
    at = {letter for letter, _ in claim.at}
    if EXPERT not in rule.axes and EXPERT not in at and sizes.get(EXPERT) == 1:
        groups = (EXPERT + groups[0], *groups[1:])
    if claim.split is None and groups == tuple(rule.axes):
        return Fragment(tensor=tensor)
    if claim.split is not None:
        axis = groups.index(claim.split[0])
        sizes = {**sizes, claim.split[0]: tensor.shape[axis]}
    needed = _needed(tensor, groups, sizes)
    if tensor.shape != needed:
        said = " ".join(group if len(group) == 1 else f"({group})" for group in groups)
        findings.shapes[tensor.name] = f"{tensor.name} {tensor.shape} (axes {said}), needed {needed}"
        return Fragment(tensor=tensor)
    return Fragment(tensor=tensor, groups=groups, sizes=sizes, split=claim.split)


def _needed(tensor: StoredTensor, groups: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that the tensor must have in the file; B has the bytes that its blocks of K have there."""
    needed = [math.prod(sizes[letter] for letter in group if letter in sizes) for group in groups]
    if groups[-1:] == ("B",) and tensor.shape:
        blocks, rest = divmod(needed[-2], max(tensor.shape[-1], 1))
        needed[-2:] = [blocks, tensor.shape[-1]] if not rest else [needed[-2], 1]
    return tuple(needed)


def _alike(fragments: Sequence[Fragment], findings: Findings) -> bool:
    """Whether they have one shape and one dtype."""
    first: Any = fragments[0]
    for other in fragments:
        if other.shape != first.shape:
            findings.shapes[other.tensor.name] = f"{other.tensor.name} {other.shape}, needed {first.shape} as its like"
        if other.tensor.dtype != first.tensor.dtype:
            for each in (first, other):
                findings.dtypes[each.tensor.name] = f"{each.tensor.name} {each.tensor.dtype}"
    return not findings.shapes and not findings.dtypes
