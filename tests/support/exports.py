"""Parameters to export, full of random bits, and exports read back array by array."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from by_name import by_name, whole_blocks
from moe_online.dense import DenseKernel
from moe_online.experts import ExpertWeights, SharedExpertWeights
from moe_online.loading import open_source
from moe_online.loading.manifest import Manifest
from moe_online.loading.orbax import OrbaxSource
from pallas_kernels import QuantizedArray, get_format

BF16 = np.dtype(ml_dtypes.bfloat16)


def bits(*shape, dtype=BF16, seed=0):
    """Any bits, NaNs and both zeros among them."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return jnp.asarray(raw.view(dtype).reshape(shape))


def quantized(name, *shape, seed=0):
    """A weight of this format, K raised to what it can store."""
    fmt, shape = by_name(name), whole_blocks(name, shape)
    second = fmt.global_shape(shape)
    return QuantizedArray(
        values=bits(*fmt.values_shape(shape), dtype=fmt.storage, seed=seed),
        scales=bits(*fmt.scales_shape(shape), dtype=fmt.scale_dtype, seed=seed + 1),
        global_scale=None if second is None else bits(*second, dtype=np.float32, seed=seed + 2),
        format=fmt,
    )


def params(name, *, seed=0):
    """Experts with all that they can have, a dense kernel, an array of their own and a scalar."""
    w13, w2 = quantized(name, 3, 2, 10, 24, seed=seed), quantized(name, 3, 24, 10, seed=seed + 3)
    shared = SharedExpertWeights(
        w13_weight=quantized(name, 1, 2, 6, 24, seed=seed + 6),
        w2_weight=bits(1, 24, 6, seed=seed + 9),
        gate_weight=bits(24, seed=seed + 10),
        activation_format=get_format("int8_per_token"),
    )
    experts = ExpertWeights(
        w13_weight=w13,
        w2_weight=w2,
        w13_bias=bits(3, 2, 10, seed=seed + 11),
        w2_bias=bits(3, 24, seed=seed + 12),
        e_score_correction_bias=bits(5, dtype=np.float32, seed=seed + 13),
        expert_map=jnp.array([0, -1, 1, -1, 2], jnp.int32),
        shared=shared,
        orig_dtype=BF16,
        activation_format=get_format("fp8_per_token"),
    )
    kernel = DenseKernel(weight=quantized(name, 7, 24, seed=seed + 14), activation_format=None)
    return {"layers": [{"experts": experts, "q": {"kernel": kernel}}], "norm": bits(24, seed=seed + 17), "s": bits()}


def stored(path):
    """Every array of an export by name, checked."""
    manifest, source = Manifest.read(path), OrbaxSource(path)
    assert manifest is not None
    assert set(manifest.arrays) == set(source.tensors)
    found = {}
    for name, tensor in source.tensors.items():
        found[name] = source.read(name, tuple(slice(0, size) for size in tensor.shape))
        manifest.verify(name, 0, found[name])
    return found


def opened(path):
    """Every array that a load could ask for by name, read as it would be."""
    source = open_source(path)
    return {name: source.read(name, tuple(slice(0, n) for n in t.shape)) for name, t in source.tensors.items()}


def data_files(path):
    """The files that hold elements of arrays."""
    metadata = ("_METADATA", "_CHECKPOINT_METADATA", "moe_online.json", ".zarray")
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name not in metadata)


def flip(file, at=0):
    """Changes one bit of a byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
