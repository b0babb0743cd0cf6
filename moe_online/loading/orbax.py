"""Orbax checkpoints as sources: names, shapes and chunks from metadata, parts of tensors through tensorstore.

Serves what Orbax writes: `ocp.save` (v1), CheckpointManager folders, and single pytree items, each with OCDBT or
plain files, zarr 2 or 3.
"""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from moe_online.errors import CheckpointError, CheckpointNotFound, ConfigError, CorruptCheckpoint
from moe_online.loading.source import Index, StoredTensor
from moe_online.loading.tree import path_name

METADATA = "_METADATA"  # the file that makes a folder a pytree item
STEP = re.compile(r"(?:step_)?(\d+)")  # folders of a CheckpointManager, with or without its usual prefix


class OrbaxSource:
    """The tensors of one pytree in an Orbax checkpoint.

    Args:
      path: A checkpoint, a step of one, a folder of steps (the last step is taken), or an item of one.
      prefix: The part to read: names joined by dots or slashes. Those that are folders (a step, an item) choose the
        item; the rest is a subtree of it.

    Raises:
      CheckpointNotFound: there is nothing at the path.
      CheckpointError: what is there is no Orbax checkpoint, or holds several items and the prefix names none.
      CorruptCheckpoint: its metadata cannot be read.
      ConfigError: the item has no such subtree.
    """

    def __init__(self, path: str | os.PathLike[str], *, prefix: str | None = None):
        keys = [key for key in (prefix or "").replace("/", ".").split(".") if key]
        try:
            self._item, keys = _find_item(epath.Path(os.fspath(path)), keys)
        except ImportError as error:  # etils lacks the package for gs:// or the like
            raise CheckpointError(f"{path} cannot be reached: {error}") from error
        self.description = str(self._item)
        leaves, facts = _metadata(self._item)
        subtree = "".join(f"{key}." for key in keys)
        self._leaves = {name.removeprefix(subtree): leaf for name, leaf in leaves.items() if name.startswith(subtree)}
        if not self._leaves:
            tops = sorted({name.partition(".")[0] for name in leaves})
            raise ConfigError(f"{prefix=} names no subtree of {self._item}; it has {', '.join(tops) or 'no tensors'}")
        self._is_ocdbt = (self._item / "manifest.ocdbt").exists()
        self._options = {
            "driver": "zarr3" if facts.get("use_zarr3") else "zarr",
            # Where chunks of zeros are stored too, one that is not there is a loss and must not read as zeros.
            "fill_missing_data_reads": not facts.get("store_array_data_equal_to_fill_value"),
        }

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every array of the item by its path."""
        return {name: _stored(name, leaf) for name, leaf in self._leaves.items()}

    def read(self, name: str, index: Index) -> np.ndarray | jax.Array:
        """A part of a tensor; `CorruptCheckpoint` where its bytes are missing or cannot be decoded."""
        try:
            part: np.ndarray = ts.open(self._spec(self._leaves[name].name), open=True).result()[index].read().result()
        except (ValueError, OSError) as error:  # what tensorstore raises for every failure
            raise CorruptCheckpoint(
                f"{name} in {self._item} cannot be read: {_first_line(error)}. Copy the checkpoint again from where it "
                "was saved.",
                names=[name],
            ) from error
        return part

    def _spec(self, name: str) -> dict[str, Any]:
        root = os.fspath(self._item)
        base = root if "://" in root else f"file://{root}"
        if self._is_ocdbt:
            return self._options | {"kvstore": {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}}
        return self._options | {"kvstore": f"{base}/{name}/"}


def _find_item(path: epath.Path, keys: Sequence[str]) -> tuple[epath.Path, list[str]]:
    """Goes down to the folder of one pytree; returns it with the keys that are no folders."""
    if not path.exists():
        raise CheckpointNotFound(f"there is nothing at {path}; give the folder that Orbax wrote")
    path, left = path.resolve(), list(keys)
    while not (path / METADATA).exists():
        if left and (path / left[0]).is_dir():
            path = path / left.pop(0)
            continue
        path = _only_child(path)
    return path, left


def _only_child(path: epath.Path) -> epath.Path:
    """The last step of a CheckpointManager, or the only item that holds a pytree."""
    children = [child for child in path.iterdir() if child.is_dir()] if path.is_dir() else []
    steps = {child: match for child in children if (match := STEP.fullmatch(child.name))}
    if steps:
        return max(steps, key=lambda child: int(steps[child].group(1)))
    items = sorted((child for child in children if (child / METADATA).exists()), key=str)
    if len(items) == 1:
        return items[0]
    if items:
        names = ", ".join(item.name for item in items)
        raise CheckpointError(f"{path} holds several items: {names}; choose one with prefix={items[0].name!r}")
    raise CheckpointError(
        f"{path} is no Orbax checkpoint: neither it nor a folder in it has a {METADATA} file. Give the folder that "
        "ocp.save or CheckpointManager wrote; one that ends in -tmp was never finished"
    )


def _metadata(item: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata of the arrays by name, and what the item says of itself."""
    try:
        facts = dict(json.loads((item / METADATA).read_text()))
        flat, _ = jax.tree_util.tree_flatten_with_path(ocp.PyTreeCheckpointHandler().metadata(item).tree)
        leaves = _without_value({path_name(path): leaf for path, leaf in flat if hasattr(leaf, "dtype")})
    except (ValueError, OSError, KeyError, TypeError) as error:  # a damaged JSON or zarr header shows in many ways
        raise CorruptCheckpoint(
            f"the metadata of {item} cannot be read: {_first_line(error)}. Copy the checkpoint again from where it was "
            "saved."
        ) from error
    return leaves, facts


def _without_value(leaves: dict[str, Any]) -> dict[str, Any]:
    """Drops the `.value` that ends each name of a saved `nnx.State`: a last key `value` that has no siblings."""
    siblings = collections.Counter(name.rpartition(".")[0] for name in leaves)

    def short(name: str) -> str:
        parent, _, key = name.rpartition(".")
        return parent if parent and key == "value" and siblings[parent] == 1 and parent not in leaves else name

    return {short(name): leaf for name, leaf in leaves.items()}


def _stored(name: str, leaf: Any) -> StoredTensor:
    shape = tuple(getattr(leaf, "shape", ()))
    chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None)
    return StoredTensor(name=name, shape=shape, dtype=_dtype(leaf.dtype), chunk=tuple(chunk or shape))


def _dtype(dtype: Any) -> np.dtype[Any]:
    """Orbax gives names or dtypes; the small floats are those of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
