"""Checkpoints in other places than a path: in tensorstore's memory, on a web server, in a bucket, below `~`."""

import json
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from http_files import as_bucket, serving
from moe_online import load, plan
from moe_online.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from moe_online.loading import open_source
from moe_online.loading.files import CONTEXT
from moe_online.loading.safetensors import INDEX, WHOLE, SafetensorsSource, is_safetensors
from sources import random
from tolerance import assert_same_bits

TREE = {
    "l.w13": random(4, 2, 48, 64),
    "l.w2": random(4, 64, 48, dtype=np.float32, seed=1),
    "ids": np.arange(6, dtype=np.int32).reshape(2, 3),
    "scalar": np.array(2.5, np.float32),
}
ABSTRACT = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in TREE.items()}


def save_orbax(folder, *, ocdbt=True, zarr3=True, chunk_bytes=None):
    """Saves TREE; the folder of the item is `c/state`."""
    context = ocp.Context()
    context.array.saving.use_ocdbt, context.array.saving.use_zarr3 = ocdbt, zarr3
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=chunk_bytes)
    with context:
        ocp.save(folder / "c", TREE)
    return "c"


def save_safetensors(folder, *, files=1):
    """Saves TREE below `c`, with an index where in several files."""
    (folder / "c").mkdir()
    if files == 1:
        save_file(TREE, folder / "c" / WHOLE)
        return "c"
    weight_map = {name: f"part {i % files}.safetensors" for i, name in enumerate(TREE)}  # names with a space
    for file in set(weight_map.values()):
        save_file({name: TREE[name] for name in TREE if weight_map[name] == file}, folder / "c" / file)
    (folder / "c" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return "c"


KINDS = {
    "orbax": save_orbax,
    "orbax, many chunks": lambda folder: save_orbax(folder, chunk_bytes=4096),
    "orbax, plain zarr3": lambda folder: save_orbax(folder, ocdbt=False),
    "orbax, plain zarr": lambda folder: save_orbax(folder, ocdbt=False, zarr3=False),
    "orbax, zarr": lambda folder: save_orbax(folder, zarr3=False),
    "safetensors": save_safetensors,
    "safetensors, two files": lambda folder: save_safetensors(folder, files=2),
}
SMOKE = {"orbax", "safetensors"}


def kinds(names=KINDS):
    marks = {name: [pytest.mark.smoke] if name in SMOKE else [] for name in names}
    return pytest.mark.parametrize("kind", [pytest.param(name, marks=marks[name]) for name in names])


def to_memory(folder, url):
    store = ts.KvStore.open(f"{url}/", context=CONTEXT).result()
    for file in pathlib.Path(folder).rglob("*"):
        if file.is_file():
            store.write(file.relative_to(folder).as_posix(), file.read_bytes()).result()
    return store


def check(source, **arguments):
    """It has TREE, bit for bit, and parts of it come alone."""
    opened = open_source(source, **arguments)
    assert set(opened.tensors) == set(TREE)
    for name, x in TREE.items():
        assert (opened.tensors[name].shape, opened.tensors[name].dtype) == (x.shape, x.dtype)
        assert_same_bits(opened.read(name, tuple(slice(0, size) for size in x.shape)), x)
    assert_same_bits(opened.read("l.w2", (slice(1, 3), slice(5, 6), slice(7, 40))), TREE["l.w2"][1:3, 5:6, 7:40])


def check_load(source):
    params, report = load(ABSTRACT, source, progress=False, unit_bytes=20_000)
    for name, x in TREE.items():
        assert_same_bits(params[name], x)
    assert report.read_bytes == sum(x.nbytes for x in TREE.values())
    assert len(plan(ABSTRACT, source, unit_bytes=20_000).units) > len(TREE)
    return report


@kinds()
def test_memory(tmp_path, kind, request):
    name = KINDS[kind](tmp_path)
    url = f"memory://{request.node.nodeid.replace('/', '.')}"
    store = to_memory(tmp_path, url)
    assert check_load(f"{url}/{name}").source.startswith("memory://")
    check(f"{url}/{name}/")
    for key in store.list().result():  # the control: what is read is what is in memory
        store.write(key, b"").result()
    with pytest.raises(CheckpointError):
        check(f"{url}/{name}")


@kinds()
def test_web_server(tmp_path, kind):
    name = KINDS[kind](tmp_path)
    with serving(tmp_path) as server:
        path = f"{name}/state" if "orbax" in kind else name
        check_load(f"{server.url}/{path}")
        check(f"{server.url}/{path}")
        if "orbax" in kind:
            check(f"{server.url}/{name}", prefix="state")
            with pytest.raises(CheckpointNotFound, match=r"web servers do not list .* 'state'"):
                check(f"{server.url}/{name}")


@kinds()
def test_bucket(tmp_path, kind, monkeypatch):
    name = KINDS[kind](tmp_path)
    with serving(tmp_path) as server:
        url = as_bucket(server, monkeypatch)
        check(f"{url}/{name}")
        assert server.requests
        for file in tmp_path.rglob("*"):  # the control
            if file.is_file():
                file.write_bytes(b"")
        with pytest.raises(CheckpointError):
            check(f"{url}/{name}")


@kinds(["orbax", "safetensors"])
def test_paths_from_home_and_from_here(tmp_path, kind, monkeypatch):
    name = KINDS[kind](tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in (f"~/{name}", pathlib.Path("~") / name, name, f"./{name}", os.path.join("..", tmp_path.name, name)):
        check(path)
    monkeypatch.setenv("HOME", str(tmp_path / name))
    with pytest.raises(CheckpointNotFound, match="there is nothing at"):
        check(f"~/{name}")


def test_names_that_a_url_would_encode(tmp_path):
    folder = tmp_path / "a b%20c#d?e"
    folder.mkdir()
    save_orbax(folder)
    check(folder / "c")
    to_memory(folder, "memory://x%20y")
    check("memory://x%20y/c")
    (folder / "f").mkdir()
    save_safetensors(folder / "f", files=2)
    check(folder / "f" / "c")
    with serving(tmp_path) as server:
        check(f"{server.url}/a%20b%2520c%23d%3Fe/c/state")
        check(f"{server.url}/a%20b%2520c%23d%3Fe/f/c")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Orbax's older writers
def test_steps_in_memory(tmp_path):
    with orbax.checkpoint.CheckpointManager(tmp_path / "run") as manager:
        for step, scale in ((9, 2), (10, 1)):
            tree = {name: x * np.asarray(scale, x.dtype) for name, x in TREE.items()}
            manager.save(step, args=orbax.checkpoint.args.StandardSave(tree))
        manager.wait_until_finished()
    to_memory(tmp_path, "memory://steps")
    check("memory://steps/run")
    check("memory://steps/run", prefix="10.default")
    with pytest.raises(AssertionError):
        check("memory://steps/run", prefix="9")


def test_only_the_headers_are_read_for_a_plan(tmp_path):
    save_safetensors(tmp_path)
    with serving(tmp_path) as server:
        planned = plan(ABSTRACT, f"{server.url}/c")
        assert planned.read_bytes == sum(x.nbytes for x in TREE.values())
        ranges = [asked for path, asked in server.requests if path.endswith(WHOLE)]
        sizes = [int(last) - int(first) + 1 for first, last in (r.removeprefix("bytes=").split("-") for r in ranges)]
        assert sum(sizes) < 2000


def test_a_web_server_that_sends_elsewhere(tmp_path):
    """As model hubs do; tensorstore does not follow, which is no damage."""
    save_safetensors(tmp_path)
    with serving(tmp_path) as server:
        server.moved[f"/hub/{WHOLE}"] = f"{server.url}/c/{WHOLE}"
        with pytest.raises(CheckpointError, match=r"HTTP code 302.*See that its place can be reached") as caught:
            check(f"{server.url}/hub/{WHOLE}")
    assert type(caught.value) is CheckpointError


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with serving(tmp_path) as server:
        with pytest.raises(CheckpointNotFound, match=r"there is nothing at http.*x\.safetensors"):
            plan(ABSTRACT, f"{server.url}/x.safetensors")
        with pytest.raises(CheckpointNotFound, match="web servers do not list"):
            plan(ABSTRACT, f"{server.url}/empty")
        with pytest.raises(CheckpointNotFound, match=f"neither {INDEX} nor {WHOLE}"):
            SafetensorsSource(f"{server.url}/empty")
        save_safetensors(tmp_path, files=2)
        next((tmp_path / "c").glob("part*")).unlink()
        with pytest.raises(CheckpointNotFound, match=r"names files that are not there: part \d\.safetensors"):
            plan(ABSTRACT, f"{server.url}/c")
    for path in ("memory://none", "memory://none/x", tmp_path / "none"):
        with pytest.raises(CheckpointNotFound, match="there is nothing at"):
            plan(ABSTRACT, path)
    assert not is_safetensors("memory://none")
    with pytest.raises(CheckpointError, match=r"cannot be reached: .*nosuch"):
        plan(ABSTRACT, "nosuch://bucket/x")


def test_a_file_that_is_shorter_than_its_header_says(tmp_path):
    save_safetensors(tmp_path)
    file = tmp_path / "c" / WHOLE
    file.write_bytes(file.read_bytes()[:-1])
    to_memory(tmp_path, "memory://short")
    with serving(tmp_path) as server:
        for url in ("memory://short/c", f"{server.url}/c", file):
            with pytest.raises(CorruptCheckpoint, match=r"is no \.safetensors file, or damaged: .*Copy the checkpoint"):
                plan(ABSTRACT, url)
