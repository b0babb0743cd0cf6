"""The oracle of routing: numpy in float64, one token and one expert at a time, written from the definition alone."""

import itertools
import math
from typing import NamedTuple

import numpy as np

F32_ERROR = 4e-6  # of a score in f32, relative: some ulps of exp, of the sum and of the quotient


class Routed(NamedTuple):
    weights: np.ndarray  # float64 [T, top_k]
    ids: np.ndarray  # int64 [T, top_k]
    clear: np.ndarray  # bool [T]: f32 must choose alike, for what was compared is either equal or far enough apart


def route(
    logits, top_k, *, scoring="softmax", renormalize=True, groups=None, bias=None, factor=1.0, best_of_group=None
) -> Routed:
    """`groups` is (all, kept) or None; `best_of_group` says how many experts score a group, where a control errs."""
    logits, routed = np.asarray(logits).astype(np.float64), []
    best_of_group = best_of_group or (1 if bias is None else 2)
    bias = np.zeros(logits.shape[1]) if bias is None else np.asarray(bias).astype(np.float64)
    for row in logits:
        scores = scored(row, scoring)
        ids, clear = choose(scores + bias, np.abs(scores) + np.abs(bias), top_k, groups, best_of_group)
        weights = scores[ids]
        if renormalize:
            weights = weights / weights.sum()
        routed.append((weights * factor, ids, clear))
    return Routed(*(np.array(part) for part in zip(*routed, strict=True)))


def scored(row, scoring):
    if scoring == "softmax":
        powers = [math.exp(x - max(row)) for x in row]
        return np.array(powers) / sum(powers)
    if scoring == "sigmoid":
        return np.array([1 / (1 + math.exp(-x)) for x in row])
    return np.array([math.sqrt(math.log1p(math.exp(x))) for x in row])


def choose(ranked, sizes, top_k, groups=None, best_of_group=1):
    """Ids by falling `ranked`, and whether that is clear; `sizes` are those of the numbers that were added."""
    allowed, clear = list(range(len(ranked))), True
    if groups is not None:
        total, kept = groups
        members = np.split(np.arange(len(ranked)), total)
        of_group = [sum(sorted(ranked[m], reverse=True)[:best_of_group]) for m in members]
        clear = is_clear(of_group, [best_of_group * max(sizes[m]) for m in members])
        allowed = [e for g in sorted(by_falling(of_group)[:kept]) for e in members[g]]
    ids = [allowed[i] for i in by_falling([ranked[e] for e in allowed])[:top_k]]
    return ids, clear and is_clear(ranked[allowed], sizes[allowed])


def by_falling(values):
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def is_clear(values, sizes):
    order = by_falling(values)
    gaps = ((values[i] - values[j], max(sizes[i], sizes[j])) for i, j in itertools.pairwise(order))
    return all(gap == 0 or gap > F32_ERROR * size for gap, size in gaps)


def stable_choice(ranked, top_k, groups=None, best_of_group=1):
    """Ids by falling `ranked [T, E]`, in its dtype: what ties resolve to, by numpy's stable sort alone."""
    if groups is not None:
        total, kept = groups
        by_group = ranked.reshape(len(ranked), total, -1)
        of_group = np.sort(by_group, axis=2)[:, :, -best_of_group:].sum(axis=2)
        lost = np.argsort(-of_group, axis=1, kind="stable")[:, kept:]
        by_group = by_group.copy()
        np.put_along_axis(by_group, lost[:, :, None], -np.inf, axis=1)
        ranked = by_group.reshape(ranked.shape)
    return np.argsort(-ranked, axis=1, kind="stable")[:, :top_k]
