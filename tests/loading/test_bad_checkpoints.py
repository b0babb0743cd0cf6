"""Bad checkpoints: one error that names every tensor and the remedy; nothing is left behind, nothing is changed."""

import pathlib
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import moe_online
from moe_online.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    DtypeMismatch,
    MissingWeights,
    NonFiniteWeight,
    ShapeMismatch,
    UnexpectedWeights,
)
from quick import few
from sources import (
    BF16,
    KEN_MAPPING,
    as_ken,
    check_quantized,
    declared,
    folder_hash,
    nothing_left_on_the_device,
    ours,
    quiet_load,
)

TREE = ours(e=2, h=48, i=32, layers=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "checkpoint"
    ocp.save(path, as_ken(TREE))
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_refused(error, source, *says, names=(), abstract=None, by_plan=True, **arguments):
    """`load` refuses with exactly this class, names and words; `plan` does too, unless only the bytes tell."""
    arguments = {"mapping": KEN_MAPPING, "quantization": "fp8_per_block"} | arguments
    abstract = declared(TREE) if abstract is None else abstract
    before = folder_hash(source) if isinstance(source, pathlib.Path) else None
    with nothing_left_on_the_device():
        with pytest.raises(CheckpointError) as caught:
            quiet_load(abstract, source, **arguments)
        assert type(caught.value) is error, repr(caught.value)
        assert set(caught.value.names) == set(names)
        for words in (*names, *says):
            assert words in str(caught.value), str(caught.value)
        if by_plan:
            with pytest.raises(error, match=re.escape(str(caught.value))):
                moe_online.plan(abstract, source, **arguments)
        else:
            moe_online.plan(abstract, source, **arguments)
    assert before is None or folder_hash(source) == before
    return caught.value


@pytest.mark.smoke
def test_good(copy):
    """The control: what the tests below damage loads, and the folder stays as it was."""
    before = folder_hash(copy)
    check_quantized(
        quiet_load(declared(TREE), copy, mapping=KEN_MAPPING, quantization="fp8_per_block").params,
        TREE,
        "fp8_per_block",
    )
    assert folder_hash(copy) == before
    with pytest.raises(AssertionError, match="are left"), nothing_left_on_the_device():
        kept = jnp.ones(3)
    del kept


@pytest.mark.smoke
def test_nothing_there(tmp_path):
    error = assert_refused(CheckpointNotFound, tmp_path / "none", "nothing at", str(tmp_path))
    assert isinstance(error, FileNotFoundError)


def test_no_checkpoint(tmp_path):
    assert_refused(CheckpointError, tmp_path, "no Orbax checkpoint", "ocp.save")
    (tmp_path / "file.txt").write_text("hello")
    assert_refused(CheckpointError, tmp_path / "file.txt", "no Orbax checkpoint")


def without(tree, *gone):
    return {
        layer: {name: x for name, x in tensors.items() if f"{layer}.{name}" not in gone}
        for layer, tensors in tree.items()
    }


@pytest.mark.smoke
def test_missing_tensors():
    source = without(as_ken(TREE), "l0.w_down", "l1.w_gate", "l1.w_up")
    names = ["l0.w2_weight", "l1.w13_weight"]
    assert_refused(MissingWeights, source, "mapping", names=names)


def test_missing_half():
    assert_refused(MissingWeights, without(as_ken(TREE), "l1.w_gate"), names=["l1.w13_weight.gate"])
    source = without(as_ken(TREE), "l0.w_up", "l1.w_up")
    mapping = {name: rule for name, rule in KEN_MAPPING.items() if name != "*.w_up"}
    assert_refused(MissingWeights, source, mapping=mapping, names=["l0.w13_weight.up", "l1.w13_weight.up"])


def test_missing_tensors_below_a_prefix():
    assert_refused(
        MissingWeights,
        {"params": TREE, "step": np.zeros((), np.int32)},
        "prefix='params'",
        names=[f"l{layer}.{name}" for layer in (0, 1) for name in ("w13_weight", "w2_weight")],
        mapping=None,
    )


def test_many_missing_tensors_are_all_named():
    tree = ours(e=1, h=2, i=2, layers=30)
    with pytest.raises(MissingWeights, match="38 more") as caught:
        quiet_load(declared(tree), {"l0": tree["l0"]}, unexpected="ignore")
    assert len(caught.value.names) == 58


@pytest.mark.smoke
@pytest.mark.slow
def test_unexpected_tensors():
    source = as_ken(TREE) | {"head": {"kernel": np.zeros((2, 2), np.float32)}, "mtp": np.zeros(3, np.float32)}
    assert_refused(UnexpectedWeights, source, 'unexpected="ignore"', names=["head.kernel", "mtp"])
    assert_refused(UnexpectedWeights, source, unexpected=["head.*"], names=["mtp"])
    assert_refused(UnexpectedWeights, source, unexpected="mtp", names=["head.kernel"])
    for allowed in ("ignore", ["head.*", "m?p", "mtp"], ["*"]):
        params, report = quiet_load(
            declared(TREE), source, mapping=KEN_MAPPING, quantization="fp8_per_block", unexpected=allowed
        )
        check_quantized(params, TREE, "fp8_per_block")
        assert report.read_bytes == sum(x.nbytes for x in jax.tree.leaves(TREE))


def test_unexpected_tensors_that_a_rule_renames():
    source = {**as_ken(TREE), "opt": np.zeros(3, np.float32)}
    mapping = {**KEN_MAPPING, "opt": "-> gone"}
    assert_refused(UnexpectedWeights, source, "opt (mapped to gone)", names=["opt"], mapping=mapping)
    quiet_load(declared(TREE), source, mapping=mapping, unexpected=["opt"])


@pytest.mark.smoke
def test_wrong_shapes():
    source = as_ken(TREE)
    for layer in source.values():
        layer["w_down"] = layer["w_down"][:, :, :-1]
    assert_refused(ShapeMismatch, source, "(2, 32, 47)", "needed (2, 32, 48)", names=["l0.w_down", "l1.w_down"])


def test_transposed_shapes():
    names = [f"l{layer}.{name}" for layer in (0, 1) for name in ("w_down", "w_gate", "w_up")]
    mapping = {name: rule.replace("K N", "N K") for name, rule in KEN_MAPPING.items()}
    assert_refused(ShapeMismatch, as_ken(TREE), "state the stored axes", names=names, mapping=mapping)


@pytest.mark.parametrize("axes", ["S K N", "E S N", "E K", "E S K N"])
def test_axes_that_the_leaf_has_not(axes):
    tree = ours(e=2, h=2, i=2)
    mapping = {**KEN_MAPPING, "*.w_up": f"{axes} -> *.w13_weight.up"}
    assert_refused(ShapeMismatch, as_ken(tree), abstract=declared(tree), names=["l0.w_up"], mapping=mapping)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [np.int32, jnp.float8_e4m3fn, bool])
