"""Reads that fail: what may pass is tried again, a few times; the rest is one clear error, with nothing half loaded."""

import concurrent.futures
import errno
import gc
import os
import shutil
import threading

import jax
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from http_files import serving
from moe_online import load, plan
from moe_online.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from moe_online.loading import files, open_source, orbax, retry
from moe_online.loading.files import open_place
from moe_online.loading.retry import RETRIES, read_error, retried
from moe_online.loading.safetensors import WHOLE, SafetensorsSource
from sources import nothing_left_on_the_device, random
from tolerance import assert_same_bits

TREE = {"a": random(4, 48, 64), "b": random(3, 64, 48, dtype=np.float32, seed=1)}
ABSTRACT = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in TREE.items()}
PASSING = [errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ECONNRESET]
LASTING = [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR]


@pytest.fixture
def pauses(monkeypatch):
    """Nobody waits; how long one would have."""
    found = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    kinds = ("http_request_retries", "gcs_request_retries", "s3_request_retries")
    real = files.CONTEXT.spec.to_json()
    assert {kind: real[kind]["max_retries"] for kind in kinds} == dict.fromkeys(kinds, RETRIES)
    again = {"max_retries": RETRIES, "initial_delay": "1ms", "max_delay": "2ms"}
    context = ts.Context({"http_request_retries": again}, files.CONTEXT)
    monkeypatch.setattr(files, "CONTEXT", context)
    monkeypatch.setattr(orbax, "CONTEXT", context)
    return found


@pytest.fixture
def saved(tmp_path):
    """`safetensors/` and `orbax/`, with the same tensors."""
    (tmp_path / "safetensors").mkdir()
    save_file(TREE, tmp_path / "safetensors" / WHOLE)
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "orbax", TREE)
    return tmp_path


def check(source):
    params, _ = load(ABSTRACT, source, progress=False)
    for name, x in TREE.items():
        assert_same_bits(params[name], x)


def assert_refused(source, error, words, names=()):
    """`load` raises exactly this class, with these words and names, and leaves nothing behind."""
    with nothing_left_on_the_device(), pytest.raises(CheckpointError, match=words) as caught:
        load(ABSTRACT, source, progress=False)
    assert type(caught.value) is error, repr(caught.value)
    assert set(caught.value.names) >= set(names)
    return caught.value


def failing(times, error):
    """A function that raises so often, then returns; and its calls."""
    calls = []

    def action():
        calls.append(None)
        if len(calls) <= times:
            raise error
        return "done"

    return action, calls


@pytest.mark.smoke
@pytest.mark.parametrize(
    "error",
    [*(OSError(code, "x") for code in PASSING), TimeoutError(), ValueError("UNAVAILABLE: x"), retry.ShortRead("x")],
    ids=repr,
)
def test_what_may_pass_is_tried_again_a_few_times(error, pauses):
    action, calls = failing(RETRIES, error)
    assert retried(action) == "done"
    assert len(calls) == 1 + RETRIES
    assert pauses == [retry.FIRST_PAUSE * 2**i for i in range(RETRIES)]
    action, calls = failing(RETRIES + 1, error)
    with pytest.raises(type(error)):
        retried(action)
    assert len(calls) == 1 + RETRIES
    said = read_error("w", error, names=["w"])
    assert type(said) is CheckpointError
    assert f"(tried {1 + RETRIES} times). See that its place" in str(said)


@pytest.mark.parametrize(
    "error",
    [*(OSError(code, "x") for code in LASTING), ValueError("DATA_LOSS: x"), OSError("x ends 3 bytes early")],
    ids=repr,
)
def test_what_stays_is_not_tried_again(error, pauses):
    action, calls = failing(1, error)
    with pytest.raises(type(error)):
        retried(action)
    assert (len(calls), pauses) == (1, [])
    assert isinstance(read_error("w", error), CorruptCheckpoint) == (not isinstance(error, PermissionError))


@pytest.fixture
def preadv(monkeypatch):
    """Lets a test decide what becomes of each read of more than a header."""
    inner, lock = os.preadv, threading.Lock()

    def replace(change):
        calls = []

        def read(descriptor, buffers, offset):
            if len(buffers[0]) < 2000:
                return inner(descriptor, buffers, offset)
            with lock:
                calls.append(offset)
                number = len(calls)
            return change(number, lambda size: inner(descriptor, [buffers[0][:size]], offset), len(buffers[0]))

        monkeypatch.setattr(os, "preadv", read)
        return calls

    return replace


