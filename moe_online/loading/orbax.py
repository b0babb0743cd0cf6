"""Orbax checkpoints as sources: names from its metadata; shapes, chunks and parts of tensors through tensorstore.

Serves what Orbax writes: `ocp.save` (v1), CheckpointManager folders, and single pytree items, each with OCDBT or
plain files, zarr 2 or 3.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from moe_online.errors import CheckpointError, CheckpointNotFound, ConfigError, CorruptCheckpoint
from moe_online.loading.files import CONTEXT, Place, open_place
from moe_online.loading.manifest import FILE
from moe_online.loading.messages import listed
from moe_online.loading.retry import AGAIN, TENSORSTORE_ERRORS, first_line, read_error, retried
from moe_online.loading.source import Index, StoredTensor

METADATA = "_METADATA"  # the file that makes a folder a pytree item
STEP = re.compile(r"(?:step_)?(\d+)")  # folders of a CheckpointManager, with or without its usual prefix
ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # types of leaves that are stored as arrays
NODE_CACHE = {"total_bytes_limit": 100_000_000}  # of OCDBT's tree, which says where chunks are; no chunks are kept


class OrbaxSource:
    """The tensors of one pytree in an Orbax checkpoint. Several threads may read.

    Args:
      path: A checkpoint, a step of one, a folder of steps (the last step is taken), or an item of one: a path or a URL.
        A web server lists no folders, so that an `http` URL is the one of an item.
      prefix: The part to read: names joined by dots or slashes. Those that are folders (a step, an item) choose the
        item; the rest is a subtree of it.

    Raises:
      CheckpointNotFound: there is nothing at the path.
      CheckpointError: what is there is no Orbax checkpoint, holds several items and the prefix names none, or cannot
        be reached.
      CorruptCheckpoint: its metadata, or those of some arrays, cannot be read.
      ConfigError: the item has no such subtree.
    """

    def __init__(self, path: str | os.PathLike[str], *, prefix: str | None = None):
        keys = [key for key in (prefix or "").replace("/", ".").split(".") if key]
        place = open_place(path)
        try:
            item, keys = _find_item(place, keys)
            all_arrays, facts = _metadata(item)
            is_ocdbt = (item / "manifest.ocdbt").exists()
        except CheckpointError:
            raise
        except OSError as error:
            raise read_error(str(place), error) from error
        subtree = "".join(f"{key}." for key in keys)
        arrays = {name.removeprefix(subtree): key for name, key in all_arrays.items() if name.startswith(subtree)}
        if not arrays:
            tops = sorted({name.partition(".")[0] for name in all_arrays})
            raise ConfigError(f"{prefix=} names no subtree of {item}; it has {', '.join(tops) or 'no tensors'}")
        self.item, self.subtree = item, subtree  # the folder that holds the arrays, and what precedes their names there
        self.description = str(item)
        self._stores = _open_arrays(_specs(item.kvstore, arrays, facts, is_ocdbt=is_ocdbt), self.description)
        self._tensors = {name: _stored(name, store) for name, store in self._stores.items()}

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every array of the item by its path."""
        return self._tensors

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor.

        Raises:
          CorruptCheckpoint: its bytes are missing or cannot be decoded.
          CheckpointError: the checkpoint cannot be reached any more.
        """
        part = np.empty([s.stop - s.start for s in index], self._tensors[name].dtype)
        self.read_into(name, index, part)
        return part

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """Fills `out`, C-contiguous and of the part's shape and dtype, with a part of a tensor; raises as `read`."""
        part = self._stores[name][index]  # chunks are decoded in parallel, each straight into its place
        try:
            retried(lambda: ts.array(out, context=CONTEXT, copy=False, write=True).write(part).result())
        except TENSORSTORE_ERRORS as error:
            raise read_error(f"{name} in {self.description}", error, names=[name]) from error


def _find_item(place: Place, keys: Sequence[str]) -> tuple[Place, list[str]]:
    """Goes down to the folder of one pytree; returns it with the keys that are no folders."""
    if place.can_list and not place.exists():
        raise CheckpointNotFound(f"there is nothing at {place}; give the folder that Orbax wrote")
    left = list(keys)
    while not (place / METADATA).exists():
        if left and _is_folder(place / left[0]):
            place /= left.pop(0)
            continue
        place = _only_child(place)
    return place, left


def _is_folder(place: Place) -> bool:
    return place.is_dir() if place.can_list else (place / METADATA).exists()