def test_wrong_dtypes(dtype):
    source = jax.tree.map(lambda x: x, as_ken(TREE))
    for layer in source.values():
        layer["w_up"] = np.ones(layer["w_up"].shape, dtype)
    for scheme in ("fp8_per_block", None):
        names = ["l0.w_up", "l1.w_up"]
        assert_refused(DtypeMismatch, source, np.dtype(dtype).name, "bfloat16", names=names, quantization=scheme)


def test_wrong_dtypes_of_plain_leaves():
    abstract = {"a": jax.ShapeDtypeStruct((2,), np.int32), "b": jax.ShapeDtypeStruct((2,), np.float32)}
    for a, b, wrong in (
        (np.float32, np.float32, "a"),
        (np.int8, np.float32, "a"),
        (np.int32, np.int32, "b"),
        (np.int32, jnp.float8_e4m3fn, "b"),
    ):
        source = {"a": np.zeros(2, a), "b": np.zeros(2, b)}
        assert_refused(DtypeMismatch, source, names=[wrong], abstract=abstract, mapping=None, quantization=None)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("scheme", "value"),
    [
        ("fp8_per_channel", np.nan),
        ("int8_w8a16", -np.inf),
        ("fp8_per_block", np.nan),
        ("fp8_per_block", np.inf),
        (None, np.nan),
        (None, -np.inf),
    ],
)
def test_not_finite(scheme, value):
    source = jax.tree.map(np.copy, as_ken(TREE))
    source["l0"]["w_up"][1, 40, 31] = value
    source["l1"]["w_down"][0, 0, 0] = value
    assert_refused(
        NonFiniteWeight,
        source,
        "NaN or infinite elements in 2 tensors (l0.w_up (first in expert 1), l1.w_down (first in expert 0))",
        names=["l0.w_up", "l1.w_down"],
        by_plan=False,
        quantization=scheme,
        unit_bytes=1,
    )