@pytest.mark.smoke
@pytest.mark.parametrize("code", PASSING)
def test_a_disk_that_stumbles(saved, preadv, pauses, code):
    def change(call, read, size):
        if call % 3:
            raise OSError(code, os.strerror(code))
        return read(size)

    calls = preadv(change)
    check(saved / "safetensors")
    assert len(calls) == 3 * len(TREE)
    assert len(pauses) == 2 * len(TREE)


def test_a_disk_that_fails(saved, preadv, pauses):
    def change(call, read, size):
        raise OSError(errno.EIO, "Input/output error")

    calls = preadv(change)
    assert_refused(saved / "safetensors", CheckpointError, r"a in .*Input/output error \(tried 6 times\)", ["a"])
    assert 1 + RETRIES <= len(calls) <= len(TREE) * (1 + RETRIES)  # those of `b` may have begun


def test_reads_that_give_less_than_was_asked_for(saved, preadv):
    calls = preadv(lambda call, read, size: read(max(1, size // 3)))
    check(saved / "safetensors")
    assert len(calls) > 3 * len(TREE)
    preadv(lambda call, read, size: 0)
    assert_refused(
        saved / "safetensors", CorruptCheckpoint, r"ends 24576 bytes early.*Copy the checkpoint again", ["a"]
    )


def replaced(file):
    other = file.with_suffix(".new")
    shutil.copy(file, other)
    os.utime(other, ns=(0, 0))
    other.replace(file)


CHANGES = {
    "gone": lambda file: file.unlink(),
    "shorter": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + bytes(8)),
    "replaced": replaced,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_between_the_plan_and_the_load(saved, change):
    source = open_source(saved / "safetensors")
    check(source)  # the control
    change(saved / "safetensors" / WHOLE)
    words = r"(No such file|has changed while it was read).*Copy the checkpoint again"
    assert_refused(source, CorruptCheckpoint, words, TREE)


@pytest.mark.parametrize("change", ["gone", "shorter", "empty"])
def test_chunks_that_change_between_the_plan_and_the_load(saved, change):
    source = open_source(saved / "orbax")
    check(source)
    chunks = [file for file in (saved / "orbax" / "state" / "b").rglob("*") if file.is_file() and file.name == "0"]
    assert chunks
    for chunk in chunks:
        CHANGES[change](chunk)
    error = assert_refused(source, CorruptCheckpoint, r"b in .*cannot be read: .*Copy the checkpoint again", ["b"])
    assert error.names == ("b",)
    assert_same_bits(source.read("a", tuple(slice(0, size) for size in TREE["a"].shape)), TREE["a"])


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_files_are_closed_with_the_source(saved, kind):
    def opened():
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.lexists(link) and str(saved) in os.readlink(link)]

    source = open_source(saved / kind)
    check(source)
    assert len(opened()) == (kind == "safetensors")  # one, however often it is read
    del source
    gc.collect()
    assert opened() == []


def url_of(server, kind):
    return f"{server.url}/orbax/state" if kind == "orbax" else f"{server.url}/safetensors/{WHOLE}"


WEB = pytest.mark.parametrize("kind", ["safetensors", "orbax"])


@WEB
@pytest.mark.parametrize("fault", ["failures", "cut"])
def test_a_server_that_stumbles(saved, kind, fault, pauses):
    with serving(saved) as server:
        setattr(server, fault, 2)
        source = open_source(url_of(server, kind))
        assert getattr(server, fault) == 0
        setattr(server, fault, 2)
        check(source)
        assert getattr(server, fault) == 0


@WEB
@pytest.mark.parametrize("fault", ["failures", "cut"])
def test_a_server_that_fails(saved, kind, fault, pauses):
    with serving(saved) as server:
        source = open_source(url_of(server, kind))
        server.requests.clear()
        setattr(server, fault, -1)
        words = r"[ab] in http.* cannot be read: .*All 5 retry attempts failed: .*See that its place can be reached"
        assert_refused(source, CheckpointError, words)
        assert len(server.requests) % (1 + RETRIES) == 0
        assert 0 < len(server.requests) <= len(TREE) * (1 + RETRIES)
        assert_refused(url_of(server, kind), CheckpointError, "All 5 retry attempts failed.*can be reached")


def test_pauses_of_tensorstore_grow(saved):
    """The real ones: 0.1 + 0.2 + 0.4 + 0.8 + 1.6 seconds, to which it adds a little."""
    with serving(saved) as server:
        server.failures = 3
        began = retry.time.monotonic()
        SafetensorsSource(url_of(server, "safetensors"))
        assert 0.7 <= retry.time.monotonic() - began < 3
        assert server.failures == 0


@WEB
@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_server_that_refuses(saved, kind, status, pauses):
    with serving(saved) as server:
        source = open_source(url_of(server, kind))
        server.failures, server.status = -1, status
        server.requests.clear()
        assert_refused(source, CheckpointError, rf"HTTP code {status}.*See that its place can be reached")
        assert len(server.requests) <= len(TREE)  # none is asked twice
        assert_refused(url_of(server, kind), CheckpointError, rf"HTTP code {status}.*See that its place can be reached")


def test_a_server_that_sends_whole_files_only(saved):
    with serving(saved) as server:
        server.ignores_ranges = True
        for url in (url_of(server, "safetensors"), f"{server.url}/safetensors"):
            assert_refused(url, CheckpointError, "was ignored by server.*See that its place can be reached")
        check(url_of(server, "orbax"))  # in plain files, that is all that it needs


@WEB
def test_files_that_vanish_from_a_server(saved, kind):
    with serving(saved) as server:
        source = open_source(url_of(server, kind))
        check(source)
        server.hidden = {f"/{file.relative_to(saved)}" for file in saved.rglob("*") if file.is_file()}
        assert_refused(source, CorruptCheckpoint, "cannot be read.*Copy the checkpoint again", TREE)
        assert_refused(url_of(server, kind), CheckpointNotFound, "there is nothing at|has no _METADATA file")


@WEB
def test_a_server_that_is_gone(saved, kind, pauses):
    with serving(saved) as server:
        url = url_of(server, kind)
    assert_refused(url, CheckpointError, "retry attempts failed.*See that its place can be reached")
    with pytest.raises(CheckpointError, match="can be reached"):
        plan(ABSTRACT, url)


@pytest.mark.smoke
@WEB
def test_many_threads_read_at_once(saved, kind):
    source = open_source(saved / kind)
    jobs = [
        (name, (slice(i, i + 1), slice(j, j + 16), slice(0, x.shape[2])))
        for name, x in TREE.items()
        for i in range(x.shape[0])
        for j in range(0, x.shape[1], 16)
    ] * 5
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda job: source.read(*job), jobs))
    for (name, index), part in zip(jobs, parts, strict=True):
        assert_same_bits(part, TREE[name][index])


