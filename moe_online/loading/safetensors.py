"""safetensors files as sources: names, shapes and places from the headers, parts of tensors by byte ranges.

Source: the format as https://github.com/huggingface/safetensors describes it: eight bytes of length, a JSON header,
and the tensors, row-major and little-endian, end to end.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from moe_online.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from moe_online.loading.files import Place, Reader, open_place
from moe_online.loading.messages import listed
from moe_online.loading.retry import AGAIN, first_line, read_error
from moe_online.loading.source import Index, StoredTensor

SUFFIX = ".safetensors"
WHOLE = "model.safetensors"  # of a checkpoint in one file, and the index of one in several, as transformers names them
INDEX = f"{WHOLE}.index.json"
MAX_HEADER = 100_000_000  # bytes; what the format allows
HEADERS_AT_ONCE = 16  # files whose headers are read at a time
LEAST_RUN = 2**20  # bytes: shorter runs of a part are not asked for one by one, but cut from what they lie in
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies."""

    stored: StoredTensor
    file: Place
    reader: Reader
    offset: int  # bytes, from the beginning of the file


class SafetensorsSource:
    """The tensors of a safetensors file, or of a folder of them such as transformers saves. Several threads may read.

    Args:
      path: A file, or a folder: a path or a URL. In a folder with an index, the files that it names; else
        `model.safetensors`, or all (of a web server, which lists nothing, the first two).

    Raises:
      CheckpointNotFound: there is nothing at the path, or files that the index names are missing.
      CheckpointError: a folder without such files, a dtype that numpy does not have, or a place out of reach.
      CorruptCheckpoint: a header cannot be read, contradicts the file's size or the index, or two files hold one name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        root = open_place(path)
        self.description = str(root)
        try:
            files, promised = _files(root)
            headers = _headers(root, files)
        except CheckpointError:
            raise
        except OSError as error:
            raise read_error(str(root), error) from error
        self._found: dict[str, _Tensor] = {}
        for tensor in (tensor for header in headers for tensor in header):
            name = tensor.stored.name
            if name in self._found:
                raise CorruptCheckpoint(
                    f"{name} is in {self._found[name].file} and in {tensor.file}; keep one of them", names=[name]
                )
            self._found[name] = tensor
        lost = [name for name, file in promised.items() if name not in self._found or self._found[name].file != file]
        if lost:
            raise CorruptCheckpoint(
                f"{root / INDEX} promises {listed(lost, 'tensor')} that its file lacks; copy the checkpoint again",
                names=lost,
            )
        self._tensors = {name: tensor.stored for name, tensor in self._found.items()}

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name."""
        return self._tensors

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor.

        Raises:
          CorruptCheckpoint: the file is gone, has changed or ends before it.
          CheckpointError: the file cannot be reached any more.
        """
        part = np.empty([s.stop - s.start for s in index], self._tensors[name].dtype)
        self.read_into(name, index, part)
        return part

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """Fills `out`, C-contiguous and of the part's shape and dtype, with a part of a tensor; raises as `read`."""
        assert out.flags.c_contiguous, "its bytes are filled in order"
        tensor = self._found[name]
        try:
            _read_part(tensor, index, out)
        except OSError as error:
            raise read_error(f"{name} in {tensor.file}", error, names=[name]) from error


def _read_part(tensor: _Tensor, index: Index, out: np.ndarray) -> None:
    """Reads each run of bytes that lie together; where these are short, all between the first and last row."""
    shape, itemsize = tensor.stored.shape, out.itemsize
    if not out.size:
        return
    whole = len(shape)  # axes from here on are whole, so that what they span lies together
    while whole and (index[whole - 1].start, index[whole - 1].stop) == (0, shape[whole - 1]):
        whole -= 1
    outer = max(whole - 1, 0)  # axes before this one: each of their indices has a run of its own
    run_bytes = math.prod(out.shape[outer:]) * itemsize
    if run_bytes < out.nbytes and run_bytes < LEAST_RUN:
        rows = np.empty((out.shape[0], *shape[1:]), out.dtype)
        _read_part(tensor, (index[0], *(slice(0, size) for size in shape[1:])), rows)
        out[...] = rows[(slice(None), *index[1:])]
        return
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    data = out.reshape(-1).view(np.uint8).data
    for i, at in enumerate(np.ndindex(*out.shape[:outer])):
        first = (*(s.start + k for s, k in zip(index, at, strict=False)), *(s.start for s in index[outer:]))
        offset = sum(k * stride for k, stride in zip(first, strides, strict=True))
        tensor.reader.read_into(data[i * run_bytes : (i + 1) * run_bytes], tensor.offset + offset)


