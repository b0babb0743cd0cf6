"""Evaluation against its definition: windows cut by hand, float64 softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_decoder
from moe_online.evaluate import _forward, evaluate, log_probabilities, score

VOCAB = tiny_decoder.CONFIG.vocab_size
SIZES = {"window": 8, "batch": 3}  # 24 predictions a block
TEXT = tiny_decoder.random_tokens(61).astype(np.uint8)  # 2.5 blocks


@pytest.fixture(scope="module")
def models():
    return tiny_decoder.decoder(seed=0), tiny_decoder.decoder(seed=1)


def definition(model, text, window):
    """log2 probabilities [N - 1, V] in float64, one window at a time."""
    rows = []
    for begin in range(0, len(text) - 1, window):
        inputs = text[begin : min(begin + window, len(text) - 1)].astype(np.int32)
        padded = np.pad(inputs, (0, window - len(inputs)))[None]
        logits = np.asarray(tiny_decoder.forward(model, padded)[0, : len(inputs)], np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        rows.append((logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))) / np.log(2))
    return np.concatenate(rows)


@pytest.mark.smoke
def test_matches_definition(models):
    model, other = models
    p, q = (definition(m, TEXT, SIZES["window"]) for m in (model, other))
    result = evaluate(other, TEXT, **SIZES, reference=log_probabilities(model, TEXT, **SIZES))
    np.testing.assert_allclose(result.bits, -q[np.arange(60), TEXT[1:]], rtol=1e-5)
    np.testing.assert_allclose(result.kl, (2**p * (p - q)).sum(axis=-1), rtol=1e-4)
    np.testing.assert_array_equal(result.agrees, p.argmax(axis=-1) == q.argmax(axis=-1))
    assert result.bits_per_byte == pytest.approx(result.bits.mean(), rel=1e-6)
    assert result.kl_per_byte == pytest.approx(result.kl.mean(), rel=1e-6)
    assert result.top1_agreement == np.mean(result.agrees)


def test_what_was_read_already_can_be_scored(models):
    """On the host, too; a model agrees with itself."""
    blocks = [jax.device_get(block) for block in log_probabilities(models[0], TEXT, **SIZES)]
    result = score(blocks, TEXT, **SIZES, reference=blocks)
    assert np.array_equal(result.bits, evaluate(models[0], TEXT, **SIZES).bits)
    assert (result.kl_per_byte, result.top1_agreement) == (0, 1)


def test_without_a_reference_there_is_no_distance(models):
    result = evaluate(models[0], TEXT, **SIZES)
    assert (result.kl, result.agrees, result.kl_per_byte, result.top1_agreement) == (None,) * 4


@pytest.mark.parametrize("length", [2, 8, 9, 10, 24, 25, 26, 61])
def test_every_token_but_the_first_is_predicted_once(models, length):
    result = evaluate(models[0], TEXT[:length], **SIZES)
    assert result.bits.shape == (length - 1,)
    expected = definition(models[0], TEXT[:length], SIZES["window"])[np.arange(length - 1), TEXT[1:length]]
    np.testing.assert_allclose(result.bits, -expected, rtol=1e-5)


def test_batch_does_not_matter(models):
    results = [evaluate(models[0], TEXT, window=8, batch=batch).bits for batch in (1, 5, 100)]
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-5)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary():
    model = tiny_decoder.decoder()
    model.lm_head.kernel[...] = jnp.zeros_like(model.lm_head.kernel[...])
    assert evaluate(model, TEXT, **SIZES).bits_per_byte == pytest.approx(np.log2(VOCAB), rel=1e-6)


def test_a_model_agrees_with_itself(models):
    result = evaluate(models[0], TEXT, **SIZES, reference=log_probabilities(models[0], TEXT, **SIZES))
    assert (result.kl_per_byte, result.top1_agreement) == (0, 1)


def test_blocks_in_a_list_serve_many_models(models):
    blocks = list(log_probabilities(models[0], TEXT, **SIZES))
    assert {block.shape for block in blocks} == {(3, 8, VOCAB)}
    streamed = evaluate(models[1], TEXT, **SIZES, reference=log_probabilities(models[0], TEXT, **SIZES))
    for _ in range(2):
        np.testing.assert_array_equal(evaluate(models[1], TEXT, **SIZES, reference=blocks).kl, streamed.kl)


def test_forward_pass_is_compiled_once(models):
    before = _forward._cache_size()
    sizes = {"window": 7, "batch": 2}
    for model in models:
        evaluate(model, TEXT, **sizes, reference=log_probabilities(models[0], TEXT, **sizes))
    assert _forward._cache_size() == before + 1


def test_few_blocks_live_at_once(models):
    text = tiny_decoder.random_tokens(24 * 20 + 1)
    alive = []

    def watched():
        for block in log_probabilities(models[0], text, **SIZES):
            alive.append(sum(array.shape == block.shape for array in jax.live_arrays()))
            yield block

    evaluate(models[1], text, **SIZES, reference=watched())
    assert len(alive) == 20
    assert max(alive) <= 6  # this and the previous one of each model, and what Python has not let go yet; not 40


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (lambda m: list(log_probabilities(m, TEXT, **SIZES))[:-1], r"block 2 of reference has shape None, that of the"),
        (lambda m: list(log_probabilities(m, TEXT, **SIZES)) * 2, r"block 3 of reference .* that of the model None"),
        (lambda m: log_probabilities(m, TEXT, window=24, batch=1), r"block 0 of reference has shape \(1, 24, 40\)"),
    ],
    ids=["too short", "too long", "other windows"],
)
def test_a_reference_of_other_windows_is_refused(models, reference, message):
    with pytest.raises(ValueError, match=message):
        evaluate(models[0], TEXT, **SIZES, reference=reference(models[0]))


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        (TEXT[:1], {}, "1 tokens predict nothing: give at least 2"),
        (TEXT, {"window": 0}, "window=0 and batch=3 must be at least 1"),
        (TEXT, {"batch": 0}, "window=8 and batch=0 must be at least 1"),
    ],
)
def test_bad_sizes_are_refused(models, text, sizes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(models[0], text, **SIZES | sizes)
