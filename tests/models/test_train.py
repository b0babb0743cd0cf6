"""The script that trains the shipped checkpoint: its data, its layer, its loss, and a whole tiny run."""

import dataclasses
import json
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import tiny_decoder
from moe_online.assets import corpus, train
from moe_online.evaluate import evaluate
from moe_online.models.decoder import DecoderConfig

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SHIPPED = Path(train.__file__).parent / "python-moe-7m"
TINY = dataclasses.replace(tiny_decoder.CONFIG, vocab_size=256)


@pytest.fixture
def library(tmp_path):
    """A small library: a few hundred short files, of both sides."""
    for i in range(200):
        (tmp_path / f"module_{i}.py").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 20)
    return tmp_path


@pytest.fixture
def trainer():
    return train.Trainer(config=TINY, batch=8, window=32, peak_lr=1e-2, warmup=5)


def read(folder, config):
    """The checkpoint in `folder`: the training state, by plain Orbax, and the model around its parameters."""
    on_cpu = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_cpu),
        ocp.metadata((folder / "checkpoint").absolute()).metadata,
    )
    state = ocp.load((folder / "checkpoint").absolute(), abstract)
    state["params"]["layers"] = {int(i): layer for i, layer in state["params"]["layers"].items()}
    model = train.build(config)
    nnx.update(model, state["params"])
    return state, model


def test_the_shipped_checkpoint_knows_python():
    assert DecoderConfig.from_json(json.loads((SHIPPED / "config.json").read_text())) == train.CONFIG
    state, model = read(SHIPPED, train.CONFIG)
    facts = json.loads((SHIPPED / "provenance.json").read_text())
    assert int(state["step"]) == facts["steps"] == train.parse(["--out", "x"]).steps
    text = np.frombuffer((SHIPPED / "heldout.txt").read_bytes(), np.uint8)
    assert text.size == facts["data"]["sample_bytes"] >= 100_000

    def bits_per_byte():
        return evaluate(model, text[:8193], window=512, batch=8).bits_per_byte

    found = bits_per_byte()
    assert found < 1.5  # of a part of the text; provenance.json has the figure of all of it
    for layer in model.layers:
        layer.moe.w_down[...] = jnp.roll(layer.moe.w_down[...], 1, axis=0)
    assert bits_per_byte() > 1.2 * found  # the experts know different things


@pytest.mark.smoke
def test_shipped_sizes():
    model = nnx.eval_shape(lambda: train.build(train.CONFIG))
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert 7e6 < sum(leaf.size for leaf in leaves) < 7.5e6  # about 7 M: at most 16 MB in bf16
    assert model.layers[0].moe.w_gate.shape == (8, 256, 256)
    assert not hasattr(model.layers[0].moe, "balance")


def test_einsum_moe_matches_definition():
    config = dataclasses.replace(TINY.moe, intermediate_size=24)
    layer = train.EinsumMoE(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    w = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("router", "w_gate", "w_up", "w_down")}
    expected = np.zeros_like(x, np.float64)
    for index in np.ndindex(2, 5):
        logits = x[index] @ w["router"]
        chosen = np.argsort(-logits)[:2]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for e, weight in zip(chosen, weights, strict=True):
            gate = x[index] @ w["w_gate"][e]
            expected[index] += weight * ((gate / (1 + np.exp(-gate)) * (x[index] @ w["w_up"][e])) @ w["w_down"][e])
    assert tiny_decoder.relative_l2(layer(jnp.asarray(x)), expected) < 1e-6
    layer.w_down[...] = layer.w_down[...][jnp.array([1, 0, 2, 3])]
    assert tiny_decoder.relative_l2(layer(jnp.asarray(x)), expected) > 0.1


@pytest.mark.smoke
def test_balance_loss_is_one_when_experts_are_used_alike():
    even = jnp.full((8, 4), 0.25, jnp.float32)
    in_turn = jnp.eye(4, dtype=jnp.float32)[np.arange(16).reshape(8, 2) % 4]
    assert train._balance_loss(even, in_turn) == pytest.approx(1)
    one = jnp.broadcast_to(jnp.array([1.0, 0, 0, 0], jnp.float32), (8, 4))
    assert train._balance_loss(one, jnp.broadcast_to(one[:, None], (8, 2, 4))) == pytest.approx(4)


def test_schedule_warms_up_and_ends_at_two_percent(trainer):
    def at(step):
        return float(trainer.schedule(jnp.int32(step), jnp.int32(1000))) / trainer.peak_lr

    assert at(0) == pytest.approx(1 / 6)
    assert at(5) == pytest.approx(1)
    assert at(502) == pytest.approx(0.51, abs=0.01)
    assert at(1000) == pytest.approx(0.02)


