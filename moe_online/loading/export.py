"""`save_quantized`: quantized parameters as an Orbax checkpoint, to be loaded again without quantizing.

The checkpoint holds plain zarr arrays that `ocp.load` reads, and a manifest (`moe_online.loading.manifest`) that says
what they are. Arrays are written here, not by Orbax, for three reasons: it would copy all of them to the host first, it
stores an array as one chunk, and it compresses, which codes do not repay and reading pays for.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_online.dense import DenseKernel
from moe_online.errors import ConfigError
from moe_online.experts import SHARED_SIZES, SIZES, ExpertWeights, SharedExpertWeights
from moe_online.loading.folder import check_space, new_folder, write_errors, write_file
from moe_online.loading.manifest import (
    FILE,
    ITEM,
    LeafFormat,
    Manifest,
    RunningChecksums,
    StoredArray,
    block_bytes,
    raw,
)
from moe_online.loading.messages import progress_bar
from moe_online.loading.source import shard_pieces
from moe_online.loading.tree import SHARED, join, path_name
from pallas_kernels import Format, QuantizedArray, get_format

CHUNK_BYTES = 16 * 2**20  # most in a stored chunk, and so in a piece on its way
WRITERS = 4  # pieces being written while the next one is fetched
CHECKPOINT_METADATA, ITEM_METADATA = "_CHECKPOINT_METADATA", "_METADATA"  # Orbax's names
DICT_KEY = 2  # what Orbax calls a key of a dict in its metadata
PARTS = ("values", "scales", "global_scale")  # of a QuantizedArray

NOT_STORED = ("uint4", "int2", "uint2", "int1", "uint1")  # dtypes that tensorstore has no name for

Region = tuple[slice, ...]


def save_quantized(
    params: Any, path: str | os.PathLike[str], *, overwrite: bool = False, progress: bool = True
) -> None:
    """Writes parameters as they are, quantized or not, so that `load` reads them back without quantizing.

    The result is an Orbax checkpoint with a manifest of formats and checksums. An array is named by its leaf's path,
    those of a `QuantizedArray` `X` by `X.values`, `X.scales` and, in two-level formats, `X.global_scale`.

    It appears at `path` at once, complete and on the disk, or not at all. Arrays come to the host in pieces: at most
    5 of 16 MiB are there at a time.

    Args:
      params: What `load` returned as `.params`: an nnx module, or a pytree of arrays, `QuantizedArray`s and
        `ExpertWeights`. Arrays may be sharded over the devices of one process.
      path: A folder that does not exist, on a local file system.
      overwrite: Replaces a checkpoint that is there; it stays until the new one is complete.
      progress: Shows a progress bar.

    Raises:
      ConfigError: a leaf that cannot be stored.
      CheckpointError: `path` exists or cannot be written, or the disk is full; what was there is unchanged.

    >>> import tempfile, jax.numpy as jnp
    >>> from pallas_kernels import quantize
    >>> params = {"w": quantize(jnp.ones((2, 4, 8)), "fp8_per_channel")}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_quantized(params, f"{folder}/export", progress=False)
    ...     sorted(Manifest.read(f"{folder}/export").arrays)
    ['w.scales', 'w.values']
    """
    export = collect(params)
    with new_folder(path, overwrite=overwrite, marks=(CHECKPOINT_METADATA,)) as folder:
        export.write(folder, destination=path, progress=progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Arrays to write, by name, and what their leaves are."""

    arrays: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # of what is written of them: all but padding
    leaves: Mapping[str, LeafFormat]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(math.prod(self.shapes[name]) * array.dtype.itemsize for name, array in self.arrays.items())

    def write(self, folder: Path, *, destination: str | os.PathLike[str], progress: bool) -> None:
        """Fills an empty folder; every file is on the disk afterwards, under names that may not be yet.

        Args:
          folder: Inside a `new_folder`.
          destination: What messages call it.
          progress: Shows a progress bar.

        Raises:
          CheckpointError: it cannot be written.
        """
        with write_errors(destination), progress_bar(progress, "writing", self.nbytes) as advance:
            check_space(folder, self.nbytes, destination)
            item = folder / ITEM
            item.mkdir()
            stored = _write_arrays(item, self, advance)
            manifest = Manifest(leaves=self.leaves, arrays=stored)
            write_file(item / FILE, _json(manifest.to_json()))
            write_file(item / ITEM_METADATA, _json(_item_metadata(self.arrays)))
            write_file(folder / CHECKPOINT_METADATA, _json({"item_handlers": {}, "custom_metadata": {}}))


