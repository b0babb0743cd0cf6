"""safetensors files as sources: names, shapes and places from the headers, parts of tensors by byte ranges.

Source: the format as https://github.com/huggingface/safetensors describes it: eight bytes of length, a JSON header,
and the tensors, row-major and little-endian, end to end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from moe_online.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from moe_online.loading.messages import listed
from moe_online.loading.source import Index, StoredTensor

SUFFIX = ".safetensors"
WHOLE = "model.safetensors"  # of a checkpoint in one file, and the index of one in several, as transformers names them
INDEX = f"{WHOLE}.index.json"
MAX_HEADER = 100_000_000  # bytes; what the format allows
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
class _Place:
    """Where a tensor lies."""

    file: epath.Path
    offset: int  # bytes, from the beginning of the file
    tensor: StoredTensor


class SafetensorsSource:
    """The tensors of a safetensors file, or of a folder of them such as transformers saves.

    Args:
      path: A file, or a folder. In a folder with an index, the files that it names; else `model.safetensors`, or all.

    Raises:
      CheckpointNotFound: there is nothing at the path, or a file that the index names is missing.
      CheckpointError: a folder without such files, or a dtype that numpy does not have.
      CorruptCheckpoint: a header cannot be read, contradicts the file's size or the index, or two files hold one name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        root = epath.Path(os.fspath(path)).expanduser()
        self.description = str(root)
        if not root.exists():
            raise CheckpointNotFound(f"there is nothing at {root}; give a {SUFFIX} file or the folder that holds them")
        self._places: dict[str, _Place] = {}
        files, promised = _files(root)
        for file in files:
            for place in _header(file):
                name = place.tensor.name
                if name in self._places:
                    raise CorruptCheckpoint(
                        f"{name} is in {self._places[name].file} and in {file}; keep one of them", names=[name]
                    )
                self._places[name] = place
        lost = [name for name, file in promised.items() if name not in self._places or self._places[name].file != file]
        if lost:
            raise CorruptCheckpoint(
                f"{root / INDEX} promises {listed(lost, 'tensor')} that its file lacks; copy the checkpoint again",
                names=lost,
            )

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name."""
        return {name: place.tensor for name, place in self._places.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor; `CorruptCheckpoint` where the file is gone or ends before it."""
        place = self._places[name]
        tensor = place.tensor
        rows = index[0] if index else slice(0, 1)
        row_bytes = tensor.nbytes // max(tensor.shape[0] if tensor.shape else 1, 1)
        part = np.empty((rows.stop - rows.start, *tensor.shape[1:]), tensor.dtype)
        if not index:
            part = part.reshape(())
        if part.nbytes:
            _read_into(part, place, rows.start * row_bytes)
        if all((s.start, s.stop) == (0, size) for s, size in zip(index[1:], tensor.shape[1:], strict=True)):
            return part
        return part[(slice(None), *index[1:])].copy()


def _files(root: epath.Path) -> tuple[list[epath.Path], dict[str, epath.Path]]:
    """The files of a checkpoint, and which of them the index, if there is one, promises each name to be in."""
    if not root.is_dir():
        return [root], {}
    if (root / INDEX).exists():
        try:
            promised = {
                name: root / file for name, file in json.loads((root / INDEX).read_text())["weight_map"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CorruptCheckpoint(f"{root / INDEX} cannot be read: {error}. Copy the checkpoint again.") from error
        files = list(dict.fromkeys(promised.values()))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointNotFound(f"{root / INDEX} names files that are not there: {', '.join(missing)}")
        return files, promised
    if (root / WHOLE).exists():
        return [root / WHOLE], {}
    files = sorted(root.glob(f"*{SUFFIX}"), key=str)
    if not files:
        raise CheckpointError(f"{root} holds no {SUFFIX} files")
    return files, {}


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether there is a safetensors file, or a folder of them, at the path."""
    root = epath.Path(os.fspath(path)).expanduser()
    return root.suffix == SUFFIX or (root.is_dir() and any(root.glob(f"*{SUFFIX}")))


def _header(file: epath.Path) -> list[_Place]:
    """The tensors of one file, checked against its size."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= MAX_HEADER:
                raise ValueError(f"its header would take {length} bytes")
            header = json.loads(opened.read(length))
        size = file.stat().length - 8 - length
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        unknown = {str(entry["dtype"]) for entry in entries.values()} - set(DTYPES)
        if unknown:
            raise CheckpointError(f"{file} has tensors of {', '.join(sorted(unknown))}, which numpy does not have")
        return [_place(file, name, entry, 8 + length, size) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CorruptCheckpoint(
            f"{file} is no {SUFFIX} file, or damaged: {error}. Copy it again from where it was saved."
        ) from error


def _place(file: epath.Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> _Place:
    shape, dtype = tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not 0 <= begin <= end <= size or end - begin != nbytes:
        raise ValueError(f"{name} {entry['dtype']} {shape} does not fit into bytes {begin} to {end} of {size}")
    chunk = (1, *shape[1:]) if shape else ()
    return _Place(file, data + begin, StoredTensor(name=name, shape=shape, dtype=dtype, chunk=chunk))


def _read_into(part: np.ndarray, place: _Place, offset: int) -> None:
    """Fills `part` with the bytes from `offset` of a tensor on."""
    target = part.reshape(-1).view(np.uint8).data
    try:
        with place.file.open("rb") as opened:
            opened.seek(place.offset + offset)
            done = 0
            while done < len(target):
                count = opened.readinto(target[done:])
                if not count:
                    raise OSError(f"the file ends {len(target) - done} bytes early")
                done += count
    except OSError as error:
        raise CorruptCheckpoint(
            f"{place.tensor.name} in {place.file} cannot be read: {error}. Copy it again from where it was saved.",
            names=[place.tensor.name],
        ) from error