def test_not_finite_plain_leaves():
    source = {"a": np.array([1, np.nan], np.float32), "b": np.float32([[1], [2]]), "c": np.array(np.inf, np.float16)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), source)
    assert_refused(
        NonFiniteWeight, source, names=["a", "c"], abstract=abstract, mapping=None, quantization=None, by_plan=False
    )


@pytest.fixture
def late_callbacks():
    """Orbax closes its event loop on the first bad array while others are being opened, and those then complain."""
    yield
    time.sleep(0.2)


ORBAX_COMPLAINS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def data_files(folder):
    return sorted(p for p in folder.rglob("d/*") if p.is_file())


@ORBAX_COMPLAINS
@pytest.mark.usefixtures("late_callbacks")
@pytest.mark.parametrize("scheme", ["fp8_per_block", None])
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
def test_damaged_data(copy, damage, scheme):
    files = data_files(copy)
    assert files
    for file in files:
        if damage == "remove":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 3] if damage == "truncate" else b"")
    before = folder_hash(copy)
    with nothing_left_on_the_device(), pytest.raises(CorruptCheckpoint, match="Copy the checkpoint again") as caught:
        quiet_load(declared(TREE), copy, mapping=KEN_MAPPING, quantization=scheme)
    assert folder_hash(copy) == before
    if caught.value.names:  # else the metadata were in the damaged files
        assert set(caught.value.names) <= {f"{layer}.{name}" for layer, part in as_ken(TREE).items() for name in part}


@ORBAX_COMPLAINS
@pytest.mark.usefixtures("late_callbacks")
@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_damaged_metadata(copy, file, keep):
    files = list(copy.rglob(file))
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * keep)])
    with nothing_left_on_the_device(), pytest.raises(CorruptCheckpoint, match="Copy the checkpoint again"):
        quiet_load(declared(TREE), copy, mapping=KEN_MAPPING, quantization="fp8_per_block")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_one_damaged_tensor_of_plain_files(tmp_path, damage):
    """Chunks in files of their own: only those tensors are named, and a lost chunk does not read as zeros."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "c", as_ken(TREE))
    for name in ("l0.w_up", "l1.w_down"):
        [folder] = list(tmp_path.rglob(name))
        chunks = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("zarr.json", ".zarray")]
        assert chunks
        for chunk in chunks:
            if damage == "remove":
                chunk.unlink()
            else:
                chunk.write_bytes(chunk.read_bytes()[:-20])
    assert_refused(CorruptCheckpoint, tmp_path / "c", "damaged", names=["l0.w_up", "l1.w_down"], by_plan=False)


@pytest.mark.parametrize("scheme", few([None, "fp8_per_block", "fp8_per_channel", "int8_w8a16"], ("fp8_per_block",)))
@pytest.mark.parametrize("dtype", few([BF16, np.float32], (BF16,)))
def test_one_nan_in_a_large_tensor_is_found(scheme, dtype):
    """Where a maximum over many elements is vectorized: XLA:CPU's drops NaN there."""
    shape = (6, 192, 320)
    for where in ((0, 0, 0), (3, 0, 0), (2, 100, 17), (5, 191, 319)):
        source = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        source[where] = np.nan
        with pytest.raises(NonFiniteWeight, match=rf"1 tensor \(w \(first in expert {where[0]}\)\)"):
            quiet_load(
                {"w": jax.ShapeDtypeStruct(shape, dtype)}, {"w": source}, mapping={"w": "E N K"}, quantization=scheme
            )
