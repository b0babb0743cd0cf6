"""`moe_online.models.load`, on which the commands stand."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_online
from moe_online import models
from moe_online.assets import HELDOUT_TEXT, PYTHON_MOE_7M
from moe_online.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from moe_online.models import Decoder, DecoderConfig
from moe_online.models.generate import generate
from pallas_kernels import QuantizedArray
from tiny_decoder import relative_l2

# Written out here, so that a change of the shipped mapping shows.
MAPPING = {
    "*.moe.router": "-> *.moe.router.kernel",
    "*.moe.w_gate": "E K N -> *.moe.experts.w13_weight.gate",
    "*.moe.w_up": "E K N -> *.moe.experts.w13_weight.up",
    "*.moe.w_down": "E K N -> *.moe.experts.w2_weight",
}


@pytest.fixture(scope="module")
def tokens():
    return np.frombuffer(HELDOUT_TEXT.read_bytes()[:64], np.uint8).reshape(2, 32)


@pytest.fixture(scope="module")
def lm():
    return models.load(PYTHON_MOE_7M, quantization="fp8_per_block", progress=False)


def by_hand(scheme):
    config = DecoderConfig.from_json(json.loads((PYTHON_MOE_7M / "config.json").read_text()))
    return moe_online.load(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))),
        PYTHON_MOE_7M / "checkpoint",
        prefix="params",
        mapping=MAPPING,
        quantization=scheme,
        progress=False,
    )


@pytest.mark.smoke
@pytest.mark.slow
def test_same_as_loading_by_hand(lm, tokens):
    model, report = by_hand("fp8_per_block")
    # One compiled function for both: the weights decide alone.
    np.testing.assert_array_equal(lm(tokens), models.CausalLM(model=model, report=report)(tokens))
    assert [t.name for t in lm.report.tensors] == [t.name for t in report.tensors]
    assert lm.report.resident_bytes == report.resident_bytes


def test_logits_are_those_of_the_model(lm, tokens):
    logits = lm(tokens)
    assert logits.shape == (2, 32, 256)
    assert logits.dtype == jnp.float32
    expected = nnx.jit(lambda model, tokens: model(tokens))(lm.model, jnp.asarray(tokens, jnp.int32))
    # Two compiled programs may round bf16 sums apart; another text is far away.
    assert relative_l2(logits, expected) <= 1e-2
    assert relative_l2(lm(tokens[::-1]), expected) > 0.1


def test_experts_are_quantized_and_the_rest_is_not(lm):
    experts = lm.model.layers[0].moe.experts.get_value()
    assert isinstance(experts.w13_weight, QuantizedArray)
    assert experts.w13_weight.format.name == "fp8_per_block"
    assert lm.model.embed.embedding[...].dtype == jnp.bfloat16


def test_dtype_is_that_of_what_is_not_quantized():
    lm = models.load(PYTHON_MOE_7M, dtype=jnp.float32, progress=False)
    assert lm.model.embed.embedding[...].dtype == jnp.float32
    assert lm.model.layers[0].moe.experts.get_value().w2_weight.dtype == jnp.float32
    assert lm.model.dtype == jnp.float32


def test_plan_is_what_load_then_does(lm):
    plan = models.plan(PYTHON_MOE_7M, quantization="fp8_per_block")
    assert plan.peak_bytes == lm.report.planned_peak_bytes
    assert plan.read_bytes == lm.report.read_bytes


@pytest.mark.slow
def test_generate_hands_everything_on(lm, tokens):
    seen = []
    arguments = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 3}
    found = lm.generate(tokens, **arguments, stop=[0], stream=seen.append)
    expected = generate(lm.model, tokens, **arguments, stop=[0])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.stack(seen, axis=1), expected)


def test_tokens_of_another_rank(lm, tokens):
    with pytest.raises(ValueError, match=r"must be \[B, S\]"):
        lm(tokens[0])


# --- folders that are no model --------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, CheckpointError, "has no config.json"),
        ('{"model_type": "mixtral"}', CheckpointError, r"Hugging Face model \(mixtral\)"),
        ('{"architectures": ["MixtralForCausalLM"]}', CheckpointError, "Hugging Face model .*Mixtral"),
        ("{", CorruptCheckpoint, "is no JSON"),
        ("[]", CheckpointError, "is no config of"),
        ("{}", CheckpointError, "it lacks 'moe'"),
    ],
)
def test_folders_that_are_no_model(config, error, message, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "checkpoint").mkdir()
    with pytest.raises(error, match=message):
        models.load(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        models.load(tmp_path / "nowhere")


def test_config_without_checkpoint(tmp_path):
    shutil.copy(PYTHON_MOE_7M / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="no folder checkpoint/"):
        models.load(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("num_heads", 3), ("head_dim", 7)])
def test_config_with_sizes_that_do_not_fit(key, value, tmp_path):
    config = json.loads((PYTHON_MOE_7M / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=key):
        models.load(tmp_path)