def collect(params: Any) -> Export:
    """Lists what is to be stored of parameters.

    Raises:
      ConfigError: no leaf, or one that cannot be stored; two that would have one name.
    """
    if isinstance(params, nnx.Module):
        params = nnx.split(params)[1]
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, ExpertWeights | DenseKernel | QuantizedArray)
    )
    found = [leaf for path, node in nodes for leaf in _leaves(path_name(path), node)]
    arrays = [array for name, value, _ in found for array in _parts(name, value)]
    _check(arrays)
    shapes = {name: tuple(array.shape) for name, array in arrays}
    for path, node in nodes:
        if isinstance(node, ExpertWeights):
            shapes |= _unpadded(path_name(path), node)
    return Export(arrays=dict(arrays), shapes=shapes, leaves={name: leaf for name, _, leaf in found})


def _unpadded(name: str, node: ExpertWeights) -> dict[str, tuple[int, ...]]:
    """Shapes of what is padded in experts, without that: another mesh may need another padding, or none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, own, sizes in ((name, node, SIZES), (join(name, SHARED), node.shared, SHARED_SIZES)):
        size = None if own is None else own.intermediate_size_unpadded
        for field, letters in sizes.items() if size is not None else ():
            value = getattr(own, field)
            if value is not None and "I" in letters:
                axis = letters.index("I") - len(letters)
                shape = (*value.shape[:axis], size, *value.shape[value.ndim + axis + 1 :])
                shapes |= _part_shapes(join(prefix, field), value, shape)
    return shapes


def _part_shapes(name: str, value: Any, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, QuantizedArray):
        return {name: shape}
    fmt = value.format
    shapes = (fmt.values_shape(shape), fmt.scales_shape(shape), fmt.global_shape(shape))
    return {f"{name}.{part}": found for part, found in zip(PARTS, shapes, strict=True) if found is not None}


def _leaves(name: str, node: Any) -> Iterator[tuple[str, Any, LeafFormat]]:
    """Names, values and formats of what a node holds."""
    match node:
        case DenseKernel():
            yield name, node.weight, _format(name, node.weight, node.activation_format, None)
        case ExpertWeights():
            yield from _fields(name, node, node.orig_dtype)
        case _:
            yield name, node, _format(name, node, None, None)


def _fields(
    name: str, node: ExpertWeights | SharedExpertWeights, dtype: np.dtype[Any]
) -> Iterator[tuple[str, Any, LeafFormat]]:
    for field in dataclasses.fields(node):
        value, inner = getattr(node, field.name), f"{name}.{field.name}" if name else field.name
        if field.metadata.get("static") or value is None:
            continue
        if isinstance(value, SharedExpertWeights):
            yield from _fields(inner, value, dtype)
        else:
            quantized = isinstance(value, QuantizedArray)
            yield inner, value, _format(inner, value, node.activation_format, dtype if quantized else None)


def _format(name: str, value: Any, activation: Format | None, dtype: np.dtype[Any] | None) -> LeafFormat:
    fmt = value.format if isinstance(value, QuantizedArray) else None
    for used in (fmt, activation):
        if used is not None and not _is_shipped(used):
            raise ConfigError(f"{name} has a format {used} that cannot be told by its name: use one of get_format")
    known = getattr(value, "dtype", None) if fmt is None and dtype is None else dtype
    return LeafFormat(format=fmt, activation=activation, dtype=None if known is None else str(known))


def _is_shipped(fmt: Format) -> bool:
    """Whether its name and group are enough to make it again."""
    try:
        return get_format(fmt.name, group=fmt.group) == fmt
    except ValueError:
        return False


def _parts(name: str, value: Any) -> list[tuple[str, Any]]:
    """A leaf as plain arrays."""
    if not isinstance(value, QuantizedArray):
        return [(name, value)]
    parts = [(f"{name}.{part}" if name else part, getattr(value, part)) for part in PARTS]
    return [(part, array) for part, array in parts if array is not None]


def _check(arrays: list[tuple[str, Any]]) -> None:
    if not arrays:
        raise ConfigError("params has no leaf: there is nothing to save")
    names = collections.Counter(name for name, _ in arrays)
    for name, array in arrays:
        if names[name] > 1 or any(names[parent] for parent in _above(name)):
            raise ConfigError(f"{name!r} is the name of several arrays, or of one and of a folder of others: rename it")
        if not name:
            raise ConfigError("params is a single array, which has no name: give {'name': array}")
        if "/" in name or not all(name.split(".")):
            raise ConfigError(f"{name!r} cannot name a stored array: a key of params is empty or has a slash")
        _check_array(name, array)


def _above(name: str) -> list[str]:
    keys = name.split(".")
    return [".".join(keys[:size]) for size in range(1, len(keys))]


def _check_array(name: str, array: Any) -> None:
    if not isinstance(array, jax.Array | np.ndarray):
        raise ConfigError(
            f"{name} is a {type(array).__name__}, no array: give what moe_online.load returned as .params, or a model "
            "whose weights are loaded"
        )
    if jnp.issubdtype(array.dtype, jax.dtypes.extended) or array.dtype.hasobject:
        raise ConfigError(f"{name} is of dtype {array.dtype}, which cannot be stored: leave it out of params")
    if not np.dtype(array.dtype).isnative or array.dtype.name in NOT_STORED:
        raise ConfigError(
            f"{name} is of dtype {array.dtype.str if isinstance(array, np.ndarray) else array.dtype}, which "
            "would not be read again: give it as one of a whole byte or more, in the order of this machine"
        )
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ConfigError(
            f"{name} lies on devices of several processes, of which this one sees a part: load the model in one "
            "process and export it there"
        )


def _write_arrays(item: Path, export: Export, advance: Callable[[int], None]) -> dict[str, StoredArray]:
    """Writes all arrays, some pieces at a time, and returns what a manifest says of them."""
    stored: dict[str, StoredArray] = {}
    pending: collections.deque[tuple[int, Future[None]]] = collections.deque()

    def settle(most: int) -> None:
        while len(pending) > most:
            size, future = pending.popleft()
            future.result()
            advance(size)

    with ThreadPoolExecutor(WRITERS, thread_name_prefix="moe-online-writer") as pool:
        try:
            for name, array in export.arrays.items():
                dtype, shape = np.dtype(array.dtype), export.shapes[name]
                chunk = chunk_shape(shape, dtype.itemsize)
                (item / name).mkdir()
                write_file(item / name / ".zarray", _json(_zarray(shape, chunk, dtype)))
                # Experts are told one by one, the elements of a plain vector are not.
                step = chunk[0] if len(shape) == 1 and name in export.leaves else 1
                running = RunningChecksums(block_bytes(shape, dtype.itemsize, step))
                for key, region in _grid(shape, chunk):
                    settle(WRITERS - 1)
                    piece = raw(_piece(array, region))
                    running.add(piece)
                    padding = math.prod(chunk) * dtype.itemsize - len(piece)
                    pending.append((len(piece), pool.submit(_write_chunk, item / name / key, piece, padding)))
                stored[name] = StoredArray(shape=shape, dtype=dtype, step=step, checksums=running.finish())
            settle(0)
        finally:
            pool.shutdown(cancel_futures=True)
    return stored


def _write_chunk(file: Path, data: np.ndarray, padding: int) -> None:
    """An uncompressed chunk is its elements; that at the end of an axis is as long as the others."""
    write_file(file, data.data, bytes(padding))


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Of the chunks in which an array is stored: at most `CHUNK_BYTES`, each contiguous in the array."""
    chunk, inner = [max(size, 1) for size in shape], itemsize
    for axis in reversed(range(len(shape))):
        if inner * chunk[axis] > CHUNK_BYTES:
            return (*(1,) * axis, _even_part(chunk[axis], max(1, CHUNK_BYTES // inner)), *chunk[axis + 1 :])
        inner *= chunk[axis]
    return tuple(chunk)


def _even_part(size: int, most: int) -> int:
    """At most `most` of `size`: a divisor if a large one fits, for ranges of experts then end where chunks do."""
    even = -(-size // -(-size // most))
    return next((part for part in range(most, most // 2, -1) if size % part == 0), even)


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[str, Region]]:
    """Names of the chunks and what they hold, in row-major order."""
    for at in np.ndindex(*(-(-size // part) for size, part in zip(shape, chunk, strict=True))):
        region = tuple(
            slice(i * part, min(size, (i + 1) * part)) for i, part, size in zip(at, chunk, shape, strict=True)
        )
        yield ".".join(map(str, at)) or "0", region


def _piece(array: Any, region: Region) -> np.ndarray:
    """A region of an array on the host. Nothing crosses between devices: each shard gives what it has of it."""
    if isinstance(array, np.ndarray):
        return array[region]
    shape = tuple(part.stop - part.start for part in region)
    out = None
    for piece, starts in shard_pieces(array, region):
        part = np.asarray(piece)
        if part.shape == shape:
            return part
        out = np.empty(shape, array.dtype) if out is None else out
        out[tuple(slice(start, start + size) for start, size in zip(starts, part.shape, strict=True))] = part
    assert out is not None  # the shards cover the array
    return out


def _zarray(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Metadata of an array in zarr's format 2, uncompressed; the small floats have tensorstore's names."""
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk),
        "dtype": dtype.str if dtype.isbuiltin == 1 else dtype.name,
        "fill_value": None,
        "order": "C",
        "filters": None,
        "compressor": None,
        "dimension_separator": ".",
    }


def _item_metadata(names: Iterable[str]) -> dict[str, Any]:
    """What Orbax wants to know of a tree of nested dicts: the keys of each array."""
    return {
        "tree_metadata": {
            str(tuple(name.split("."))): {
                "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in name.split(".")],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for name in names
        },
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode()
