"""`moe-online evaluate`: every scheme on a small model of bytes, and the shipped model on a little of its text."""

import dataclasses
import functools
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import tiny_decoder
from moe_online import models
from moe_online.assets import HELDOUT_TEXT, PYTHON_MOE_7M
from moe_online.assets.train import EinsumMoE
from moe_online.cli import comparison, main
from moe_online.evaluate import evaluate, log_probabilities
from moe_online.schemes import SHORTHANDS

FIELDS = {"scheme", "weight", "activation", "stored_bytes", "peak_bytes", "bits_per_byte", "kl", "top1_agreement"}
LONG = "int8_per_channel_weight_only"
EVERY = [  # but one of several names for the same; written out here, so that a change shows
    "bf16", "fp8_per_channel", "fp8_per_block", "int8_w8a16", "fp8_per_tensor", "fp8_w8a16", "int8_w8a8", LONG,
    "mxfp8", "mxfp4", "nvfp4_per_token", "int4_w4a16", "mxfp4_w4a16", "nvfp4_w4a16",
]  # fmt: skip
ALIASES = {"fp8_per_tensor": ["fp8"], LONG: ["experts_int8"]}
EXPERTS_ONLY = {"bf16", LONG, "nvfp4_per_token"}  # no dense layer


def save_model(folder, **changes):
    """A random model of one layer, as a training run stores it."""
    config = dataclasses.replace(tiny_decoder.CONFIG, **{"num_layers": 1, "vocab_size": 256, **changes})
    factory = functools.partial(EinsumMoE, dtype=jnp.float32, param_dtype=jnp.float32)
    model = models.Decoder(config, moe=factory, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    ocp.save(folder / "checkpoint", {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))})
    return str(folder)


@pytest.fixture
def fits_all(tmp_path):
    """A model whose sizes are multiples of every block."""
    moe = dataclasses.replace(tiny_decoder.CONFIG.moe, hidden_size=128, intermediate_size=128)
    return save_model(tmp_path / "fits", hidden_size=128, head_dim=32, moe=moe)


def run(*arguments):
    """The rows that the command writes."""
    *_, file = arguments
    assert main(["evaluate", *map(str, arguments[:-1]), "--json", str(file)]) == 0
    return {row["scheme"]: row for row in json.loads(file.read_text())}


def assert_one_message(capsys, *pieces):
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("moe-online: error: ")
    assert found.err.count("\n") == 1
    for piece in pieces:
        assert piece in found.err


@pytest.mark.slow
def test_all_schemes(fits_all, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison, "WINDOW", 32)  # the text is short
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(200)))
    picture = tmp_path / "schemes.png"
    rows = run(fits_all, "--schemes", "all", "--dense", "--text", text, "--plot", picture, tmp_path / "rows.json")
    assert list(rows) == EVERY
    assert {*EVERY, *itertools.chain(*ALIASES.values())} == {"bf16", *SHORTHANDS}
    out = capsys.readouterr().out
    assert [out.count(f"\n {scheme} ") for scheme in EVERY if scheme != LONG] == [1] * (len(EVERY) - 1)
    assert out.count(f"\n {LONG[:16]} ") == out.count(f"\n {LONG[16:]} ") == 1
    words = " ".join(out.split())
    assert "199 bytes of text.txt" in words
    assert f"Other names: fp8 for fp8_per_tensor, experts_int8 for {LONG}." in words
    assert f"attention's projections; by {LONG} and nvfp4_per_token only the experts." in words
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert rows["bf16"] | {"weight": None, "activation": None, "kl": 0.0, "top1_agreement": 1.0} == rows["bf16"]
    for name, row in rows.items():
        assert set(row) >= FIELDS
        assert row["tokens_per_second"] is None
        assert row["aliases"] == ALIASES.get(name, [])
        assert row["linear"] == (name not in EXPERTS_ONLY)
        assert row["stored_bytes"] <= row["peak_bytes"] <= row["planned_peak_bytes"]
        if name != "bf16":
            spec = SHORTHANDS[name].moe
            assert (row["weight"], row["activation"]) == (spec.weight.name, spec.activation and spec.activation.name)
            assert row["kl"] > 0
            assert row["stored_bytes"] < rows["bf16"]["stored_bytes"]
    assert rows["mxfp4"]["stored_bytes"] < rows["mxfp8"]["stored_bytes"]
    assert rows["int8_w8a16"]["stored_bytes"] < rows[LONG]["stored_bytes"]


