"""Intermediate sizes that do not divide among devices: whole blocks for each of them, filled up with zeros.

In a process of its own, where a CPU counts as eight devices: a test calls the function of its name there.
"""

import dataclasses
import functools
import json
import math
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from by_name import assert_same_parts, by_name
from eight_devices import in_eight_devices
from moe_online import MoEConfig, get_method, reload, save_quantized
from moe_online.errors import ConfigError, ShapeMismatch
from moe_online.experts import abstract_experts
from moe_online.loading import open_source, source
from moe_online.schemes import QuantSpec
from numpy_quantizer import BLOCKS, WEIGHTS, quantize_numpy
from pallas_kernels import QuantizedArray, get_format
from quick import few
from sources import BF16, WatchedSource, quiet_load, random, swapped
from tolerance import assert_close, assert_same_bits

E, H = 4, 128
MESHES = ((1, 2), (2, 2), (1, 4), (2, 4))  # expert, tensor
KEN = {
    "gate": "E K N -> w13_weight.gate",
    "up": "E K N -> w13_weight.up",
    "down": "E K N -> w2_weight",
    "b13": "E (S N) -> w13_bias",
    "w2_bias": "E N -> w2_bias",
    "shared.gate": "K N -> shared.w13_weight.gate",
    "shared.up": "K N -> shared.w13_weight.up",
    "shared.down": "1 K N -> shared.w2_weight",
}


def mesh_of(shape):
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), ("expert", "tensor"))


def sizes(weight):
    """I of experts and of shared ones: some blocks that two devices cannot share out."""
    if weight == "fp8_per_block":
        return 192, 160  # the last ones are no whole blocks
    block = block_of(weight)
    return (11, 5) if block == 1 else (3 * block, block)


def block_of(weight):
    """Along I, which is N of w13 and K of w2."""
    return max(size or 1 for size in (BLOCKS[weight] if weight is not None else (1, 1)))


@functools.cache
def weights(weight):
    inner, of_shared = sizes(weight)
    own = {"w13_weight": random(E, 2, inner, H), "w2_weight": random(E, H, inner, seed=1)}
    own |= {"w13_bias": random(E, 2, inner, seed=2), "w2_bias": random(E, H, seed=3)}
    shared = {"w13_weight": random(1, 2, of_shared, H, seed=4), "w2_weight": random(1, H, of_shared, seed=5)}
    return own, shared


def declared(weight):
    inner, of_shared = sizes(weight)
    return abstract_experts(E, H, inner, BF16, has_bias=True, shared_intermediate_size=of_shared)


def source_of(layout, weight):
    own, shared = weights(weight)
    if layout == "ours":
        return open_source(own | {"shared": shared}), {}
    if layout == "on a device":
        return open_source(jax.tree.map(jnp.asarray, own | {"shared": shared})), {}
    w13, w2 = own["w13_weight"], own["w2_weight"]
    tree = {"gate": swapped(w13[:, 0]), "up": swapped(w13[:, 1]), "down": swapped(w2), "w2_bias": own["w2_bias"]}
    w13, w2 = shared["w13_weight"], shared["w2_weight"]
    tree["shared"] = {"gate": swapped(w13[0, 0]), "up": swapped(w13[0, 1]), "down": swapped(w2)}
    return open_source(tree | {"b13": own["w13_bias"].reshape(E, -1)}), KEN


def padded_size(size, weight, tensor):
    """From the definition: the least that gives each device whole blocks."""
    return next(total for total in range(size, 10**6) if total % (block_of(weight) * tensor) == 0)


def cropped(found, shape):
    """The part that is no padding, and a check that the rest counts for nothing."""
    if not isinstance(found, QuantizedArray):
        inside = tuple(map(slice, shape))
        outside = np.array(found, np.float32)
        outside[inside] = 0
        assert not outside.any()
        return np.asarray(found)[inside]
    outside = np.array(found.dequantize(jnp.float32))
    outside[tuple(map(slice, shape))] = 0
    assert not outside.any(), "padding is not zero"
    fmt = found.format
    shapes = {"values": fmt.values_shape(shape), "scales": fmt.scales_shape(shape)}
    shapes |= {"global_scale": fmt.global_shape(shape)} if fmt.two_level else {}
    parts = {name: np.asarray(getattr(found, name))[tuple(map(slice, size))] for name, size in shapes.items()}
    return dataclasses.replace(found, **parts)


