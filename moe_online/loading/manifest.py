"""The manifest of an export: formats of its leaves, and checksums of its arrays.

It lies beside the arrays as `moe_online.json`. Neither Orbax nor tensorstore notices a flipped bit in an array;
`Manifest.verify` does.
"""

from __future__ import annotations

import binascii
import dataclasses
import importlib.metadata
import json
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_online.errors import CheckpointError, CorruptCheckpoint
from moe_online.loading.files import open_place
from moe_online.loading.retry import read_error
from pallas_kernels import Format, get_format

FILE = "moe_online.json"
ITEM = "state"  # the folder of an Orbax checkpoint that holds the arrays, and the manifest beside them
KIND, VERSION = "moe-online export", 1
CRC = np.dtype("<u4")
AGAIN = "Copy it again from where it was exported, or export it again."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafFormat:
    """What a leaf is, beyond its arrays."""

    format: Format | None  # None: stored as it is, in one array of the leaf's name
    activation: Format | None  # of the inputs of the layer that it belongs to
    dtype: str | None  # before quantization, where the parameters say so

    def to_json(self) -> dict[str, Any]:
        """Names of the formats, and the group of one that leaves it open."""
        return {
            "format": self.format and self.format.name,
            "group": self.format and self.format.group,
            "activation": self.activation and self.activation.name,
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LeafFormat:
        """Raises KeyError, TypeError or ValueError where these are no formats."""
        name, activation = values["format"], values["activation"]
        return cls(
            format=None if name is None else get_format(name, group=values["group"]),
            activation=None if activation is None else get_format(activation),
            dtype=values["dtype"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One stored array: what must be there, and the checksums of its bytes in row-major order."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    step: int  # indices of axis 0 that share a checksum
    checksums: bytes  # crc32 of each step, uint32 little-endian

    def to_json(self) -> dict[str, Any]:
        """The checksums as base64."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "step": self.step,
            "checksums": binascii.b2a_base64(self.checksums, newline=False).decode(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StoredArray:
        """Raises KeyError, TypeError or ValueError where this describes no array."""
        name = values["dtype"]
        return cls(
            shape=tuple(map(int, values["shape"])),
            dtype=np.dtype(getattr(ml_dtypes, name, name)),
            step=int(values["step"]),
            checksums=binascii.a2b_base64(values["checksums"]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that an export says of itself."""

    leaves: Mapping[str, LeafFormat]
    arrays: Mapping[str, StoredArray]
    library: str = dataclasses.field(default_factory=lambda: importlib.metadata.version("moe-online"))  # that wrote it

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes, with a checksum of its own."""
        values = {
            "kind": KIND,
            "version": VERSION,
            "library": self.library,
            "leaves": {name: leaf.to_json() for name, leaf in self.leaves.items()},
            "arrays": {name: array.to_json() for name, array in self.arrays.items()},
        }
        return {**values, "checksum": _checksum(values)}

    @classmethod
    def from_json(cls, values: Any, *, where: str = FILE) -> Manifest:
        """Builds the manifest that `to_json` wrote.

        Args:
          values: What it returned.
          where: What messages call it.

        Raises:
          CheckpointError: a newer moe-online wrote it.
          CorruptCheckpoint: it was changed since, or is something else.
        """
        if not isinstance(values, dict) or values.get("kind") != KIND or not isinstance(values.get("version"), int):
            raise CorruptCheckpoint(f"{where} is no manifest of a {KIND}. {AGAIN}")
        library = values.get("library")
        if values["version"] > VERSION:
            raise CheckpointError(
                f"{where} was written by moe-online {library} as version {values['version']}; this moe-online "
                f"{importlib.metadata.version('moe-online')} reads versions up to {VERSION}. Upgrade moe-online, or "
                "export the model again with this one."
            )
        if values.get("checksum") != _checksum({key: value for key, value in values.items() if key != "checksum"}):
            raise CorruptCheckpoint(f"{where} is not what moe-online {library} wrote: its checksum differs. {AGAIN}")
        try:
            return cls(
                leaves={name: LeafFormat.from_json(leaf) for name, leaf in values["leaves"].items()},
                arrays={name: StoredArray.from_json(array) for name, array in values["arrays"].items()},
                library=str(library),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # whole, so by another moe-online
            raise CheckpointError(
                f"{where} was written by moe-online {library}, whose formats this one does not know: {error}. Upgrade "
                "moe-online, or export the model again with this one."
            ) from error

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest | None:
        """The manifest of an export, or None where there is none: a checkpoint that something else wrote.

        Args:
          folder: The export, or the item in it that holds the arrays.

        Raises:
          CheckpointError: a newer moe-online wrote it.
          CorruptCheckpoint: it is damaged.
        """
        place = open_place(folder)
        try:
            file = next((file for file in (place / FILE, place / ITEM / FILE) if file.exists()), None)
            data = None if file is None else file.read_bytes()
        except CheckpointError:
            raise
        except OSError as error:
            raise read_error(f"{FILE} in {place}", error) from error
        if data is None:
            return None
        try:
            values = json.loads(data)
        except ValueError as error:
            raise CorruptCheckpoint(f"{file} is no JSON: {error}. {AGAIN}") from error
        return cls.from_json(values, where=str(file))

    def verify(self, name: str, start: int, array: Any) -> None:
        """Checks bytes that were read against those that were exported.

        Args:
          name: Of the stored array, such as `"layers.0.moe.experts.w13_weight.values"`.
          start: Index of axis 0 at which the part begins; a multiple of the array's `step`.
          array: `[n, ...]`, the part, whole along all other axes; it ends where a step or the array ends. 0-d of a
            scalar, whose `start` is 0.

        Raises:
          CorruptCheckpoint: it has another dtype, shape or other bytes, or the export has no such array.
          ValueError: it begins or ends within a step.
        """
        stored, array = self.arrays.get(name), np.asarray(array)
        if stored is None:
            raise CorruptCheckpoint(f"{name} is no array that was exported. {AGAIN}", names=[name])
        length = num_rows(array.shape)
        if array.dtype != stored.dtype or array.shape[1:] != stored.shape[1:] or array.ndim != len(stored.shape):
            raise CorruptCheckpoint(
                f"{name} is {array.dtype.name} {array.shape} where part of {stored.dtype.name} {stored.shape} was "
                f"exported. {AGAIN}",
                names=[name],
            )
        stop, step = start + length, stored.step
        if start % step or (stop % step and stop != num_rows(stored.shape)) or stop > num_rows(stored.shape):
            raise ValueError(f"{name} {stored.shape} cannot be checked in [{start}, {stop}): its {step=}")
        if array.size == 0:
            return
        expected = np.frombuffer(stored.checksums, CRC)[start // step : -(-stop // step)]
        found = np.frombuffer(checksums(array, step), CRC)
        wrong = np.flatnonzero(found != expected) if len(found) == len(expected) else np.arange(1)
        if wrong.size:
            raise CorruptCheckpoint(
                f"{name} is damaged at index {start + int(wrong[0]) * step} of axis 0: its bytes are not those that "
                f"were exported. {AGAIN}",
                names=[name],
            )


class RunningChecksums:
    """Checksums of an array that comes in pieces, in row-major order.

    Args:
      block: Bytes that share a checksum; the last block may be shorter.
    """

    def __init__(self, block: int):
        self._block = block
        self._done: list[int] = []
        self._crc, self._filled = 0, 0

    def add(self, data: np.ndarray) -> None:
        """Goes on with these bytes, uint8 `[n]`."""
        at = 0
        while at < len(data):
            part = data[at : at + self._block - self._filled]
            self._crc = zlib.crc32(part.data, self._crc)
            self._filled += len(part)
            at += len(part)
            if self._filled == self._block:
                self._flush()

    def finish(self) -> bytes:
        """All checksums, uint32 little-endian."""
        if self._filled:
            self._flush()
        return np.array(self._done, CRC).tobytes()

    def _flush(self) -> None:
        self._done.append(self._crc)
        self._crc, self._filled = 0, 0


def checksums(array: np.ndarray, step: int) -> bytes:
    """Of each `step` indices of axis 0, as `StoredArray` has them; zlib lets go of the interpreter meanwhile."""
    running = RunningChecksums(block_bytes(array.shape, array.dtype.itemsize, step))
    running.add(raw(array))
    return running.finish()


def raw(array: np.ndarray) -> np.ndarray:
    """Its bytes in row-major order, uint8 `[n]`; dtypes of ml_dtypes have no buffer that zlib takes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def num_rows(shape: tuple[int, ...]) -> int:
    """Length of axis 0; 1 for a scalar."""
    return shape[0] if shape else 1


def block_bytes(shape: tuple[int, ...], itemsize: int, step: int) -> int:
    """Bytes of `step` indices of axis 0."""
    return step * math.prod(shape[1:]) * itemsize


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