@pytest.mark.slow
def test_shipped_model(tmp_path, capsys):
    """The numbers are those of `moe_online.evaluate`; the text is the shipped one unless another is named."""
    names = "int4_w4a16, bf16,int8_w8a16 ,int8_w8a16"  # bf16 comes first, and each once
    rows = run(PYTHON_MOE_7M, "--schemes", names, "--bytes", "2000", tmp_path / "rows.json")
    assert list(rows) == ["bf16", "int4_w4a16", "int8_w8a16"]
    assert "2,000 bytes of held-out text" in capsys.readouterr().out
    text = np.frombuffer(HELDOUT_TEXT.read_bytes()[:2001], np.uint8)
    sizes = {"window": comparison.WINDOW, "batch": comparison.BATCH}
    reference = log_probabilities(models.load(PYTHON_MOE_7M, progress=False).model, text, **sizes)
    lm = models.load(PYTHON_MOE_7M, quantization={"moe": "int4_w4a16"}, progress=False)
    expected = evaluate(lm.model, text, **sizes, reference=reference)
    row = rows["int4_w4a16"]
    # one compiled program, so the same sums; the reference went over the host, which keeps f32
    found = (row["bits_per_byte"], row["kl"], row["top1_agreement"])
    assert found == (expected.bits_per_byte, expected.kl_per_byte, expected.top1_agreement)
    assert row["stored_bytes"] == lm.report.resident_bytes
    assert not row["linear"]
    assert rows["int8_w8a16"]["kl"] < row["kl"] / 10  # 7 bits against 3


@pytest.fixture
def measured(monkeypatch):
    """The command without its work: what it would measure."""
    calls = []

    def compare(path, text, names, *, dense):
        calls.append((text, names))
        row = comparison.Row(
            **dict.fromkeys(("weight", "activation", "tokens_per_second")),
            **dict.fromkeys(("stored_bytes", "peak_bytes", "planned_peak_bytes"), 10**6),
            **dict.fromkeys(("bits_per_byte", "kl", "top1_agreement", "seconds"), 0.5),
            scheme="bf16",
            aliases=(),
            linear=False,
        )
        return [
            comparison.Measured(row=dataclasses.replace(row, scheme=name, kl=0.01 * i), completion="")
            for i, name in enumerate(names)
        ]

    monkeypatch.setattr(comparison, "compare", compare)
    return calls


@pytest.mark.smoke
def test_all_leaves_out_what_does_not_fit(measured, tmp_path, capsys):
    folder = save_model(tmp_path / "odd")  # hidden 32, intermediate 48
    assert main(["evaluate", folder]) == 0
    ((text, names),) = measured
    odd = ["int4_w4a16", "mxfp8", "mxfp4", "mxfp4_w4a16"]  # groups of 128, blocks of 32
    assert names == [name for name in EVERY if name not in odd]
    assert text == HELDOUT_TEXT.read_bytes()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out ")]
    assert sorted(line.split()[2] for line in lines) == sorted(f"{name}:" for name in odd)
    assert all("multiple of" in line for line in lines)


@pytest.mark.smoke
def test_each_model_is_planned_once(measured, monkeypatch):
    planned = []
    monkeypatch.setattr(models, "plan", lambda path, *, quantization: planned.append(quantization))
    assert main(["evaluate", str(PYTHON_MOE_7M), "--schemes", " all"]) == 0
    assert planned == [None, *({"moe": name} for name in EVERY[1:])]
    planned.clear()
    assert main(["evaluate", str(PYTHON_MOE_7M), "--schemes", "all", "--dense"]) == 0
    assert planned == [None, *EVERY[1:]]
    assert measured[0][1] == EVERY


