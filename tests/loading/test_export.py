"""Exports: every bit comes back, a changed one is noticed, and a folder appears whole or not at all."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import psutil
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import exports
from by_name import by_name
from moe_online import models
from moe_online.assets import PYTHON_MOE_7M
from moe_online.errors import CheckpointError, ConfigError, CorruptCheckpoint
from moe_online.loading import export, exported, folder, load
from moe_online.loading.export import chunk_shape, save_quantized
from moe_online.loading.manifest import Manifest, checksums
from moe_online.loading.orbax import OrbaxSource
from numpy_quantizer import WEIGHTS
from pallas_kernels import QuantizedArray, get_format
from process_memory import needs_linux
from sources import folder_hash
from tolerance import assert_same_bits

SMALL = "mxfp4"
OTHER = dataclasses.replace(get_format(SMALL), code_max=5.0)  # by the same name


def save(params, path, **arguments):
    save_quantized(params, path, **{"progress": False} | arguments)
    return path


def small(seed=0):
    """Two arrays of a quantized leaf, a matrix and a vector."""
    return {
        "w": exports.quantized("fp8_per_channel", 4, 6, 16, seed=seed),
        "m": exports.bits(5, 8, seed=seed + 7),
        "v": exports.bits(9, seed=seed + 8),
    }


def assert_small(path, seed=0):
    found, wanted = exports.stored(path), small(seed)
    assert set(found) == {"w.values", "w.scales", "m", "v"}
    for name, array in found.items():
        leaf, _, part = name.partition(".")
        assert_same_bits(array, getattr(wanted[leaf], part) if part else wanted[leaf])


def nested(tree, name):
    for key in name.split("."):
        tree = tree[key]
    return tree


# What is stored


MARKS = {"nvfp4": pytest.mark.smoke, "fp8_per_block": (), "int4_per_group": ()}


@pytest.mark.parametrize("weight", [pytest.param(w, marks=MARKS.get(w, pytest.mark.slow)) for w in WEIGHTS])
def test_every_bit_comes_back(weight, tmp_path):
    params = exports.params(weight)
    path = save(params, tmp_path / "export")
    experts, kernel = params["layers"][0]["experts"], params["layers"][0]["q"]["kernel"]
    quantized = {
        "layers.0.experts.w13_weight": experts.w13_weight,
        "layers.0.experts.w2_weight": experts.w2_weight,
        "layers.0.experts.shared.w13_weight": experts.shared.w13_weight,
        "layers.0.q.kernel": kernel.weight,
    }
    expected = {
        "layers.0.experts.w13_bias": experts.w13_bias,
        "layers.0.experts.w2_bias": experts.w2_bias,
        "layers.0.experts.e_score_correction_bias": experts.e_score_correction_bias,
        "layers.0.experts.expert_map": experts.expert_map,
        "layers.0.experts.shared.w2_weight": experts.shared.w2_weight,
        "layers.0.experts.shared.gate_weight": experts.shared.gate_weight,
        "norm": params["norm"],
        "s": params["s"],
    }
    for name, leaf in quantized.items():
        expected |= {f"{name}.values": leaf.values, f"{name}.scales": leaf.scales}
        if weight == "nvfp4":
            expected[f"{name}.global_scale"] = leaf.global_scale
    found, by_orbax = exports.stored(path), ocp.load(path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert_same_bits(found[name], array)
        assert_same_bits(nested(by_orbax, name), array)

    leaves = Manifest.read(path).leaves
    assert set(leaves) == {*quantized, *(name for name in expected if not name.startswith(tuple(quantized)))}
    assert all(leaves[name].format == by_name(weight) for name in quantized)
    assert {name for name, leaf in leaves.items() if leaf.format is not None} == set(quantized)
    of_experts = leaves["layers.0.experts.w2_weight"]
    assert (of_experts.activation, of_experts.dtype) == (get_format("fp8_per_token"), "bfloat16")
    assert leaves["layers.0.experts.shared.w13_weight"].activation == get_format("int8_per_token")
    assert (leaves["layers.0.q.kernel"].activation, leaves["layers.0.q.kernel"].dtype) == (None, None)
    assert leaves["layers.0.experts.expert_map"].dtype == "int32"


def test_a_loaded_module(tmp_path):
    lm = models.load(PYTHON_MOE_7M, quantization="fp8_per_block", progress=False)
    found = exports.stored(save(lm.model, tmp_path / "export"))
    names = {name for name in found if name.startswith("layers.1.") and "norm" not in name}
    parts = ("values", "scales")
    assert names == {
        "layers.1.moe.router.kernel",
        *(f"layers.1.moe.experts.{weight}.{part}" for weight in ("w13_weight", "w2_weight") for part in parts),
        *(f"layers.1.attention.{proj}_proj.kernel.{part}" for proj in "qkvo" for part in parts),
    }
    layer = lm.model.layers[1]
    assert_same_bits(found["layers.1.moe.experts.w2_weight.values"], layer.moe.experts.get_value().w2_weight.values)
    assert_same_bits(
        found["layers.1.attention.k_proj.kernel.scales"], layer.attention.k_proj.kernel.get_value().weight.scales
    )
    assert_same_bits(found["embed.embedding"], lm.model.embed.embedding[...])


@pytest.mark.smoke
def test_orbax_loads_it_onto_devices_too(tmp_path):
    path = save(small(), tmp_path / "export")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), ocp.load(path))
    found = ocp.load(path, tree)
    assert isinstance(found["w"]["values"], jax.Array)
    assert_same_bits(found["w"]["values"], small()["w"].values)
    assert ocp.metadata(path).metadata["w"]["values"].dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.float16, jnp.int4, jnp.float8_e5m2])
def test_dtypes_of_plain_arrays(dtype, tmp_path):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    path = save({"x": array}, tmp_path / "export")
    for found in (exports.stored(path)["x"], ocp.load(path)["x"]):
        assert (found.dtype, found.tolist()) == (array.dtype, array.tolist())


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((), 4, ()),
        ((128, 2, 768, 2048), 1, (4, 2, 768, 2048)),  # a divisor, though 5 would fit
        ((7, 2, 768, 2048), 1, (4, 2, 768, 2048)),  # 4 and 3
        ((8, 2, 4096, 4096), 1, (1, 1, 4096, 4096)),  # an expert is too large
        ((3, 4096, 3 * 4096), 1, (1, 1024, 3 * 4096)),
        ((0, 5), 2, (1, 5)),
        ((2**24,), 4, (2**22,)),
        ((100, 4), 4, (100, 4)),
    ],
)
def test_chunks_are_contiguous_and_bounded(shape, itemsize, expected):
    assert chunk_shape(shape, itemsize) == expected
    assert np.prod(expected) * itemsize <= export.CHUNK_BYTES == 2**24


@pytest.mark.parametrize("size", [1, 20, 64, 90, 1000])
def test_any_chunks_hold_the_same(size, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CHUNK_BYTES", size)
    tree = {
        "a": exports.bits(5, 3, 7),
        "b": exports.bits(11),
        "c": exports.bits(4, 0, 2),
        "d": exports.bits(2, 2, 2, 3),
    }
    path = save(tree, tmp_path / "export")
    found, by_orbax, manifest = exports.stored(path), ocp.load(path), Manifest.read(path)
    for name, array in tree.items():
        assert_same_bits(found[name], array)
        assert_same_bits(by_orbax[name], array)
        assert manifest.arrays[name].checksums == checksums(np.asarray(array), manifest.arrays[name].step)
    whole = size >= 5 * 3 * 7 * 2
    assert (len(list((path / "state" / "a").iterdir())) == 2) == whole  # one chunk and the metadata


FOUR_DEVICES = """
import sys
import jax

jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import exports
from moe_online.loading import export
from tolerance import assert_same_bits

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "tensor"))
specs = [P(), P("expert"), P("expert", None, "tensor"), P(("tensor", "expert")), P(None, "tensor", "expert")]
for size in (2**20, 100):
    export.CHUNK_BYTES = size
    tree = {str(i): jax.device_put(exports.bits(4, 2, 8, seed=i), NamedSharding(mesh, s)) for i, s in enumerate(specs)}
    export.save_quantized(tree, sys.argv[1], overwrite=size == 100, progress=False)
    for name, found in exports.stored(sys.argv[1]).items():
        assert_same_bits(found, tree[name])
"""


def test_arrays_of_several_devices(tmp_path, request):
    support = f"import sys; sys.path.insert(0, {str(request.config.rootpath / 'tests' / 'support')!r})\n"
    command = [sys.executable, "-c", support + FOUR_DEVICES, str(tmp_path / "export")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "no leaf"),
        (jnp.ones(3), "single array"),
        ({"a": jax.ShapeDtypeStruct((2,), "float32")}, "a is a ShapeDtypeStruct"),
        ({"a": np.ones(2), "b": 3.0}, "b is a float"),
        ({"a": jax.random.key(0)}, "dtype key<fry>"),
        ({"a": np.array(["x", None])}, "dtype object"),
        ({"a": {"b": np.ones(2)}, "a.b": np.ones(2)}, "'a.b' is the name of several"),
        ({"a": exports.quantized(SMALL, 2, 32), "a.values": {"x": np.ones(2)}}, "'a.values.x' is the name of"),
        ({"a/b": np.ones(2)}, "slash"),
        ({"": {"a": np.ones(2)}}, "empty"),
        ({"a": dataclasses.replace(exports.quantized(SMALL, 2, 32), format=OTHER)}, "a has a format mxfp4 that cannot"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_stored(params, says, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(says)):
        save(params, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_an_abstract_module_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is a ShapeDtypeStruct, .* weights are loaded"):
        save(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))), tmp_path / "export")


# Damage


@pytest.mark.smoke
def test_a_flipped_bit_in_any_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CHUNK_BYTES", 96)
    path = save(exports.params("nvfp4"), tmp_path / "export")
    exports.stored(path)  # the control
    assert len(exports.opened(path)) == len(Manifest.read(path).arrays) - 1  # the map of experts is the model's own
    files = exports.data_files(path)
    names = {file.parent.name for file in files}
    assert names == set(Manifest.read(path).arrays)
    assert len(files) > 2 * len(names)
    rng = np.random.default_rng(0)
    for file in files:
        name = file.parent.name
        used = used_bytes(path, file)
        exports.flip(file, at := int(rng.integers(used)))
        with pytest.raises(CorruptCheckpoint, match=re.escape(f"{name} is damaged at index")) as caught:
            exports.stored(path)
        assert caught.value.names == (name,)
        if not name.endswith("expert_map"):
            with pytest.raises(CorruptCheckpoint, match=re.escape(f"{name} is damaged at index")):
                exports.opened(path)
        exports.flip(file, at)
    exports.stored(path)


@pytest.mark.smoke
@pytest.mark.parametrize("damage", ["vanished", "cut short", "empty"])
def test_a_chunk_that_is_lost_is_named(tmp_path, damage):
    path = save(small(), tmp_path / "export")
    file = path / "state" / "m" / "0.0"
    data = file.read_bytes()
    file.unlink()
    if damage != "vanished":
        file.write_bytes(data[: len(data) // 2] if damage == "cut short" else b"")
    declared = {"m": jax.ShapeDtypeStruct((5, 8), jnp.bfloat16)}
    with pytest.raises(CorruptCheckpoint, match=r"m in .* cannot be read: ") as caught:
        load(declared, path, unexpected="ignore", progress=False)
    assert caught.value.names == ("m",)


@pytest.mark.parametrize("times", [2, 100])
def test_errors_that_may_pass_are_tried_again(tmp_path, monkeypatch, times):
    path = save(small(), tmp_path / "export")
    left, read, pauses = [times], exported._read_file, []

    def stumbling(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        read(*arguments)

    monkeypatch.setattr(exported, "_read_file", stumbling)
    monkeypatch.setattr("time.sleep", pauses.append)
    if times == 2:
        assert set(exports.opened(path)) == {"w.values", "w.scales", "m", "v"}
        assert len(pauses) == 2
    else:
        with pytest.raises(CheckpointError, match=r"Input/output error \(tried \d times\)"):
            exports.opened(path)


@pytest.mark.parametrize("written", [64, 1024])
def test_chunks_of_another_size_than_today(tmp_path, monkeypatch, written):
    monkeypatch.setattr(export, "CHUNK_BYTES", written)
    path = save(small(), tmp_path / "export")
    monkeypatch.undo()
    for name, array in exports.opened(path).items():
        assert_same_bits(array, exports.stored(path)[name])


def test_any_names_and_sizes_come_back(tmp_path):
    params = {"temperature": {"value": jnp.ones(3)}, "empty": np.zeros((4, 0)), "none": np.zeros((0, 4))}
    found = exports.opened(save(params, tmp_path / "export"))
    assert {name: array.shape for name, array in found.items()} == {
        "temperature.value": (3,), "empty": (4, 0), "none": (0, 4)
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [">f4", "uint4"])
def test_what_could_not_be_read_again_is_refused(tmp_path, dtype):
    array = np.ones(4, getattr(ml_dtypes, dtype, dtype))
    with pytest.raises(ConfigError, match="would not be read again"):
        save({"a": array}, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(small(), "~/export")
    assert_small(tmp_path / "export")


def used_bytes(path, file):
    """Of a chunk without what is beyond the end of the array."""
    source = OrbaxSource(path).tensors[file.parent.name]
    if not source.shape:
        return source.nbytes
    at = [int(i) for i in file.name.split(".")]
    held = [min(c, n - i * c) for i, c, n in zip(at, source.chunk, source.shape, strict=True)]
    return int(np.prod(held)) * source.dtype.itemsize


def test_orbax_does_not_notice(tmp_path):
    """Why there are checksums: the same flip comes back as data."""
    path = save(small(), tmp_path / "export")
    exports.flip(path / "state" / "m" / "0.0")
    assert not np.array_equal(ocp.load(path)["m"].view(np.uint16), np.asarray(small()["m"]).view(np.uint16))


@pytest.mark.smoke
def test_any_range_of_rows_can_be_checked(tmp_path):
    path = save(small(), tmp_path / "export")
    manifest, array = Manifest.read(path), np.array(small()["w"].values)
    for start in range(4):
        for stop in range(start, 5):
            manifest.verify("w.values", start, array[start:stop])
    with pytest.raises(CorruptCheckpoint, match="index 2 of axis 0"):
        manifest.verify("w.values", 2, array[1:3])
    exports_row = array.copy()
    exports_row.view(np.uint8)[3, 5, 15] ^= 128
    manifest.verify("w.values", 0, exports_row[:3])
    with pytest.raises(CorruptCheckpoint, match="index 3 of axis 0"):
        manifest.verify("w.values", 1, exports_row[1:])
    with pytest.raises(ValueError, match=r"\[3, 5\)"):
        manifest.verify("w.values", 3, array[:2])
    manifest.verify("v", 0, small()["v"])
    with pytest.raises(ValueError, match="step=9"):
        manifest.verify("v", 0, np.asarray(small()["v"])[:4])


def test_large_arrays_are_checked_by_threads(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (37, 300_001), np.uint8)
    manifest = Manifest.read(save({"x": array}, tmp_path / "export"))
    manifest.verify("x", 0, array)
    manifest.verify("x", 0, np.asfortranarray(array))  # the layout in memory does not matter
    array[36, 300_000] ^= 1
    with pytest.raises(CorruptCheckpoint, match="index 36 of axis 0"):
        manifest.verify("x", 0, array)


@pytest.mark.parametrize("change", [lambda x: x.astype(np.float32), lambda x: x[:, :4], lambda x: x[..., None]])
def test_another_dtype_or_shape_is_noticed(change, tmp_path):
    manifest = Manifest.read(save(small(), tmp_path / "export"))
    with pytest.raises(CorruptCheckpoint, match=r"m is .* where part of bfloat16 \(5, 8\) was exported"):
        manifest.verify("m", 0, change(np.asarray(small()["m"])))
    with pytest.raises(CorruptCheckpoint, match="other is no array that was exported"):
        manifest.verify("other", 0, np.asarray(small()["m"]))


def rewritten(path, **changes):
    file = path / "state" / "moe_online.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


def test_versions_of_the_manifest(tmp_path):
    path = save(small(), tmp_path / "export")
    assert json.loads((path / "state" / "moe_online.json").read_text())["version"] == 1
    assert Manifest.read(path) == Manifest.read(path / "state")
    rewritten(path, version=2, library="9.9")
    with pytest.raises(
        CheckpointError, match=r"moe-online 9\.9 as version 2; .* up to 1\. Upgrade moe-online, or"
    ) as e:
        Manifest.read(path)
    assert type(e.value) is CheckpointError


def test_a_format_that_is_not_known_yet(tmp_path):
    manifest = Manifest.read(save(small(), tmp_path / "export"))
    later = dataclasses.replace(get_format("fp8_per_channel"), name="fp4_of_tomorrow")
    leaves = {"w": dataclasses.replace(manifest.leaves["w"], format=later)}
    with pytest.raises(CheckpointError, match=r"fp4_of_tomorrow.*Upgrade moe-online"):
        Manifest.from_json(dataclasses.replace(manifest, leaves=leaves).to_json())


def test_a_changed_manifest_is_refused(tmp_path):
    path = save(small(), tmp_path / "export")
    file = path / "state" / "moe_online.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        exports.flip(file, at)
        with pytest.raises(CheckpointError):
            Manifest.read(path)
        file.write_bytes(whole)
    for text in (b"", whole[:-20], b"[]", b'{"kind": "moe-online export", "version": "1"}'):
        file.write_bytes(text)
        with pytest.raises(CorruptCheckpoint, match="Copy it again"):
            Manifest.read(path)


def test_other_checkpoints_have_no_manifest(tmp_path):
    ocp.save(tmp_path / "checkpoint", {"a": np.ones(3)})
    assert Manifest.read(tmp_path / "checkpoint") is None
    assert Manifest.read(tmp_path / "nothing") is None


# The folder


@pytest.mark.smoke
def test_overwriting(tmp_path):
    path = save(small(), tmp_path / "export")
    before = folder_hash(path)
    with pytest.raises(CheckpointError, match=r"export exists: give overwrite=True"):
        save(small(1), path)
    assert folder_hash(path) == before
    save(small(1), path, overwrite=True)
    assert_small(path, 1)
    with pytest.raises(AssertionError, match="differ"):
        assert_small(path, 0)
    save(small(2), tmp_path / "other", overwrite=True)  # nothing there to replace
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "other"]


def test_only_a_checkpoint_is_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with pytest.raises(CheckpointError, match=f"{name} is not replaced"):
            save(small(), tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    assert_small(save(small(), tmp_path / "empty", overwrite=True))
    ocp.save(tmp_path / "orbax", {"a": np.ones(3)})
    assert_small(save(small(), tmp_path / "orbax", overwrite=True))


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    save(small(), tmp_path / "disk" / "export")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "export")
    save(small(1), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert_small(tmp_path / "disk" / "export", 1)


@pytest.mark.parametrize("path", ["gs://bucket/export", "/"])
def test_destinations_that_cannot_be(path):
    with pytest.raises(CheckpointError, match=r"local path|give a folder in it"):
        save(small(), path)


def failing_after(monkeypatch, writes, action):
    """The chunk after so many is not written: `action` is called instead."""
    inner, done = export._write_chunk, []

    def write(*arguments):
        done.append(None)
        if len(done) > writes:
            action()
        inner(*arguments)

    monkeypatch.setattr(export, "_write_chunk", write)


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.smoke
@pytest.mark.parametrize("writes", [0, 1, 3])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk(writes, overwrite, tmp_path, monkeypatch):
    path = tmp_path / "export"
    if overwrite:
        save(small(), path)
    with monkeypatch.context() as patched:
        failing_after(patched, writes, full_disk)
        with pytest.raises(CheckpointError, match=r"export cannot be written: No space left on device. Free space"):
            save(small(1), path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["export"] * overwrite
    if overwrite:
        assert_small(path)
    save(small(1), path, overwrite=overwrite)
    assert_small(path, 1)


def test_too_little_space_is_known_before_writing(tmp_path, monkeypatch):
    left = shutil.disk_usage(tmp_path)._replace(free=300)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: left)
    failing_after(monkeypatch, 0, lambda: pytest.fail("something was written"))
    with pytest.raises(CheckpointError, match=r"export needs 578 B and its disk has 300 B left"):
        save(small(), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere for export: create it"):
        save(small(), tmp_path / "nowhere" / "export")
    parent = tmp_path / "parent"
    parent.mkdir()
    failing_after(monkeypatch, 1, lambda: parent.rename(tmp_path / "moved"))
    with pytest.raises(CheckpointError, match=r"cannot be written: No such file or directory. .* create it"):
        save(small(), parent / "export")
    assert not parent.exists()


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    path = save(small(), tmp_path / "export")

    def interrupt():
        raise KeyboardInterrupt

    failing_after(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(small(1), path, overwrite=True)
    assert_small(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_swap_puts_the_old_one_back(tmp_path, monkeypatch):
    path, rename = save(small(), tmp_path / "export"), os.rename

    def second_fails(source, target):
        if pathlib.Path(source).name.endswith(".new"):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(CheckpointError, match=r"cannot be written: Permission denied. Get leave to write there"):
        save(small(1), path, overwrite=True)
    assert_small(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_runs_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    again = f"{os.getppid()}-{int(psutil.Process(os.getppid()).create_time()) - 60}"  # a number that another had before
    mine = [
        tmp_path / f".export.moe-online-{writer}.new"
        for writer in (f"{dead.pid}-1700000000", folder._writer(os.getpid()), again)
    ]
    others = [
        tmp_path / f".export.moe-online-{folder._writer(os.getppid())}.new",
        tmp_path / f".exported.moe-online-{dead.pid}-1700000000.new",
    ]
    for left in mine + others:
        left.mkdir()
        (left / "half").write_text("of a chunk")
    path = save(small(), tmp_path / "export")
    assert_small(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])  # of a run that goes on, of another destination


def test_the_old_one_comes_back_after_a_kill_between_the_renames(tmp_path):
    path = save(small(), tmp_path / "export")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.rename(tmp_path / f".export.moe-online-{dead.pid}-1700000000.old")
    with pytest.raises(CheckpointError, match="exists"):
        save(small(1), path)
    assert_small(path)
    save(small(1), path, overwrite=True)
    assert_small(path, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced, inner, rename = set(), os.fsync, os.rename

    def fsync(opened):
        synced.add(os.stat(opened).st_ino)
        inner(opened)

    def checked(source, target):
        missing = [p for p in [source, *source.rglob("*")] if p.stat().st_ino not in synced]
        assert not missing, missing
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", checked)
    save(small(), tmp_path / "export")
    assert tmp_path.stat().st_ino in synced
    monkeypatch.setattr(folder, "_sync_folder", lambda path: None)
    with pytest.raises(AssertionError):
        save(small(), tmp_path / "control")


MEMORY = """
import gc, sys
import jax.numpy as jnp
from moe_online.loading import export
from process_memory import peak, reset_peak

