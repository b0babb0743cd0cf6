"""A process that overwrites an export is killed: what is there is the old export or the new one, whole."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import exports
from moe_online.errors import CheckpointError, CheckpointNotFound
from moe_online.loading.export import save_quantized

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a child that imports jax again takes seconds")
# jax is imported once; its backend never starts, so there are no threads that a fork would lose.
SERVER = """
import os, shutil, sys, warnings
import numpy as np
from pathlib import Path
from moe_online.loading import export, folder

warnings.simplefilter("ignore")  # about forks
path, way = sys.argv[1:]
export.CHUNK_BYTES = 2**15


def tree(fill):
    return {name: np.full((8, 2**13), fill, np.uint8) for name in ("a", "b")}


def in_place(params, path, **arguments):  # the control: what there was goes first
    shutil.rmtree(path, ignore_errors=True)
    Path(path).mkdir()
    export.collect(params).write(Path(path), destination=path, progress=False)


def dies_at(count):
    inner, done = os.rename, []

    def rename(source, target):
        done.append(None)
        if len(done) == count:
            os._exit(9)
        inner(source, target)

    os.rename = rename


save = in_place if way == "in place" else export.save_quantized
for line in sys.stdin:
    child = os.fork()
    if not child:
        if line.startswith("rename"):
            dies_at(int(line.split()[1]))
        fill = 0
        while True:
            fill = (fill + 1) % 256
            save(tree(fill), path, overwrite=True, progress=False)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@contextlib.contextmanager
def server(path, way, request):
    support = f"import sys; sys.path.insert(0, {str(request.config.rootpath / 'tests' / 'support')!r})\n"
    command = [sys.executable, "-c", support + SERVER, str(path), way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def begin(how):
            process.stdin.write(f"{how}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield begin, lambda: process.stdout.readline()
        process.stdin.close()


def assert_whole(path):
    """Both arrays are of one and the same save; returns its fill, or None where there is nothing."""
    try:
        found = exports.stored(path) if path.exists() else None
    except CheckpointError as error:
        raise AssertionError(f"half an export: {error}") from error
    if found is None:
        return None
    assert set(found) == {"a", "b"}
    [fill] = {*np.unique(found["a"]), *np.unique(found["b"])}
    return int(fill)


def zeros():
    return {name: np.zeros((8, 2**13), np.uint8) for name in ("a", "b")}


def kill_at_random(path, begin, gone, kills):
    """Kills one process that saves in a loop after the other; returns how many left something unfinished."""
    rng, unfinished = random.Random(kills), 0
    for _ in range(kills):
        child = begin("loop")
        time.sleep(rng.uniform(0, 0.15))  # within its first few saves
        os.kill(child, signal.SIGKILL)
        gone()
        assert_whole(path)
        unfinished += any(name != path.name for name in os.listdir(path.parent))
        save_quantized(zeros(), path, overwrite=True, progress=False)
        assert assert_whole(path) == 0
        assert os.listdir(path.parent) == [path.name]
    return unfinished


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills(kills, tmp_path, request):
    path = tmp_path / "export"
    with server(path, "whole", request) as (begin, gone):
        unfinished = kill_at_random(path, begin, gone, kills)
    assert unfinished > kills / 2, "the kills came at other times than while it saved"


def test_a_writer_in_place_is_found_out(tmp_path, request):
    path = tmp_path / "export"
    with (
        server(path, "in place", request) as (begin, gone),
        pytest.raises((AssertionError, CheckpointError), match=r"half an export|is not replaced"),
    ):
        kill_at_random(path, begin, gone, 50)


@pytest.mark.parametrize(("count", "left"), [(1, 0), (2, None), (3, 1)])
def test_kills_at_each_rename(count, left, tmp_path, request):
    """Before the old one steps aside, before the new one takes its place, before the old one is deleted."""
    path = tmp_path / "export"
    save_quantized(zeros(), path, progress=False)
    with server(path, "whole", request) as (begin, gone):
        begin(f"rename {count}")
        gone()
        assert assert_whole(path) == left
        assert len(os.listdir(tmp_path)) == 2
        if left is None:
            with pytest.raises(CheckpointNotFound):
                exports.OrbaxSource(path)
        with pytest.raises(CheckpointError, match="exists"):  # back again, if it had stepped aside
            save_quantized(zeros(), path, progress=False)
        assert assert_whole(path) == (left or 0)
        begin("rename 3")  # a whole save, but for deleting the old one
        gone()
        assert assert_whole(path) == 1