def test_the_reference_is_read_once(monkeypatch, tmp_path):
    """What bf16 predicts serves for its own row."""
    read = []

    def counted(model, *arguments, **sizes):
        read.append(model)
        return log_probabilities(model, *arguments, **sizes)

    monkeypatch.setattr(comparison, "log_probabilities", counted)
    monkeypatch.setattr("moe_online.evaluate.log_probabilities", lambda *_, **__: pytest.fail("read again"))
    rows = run(PYTHON_MOE_7M, "--schemes", "int8_w8a16", "--bytes", "500", tmp_path / "rows.json")
    assert len(read) == len(rows) == 2
    assert (rows["bf16"]["kl"], rows["bf16"]["top1_agreement"]) == (0, 1)
    assert rows["int8_w8a16"]["kl"] > 0


@pytest.mark.smoke
@pytest.mark.usefixtures("measured")
def test_the_picture_of_all_schemes_has_room_for_each(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "all.svg"
    assert main(["evaluate", str(PYTHON_MOE_7M), "--plot", str(file)]) == 0
    height = float(file.read_text().split('height="')[1].split("pt")[0])
    assert height > 24 * len(EVERY)  # points: two lines of text for each


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["nowhere"], ["nothing at", "nowhere"]),
        (["."], ["no model folder"]),
        ([PYTHON_MOE_7M, "--schemes", "fp9,bf16,int3"], ["schemes 'fp9', 'int3'", "valid names: bf16, ", "mxfp4"]),
        ([PYTHON_MOE_7M, "--schemes", "mxfp4,"], ["unknown scheme ''"]),
        ([PYTHON_MOE_7M, "--text", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        ([PYTHON_MOE_7M, "--text", "."], ["directory"]),
        ([PYTHON_MOE_7M, "--text", "one"], ["one holds 1 byte", "at least 2"]),
        ([PYTHON_MOE_7M, "--json", "nowhere/x.json"], ["nowhere/x.json", "no folder"]),
        ([PYTHON_MOE_7M, "--plot", "nowhere/x.png"], ["nowhere/x.png", "no folder"]),
        ([PYTHON_MOE_7M, "--plot", "x.txt"], ["x.txt", "png"]),
    ],
    ids=lambda value: " ".join(str(v) for v in value)[-30:],
)
def test_one_readable_message(arguments, pieces, measured, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").write_text("x")
    assert main(["evaluate", *map(str, arguments)]) == 1
    assert_one_message(capsys, *pieces)
    assert measured == []  # found before the work


@pytest.mark.smoke
def test_named_schemes_must_fit(measured, tmp_path, capsys):
    folder = save_model(tmp_path / "odd")
    assert main(["evaluate", folder, "--schemes", "mxfp4,int8_w8a8,int4_w4a16"]) == 1
    assert_one_message(capsys, "mxfp4: ", "K=48", "multiple of 32", "int4_w4a16: ", "K=32", "multiple of 128")
    assert measured == []


@pytest.mark.smoke
def test_other_tokens_than_bytes(measured, tmp_path, capsys):
    assert main(["evaluate", save_model(tmp_path / "words", vocab_size=40)]) == 1
    assert_one_message(capsys, "vocab_size 40", "256", "moe_online.evaluate")
    assert measured == []


@pytest.mark.smoke
def test_a_picture_needs_matplotlib(measured, monkeypatch, capsys):
    monkeypatch.setattr("moe_online.cli.picture.can_draw", lambda: False)
    assert main(["evaluate", str(PYTHON_MOE_7M), "--plot", "x.png"]) == 1
    assert_one_message(capsys, "x.png", "pip install 'moe-online[plot]'")
    assert measured == []


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", [[], ["x", "y"], ["x", "--bytes", "0"], ["x", "--bytes", "many"]])
def test_usage_errors_are_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *arguments])
    assert exit_.value.code == 2
    assert "usage: moe-online" in capsys.readouterr().err