def _files(root: Place) -> tuple[list[Place], dict[str, Place]]:
    """The files of a checkpoint, and which of them the index, if there is one, promises each name to be in."""
    if root.can_list and not root.exists():
        raise CheckpointNotFound(f"there is nothing at {root}; give a {SUFFIX} file or the folder that holds them")
    if not (root.is_dir() if root.can_list else not root.name.endswith(SUFFIX)):
        return [root], {}
    if (root / INDEX).exists():
        promised = _promised(root)
        return list(dict.fromkeys(promised.values())), promised
    if (root / WHOLE).exists():
        return [root / WHOLE], {}
    if not root.can_list:
        raise CheckpointNotFound(
            f"{root} has neither {INDEX} nor {WHOLE}, and web servers do not list what else is there; give the file"
        )
    files = sorted((file for file in root.files() if file.name.endswith(SUFFIX)), key=str)
    if not files:
        raise CheckpointError(f"{root} holds no {SUFFIX} files")
    return files, {}


def _promised(root: Place) -> dict[str, Place]:
    """The file of each tensor, as the index of a folder has it."""
    try:
        files = json.loads((root / INDEX).read_bytes())["weight_map"]
        places = {file: root / file for file in files.values()}
        return {name: places[file] for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{root / INDEX} cannot be read: {first_line(error)}. {AGAIN}") from error


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether there is a safetensors file, or a folder of them, at the path or URL.

    Raises:
      CheckpointError: the place cannot be reached.
    """
    root = open_place(path)
    if root.name.endswith(SUFFIX):
        return True
    try:
        if not root.can_list:
            return (root / INDEX).exists() or (root / WHOLE).exists()
        return root.is_dir() and any(file.name.endswith(SUFFIX) for file in root.files())
    except OSError as error:
        raise read_error(str(root), error) from error


def _headers(root: Place, files: Sequence[Place]) -> list[list[_Tensor]]:
    """The tensors of each file."""

    def header(file: Place) -> list[_Tensor] | FileNotFoundError:
        try:
            return _header(file)
        except FileNotFoundError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(HEADERS_AT_ONCE, thread_name_prefix="moe-online-headers") as pool:
        found = list(pool.map(header, files))
    missing = [file for file, header in zip(files, found, strict=True) if isinstance(header, FileNotFoundError)]
    if missing == [root]:
        raise CheckpointNotFound(f"there is nothing at {root}; give a {SUFFIX} file or the folder that holds them")
    if missing:
        names = ", ".join(file.name for file in missing)
        raise CheckpointNotFound(f"{root / INDEX} names files that are not there: {names}")
    return [header for header in found if not isinstance(header, FileNotFoundError)]


def _header(file: Place) -> list[_Tensor]:
    """The tensors of one file, checked against its size."""
    reader = file.reader()
    try:
        length = int.from_bytes(reader.read(8, 0), "little")
        if not 2 <= length <= MAX_HEADER:
            raise ValueError(f"its header would take {length} bytes")
        header = json.loads(reader.read(length, 8), object_pairs_hook=_unique)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        unknown = {str(entry["dtype"]) for entry in entries.values()} - set(DTYPES)
        if unknown:
            raise CheckpointError(f"{file} has tensors of {', '.join(sorted(unknown))}, which numpy does not have")
        tensors = [
            _Tensor(_stored(name, entry), file, reader, 8 + length + int(entry["data_offsets"][0]))
            for name, entry in entries.items()
        ]
        _check_apart(tensors)
        end = max((tensor.offset + tensor.stored.nbytes for tensor in tensors), default=0)
        if end > 8 + length:
            reader.read(1, end - 1)  # fails where the file has been cut off
        return tensors
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, OSError) as error:
        raise read_error(str(file), error, damaged=f"is no {SUFFIX} file, or damaged") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _check_apart(tensors: Sequence[_Tensor]) -> None:
    filled = [tensor for tensor in tensors if tensor.stored.nbytes]
    for one, other in itertools.pairwise(sorted(filled, key=lambda tensor: tensor.offset)):
        if one.offset + one.stored.nbytes > other.offset:
            raise ValueError(f"{one.stored.name} and {other.stored.name} share bytes")


def _stored(name: str, entry: Mapping[str, Any]) -> StoredTensor:
    shape, dtype = tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} {entry['dtype']} {shape} does not fit into bytes {begin} to {end}")
    return StoredTensor(name=name, shape=shape, dtype=dtype, chunk=(1, *shape[1:]) if shape else ())
