"""The shipped decoder with its projections quantized beside its experts."""

import numpy as np
import pytest

from moe_online import models
from moe_online.dense import DenseKernel
from moe_online.evaluate import evaluate, log_probabilities
from shipped import SHIPPED, heldout

WINDOW, BATCH = 512, 8
TEXT = heldout()[: 2 * WINDOW * BATCH + 1]
PROJECTIONS = {f"layers.{i}.attention.{x}_proj.kernel" for i in range(4) for x in "qkvo"}


def load(quantization):
    return models.load(SHIPPED, quantization=quantization, progress=False)


@pytest.fixture(scope="module")
def bf16():
    """What the unquantized model predicts, and its bits per byte."""
    model = load(None).model
    blocks = [np.asarray(block) for block in log_probabilities(model, TEXT, window=WINDOW, batch=BATCH)]
    return blocks, evaluate(model, TEXT, window=WINDOW, batch=BATCH).bits_per_byte


@pytest.mark.parametrize(
    ("linear", "rise"),
    [
        pytest.param("int8_w8a16", 0.01, marks=pytest.mark.slow),
        pytest.param("fp8_per_block", 0.01, marks=pytest.mark.slow),
        pytest.param("nvfp4_w4a16", 0.06, marks=pytest.mark.slow),
    ],  # as for experts of 8 and of 4 bits
)
def test_quantized_projections_cost_little(bf16, linear, rise):
    blocks, bits = bf16

    def measured(quantization):
        model = load(quantization).model
        return evaluate(model, TEXT, window=WINDOW, batch=BATCH, reference=blocks)

    both, experts = measured({"linear": linear, "moe": "int8_w8a16"}), measured({"moe": "int8_w8a16"})
    print(f"{linear}: KL {both.kl_per_byte:.5f}, of experts alone {experts.kl_per_byte:.5f}, {both.bits_per_byte:.4f}")
    assert np.isfinite(both.bits_per_byte)
    assert abs(both.bits_per_byte / bits - 1) < rise
    assert both.kl_per_byte > 1.2 * experts.kl_per_byte  # it shows


@pytest.mark.slow
def test_what_is_quantized():
    lm = load({"linear": "int8_w8a16", "moe": "fp8_per_block"})
    linear = {tensor.name for tensor in lm.report.tensors if tensor.rule == "linear"}
    experts = {tensor.name for tensor in lm.report.tensors if tensor.rule == "moe"}
    assert linear == PROJECTIONS
    assert len(experts) == 8
    kept = {tensor.scheme for tensor in lm.report.tensors if tensor.name not in linear | experts}
    assert kept == {"bfloat16"}  # embedding, norms, routers, lm head
    assert isinstance(lm.model.layers[0].attention.q_proj.kernel.get_value(), DenseKernel)
    assert lm.report.resident_bytes <= lm.report.peak_bytes <= lm.report.planned_peak_bytes
    tokens = lm.generate(TEXT[None, :32], max_new_tokens=4)
    assert tokens.shape == (1, 4)