@pytest.mark.slow
def test_training_learns_and_does_not_depend_on_dispatches(trainer, library):
    text, total = jnp.asarray(corpus.read(library).train), jnp.int32(40)
    state, first = trainer.run(trainer.init(0), text, jnp.int32(10), total)
    halves, last = trainer.run(state, text, jnp.int32(30), total)
    assert first[0] > 5  # bits per byte, of 8
    assert last[0] < first[0] - 1
    whole, mean = trainer.run(trainer.init(0), text, total, total)
    assert trainer.run._cache_size() == 1
    np.testing.assert_allclose(mean, (first + 3 * last) / 4, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(halves.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_whole_run(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "CONFIG", TINY)
    out = tmp_path / "out"
    train.main(
        f"--stdlib {library} --source tests --out {out} --steps 3 --chunk 2 --batch 2 --window 32 "
        "--sample-bytes 8 --heldout-bytes 500".split()
    )
    assert {path.name for path in out.iterdir()} == {
        "checkpoint", "config.json", "heldout.txt", "loss_curve.png", "provenance.json",
    }  # fmt: skip
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["data"]["source"] == "tests"
    assert [row[0] for row in facts["curve"]["rows"]] == [2, 3]
    assert f"{facts['heldout_bits_per_byte']} on all held-out files" in capsys.readouterr().out
    assert DecoderConfig.from_json(json.loads((out / "config.json").read_text())) == TINY

    state, model = read(out, TINY)
    assert int(state["step"]) == int(state["opt_state"]["count"]) == 3
    assert state["params"]["layers"][1]["moe"]["w_down"].shape == (4, 48, 32)  # [E, I, H]
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype(jnp.bfloat16)}
    text = np.frombuffer((out / "heldout.txt").read_bytes(), np.uint8)
    found = evaluate(model, text[:500], window=32, batch=32).bits_per_byte
    assert found == pytest.approx(facts["sample_bits_per_byte"], abs=1e-4)


def test_steps_that_fit_is_at_least_one(trainer, library, capsys):
    text = jnp.asarray(corpus.read(library).train)
    assert train.steps_that_fit(trainer, text, begin=-1e9, seconds=1.0) == 1
    assert "ms per step: 1 steps fit" in capsys.readouterr().out


@pytest.mark.smoke
def test_split_depends_on_the_path_alone(library):
    before = corpus.read(library)
    assert before.num_files[0] + before.num_files[1] == 200
    assert 1 <= before.num_files[1] <= 20
    for i in range(200, 300):
        (library / f"module_{i}.py").write_text(f"x = {i}\n")
    after = corpus.read(library)
    assert sum(after.num_files) == 300
    assert set(before.sample_files) <= set(after.sample_files)
    assert after.sha256 != before.sha256


def test_a_copy_is_not_in_the_sample(library):
    before = corpus.read(library)
    name = before.sample_files[0]
    assert corpus._hash("copy.py") >= corpus.HELDOUT_SHARE
    (library / "copy.py").write_text("# a copy" + "\n" + (library / name).read_text())
    after = corpus.read(library)
    assert set(before.sample_files) - set(after.sample_files) == {name}
    assert after.num_files == (before.num_files[0] + 1, before.num_files[1])


def test_unwanted_files_are_left_out(library):
    count = sum(corpus.read(library).num_files)
    for name in ("site-packages/x.py", "encodings/cp037.py", "a/__pycache__/y.py", "test/test_unicodedata.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("unwanted = 1\n")
    (library / "latin.py").write_bytes(b"name = '\xe4'\n")
    (library / "again.py").write_bytes((library / "module_7.py").read_bytes())
    (library / "empty.py").write_text("\n")
    (library / "notes.txt").write_text("no Python")
    found = corpus.read(library)
    assert sum(found.num_files) == count
    assert b"unwanted" not in found.train.tobytes() + found.heldout.tobytes()


@pytest.mark.slow
def test_standard_library_gives_a_sample_without_tests():
    found = corpus.read(STDLIB)
    assert found.train.size > 5e6
    assert 0.01 < found.heldout.size / found.train.size < 0.08
    assert 100_000 <= len(found.sample) <= corpus.SAMPLE_BYTES
    assert not any("test" in name.split("/") for name in found.sample_files)
    assert found.sample.decode()
    assert "chunk.py" not in found.sample_files  # wave.py, a training file, has a copy of it


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"holds 1 training and 0 held-out files .* give the folder of a standard lib"):
        corpus.read(tmp_path)
