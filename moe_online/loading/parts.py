"""Stored tensors as parts of leaves: which axes they have, and which bytes of the file are a region of the part."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from moe_online.loading.rules import BYTES
from moe_online.loading.source import Index, StoredTensor

Child = str  # of a QuantizedArray: "values", "scales", "global_scale"; "" for a part that is not quantized
CHILDREN: tuple[Child, ...] = ("values", "scales", "global_scale")


@dataclasses.dataclass(frozen=True)
class Read:
    """A region of a stored tensor, and what is made of it: `tensor[index].reshape(shape)[cut]`."""

    tensor: StoredTensor  # as in the file
    index: Index
    shape: tuple[int, ...]  # axes taken apart
    cut: Index | None  # of that; None: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragment:
    """A stored tensor, or one index of it along one axis, as it comes into a part."""

    tensor: StoredTensor  # as in the file
    groups: tuple[str, ...] | None = None  # the letters of each axis in the file; None: they are those of the part
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of each letter, where there are groups
    split: tuple[str, int] | None = None  # an axis of the file, and the index along it that this is

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """With axes taken apart, without the one of which it is a single index."""
        if self.groups is None:
            return self.tensor.shape
        return tuple(self.sizes[letter] for letter in self.letters)

    @functools.cached_property
    def letters(self) -> str:
        """Of the axes of `shape`."""
        taken = "" if self.split is None else self.split[0]
        return "".join(letter for group in self.groups or () for letter in group if letter not in (taken, BYTES))

    @functools.cached_property
    def chunk(self) -> tuple[int, ...]:
        """The smallest part of `shape` that can be read alone."""
        if self.groups is None:
            return self.tensor.chunk
        chunks = dict(self.sizes)
        for group, chunk in zip(self.groups, self.tensor.chunk, strict=True):
            if group and group != BYTES:
                chunks[group[0]] = -(-chunk // math.prod(self.sizes[letter] for letter in group[1:]))
        if BYTES in self.groups:
            chunks[self.letters[-1]] = self.shape[-1]
        return tuple(chunks[letter] for letter in self.letters)

    def read(self, index: Index) -> Read:
        """What to read for a region of `shape`."""
        if self.groups is None:
            return Read(self.tensor, index, tuple(s.stop - s.start for s in index), None)
        by_letter = dict(zip(self.letters, index, strict=True))
        in_file, shape, cut = [], [], []
        for axis, group in enumerate(self.groups):
            if not group or group == BYTES or (axis + 1 < len(self.groups) and self.groups[axis + 1] == BYTES):
                in_file.append(slice(0, self.tensor.shape[axis]))
                inner = group
            elif self.split is not None and group == self.split[0]:
                in_file.append(slice(self.split[1], self.split[1] + 1))
                continue
            else:
                first, inner = by_letter[group[0]], group[1:]
                each = math.prod(self.sizes[letter] for letter in inner)
                in_file.append(slice(first.start * each, first.stop * each))
                shape.append(first.stop - first.start)
                cut.append(slice(0, shape[-1]))
            for letter in inner.replace(BYTES, ""):
                shape.append(self.sizes[letter])
                cut.append(by_letter[letter])
        whole = all((s.start, s.stop) == (0, size) for s, size in zip(cut, shape, strict=True))
        return Read(self.tensor, tuple(in_file), tuple(shape), None if whole else tuple(cut))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What is stored of a leaf, or of its gate or up half, or of a child of it where it is stored quantized.

    Either one fragment, or one for each index along the outer axes, in order.
    """

    fragments: tuple[Fragment, ...]
    outer: tuple[int, ...] = ()  # sizes of the axes that the fragments are counted along
    axes: str | None  # letters of `shape`; None: those of the leaf
    half: int | None = None  # 0 gate, 1 up
    child: Child = ""

    @functools.cached_property
    def stored(self) -> StoredTensor:
        """All fragments as one."""
        first = self.fragments[0]
        names = first.tensor.name if len(self.fragments) == 1 else f"{first.tensor.name} ... {self.names[-1]}"
        return StoredTensor(
            name=names,
            shape=(*self.outer, *first.shape),
            dtype=first.tensor.dtype,
            chunk=(*(1 for _ in self.outer), *first.chunk),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors in the file."""
        return tuple(fragment.tensor.name for fragment in self.fragments)

    def name_at(self, row: int) -> str:
        """The tensor in which a row of the outer axes lies."""
        return self.fragments[row if len(self.fragments) > 1 else 0].tensor.name

    def reads(self, index: Index) -> Iterator[Read]:
        """What to read for a region, one after the other along the outer axes."""
        outer, inner = index[: len(self.outer)], index[len(self.outer) :]
        for place in itertools.product(*(range(s.start, s.stop) for s in outer)):
            yield self.fragments[_flat(place, self.outer)].read(inner)


def _flat(place: Sequence[int], sizes: Sequence[int]) -> int:
    flat = 0
    for index, size in zip(place, sizes, strict=True):
        flat = flat * size + index
    return flat