path, keep = sys.argv[1], sys.argv[2] == "keep"
export.CHUNK_BYTES = 2**21
tree = {str(i): jnp.full((16, 1024, 1024), i, jnp.int8) for i in range(12)}
export.save_quantized({"0": tree["0"]}, path, progress=False)  # compiles
kept, inner = [], export._piece


def piece(array, region):
    found = inner(array, region)
    kept.append(found if keep else None)
    return found


export._piece = piece
gc.collect()
before = reset_peak()
export.save_quantized(tree, path, overwrite=True, progress=False)
print(peak() - before)
"""


@needs_linux
def test_the_host_holds_a_few_pieces(tmp_path, request):
    def grown(keep):
        support = f"import sys; sys.path.insert(0, {str(request.config.rootpath / 'tests' / 'support')!r})\n"
        command = [sys.executable, "-c", support + MEMORY, str(tmp_path / keep), keep]
        # Large blocks go back to the system when they are freed, as in test_host_memory.py.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    bound, whole = 5 * 2**21 + 2**24, 12 * 2**24  # what the docstring says and what threads take; the model
    assert grown("free") < bound
    assert grown("keep") > whole / 2 > bound


def test_quantized_array_as_the_whole(tmp_path):
    whole = exports.quantized("int4_per_group_32", 4, 64)
    path = save(whole, tmp_path / "export")
    found, leaf = exports.stored(path), Manifest.read(path).leaves[""]
    assert set(found) == {"values", "scales"}
    assert leaf.format.group == 32
    again = QuantizedArray.from_parts(jnp.asarray(found["values"]), jnp.asarray(found["scales"]), leaf.format)
    assert_same_bits(again.values, whole.values)
