"""Expert weights to load: their declaration, sources in several layouts, and what numpy makes of them."""

import contextlib
import dataclasses
import gc
import hashlib
import pathlib

import jax
import ml_dtypes
import numpy as np

import moe_online
from by_name import assert_same_parts, by_name, whole_blocks
from moe_online.experts import abstract_experts
from moe_online.loading import CheckpointSource
from numpy_quantizer import quantize_numpy

BF16 = np.dtype(ml_dtypes.bfloat16)
KEN_MAPPING = {  # of a training run: [E, K, N], gate and up apart
    "*.w_gate": "E K N -> *.w13_weight.gate",
    "*.w_up": "E K N -> *.w13_weight.up",
    "*.w_down": "E K N -> *.w2_weight",
}


def random(*shape, dtype=BF16, seed=0):
    """Normal values whose rows along axis -2 differ in size by up to 2**12."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, np.float32)
    if x.ndim > 1:
        x *= np.exp2(rng.integers(-8, 4, (*shape[:-1], 1))).astype(np.float32)
    return x.astype(dtype)


def ours(e=3, h=160, i=96, *, layers=1, dtype=BF16, seed=0):
    """`{"l0": {"w13_weight": [E, 2, I, H], "w2_weight": [E, H, I]}}`: the layout of our leaves."""
    return {
        f"l{layer}": {
            "w13_weight": random(e, 2, i, h, dtype=dtype, seed=seed + 2 * layer),
            "w2_weight": random(e, h, i, dtype=dtype, seed=seed + 2 * layer + 1),
        }
        for layer in range(layers)
    }


def sizes_for(weight, e=3, h=160, i=96):
    """The sizes, H and I raised to what a format can store."""
    (h,), (i,) = (whole_blocks(weight, (size,)) for size in (h, i))
    return e, h, i


def as_ken(tree):
    """The same weights as a training run stores them; read with KEN_MAPPING."""
    return {
        name: {
            "w_gate": swapped(layer["w13_weight"][:, 0]),
            "w_up": swapped(layer["w13_weight"][:, 1]),
            "w_down": swapped(layer["w2_weight"]),
        }
        for name, layer in tree.items()
    }


def swapped(x):
    return np.ascontiguousarray(np.swapaxes(x, -1, -2))


def declared(tree, *, dtype=None, mesh=None):
    """The abstract `ExpertWeights` of a tree of `ours`."""
    return {
        name: abstract_experts(
            layer["w2_weight"].shape[0],
            *layer["w2_weight"].shape[1:],
            dtype or layer["w2_weight"].dtype,
            mesh=mesh,
        )
        for name, layer in tree.items()
    }


def check_quantized(params, tree, weight):
    """Codes and scales of all experts are those of numpy, bit for bit."""
    assert set(params) == set(tree)
    for name, layer in tree.items():
        for field, source in layer.items():
            found = getattr(params[name], field)
            assert found.format == by_name(weight)
            shared = tuple(range(1, source.ndim - 2))  # gate and up have one scale where a scale spans a matrix
            assert_same_parts(found, quantize_numpy(source, weight, shared_axes=shared))


def quiet_load(abstract, source, **arguments):
    return moe_online.load(abstract, source, **{"progress": False} | arguments)


class WatchedSource:
    """Counts how often each element of a source is read, whole chunks at a time, and may change what is returned."""

    def __init__(self, source: CheckpointSource, *, keep=False, chunks=None):
        self.source, self.description = source, source.description
        self.chunks, self.kept = chunks or {}, [] if keep else None
        self.read_counts = {name: np.zeros(tensor.shape, np.int8) for name, tensor in self.tensors.items()}
        self.reads = []

    @property
    def tensors(self):
        return {
            name: dataclasses.replace(tensor, chunk=self.chunks.get(name, tensor.chunk))
            for name, tensor in self.source.tensors.items()
        }

    def read(self, name, index):
        chunk = self.tensors[name].chunk
        whole = tuple(  # a chunk that is touched is read
            slice(part.start // size * size, -(-part.stop // size) * size)
            for part, size in zip(index, chunk, strict=True)
        )
        self.read_counts[name][whole] += 1
        self.reads.append(name)
        part = self.source.read(name, index)
        if self.kept is not None:
            self.kept.append(part)
        return part


def folder_hash(folder):
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


@contextlib.contextmanager
def nothing_left_on_the_device():
    """Fails where the body leaves arrays behind, even while its exception is still at hand."""
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    yield
    left = [array for array in jax.live_arrays() if id(array) not in before]
    assert not left, f"{[(array.shape, array.dtype.name) for array in left]} are left"
