"""Where weights come from: the protocol, and trees in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from moe_online.errors import ConfigError
from moe_online.loading.tree import path_name

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What is known of a stored tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]  # the smallest part that can be read alone
    sharding: Sharding | None = None  # of one that lies on devices, which an `OnDeviceSource` has

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@runtime_checkable
class CheckpointSource(Protocol):
    """Anything that can list its tensors and read parts of them.

    `read` is called from one thread at a time, but for sources that are an `InPlaceSource` too.
    """

    @property
    def description(self) -> str:
        """What messages call it."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by name, from metadata alone."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray | jax.Array:
        """A part of a tensor, in memory of its own.

        Raises:
          CorruptCheckpoint: the stored bytes cannot be decoded.
        """
        ...


@runtime_checkable
class InPlaceSource(Protocol):
    """A `CheckpointSource` that several threads may read from at once, into arrays that are there."""

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """Fills `out`, row-major, of the region's shape and dtype.

        Raises:
          CorruptCheckpoint: the stored bytes cannot be decoded.
        """
        ...


@runtime_checkable
class OnDeviceSource(Protocol):
    """A `CheckpointSource` of which some tensors lie on devices: those whose `StoredTensor` has a sharding."""

    def array(self, name: str) -> jax.Array:
        """Such a tensor itself, which is to be left as it is."""
        ...


class MemorySource:
    """A pytree of numpy or `jax.Array`s, such as a trainer's live weights.

    They are copied part by part, but for those on devices that `array` gives as they are.
    """

    description = "the tree in memory"

    def __init__(self, tree: Any):
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        self._arrays = {path_name(path): leaf for path, leaf in flat}
        wrong = [name for name, leaf in self._arrays.items() if not isinstance(leaf, np.ndarray | jax.Array)]
        if wrong or not flat:
            found = ", ".join(f"{name or 'the source'} is {type(self._arrays[name]).__name__}" for name in wrong)
            raise ConfigError(
                f"a source is a path, a CheckpointSource or a pytree of arrays; {found or 'this tree has no leaf'}"
            )

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every leaf by its path."""
        return {
            name: StoredTensor(
                name=name,
                shape=array.shape,
                dtype=np.dtype(array.dtype),
                chunk=(1,) * array.ndim,
                sharding=array.sharding if _lies_in_order(array) else None,
            )
            for name, array in self._arrays.items()
        }

    def array(self, name: str) -> jax.Array:
        """One that is on devices, no copy of it."""
        found = self._arrays[name]
        assert isinstance(found, jax.Array)
        return found

    def read(self, name: str, index: Index) -> np.ndarray | jax.Array:
        """A copy of a part: deleting it, or changing the original, leaves the other alone."""
        array = self._arrays[name]
        if isinstance(array, np.ndarray):
            return array[index].copy()
        if len(array.sharding.device_set) == 1:
            return _copied(array, index)
        return _gathered(array, index)


def _lies_in_order(array: Any) -> bool:
    """Whether it is on devices, its last axis contiguous, as compiled steps want their arguments."""
    if not isinstance(array, jax.Array):
        return False
    layout: Any = array.format.layout  # type: ignore[attr-defined]
    return layout is None or bool(layout.major_to_minor == tuple(range(array.ndim)))


def _gathered(array: jax.Array, index: Index) -> jax.Array:
    """A copy of a part of a sharded array, on one device; no more than that part crosses between devices."""
    sizes = tuple(s.stop - s.start for s in index)
    whole = None
    for piece, starts in shard_pieces(array, index):
        if piece.shape == sizes:
            return piece
        if whole is None:
            whole = jnp.zeros(sizes, array.dtype, device=piece.sharding)
        whole = _pasted(whole, jax.device_put(piece, whole.sharding), np.asarray(starts, np.int32))
    return jnp.zeros(sizes, array.dtype) if whole is None else whole  # of an empty region there is no piece


def shard_pieces(array: jax.Array, index: Index) -> Iterator[tuple[jax.Array, tuple[int, ...]]]:
    """Copies of what the shards have of a region, each on its own device, and where it begins in the region.

    Every element comes once. They are copies for jax keeps on the host what it was once asked for there, as long as the
    array lives.
    """
    seen = set()
    for shard in array.addressable_shards:
        held = [s.indices(size)[:2] for s, size in zip(shard.index, array.shape, strict=True)]
        common = tuple((max(low, s.start), min(high, s.stop)) for (low, high), s in zip(held, index, strict=True))
        if common in seen or any(low >= high for low, high in common):
            continue
        seen.add(common)
        inner = tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(common, held, strict=True))
        yield _copied(shard.data, inner), tuple(low - s.start for (low, _), s in zip(common, index, strict=True))


def _copied(array: jax.Array, index: Index) -> jax.Array:
    """A copy of a part of an array on one device."""
    starts, sizes = zip(*((s.start, s.stop - s.start) for s in index), strict=True) if index else ((), ())
    part: jax.Array = _copy(array, np.asarray(starts, np.int32), sizes)
    return part


@functools.partial(jax.jit, donate_argnums=0)
def _pasted(whole: jax.Array, piece: jax.Array, starts: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, piece, list(starts))


def _copy_part(array: jax.Array, starts: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(array, list(starts), sizes) if sizes else jnp.copy(array)


_copy = jax.jit(_copy_part, static_argnames="sizes")


def prefixed(source: CheckpointSource, prefix: str) -> CheckpointSource:
    """The part of a source below a name.

    Raises:
      ConfigError: there is nothing below it.
    """
    return PrefixedInPlace(source, prefix) if isinstance(source, InPlaceSource) else Prefixed(source, prefix)


class Prefixed:
    """The part of a source below a name."""

    def __init__(self, source: CheckpointSource, prefix: str):
        self._source, self._prefix = source, prefix.strip("./").replace("/", ".") + "."
        self.description = f"{prefix} of {source.description}"
        if not self.tensors:
            tops = sorted({name.partition(".")[0] for name in source.tensors})
            raise ConfigError(f"{prefix=} names nothing in {source.description}; it has {', '.join(tops)}")

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by what follows the prefix."""
        inner, size = self._source.tensors, len(self._prefix)
        may_stay = isinstance(self._source, OnDeviceSource)
        return {
            name[size:]: dataclasses.replace(tensor, name=name[size:], sharding=tensor.sharding if may_stay else None)
            for name, tensor in inner.items()
            if name.startswith(self._prefix)
        }

    def read(self, name: str, index: Index) -> np.ndarray | jax.Array:
        """A part of a tensor."""
        return self._source.read(self._prefix + name, index)

    def array(self, name: str) -> jax.Array:
        """A tensor that is on devices."""
        found: jax.Array = self._source.array(self._prefix + name)  # type: ignore[attr-defined]
        return found


class PrefixedInPlace(Prefixed):
    """The same of one that reads into arrays."""

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """A part of a tensor."""
        self._source.read_into(self._prefix + name, index, out)  # type: ignore[attr-defined]
