"""How fast checkpoints load, beside what reading and copying alone take: `python -m moe_online.bench.loading FOLDER`.

Writes a synthetic model of experts in bf16, once, then measures in turns: plain sequential reads of its files, copies
of as many bytes to the device, and loads with each scheme; an export of each, and its load; and new weights from arrays
on the device. A load has to do both, one beside the other, so its floor is the larger. Each row has both sides,
measured in one run.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe_online.experts import abstract_experts
from moe_online.loading import load, reload, save_quantized
from pallas_kernels import Format, QuantizedArray, quantize, quantize_into
from pallas_kernels.quantize import matrix_amax

BF16 = np.dtype(ml_dtypes.bfloat16)
MB = 2**20
BUFFER = 64 * MB
SCHEMES = ("int8_w8a16", "fp8_per_block", "mxfp4_w4a16")
EXPERTS, HIDDEN, INTERMEDIATE = 64, 4096, 2048  # 3.2 GB for each layer
MAPPING = {
    "l{L}.gate": "E N K -> l{L}.w13_weight.gate",
    "l{L}.up": "E N K -> l{L}.w13_weight.up",
    "l{L}.down": "E N K -> l{L}.w2_weight",
}
PER_EXPERT = {
    "l{L}.{E}.w1": "N K -> l{L}.w13_weight.gate",
    "l{L}.{E}.w3": "N K -> l{L}.w13_weight.up",
    "l{L}.{E}.w2": "N K -> l{L}.w2_weight",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; each row goes to stdout as JSON, as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m moe_online.bench.loading", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the checkpoints; about 2.5 times as large as the model")
    parser.add_argument("--layers", type=int, default=5, help="of 3.2 GB each")
    parser.add_argument("--layout", choices=("fused", "per_expert", "orbax"), default="fused")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--cold", action="store_true", help="with files that the system has forgotten, too")
    args = parser.parse_args(argv)
    sizes = args.experts, args.hidden, args.intermediate
    source = args.folder / args.layout
    if not source.exists():
        (write_orbax if args.layout == "orbax" else write_files)(source, args.layers, sizes, args.layout)
    bench = Bench(source, args.layers, sizes, args.layout)
    for scheme in args.schemes.split(","):
        for row in bench.rows(scheme, cold=args.cold):
            print(json.dumps(row), flush=True)
    return 0


class Bench:
    """Measures one checkpoint."""

    def __init__(self, source: Path, layers: int, sizes: tuple[int, int, int], layout: str):
        self._source, self._layers, self._layout = source, layers, layout
        self._sizes = sizes
        self._files = _files_of(source)
        self._mapping = PER_EXPERT if layout == "per_expert" else MAPPING
        self._bytes = layers * 3 * math.prod(sizes) * BF16.itemsize

    def rows(self, scheme: str, *, cold: bool) -> Iterator[dict[str, Any]]:
        """For each state of the cache one for a load of the checkpoint and one for an export; and one for a reload."""
        copy = copy_seconds(self._bytes)
        self._load(self._source, self._mapping, scheme)  # warms the cache
        caches = ("warm", "cold") if cold else ("warm",)
        for cache in caches:
            _prepare(cache, self._files)
            read = self._read_seconds()
            _prepare(cache, self._files)
            params, report = self._load(self._source, self._mapping, scheme)
            floor = max(read, copy)
            yield self._row(scheme, cache, report) | {
                "read_seconds": read,
                "copy_seconds": copy,
                "of_floor": report.seconds / floor,
                "of_floor_compiled": (report.seconds - report.compile_seconds) / floor,
            }
            del params
        export = self._source.with_name(f"{self._source.name}-{scheme}")
        params = self._load(self._source, self._mapping, scheme).params
        began = time.perf_counter()
        save_quantized(params, export, overwrite=True, progress=False)
        saved = time.perf_counter() - began
        yield self._reload(params, scheme)
        del params
        self._load(export, None, None)
        for cache in caches:  # both sides anew, one right after the other
            _prepare(cache, self._files)
            online = self._load(self._source, self._mapping, scheme).report
            _prepare(cache, _files_of(export))
            again = self._load(export, None, None).report
            yield self._row(scheme, cache, again) | {
                "what": "export",
                "save_seconds": saved,
                "online_seconds": online.seconds,
                "times_faster": online.seconds / again.seconds,
                "times_faster_compiled": (online.seconds - online.compile_seconds)
                / (again.seconds - again.compile_seconds),
            }
        shutil.rmtree(export)

    def _reload(self, params: Any, scheme: str) -> dict[str, Any]:
        """New weights from arrays on the device, beside what quantizing them takes if nothing else is done.

        The device has to hold the model in bf16 and twice quantized.
        """
        fields = {name: getattr(params["l0"], name) for name in ("w13_weight", "w2_weight")}
        tree = {layer: {name: _normal(weight.shape) for name, weight in fields.items()} for layer in params}
        reports, took = [], []
        for _ in range(4):  # the first one compiles
            began = time.perf_counter()
            fresh, report = jax.block_until_ready(reload(params, tree, staging="device", progress=False))
            took.append(time.perf_counter() - began)
            reports.append(report)
            del fresh
        alone = self._layers * sum(quantize_seconds(weight.format, tree["l0"][name]) for name, weight in fields.items())
        return self._row(scheme, "device", reports[-1]) | {
            "what": "reload",
            "seconds": min(took),
            "quantize_seconds": alone,
            "of_quantize": min(took) / alone,
        }

    def _row(self, scheme: str, cache: str, report: Any) -> dict[str, Any]:
        return {
            "what": "load",
            "layout": self._layout,
            "scheme": scheme,
            "cache": cache,
            "device": jax.devices()[0].device_kind,
            "source_bytes": report.read_bytes,
            "kept_bytes": report.resident_bytes,
            "seconds": report.seconds,
            "compile_seconds": report.compile_seconds,
            "gb_per_second": report.read_bytes / report.seconds / 1e9,
            "peak_bytes": report.peak_bytes,
            "planned_peak_bytes": report.planned_peak_bytes,
            "host_peak_bytes": report.host_peak_bytes,
        }

    def _load(self, source: Path, mapping: dict[str, str] | None, scheme: str | None) -> Any:
        abstract = {f"l{layer}": abstract_experts(*self._sizes, BF16) for layer in range(self._layers)}
        return load(abstract, source, mapping=mapping, quantization=scheme, progress=False)

    def _read_seconds(self) -> float:
        if self._layout == "orbax":
            return restore_seconds(self._source)
        return read_seconds(self._files)


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _prepare(cache: str, files: Sequence[Path]) -> None:
    if cache == "cold":
        evict(files)


@functools.partial(jax.jit, static_argnums=0)
def _normal(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)


def quantize_seconds(fmt: Format, x: jax.Array) -> float:
    """Experts quantized in place, a leaf that is there already; the least of some times."""

    def into(out: QuantizedArray, x: jax.Array) -> tuple[QuantizedArray, Any]:
        amax = jnp.max(matrix_amax(x).reshape(x.shape[0], -1), axis=1) if fmt.whole_matrix else None
        return quantize_into(out, x, amax=amax)

    run = jax.jit(into, donate_argnums=0)
    out = jax.jit(lambda x: quantize(x, fmt, shared_axes=tuple(range(1, x.ndim - 2))))(x[:1])
    leaf = jax.tree.map(lambda part: jnp.zeros((x.shape[0], *part.shape[1:]), part.dtype), out)
    took = []
    for _ in range(4):
        began = time.perf_counter()
        leaf, _ = jax.block_until_ready(run(leaf, x))
        took.append(time.perf_counter() - began)
    return min(took)


def read_seconds(files: Sequence[Path]) -> float:
    """Plain sequential reads of all files into one buffer."""
    buffer = bytearray(BUFFER)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - began


def copy_seconds(size: int, piece: int = 256 * MB) -> float:
    """Copies of so many bytes from host to device, in pieces; two are on their way at a time."""
    host = np.ones(piece, np.uint8)
    jax.block_until_ready(jax.device_put(host))
    began = time.perf_counter()
    before = None
    for _ in range(-(-size // piece)):
        array = jax.device_put(host)
        if before is not None:
            before.block_until_ready()
            before.delete()
        before = array
    jax.block_until_ready(before)
    return (time.perf_counter() - began) * size / (-(-size // piece) * piece)


def restore_seconds(source: Path) -> float:
    """Plain Orbax, in bf16, onto the device."""
    from orbax.checkpoint import v1 as ocp

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), ocp.metadata(source).metadata
    )
    began = time.perf_counter()
    tree = ocp.load(source, abstract)
    jax.block_until_ready(tree)
    took = time.perf_counter() - began
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
    return took


def evict(files: Sequence[Path]) -> None:
    """Makes the system forget what it has of files."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def experts(layer: int, sizes: tuple[int, int, int]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, expert and matrix of a layer, expert after expert."""
    count, hidden, inner = sizes
    normal = np.random.default_rng(layer).standard_normal(hidden * inner, np.float32).astype(BF16)
    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        for expert in range(count):
            yield name, expert, np.roll(normal, 977 * expert).reshape(shape)