def check(loaded, weight, tensor):
    """Each field is as long as the mesh needs, with the bits of numpy, of what is padded and of what is not."""
    for params, own, size in zip((loaded, loaded.shared), weights(weight), sizes(weight), strict=True):
        total = padded_size(size, weight, tensor)
        assert params.w2_weight.shape[-1] == params.w13_weight.shape[-2] == total
        assert params.intermediate_size_unpadded == (None if total == size else size)
        for name, x in own.items():
            if weight is None or name.endswith("bias"):
                assert_same_bits(cropped(getattr(params, name), x.shape), x)
            else:
                found, axes = getattr(params, name), tuple(range(1, x.ndim - 2))
                filled = np.pad(x, [(0, more - size) for more, size in zip(found.shape, x.shape, strict=True)])
                assert_same_parts(found, quantize_numpy(filled, weight, shared_axes=axes))
                assert_same_parts(cropped(found, x.shape), quantize_numpy(x, weight, shared_axes=axes))


def bits(pairs):
    """Loads formats onto meshes, the layouts of the source in turn."""
    for i, (weight, shape) in enumerate(pairs):
        source, mapping = source_of(("ours", "ken", "on a device")[i % 3], weight)
        watched = WatchedSource(source)
        config = None if weight is None else config_of(weight)
        more = {"mapping": mapping, "quantization": config, "unit_bytes": 2**16 if i % 2 else 2**28}
        params, report = quiet_load(declared(weight), watched, mesh=mesh_of(shape), **more)
        check(params, weight, shape[1])
        assert all((counts == 1).all() for counts in watched.read_counts.values()), "read once, and nothing else"
        assert report.planned_peak_bytes >= report.peak_bytes >= report.resident_bytes
    print(json.dumps(len(pairs)))


def config_of(weight):
    spec = QuantSpec(by_name(weight), None)
    return {"moe": spec, "linear": spec}


def life(weight, shape):
    """Padded weights give the output of others, are exported as if they were not padded, and can be reloaded."""
    mesh, config, source = mesh_of(shape), config_of(weight), source_of("ours", weight)[0]
    padded = quiet_load(declared(weight), source, quantization=config, mesh=mesh).params
    plain = quiet_load(declared(weight), source, quantization=config).params
    moe = MoEConfig(
        num_experts=E,
        top_k=2,
        hidden_size=H,
        intermediate_size=sizes(weight)[0],
        has_bias=True,
        shared_intermediate_size=sizes(weight)[1],
    )
    method = get_method(None, moe)
    x, logits = jnp.asarray(random(33, H, seed=7)), jnp.asarray(random(33, E, seed=8))
    run = jax.jit(method.apply_monolithic)
    expected = run(plain, x, logits)
    assert_close(run(padded, x, logits), expected, batch=3e-3, worst_row=1e-2)
    with pytest.raises(AssertionError):
        assert_close(run(plain, x, jnp.roll(logits, 1, axis=1)), expected, batch=3e-3, worst_row=1e-2)

    with tempfile.TemporaryDirectory() as folder:
        save_quantized(padded, f"{folder}/export", progress=False)
        check_same(quiet_load(declared(weight), f"{folder}/export").params, plain)
        again = quiet_load(declared(weight), f"{folder}/export", mesh=mesh_of((2, 4))).params
        check(again, weight, 4)
        save_quantized(plain, f"{folder}/plain", progress=False)
        check(quiet_load(declared(weight), f"{folder}/plain", mesh=mesh).params, weight, shape[1])

    fresh = jax.tree.map(lambda array: array * 2, weights(weight)[0] | {"shared": weights(weight)[1]})
    other = quiet_load(declared(weight), fresh, quantization=config, mesh=mesh).params
    for staging in ("device", "host"):
        found = reload(padded, fresh, staging=staging, progress=False).params
        check_same(found, other)
        assert jax.tree.structure(found) == jax.tree.structure(padded)
        padded = found
    print(json.dumps("done"))


