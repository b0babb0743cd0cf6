"""safetensors files as the library of that name writes them: read by ranges, and what is wrong with them said."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from by_name import assert_same_parts
from moe_online import load, plan
from moe_online.errors import CheckpointError, CheckpointNotFound, ConfigError, CorruptCheckpoint, MissingWeights
from moe_online.loading.safetensors import INDEX, SafetensorsSource, is_safetensors
from numpy_quantizer import quantize_numpy
from sources import BF16
from tolerance import assert_same_bits

RNG = np.random.default_rng(0)
EXPERTS, N, K = 5, 48, 64
TREE = {
    "l.w13": RNG.standard_normal((EXPERTS, 2, N, K), np.float32).astype(BF16),
    "l.w2": RNG.standard_normal((EXPERTS, K, N), np.float32).astype(np.float16),
    "norm": RNG.standard_normal(K, np.float32),
    "ids": np.arange(6, dtype=np.int32).reshape(2, 3),
    "scalar": np.array(3.5, np.float32),
    "none": np.zeros((0, 4), np.float32),
}
MAPPING = {"l.w13": "E S N K", "l.w2": "E N K"}


def abstract(tree=TREE):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tree.items()}


def in_two_files(folder, tree=TREE):
    """As transformers saves it; returns where each tensor is."""
    folder.mkdir(exist_ok=True)
    names = list(tree)
    weight_map = {}
    for i, some in enumerate((names[:2], names[2:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tree[name] for name in some}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.fixture(params=["file", "folder", "folder with an index"])
def path(request, tmp_path):
    if request.param == "folder with an index":
        in_two_files(tmp_path)
        return tmp_path
    save_file(TREE, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors" if request.param == "file" else tmp_path


def test_what_is_stored_comes_back(path):
    params, report = load(abstract(), path, progress=False)
    for name, x in TREE.items():
        assert_same_bits(params[name], x)
    assert report.read_bytes == sum(x.nbytes for x in TREE.values())


@pytest.mark.smoke
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"]
)
def test_dtypes_and_ranges(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = RNG.integers(0, 2, (4, 6, 8)).astype(dtype)
    save_file({"a": np.zeros(3, np.uint8), "x": x}, tmp_path / "x.safetensors")
    source = SafetensorsSource(tmp_path / "x.safetensors")
    assert (source.tensors["x"].shape, source.tensors["x"].dtype) == (x.shape, dtype)
    for index in (
        (slice(0, 4), slice(0, 6), slice(0, 8)),
        (slice(1, 3), slice(0, 6), slice(0, 8)),
        (slice(2, 4), slice(1, 5), slice(7, 8)),
    ):
        part = source.read("x", index)
        assert_same_bits(part, x[index])


def test_quantized_while_it_is_read(path):
    options = {"quantization": {"targets": {"l.*": "int8_w8a16"}}, "mapping": MAPPING, "unit_bytes": 20_000}
    params, report = load(abstract(), path, progress=False, **options)
    for name, shared_axes in (("l.w13", (1,)), ("l.w2", ())):
        assert_same_parts(params[name], quantize_numpy(TREE[name], "int8_per_channel", shared_axes=shared_axes))
    units = plan(abstract(), path, **options).units
    assert len([unit for unit in units if unit.target.name == "l.w13"]) > 1
    assert report.peak_bytes <= report.planned_peak_bytes


def test_only_the_rows_of_a_unit_are_read(tmp_path, monkeypatch):
    """The bytes that are asked of the file are those of the tensors, once."""
    save_file(TREE, tmp_path / "model.safetensors")
    read = []
    inner = SafetensorsSource.read_into  # what `read` calls, too

    def counting(self, name, index, out):
        inner(self, name, index, out)
        read.append(out.nbytes)

    monkeypatch.setattr(SafetensorsSource, "read_into", counting)
    load(abstract(), tmp_path, unit_bytes=10_000, progress=False)
    assert sum(read) == sum(x.nbytes for x in TREE.values())
    assert len(read) > len(TREE)


def test_names_are_those_of_load(tmp_path):
    save_file({f"model.{name}": x for name, x in TREE.items()}, tmp_path / "model.safetensors")
    with pytest.raises(MissingWeights, match="give prefix='model'"):
        load(abstract(), tmp_path, progress=False)
    params, _ = load(abstract(), tmp_path, prefix="model", progress=False)
    assert_same_bits(params["norm"], TREE["norm"])
    with pytest.raises(ConfigError, match="names nothing"):
        load(abstract(), tmp_path, prefix="decoder", progress=False)


def damaged(data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "no length": b"123",
    "a header that is too long": (2**40).to_bytes(8, "little") + b"{}",
    "a header that is cut off": save(TREE)[:100],
    "no JSON": (5).to_bytes(8, "little") + b"nope!",
    "no object": header([1]),
    "truncated data": save(TREE)[:-1],
    "bytes of two tensors": header({"x": X, "y": X}) + bytes(8),
    "a name twice": header({"x": X, "y": X}).replace(b'"y"', b'"x"') + bytes(8),
    "another size than the shape's": header({"x": X | {"shape": [3]}}) + bytes(8),
    "offsets past the end": header({"x": X | {"data_offsets": [8, 16]}}) + bytes(8),
    "a negative shape": header({"x": X | {"shape": [-1, -2]}}) + bytes(8),
    "offsets that no file has": header({"x": X | {"data_offsets": [2**70, 2**70 + 8]}}) + bytes(8),
    "no offsets": header({"x": {"dtype": "F32", "shape": [2]}}) + bytes(8),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_found_before_anything_is_read(data, tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is no \.safetensors file, or damaged"):
        plan(abstract(), damaged(data, tmp_path))


def test_a_dtype_that_numpy_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="tensors of F4, which numpy does not have"):
        plan(abstract(), damaged(header({"x": X | {"dtype": "F4"}}) + bytes(8), tmp_path))


def test_files_that_are_lost_or_disagree(tmp_path):
    weight_map = in_two_files(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {"more": weight_map["norm"]}}))
    with pytest.raises(CorruptCheckpoint, match=r"promises 1 tensor.*more") as caught:
        plan(abstract(), tmp_path)
    assert caught.value.names == ("more",)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"index\.json cannot be read"):
        plan(abstract(), tmp_path)
    in_two_files(tmp_path)
    (tmp_path / weight_map["norm"]).unlink()
    with pytest.raises(CheckpointNotFound, match="names files that are not there: model-00002-of-00002"):
        plan(abstract(), tmp_path)
    with pytest.raises(CheckpointNotFound, match="there is nothing at"):
        plan(abstract(), tmp_path / "other.safetensors")


def test_one_name_in_two_files(tmp_path):
    for name in ("a", "b"):
        save_file({"x": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"x is in .*a\.safetensors and in .*b\.safetensors"):
        plan({"x": jax.ShapeDtypeStruct((2,), jnp.float32)}, tmp_path)


def test_a_file_whose_name_does_not_say_what_it_is(tmp_path):
    save_file(TREE, tmp_path / "weights.bin")
    assert_same_bits(SafetensorsSource(tmp_path / "weights.bin").read("norm", (slice(0, K),)), TREE["norm"])
    assert not is_safetensors(tmp_path / "weights.bin")
    (tmp_path / "folder.safetensors").mkdir()
    save_file(TREE, tmp_path / "folder.safetensors" / "weights.safetensors")
    for path in (tmp_path / "folder.safetensors", tmp_path / "folder.safetensors" / "weights.safetensors"):
        assert is_safetensors(path)
        assert set(SafetensorsSource(path).tensors) == set(TREE)