def write_files(folder: Path, layers: int, sizes: tuple[int, int, int], layout: str) -> None:
    """A safetensors file for each layer, written matrix by matrix."""
    folder.mkdir(parents=True)
    count = sizes[0]
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    for layer in range(layers):
        header: dict[str, Any] = {}
        at = 0
        for name, expert, matrix in experts(layer, sizes):
            if layout == "per_expert":
                key, shape = f"l{layer}.{expert}.{names[name]}", list(matrix.shape)
            else:
                key, shape = f"l{layer}.{name}", [count, *matrix.shape]
            begin = header[key]["data_offsets"][0] if key in header else at
            at += matrix.nbytes
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, at]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / f"model-{layer}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, _, matrix in experts(layer, sizes):
                file.write(matrix.view(np.uint8).data)


def write_orbax(folder: Path, layers: int, sizes: tuple[int, int, int], layout: str) -> None:
    """What `ocp.save` writes with chunks of some experts."""
    from orbax.checkpoint import v1 as ocp

    tree: dict[str, dict[str, Any]] = {}
    for layer in range(layers):
        found: dict[str, list[np.ndarray]] = {}
        for name, _, matrix in experts(layer, sizes):
            found.setdefault(name, []).append(matrix)
        tree[f"l{layer}"] = {name: np.stack(matrices) for name, matrices in found.items()}
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 64 * MB
    context.array.saving.storage_options.shard_axes = (0,)
    with context:
        ocp.save(folder, tree)


if __name__ == "__main__":
    sys.exit(main())
