"""Named cases: the two grouped matmuls of real models' MoE layers, and groups of equal size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Routing = Literal["uniform", "zipf", "equal"]
ROUTINGS: tuple[Routing, ...] = ("uniform", "zipf", "equal")
ITEMSIZE = 2  # bytes of bf16


class Model(NamedTuple):
    """The MoE layer of a model."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


class Groups(NamedTuple):
    """Groups of equal size."""

    num_experts: int
    rows: int  # of each group
    n: int
    k: int


MODELS = {
    "qwen3-30b": Model(128, 8, 2048, 768),
    "mixtral": Model(8, 2, 4096, 14336),
    "dsv3-tp8": Model(256, 8, 7168, 256),
    "gpt-oss-20b": Model(32, 4, 2880, 2880),
    "tiny": Model(4, 2, 128, 128),  # for a CPU
}
EQUAL = {"8x1024": Groups(8, 1024, 14336, 4096), "128x256": Groups(128, 256, 1536, 2048)}
DEFAULT = ("qwen3-30b", "mixtral", *EQUAL)
ALL = (*(name for name in MODELS if name != "tiny"), *EQUAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One grouped matmul: `[M, K]` rows sorted by expert times weights `[E, N, K]`, all bf16."""

    name: str
    group_sizes: tuple[int, ...]
    n: int
    k: int
    routing: Routing
    seed: int

    @property
    def m(self) -> int:
        """Rows of all groups."""
        return sum(self.group_sizes)

    @property
    def experts_hit(self) -> int:
        """Experts that have rows: only their weights have to be read."""
        return sum(size > 0 for size in self.group_sizes)

    @property
    def flops(self) -> int:
        """Floating-point operations that the result needs."""
        return 2 * self.m * self.n * self.k

    @property
    def hit_weight_bytes(self) -> int:
        """Weights that have to be read."""
        return ITEMSIZE * self.experts_hit * self.n * self.k

    @property
    def array_bytes(self) -> int:
        """All of `x`, weights and result."""
        return ITEMSIZE * (len(self.group_sizes) * self.n * self.k + self.m * (self.k + self.n))

    @property
    def min_bytes(self) -> int:
        """What has to go through device memory: each input that takes part once, the output once."""
        return self.hit_weight_bytes + ITEMSIZE * self.m * (self.k + self.n)


def select(names: Sequence[str], tokens: Sequence[int], *, routing: Routing = "uniform", seed: int = 0) -> list[Case]:
    """The cases that `names` stand for.

    Args:
      names: Of models (`"mixtral"`: both matmuls), of one matmul (`"mixtral_w13"`) or of equal groups (`"8x1024"`).
      tokens: Batch sizes of the models; equal groups have their own.
      routing: How tokens choose experts.
      seed: Of that choice.

    Raises:
      ValueError: unknown names, all at once.
    """
    makers = {name: [functools.partial(_equal_groups, name)] for name in EQUAL}
    for model in MODELS:
        both = [functools.partial(_of_model, model, which, num, routing, seed) for which in _SHAPES for num in tokens]
        makers[model] = both
        makers |= {f"{model}_{which}": [make for make in both if make.args[1] == which] for which in _SHAPES}
    refuse_unknown({"cases": (names, makers)})
    return [make() for name in names for make in makers[name]]


def refuse_unknown(named: Mapping[str, tuple[Sequence[str], Collection[str]]]) -> None:
    """Raises ValueError for names that do not exist, all at once.

    Args:
      named: For each kind of thing, the names that were given and those that there are.
    """
    complaints = [
        f"unknown {kind} {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
        for kind, (given, known) in named.items()
        if (unknown := [name for name in given if name not in known])
    ]
    if complaints:
        raise ValueError("\n".join(complaints))


def route(model: Model, tokens: int, routing: Routing, seed: int) -> tuple[int, ...]:
    """Rows of each expert."""
    ids = route_ids(model, tokens, routing, seed)
    return tuple(np.bincount(ids.ravel(), minlength=model.num_experts).tolist())


def route_ids(model: Model, tokens: int, routing: Routing, seed: int) -> np.ndarray[Any, Any]:
    """The experts of each token, int32 `[tokens, top_k]`, all of a token different."""
    if routing == "equal":
        in_turn = np.arange(tokens * model.top_k, dtype=np.int32) % model.num_experts
        return in_turn.reshape(tokens, model.top_k)
    rng = np.random.default_rng(seed)
    popularity = np.zeros(model.num_experts)
    if routing == "zipf":  # the expert of rank r is 1/r as popular as the first
        popularity = -np.log(1 + rng.permutation(model.num_experts))
    keys = popularity + rng.gumbel(size=(tokens, model.num_experts))  # the largest are a sample without replacement
    return np.argpartition(keys, -model.top_k, axis=1)[:, -model.top_k :].astype(np.int32)


_SHAPES = ("w13", "w2")


def _of_model(name: str, which: str, tokens: int, routing: Routing, seed: int) -> Case:
    model = MODELS[name]
    n, k = (2 * model.intermediate, model.hidden) if which == "w13" else (model.hidden, model.intermediate)
    suffix = "" if routing == "uniform" else f"_{routing}"
    return Case(
        name=f"{name}_{which}_T{tokens}{suffix}",
        group_sizes=route(model, tokens, routing, seed),
        n=n,
        k=k,
        routing=routing,
        seed=seed,
    )


def _equal_groups(name: str) -> Case:
    groups = EQUAL[name]
    sizes = (groups.rows,) * groups.num_experts
    return Case(name=name, group_sizes=sizes, n=groups.n, k=groups.k, routing="equal", seed=0)