def check_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(assert_same_bits, found, expected)


def taken_over(requantized):
    """Codes and scales of a checkpoint come into padded weights too."""
    own = {name: weights("fp8_per_block")[0][name] for name in ("w13_weight", "w2_weight")}
    fmt = get_format("fp8_per_block")
    quantized = {name: quantize_numpy(x, fmt.name) for name, x in own.items()}
    tree, mapping = {}, {}
    for name, axes in (("w13_weight", "E S"), ("w2_weight", "E")):
        tree |= {name: quantized[name][0], f"{name}_scale_inv": swapped(quantized[name][1])}
        mapping[f"{name}_scale_inv"] = f"{axes} N K -> {name}.scales"
    abstract = abstract_experts(E, H, 192, BF16)
    asked = {"quantization": "int8_per_channel_weight_only", "requantize": True} if requantized else {}
    more = {"mapping": mapping} | asked
    plain = quiet_load(abstract, tree, **more).params
    for shape in MESHES:
        padded = quiet_load(abstract, tree, mesh=mesh_of(shape), **more).params
        assert padded.w2_weight.shape[-1] == padded_size(192, fmt.name, shape[1])
        for name, x in own.items():
            found, expected = cropped(getattr(padded, name), x.shape), getattr(plain, name)
            jax.tree.map(assert_same_bits, found, expected)
            if not requantized:
                assert_same_parts(found, quantized[name])
    print(json.dumps("done"))


def as_declared():
    """A sharding of the user's own, and experts that do not divide, are not padded but refused."""
    tree = {name: weights("fp8_per_block")[0][name] for name in ("w13_weight", "w2_weight")}
    sharded = abstract_experts(E, H, 192, BF16, mesh=mesh_of((1, 2)))
    with pytest.raises(ConfigError, match="a shard has 96 elements along N, no multiple of the block 128"):
        quiet_load(sharded, tree, quantization="fp8_per_block", mesh=mesh_of((1, 2)))
    with pytest.raises(ValueError, match=r"does not divide.*moe_online\.load\(mesh=\.\.\.\) pads"):
        abstract_experts(E, H, 192, BF16, mesh=Mesh(np.array(jax.devices()[:5]).reshape(1, 5), ("expert", "tensor")))
    with pytest.raises(ConfigError, match="the mesh does not fit"):
        quiet_load(abstract_experts(E, H, 192, BF16), tree, mesh=mesh_of((8, 1)))
    wrong = tree | {"w2_weight": tree["w2_weight"][..., :-1]}
    with pytest.raises(ShapeMismatch, match=r"w2_weight \(4, 128, 191\).*, needed \(4, 128, 192\)"):
        quiet_load(abstract_experts(E, H, 192, BF16), wrong, quantization="fp8_per_block", mesh=mesh_of((1, 2)))
    config = {"moe": QuantSpec(get_format("int4_per_group"), None)}
    with pytest.raises(ConfigError, match=r"K=192.* must be a multiple of 128"):  # as on one device
        quiet_load(abstract_experts(E, H, 192, BF16), tree, quantization=config, mesh=mesh_of((1, 2)))
    print(json.dumps("done"))


