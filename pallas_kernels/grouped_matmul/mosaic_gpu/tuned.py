"""Tiles that were measured: for which matmuls, and how they are looked up.

`tuned_h200.json` holds what `python -m pallas_kernels.bench tune` found to be faster than the heuristic on an H200; an
H100 takes the same. A matmul that was not measured, or only with far more or fewer rows, has none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.formats import QuantizedArray
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_gpu.config import MosaicGpuConfig
from pallas_kernels.grouped_matmul.mosaic_gpu.scales import kind

FILE = Path(__file__).with_name("tuned_h200.json")
NEAR = 2  # times as many rows as were measured, or as few
_CODES = {"float8_e4m3fn": "fp8", "int8": "int8", "bfloat16": "bf16", "float16": "f16"}
_TILES = tuple(field.name for field in dataclasses.fields(MosaicGpuConfig))


class Shape(NamedTuple):
    """What a matmul is, whatever the number of its rows."""

    experts: int
    n: int  # rows of the weights of an expert
    k: int
    gated: bool  # gate and up rows, half of N each
    operands: str  # "bf16", "f16", or codes and what a scale of the weights is of: "fp8_block", "int8_row"


Table = Mapping[Shape, Mapping[int, MosaicGpuConfig]]  # by shape and rows


def shape_of(call: Call) -> Shape:
    """That of a call that the kernel serves."""
    experts, *rows, k = call.rhs.shape
    return Shape(experts, math.prod(rows), k, call.gated, _operands(call))


def config_for(call: Call) -> MosaicGpuConfig | None:
    """The measured tiles of a call, or None."""
    return look_up(table(), shape_of(call), call.lhs.shape[0])


def look_up(found: Table, shape: Shape, m: int) -> MosaicGpuConfig | None:
    """The tiles of the nearest number of rows, by their ratio, that is within a factor of `NEAR`; or None."""
    near = [rows for rows in found.get(shape, ()) if rows <= NEAR * m and m <= NEAR * rows]
    return found[shape][min(near, key=lambda rows: (max(rows / m, m / rows), rows))] if near else None


@functools.cache
def table() -> Table:
    """What is in the file. That its tiles serve their matmuls is for a test to see."""
    found: dict[Shape, dict[int, MosaicGpuConfig]] = {}
    for entry in json.loads(FILE.read_text(encoding="utf-8")):
        shape, m, config = read(entry)
        found.setdefault(shape, {})[m] = config
    return found


def read(entry: Mapping[str, Any]) -> tuple[Shape, int, MosaicGpuConfig]:
    """Shape, rows and tiles of an entry of the file."""
    shape = Shape(*(entry[name] for name in Shape._fields))
    return shape, entry["m"], MosaicGpuConfig(**{name: entry[name] for name in _TILES})


def write(shape: Shape, m: int, config: MosaicGpuConfig, **facts: Any) -> dict[str, Any]:
    """The entry that `read` reads; `facts` say how it was found."""
    return {**shape._asdict(), "m": m, **dataclasses.asdict(config), **facts}


def _operands(call: Call) -> str:
    if not isinstance(call.rhs, QuantizedArray):
        return _name(call.rhs.dtype)
    return f"{_name(call.rhs.format.code)}_{kind(call.rhs.format, weights=True)}"


def _name(dtype: Any) -> str:
    name: str = jnp.dtype(dtype).name
    return _CODES.get(name, name)
