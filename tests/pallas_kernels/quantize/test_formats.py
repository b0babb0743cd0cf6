"""`Format` and `QuantizedArray`: shapes, layouts, checks, and what holds under transformations."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import QuantizedArray, UnsupportedError, get_format, quantize
from pallas_kernels.formats import FORMATS

LAYOUTS = {  # of an array [2, 200, 384]: scales (K blocks, then N blocks), second level, bytes of a row of K
    "fp8_per_tensor": ((2, 1, 1), None, 384),
    "fp8_per_tensor_dynamic": ((2, 1, 1), None, 384),
    "fp8_per_channel": ((2, 1, 200), None, 384),
    "fp8_per_token": ((2, 1, 200), None, 384),
    "fp8_per_block": ((2, 3, 2), None, 384),
    "fp8_per_group": ((2, 3, 200), None, 384),
    "int8_per_channel": ((2, 1, 200), None, 384),
    "int8_per_token": ((2, 1, 200), None, 384),
    "int4_per_group": ((2, 3, 200), None, 192),
    "mxfp8": ((2, 12, 200), None, 384),
    "mxfp4": ((2, 12, 200), None, 192),
    "nvfp4": ((2, 24, 200), (2,), 192),
    "nvfp4_per_token": ((2, 24, 200), (2, 200), 192),
}
SCALES = {"mxfp8": np.uint8, "mxfp4": np.uint8, "nvfp4": jnp.float8_e4m3fn, "nvfp4_per_token": jnp.float8_e4m3fn}


@functools.cache
def example(name="fp8_per_block"):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 200, 384)), jnp.bfloat16)
    return jax.jit(quantize, static_argnames="format")(x, name)


def test_every_format_is_here():
    assert set(LAYOUTS) == set(FORMATS)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items(), ids=LAYOUTS)
def test_layout(name, layout):
    scales, second, width = layout
    q, fmt = example(name), get_format(name)
    assert (q.values.shape, q.scales.shape) == ((2, 200, width), scales)
    assert q.global_scale is None if second is None else q.global_scale.shape == second
    assert (q.values.dtype, q.scales.dtype) == (fmt.storage, fmt.scale_dtype)
    assert q.scales.dtype == SCALES.get(name, np.float32)
    assert q.values.dtype == (np.uint8 if width == 192 else np.int8 if "int8" in name else jnp.float8_e4m3fn)
    assert (q.shape, q.ndim, q.dtype) == ((2, 200, 384), 3, fmt.storage)
    assert fmt.scales_shape(q.shape) == scales
    assert fmt.global_shape(q.shape) == second
    assert fmt.values_shape(q.shape) == q.values.shape
    assert (
        q.nbytes
        == fmt.stored_bytes(q.shape)
        == 400 * width + (1 if name in SCALES else 4) * np.prod(scales) + (0 if second is None else 4 * np.prod(second))
    )
    assert str(fmt) == name
    assert hash(fmt) == hash(dataclasses.replace(fmt))


def test_abstract_values():
    q = jax.eval_shape(lambda x: quantize(x, "fp8_per_block"), jax.ShapeDtypeStruct((4, 256, 130), jnp.bfloat16))
    assert (q.shape, q.scales.shape, q.nbytes) == ((4, 256, 130), (4, 2, 2), 4 * 256 * 130 + 4 * 4 * 4)


@pytest.mark.parametrize("name", FORMATS)
def test_properties_follow_the_children(name):
    q = example(name)
    whole = q.dequantize()

    def inside(part):
        assert (part.shape, part.ndim) == ((200, 384), 2)
        assert part.nbytes == get_format(name).stored_bytes((200, 384))
        return part.dequantize()

    assert np.array_equal(inside(jax.tree.map(lambda v: v[1], q)), whole[1])
    assert np.array_equal(jax.vmap(inside)(q), whole)
    assert np.array_equal(jax.lax.scan(lambda _, part: (None, inside(part)), None, q)[1], whole)
    part = jax.tree.map(lambda v: v[:1], q)
    assert part.shape == (1, 200, 384)
    assert np.array_equal(part.dequantize(), whole[:1])


def test_from_parts():
    q = example()
    again = QuantizedArray.from_parts(q.values, q.scales, "fp8_per_block")
    assert again.format is get_format("fp8_per_block")
    assert np.array_equal(again.dequantize(), q.dequantize())
    bad = {
        r"values.dtype=.*int8.* must be float8_e4m3fn": (q.values.astype(jnp.int8), q.scales),
        r"scales.dtype=.*bfloat16.* must be float32": (q.values, q.scales.astype(jnp.bfloat16)),
        r"scales.shape=\(2, 2, 3\) must be \(2, 3, 2\)": (q.values, jnp.swapaxes(q.scales, 1, 2)),
        r"scales.shape=\(3, 2\)": (q.values, q.scales[0]),
        "rank 1": (q.values[0, 0], q.scales[0]),
    }
    for message, parts in bad.items():
        with pytest.raises(ValueError, match=message):
            QuantizedArray.from_parts(*parts, "fp8_per_block")
    with pytest.raises(ValueError, match=r"no second-level scale; drop global_scale.shape=\(2,\)"):
        QuantizedArray.from_parts(q.values, q.scales, "fp8_per_block", jnp.ones(2))
    for name, second in (("nvfp4", (2,)), ("nvfp4_per_token", (2, 200))):
        q = example(name)
        again = QuantizedArray.from_parts(q.values, q.scales, name, q.global_scale)
        assert np.array_equal(again.dequantize(), q.dequantize())
        for wrong in (None, jnp.ones((2, 1, 1)), jnp.ones(second, jnp.bfloat16)):
            with pytest.raises(ValueError, match=rf"global_scale must be float32 {re.escape(str(second))}"):
                QuantizedArray.from_parts(q.values, q.scales, name, wrong)


def test_shardings():
    """On an abstract mesh of the only device: which scale axis follows which values axis."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("expert", "model"))
    for name, n_and_k, expected in [
        ("fp8_per_channel", ("model", None), (None, "model")),
        ("fp8_per_block", ("model", None), (None, "model")),
        ("fp8_per_block", (None, "model"), ("model", None)),
        ("fp8_per_block", (), (None, None)),
    ]:
        sharding = NamedSharding(mesh, PartitionSpec("expert", *n_and_k))
        q = example(name).shardings(sharding)
        assert q.values == sharding
        assert tuple(q.scales.spec) == ("expert", *expected)
        assert jax.device_put(example(name), q).shape == (2, 200, 384)
    q = example("nvfp4").shardings(NamedSharding(mesh, PartitionSpec("expert", "model")))
    assert (tuple(q.scales.spec), tuple(q.global_scale.spec)) == (("expert", None, "model"), ("expert",))
    q = example("nvfp4_per_token").shardings(NamedSharding(mesh, PartitionSpec("expert", "model")))
    assert tuple(q.global_scale.spec) == ("expert", "model")


