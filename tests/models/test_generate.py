"""Generation: the tokens are those of the full forward pass, and nothing is compiled twice."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import tiny_decoder
from moe_online.flax import MoE
from moe_online.models.generate import _pick, _prefill, _step, generate
from pallas_kernels import quantize

VOCAB = tiny_decoder.CONFIG.vocab_size
PROMPTS = tiny_decoder.random_tokens(3, 5)


@pytest.fixture(scope="module")
def model():
    return tiny_decoder.decoder()


def greedy_without_cache(model, tokens, count):
    length = tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, count)))  # later tokens change nothing: one shape serves every step
    for i in range(length, length + count):
        tokens[:, i] = np.argmax(tiny_decoder.forward(model, tokens)[:, i - 1], axis=-1)
    return tokens[:, length:]


@pytest.mark.smoke
def test_greedy_tokens_are_those_of_the_full_forward_pass(model):
    found = generate(model, PROMPTS, max_new_tokens=12)
    assert (found.shape, found.dtype) == ((3, 12), jnp.int32)
    np.testing.assert_array_equal(found, greedy_without_cache(model, PROMPTS, 12))


@pytest.mark.slow
def test_a_quantized_model_generates_alike():
    model = tiny_decoder.decoder(moe=MoE)
    for layer in model.layers:
        experts = layer.moe.experts.get_value()
        w13, w2 = (quantize(w, "fp8_per_channel") for w in (experts.w13_weight, experts.w2_weight))
        layer.moe.experts.set_value(dataclasses.replace(experts, w13_weight=w13, w2_weight=w2))
    found = generate(model, PROMPTS, max_new_tokens=6)
    np.testing.assert_array_equal(found, greedy_without_cache(model, PROMPTS, 6))


def test_one_new_token(model):
    np.testing.assert_array_equal(generate(model, PROMPTS, max_new_tokens=1), greedy_without_cache(model, PROMPTS, 1))


def test_two_compilations_whatever_the_values_and_weights(model):
    def compiled(**kwargs):
        before = _prefill._cache_size(), _step._cache_size()
        tokens = generate(**{"model": model, "tokens": PROMPTS, "max_new_tokens": 9} | kwargs)
        return tokens, (_prefill._cache_size() - before[0], _step._cache_size() - before[1])

    first, count = compiled()
    assert count == (1, 1)
    other, count = compiled(model=tiny_decoder.decoder(seed=1))
    assert count == (0, 0)
    assert (first != other).any(), "the weights are constants of the compiled functions"
    assert compiled(temperature=0.7)[1] == (1, 1)  # sampling is another program, once
    assert compiled(temperature=0.2, top_p=0.9, top_k=3, seed=5)[1] == (0, 0)
    assert compiled(tokens=PROMPTS[:2])[1] == (1, 1)


def test_stream_gets_each_column_as_it_comes(model):
    columns = []
    tokens = generate(model, PROMPTS, max_new_tokens=6, stream=columns.append)
    assert all(isinstance(column, np.ndarray) and column.dtype == np.int32 for column in columns)
    np.testing.assert_array_equal(np.stack(columns, axis=1), tokens)


def test_a_stopped_row_repeats_its_stop_token(model):
    free = np.asarray(generate(model, PROMPTS, max_new_tokens=8))
    stop = int(free[0, 2])
    columns = []
    stopped = np.asarray(generate(model, PROMPTS, max_new_tokens=8, stop=[stop], stream=columns.append))
    for row, expected in zip(stopped, free, strict=True):
        end = int(np.argmax(expected == stop)) if stop in expected else len(expected)
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert (row[end:] == stop).all()
    assert stop in stopped[0]


def test_generation_ends_when_every_row_has_stopped(model):
    columns = []
    free = np.asarray(generate(model, PROMPTS, max_new_tokens=8))
    tokens = generate(model, PROMPTS, max_new_tokens=8, stop=np.unique(free[:, 1]).tolist(), stream=columns.append)
    assert len(columns) <= 2
    np.testing.assert_array_equal(tokens[:, 2:], np.repeat(np.asarray(tokens)[:, 1:2], 6, axis=1))


def test_the_seed_decides_the_sample(model):
    def sample(seed):
        return np.asarray(generate(model, PROMPTS, max_new_tokens=16, temperature=1.0, seed=seed))

    np.testing.assert_array_equal(sample(1), sample(1))
    assert (sample(1) != sample(2)).any()
    assert len(np.unique(sample(1))) > 3  # the key moves on from step to step


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_sampling_from_one_token_is_greedy(model, options):
    found = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, **options)
    np.testing.assert_array_equal(found, generate(model, PROMPTS, max_new_tokens=8))


# softmax(LOGITS): 0.5, 0.25, 0.125, 0.125 in the order 2, 0, 1, 3
LOGITS = np.log(np.array([0.25, 0.125, 0.5, 0.125], np.float32))
NUCLEI = {
    "all": (1.0, 4, 1.0, [0.25, 0.125, 0.5, 0.125]),
    "top_k": (1.0, 2, 1.0, [1 / 3, 0, 2 / 3, 0]),
    "top_p on a boundary": (1.0, 4, 0.75, [1 / 3, 0, 2 / 3, 0]),
    "top_p between": (1.0, 4, 0.6, [1 / 3, 0, 2 / 3, 0]),
    "ties stay together": (1.0, 3, 1.0, [0.25, 0.125, 0.5, 0.125]),
    "top_p within top_k": (1.0, 2, 0.6, [0, 0, 1, 0]),
    "cold": (0.5, 4, 1.0, [4 / 22, 1 / 22, 16 / 22, 1 / 22]),
}


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "expected"), NUCLEI.values(), ids=NUCLEI)
def test_samples_follow_the_distribution(temperature, top_k, top_p, expected):
    count = 40_000
    sampling = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    picks = _pick(jnp.broadcast_to(LOGITS, (count, 4)), sampling, jax.random.key(0))
    found = np.bincount(np.asarray(picks), minlength=4) / count
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / count))  # four standard deviations
    assert (found[np.array(expected) == 0] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": PROMPTS[0]}, r"tokens of shape \(5,\) must be \[B, S\]"),
        ({"tokens": PROMPTS[:, :0]}, r"tokens of shape \(3, 0\) must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, r"temperature=-1.0 must be finite and not negative"),
        ({"temperature": float("nan")}, r"temperature=nan must be finite"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must be above 0"),
        ({"temperature": 1.0, "top_k": 0}, r"top_k=0 must be at least 1"),
        ({"top_k": 5}, r"top_k=5 need a temperature above 0"),
        ({"stop": [3, VOCAB]}, rf"stop=\[{VOCAB}\] must be token ids below vocab_size={VOCAB}"),
    ],
)
def test_bad_arguments_are_refused(model, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would speak before our own checks
    with pytest.raises(ValueError, match=message):
        generate(**{"model": model, "tokens": PROMPTS, "max_new_tokens": 4} | options)