def _only_child(place: Place) -> Place:
    """The last step of a CheckpointManager, or the only item that holds a pytree."""
    if not place.can_list:
        raise CheckpointNotFound(
            f"{place} has no {METADATA} file, and web servers do not list what else is there; give the folder of the "
            "item: below what ocp.save wrote 'state', below a step of a CheckpointManager 'default'"
        )
    folders = place.folders() if place.is_dir() else []
    steps = {int(match[1]): folder for folder in folders if (match := STEP.fullmatch(folder.name))}
    if steps:
        return steps[max(steps)]
    items = sorted((folder for folder in folders if (folder / METADATA).exists()), key=str)
    if len(items) == 1:
        return items[0]
    if items:
        names = ", ".join(item.name for item in items)
        raise CheckpointError(f"{place} holds several items: {names}; choose one with prefix={items[0].name!r}")
    raise CheckpointError(
        f"{place} is no Orbax checkpoint: neither it nor a folder in it has a {METADATA} file. Give the folder that "
        "ocp.save or CheckpointManager wrote; one that ends in -tmp was never finished"
    )


def _metadata(item: Place) -> tuple[dict[str, str], dict[str, Any]]:
    """By name what each array is called in the store, and what the item says of itself."""
    data = (item / METADATA).read_bytes()
    try:
        facts = dict(json.loads(data))
        entries = [
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in facts["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in ARRAYS
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a damaged JSON shows in many ways
        raise CorruptCheckpoint(f"the metadata of {item} cannot be read: {first_line(error)}. {AGAIN}") from error
    is_export = (item / FILE).exists()  # whose manifest has the names as they are
    return ({name: name for name in entries} if is_export else _without_value(entries)), facts


def _without_value(names: Iterable[str]) -> dict[str, str]:
    """Drops the `.value` that ends each name of a saved `nnx.State`: a last key `value` that has no siblings."""
    all_names = set(names)
    siblings = collections.Counter(name.rpartition(".")[0] for name in all_names)

    def short(name: str) -> str:
        parent, _, key = name.rpartition(".")
        return parent if parent and key == "value" and siblings[parent] == 1 and parent not in all_names else name

    return {short(name): name for name in names}


def _specs(
    base: dict[str, Any], arrays: Mapping[str, str], facts: Mapping[str, Any], *, is_ocdbt: bool
) -> dict[str, dict[str, Any]]:
    """What tensorstore opens each array with."""
    options = {
        "driver": "zarr3" if facts.get("use_zarr3") else "zarr",
        # Where chunks of zeros are stored too, one that is not there is a loss and must not read as zeros.
        "fill_missing_data_reads": not facts.get("store_array_data_equal_to_fill_value"),
        "recheck_cached_data": "open",  # OCDBT's tree is asked for once, not for each read
    }

    def kvstore(name: str) -> dict[str, Any]:
        if is_ocdbt:
            return {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
        return base | {"path": f"{base.get('path', '')}{name}/"}

    return {name: options | {"kvstore": kvstore(stored)} for name, stored in arrays.items()}


def _open_arrays(specs: Mapping[str, dict[str, Any]], where: str) -> dict[str, ts.TensorStore]:
    """Reads the headers of all arrays, many at a time."""
    context = ts.Context({"cache_pool#ocdbt": NODE_CACHE}, CONTEXT)

    def start(name: str) -> Any:
        return ts.open(specs[name], read=True, open=True, context=context)

    started = {name: start(name) for name in specs}

    def result(name: str) -> ts.TensorStore:
        future = started.pop(name, None) or start(name)  # the latter where it is tried again
        store: ts.TensorStore = future.result()
        return store

    opened, failed = {}, {}
    for name in specs:
        try:
            opened[name] = retried(functools.partial(result, name))
        except TENSORSTORE_ERRORS as error:
            failed[name] = read_error(f"the metadata of {name} in {where}", error)
    if failed:
        first = next(iter(failed.values()))
        raise type(first)(f"{listed(list(failed), 'array')} cannot be opened. First: {first}", names=failed) from first
    return opened


def _stored(name: str, store: ts.TensorStore) -> StoredTensor:
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
    chunk = store.chunk_layout.read_chunk.shape or ()  # None for a scalar
    return StoredTensor(name=name, shape=shape, dtype=dtype, chunk=tuple(size or 1 for size in chunk))
