"""`moe-online quantize`: a model folder that holds what loading would have made, and appears at once."""

import argparse
import json
import shutil

import pytest
from flax import nnx

import exports
from moe_online import models
from moe_online.assets import PYTHON_MOE_7M
from moe_online.cli import quantize
from moe_online.errors import CheckpointError, ConfigError
from moe_online.loading import export
from moe_online.loading.export import collect
from moe_online.loading.manifest import Manifest
from sources import folder_hash
from tolerance import assert_same_bits

SCHEME = "fp8_per_block"


def run(*arguments):
    parser = argparse.ArgumentParser()
    quantize.add_parser(parser.add_subparsers())
    quantize.run(parser.parse_args(["quantize", *map(str, arguments)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "model"
    run(PYTHON_MOE_7M, path, "--scheme", SCHEME, "--json", path.parent / "facts.json")
    return path


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def test_holds_what_loading_makes(made):
    assert sorted(p.name for p in made.iterdir()) == ["checkpoint", "config.json"]
    assert (made / "config.json").read_bytes() == (PYTHON_MOE_7M / "config.json").read_bytes()
    found = exports.stored(made / "checkpoint")
    lm = models.load(PYTHON_MOE_7M, quantization=SCHEME, progress=False)
    for name, array in collect(lm.model).arrays.items():
        assert_same_bits(found.pop(name), array)
    assert not found
    assert Manifest.read(made / "checkpoint").leaves == collect(lm.model).leaves


def test_names_are_those_of_the_model(made):
    """So that `models.load` needs no mapping to read it."""
    abstract = nnx.eval_shape(lambda: models.Decoder(models.pretrained.read_config(made), rngs=nnx.Rngs(0)))
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
    leaves = {
        name.replace(".w13_weight", "").replace(".w2_weight", "") for name in Manifest.read(made / "checkpoint").leaves
    }
    assert leaves == names


def test_facts(made, capsys):
    facts = json.loads((made.parent / "facts.json").read_text())
    stored = sum(array.nbytes for array in exports.stored(made / "checkpoint").values())
    plan = models.plan(PYTHON_MOE_7M, quantization=SCHEME)
    assert facts["stored_bytes"] == stored < 0.6 * facts["read_bytes"]
    assert (facts["read_bytes"], facts["load"]["resident_bytes"]) == (plan.read_bytes, plan.resident_bytes)
    assert (facts["source"], facts["destination"]) == (str(PYTHON_MOE_7M), str(made))
    assert facts["scheme"] == SCHEME
    assert facts["seconds"] >= facts["load"]["seconds"] > 0


def test_overwriting(copy, capsys):
    before = folder_hash(copy)
    with pytest.raises(CheckpointError, match=r"exists: give .*--overwrite"):
        run(PYTHON_MOE_7M, copy, "--scheme", "int8_w8a16")
    assert folder_hash(copy) == before
    run(PYTHON_MOE_7M, copy, "--scheme", "int8_w8a16", "--overwrite")
    assert "int8_per_channel" in {
        leaf.format.name for leaf in Manifest.read(copy / "checkpoint").leaves.values() if leaf.format
    }
    out = capsys.readouterr().out
    assert f"{copy}: 7.47 MB" in out
    assert "as int8_w8a16, from 1" in out
    assert [p.name for p in copy.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("scheme", "error", "says"), [("fp9", ConfigError, "'fp9'"), (SCHEME, CheckpointError, "needs .* free space")]
)
def test_a_failure_changes_nothing(scheme, error, says, copy, monkeypatch):
    before, little = folder_hash(copy), shutil.disk_usage(copy)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(error, match=f"(?i){says}"):
        run(PYTHON_MOE_7M, copy, "--scheme", scheme, "--overwrite")
    assert folder_hash(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == ["model"]


def test_a_late_failure_changes_nothing(copy, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    before = folder_hash(copy)
    monkeypatch.setattr(export, "_write_chunk", fail)
    with pytest.raises(CheckpointError, match="model cannot be written: No space left on device"):
        run(PYTHON_MOE_7M, copy, "--scheme", SCHEME, "--overwrite")
    assert folder_hash(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("above", [False, True])
def test_the_source_is_never_replaced(above, tmp_path):
    source = shutil.copytree(PYTHON_MOE_7M, tmp_path / "models" / "source")
    (tmp_path / "link").symlink_to(source)
    destination = source.parent if above else tmp_path / "link"
    before = folder_hash(source)
    with pytest.raises(ConfigError, match="would replace"):
        run(source, destination, "--scheme", SCHEME, "--overwrite")
    assert folder_hash(source) == before


def test_something_else_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not replaced: it has no checkpoint/_CHECKPOINT_METADATA"):
        run(PYTHON_MOE_7M, tmp_path, "--scheme", SCHEME, "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_usage(capsys):
    with pytest.raises(SystemExit) as exit_:
        run(PYTHON_MOE_7M, "somewhere")
    assert exit_.value.code == 2
    assert "--scheme" in capsys.readouterr().err