@WEB
def test_parts_go_straight_to_their_place(saved, kind):
    """Into a region of a larger array that lies together, and nowhere else."""
    source = open_source(saved / kind)
    for name, x in TREE.items():
        out = np.full((4, *x.shape[1:]), 7, x.dtype)
        source.read_into(name, (slice(1, 3), slice(0, x.shape[1]), slice(0, x.shape[2])), out[1:3])
        assert_same_bits(out[1:3], x[1:3])
        assert (out[[0, 3]] == 7).all()
        columns = np.empty((2, 5, 9), x.dtype)
        source.read_into(name, (slice(0, 2), slice(3, 8), slice(1, 10)), columns)
        assert_same_bits(columns, x[:2, 3:8, 1:10])


def test_long_runs_are_read_one_by_one(tmp_path, preadv, monkeypatch):
    """Parts of a few long runs are read as such, those of many short ones with what lies between."""
    x = random(3, 40, 256, dtype=np.float32)
    save_file({"x": x}, tmp_path / "x.safetensors")
    source = SafetensorsSource(tmp_path / "x.safetensors")
    index = (slice(1, 3), slice(10, 30), slice(0, 256))
    calls = preadv(lambda call, read, size: read(size))
    assert_same_bits(source.read("x", index), x[index])
    assert len(calls) == 1
    monkeypatch.setattr("moe_online.loading.safetensors.LEAST_RUN", 20 * 256 * 4)
    calls.clear()
    assert_same_bits(source.read("x", index), x[index])
    assert np.diff(calls).tolist() == [40 * 256 * 4]


def test_a_stream_that_is_cut(tmp_path, pauses):
    """Places of etils without reads at a position: opened anew for each read, and after each failure."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    reader = files.StreamReader(open_place(tmp_path / "file").path)
    assert reader.read(7, 3) == bytes(range(3, 10))
    with pytest.raises(OSError, match="ends 5 bytes early"):
        reader.read(10, 95)
    assert len(pauses) == RETRIES
    (tmp_path / "file").unlink()
    with pytest.raises(FileNotFoundError):
        reader.read(1, 0)
    assert len(pauses) == RETRIES