@pytest.mark.parametrize(("devices", "spec"), [(2, "model"), (4, None)])
def test_scales_are_whole_where_blocks_do_not_divide(devices, spec):
    """2 blocks along N go to 2 devices, not to 4."""
    mesh = jax.sharding.AbstractMesh((devices,), ("model",))
    q = example().shardings(NamedSharding(mesh, PartitionSpec(None, "model")))
    assert tuple(q.scales.spec) == (None, None, spec)


def test_get_format():
    fmt = get_format("fp8_per_block", role="weight")
    assert get_format(fmt) is fmt
    assert fmt.grid(129, 128) == (2, 1)
    assert (fmt.spans(), get_format("fp8_per_channel").spans()) == ((False, False), (False, True))
    weights = "fp8_per_block, fp8_per_channel, fp8_per_tensor, int4_per_group, int8_per_channel, mxfp4, mxfp8, nvfp4"
    activations = "fp8_per_group, fp8_per_tensor_dynamic, fp8_per_token, int8_per_token, mxfp4, mxfp8, nvfp4_per_token"
    with pytest.raises(ValueError, match=f"unknown weight format 'fp8'; valid names: {weights}$"):
        get_format("fp8", role="weight")
    with pytest.raises(
        ValueError, match=r"unknown quantization format 'fp8'; valid names: fp8_per_b.*nvfp4_per_token$"
    ):
        get_format("fp8")
    with pytest.raises(ValueError, match=f"'fp8_per_block' is no activation format; valid names: {activations}$"):
        get_format("fp8_per_block", role="activation")
    with pytest.raises(ValueError, match="'int8_per_token' is no weight format"):
        get_format(get_format("int8_per_token"), role="weight")
    with pytest.raises(TypeError, match="not int"):
        get_format(8)
    with pytest.raises(ValueError, match="group=64: the block of format 'fp8_per_block' is fixed"):
        get_format("fp8_per_block", group=64)
    assert get_format("int4_per_group").group == get_format("int4_per_group", group=128).group == 128
    assert str(get_format("int4_per_group")) == "int4_per_group"
    assert str(get_format("int4_per_group", group=32)) == "int4_per_group_32"
    with pytest.raises(ValueError, match="group=16 of format 'int4_per_group' must be one of 32, 64, 128"):
        get_format("int4_per_group", group=16)


@pytest.mark.parametrize(("name", "block"), [("int4_per_group", 128), ("mxfp8", 32), ("mxfp4", 32), ("nvfp4", 16)])
def test_formats_of_whole_blocks(name, block):
    message = rf"K=100 of shape=\(2, 4, 100\) must be a multiple of {block}, the block of format {name}"
    with pytest.raises(ValueError, match=f"{message}$"):
        quantize(jnp.ones((2, 4, 100)), name)


def test_groups_that_would_fit_are_named():
    with pytest.raises(ValueError, match="int4_per_group; int4_per_group_64 and int4_per_group_32 would fit"):
        quantize(jnp.ones((2, 4, 192)), "int4_per_group")
    with pytest.raises(ValueError, match="of 64, the block of format int4_per_group_64; int4_per_group_32 would fit"):
        quantize(jnp.ones((2, 4, 96)), get_format("int4_per_group", group=64))


def test_errors_of_quantize():
    x = jnp.ones((2, 4, 8))
    for message, call in {
        "rank 1": lambda: quantize(x[0, 0], "fp8_per_block"),
        "unknown quantization format 'int3'": lambda: quantize(x, "int3"),
        r"shared_axes=\(1,\) must be leading axes": lambda: quantize(x, "fp8_per_block", shared_axes=(1,)),
        r"shared_axes=\(-4,\)": lambda: quantize(x, "fp8_per_block", shared_axes=(-4,)),
        "4 elements along N, no multiple of the block 128": lambda: quantize(
            x, "fp8_per_block", axis_names=(("model",), ())
        ),
        "8 elements along K, no multiple of the block 128": lambda: quantize(
            x, "fp8_per_group", axis_names=((), ("model",))
        ),
        "implementation='cuda'": lambda: quantize(x, "fp8_per_block", implementation="cuda"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="int32"):
        quantize(x.astype(jnp.int32), "fp8_per_block")
    with pytest.raises(UnsupportedError, match="use 'xla'"):
        quantize(x, "fp8_per_block", implementation="mosaic_gpu")
    assert quantize(x, "fp8_per_block", shared_axes=(0, -3)).shape == x.shape