def stacked(weight):
    """`[L, E, ...]`: layers stay together, E and I are shared out, and I is padded."""
    own = {name: np.stack([x, x[::-1]]) for name, x in weights(weight)[0].items()}
    inner, _ = sizes(weight)
    one = abstract_experts(E, H, inner, BF16, has_bias=True)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), one)
    config = {"moe": QuantSpec(by_name(weight), None)}
    for shape in MESHES:
        params = quiet_load(abstract, own, quantization=config, mesh=mesh_of(shape), unit_bytes=2**14).params
        assert params.w2_weight.values.sharding.spec == PartitionSpec(None, "expert", None, "tensor")
        assert params.w2_weight.shape[-1] == padded_size(inner, weight, shape[1])
        for name, x in own.items():
            found = cropped(getattr(params, name), x.shape)
            if name.endswith("bias"):
                assert_same_bits(found, x)
            else:
                assert_same_parts(found, quantize_numpy(x, weight, shared_axes=tuple(range(2, x.ndim - 2))))
    print(json.dumps("done"))


def twice(weight):
    """Declared as it lies on one mesh, and padded further for another: what it was is what it was at first."""
    tree = source_of("ours", weight)[0]
    first = quiet_load(declared(weight), tree, quantization=config_of(weight), mesh=mesh_of((1, 2))).params
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, BF16), first, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )
    check(quiet_load(abstract, tree, quantization=config_of(weight), mesh=mesh_of((2, 4))).params, weight, 4)
    print(json.dumps("done"))


def from_a_mesh():
    """Arrays on one mesh come to another piece by piece: no program of several devices touches them."""
    weight, mesh = "fp8_per_block", mesh_of((2, 4))
    own = {"w13_weight": random(E, 2, 256, H), "w2_weight": random(E, H, 256, seed=1)}
    sharding = NamedSharding(mesh, PartitionSpec("expert", None, "tensor"))
    tree = {name: jax.device_put(x, sharding) for name, x in own.items()}
    devices, copy = [], source._copy
    source._copy = lambda array, *rest: devices.append(len(array.sharding.device_set)) or copy(array, *rest)
    for shape, unit_bytes in (((1, 2), 2**28), ((2, 1), 2**14), ((4, 2), 2**28), ((1, 1), 2**16)):
        abstract = abstract_experts(E, H, 256, BF16)
        arguments = {"quantization": {"moe": QuantSpec(get_format(weight), None)}, "unit_bytes": unit_bytes}
        params = quiet_load(abstract, tree, mesh=mesh_of(shape), **arguments).params
        for name, x in own.items():
            axes = tuple(range(1, x.ndim - 2))
            assert_same_parts(getattr(params, name), quantize_numpy(x, weight, shared_axes=axes))
    assert devices
    assert set(devices) == {1}
    print(json.dumps("done"))


@pytest.mark.parametrize("weight", few(["fp8_per_block", "nvfp4", "int8_per_channel"], ("fp8_per_block",)))
def test_leaves_of_all_layers(request, weight):
    assert in_eight_devices(request, "test_padding", "stacked", weight=weight) == "done"


def test_padded_twice(request):
    assert in_eight_devices(request, "test_padding", "twice", weight="mxfp8") == "done"


def test_arrays_on_another_mesh(request):
    assert in_eight_devices(request, "test_padding", "from_a_mesh") == "done"


SOME = [(None, (2, 2)), ("fp8_per_block", (2, 4)), ("nvfp4", (1, 2)), ("int8_per_channel", (1, 4))]
CASES = {"some": SOME, **{str(weight): [(weight, shape) for shape in MESHES] for weight in (None, *WEIGHTS)}}


@pytest.mark.parametrize("case", few(CASES, ("some",)))
def test_bits(request, case):
    pairs = CASES[case]
    assert in_eight_devices(request, "test_padding", "bits", pairs=pairs) == len(pairs)


@pytest.mark.parametrize("weight", few(["fp8_per_block", "mxfp4", "int8_per_channel", "nvfp4"], ()))
def test_output_export_and_reload(request, weight):
    assert in_eight_devices(request, "test_padding", "life", weight=weight, shape=(2, 2)) == "done"


@pytest.mark.parametrize("requantized", few([False, True], (False,)))
def test_codes_of_a_checkpoint(request, requantized):
    assert in_eight_devices(request, "test_padding", "taken_over", requantized=requantized) == "done"


def test_what_is_declared_otherwise_stays(request):
    assert in_eight_devices(request, "test_padding", "as_declared") == "done"
