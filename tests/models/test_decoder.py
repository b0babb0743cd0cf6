"""The generic decoder: what it computes, its cache, its life before it has weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny_decoder
from moe_online.errors import ConfigError
from moe_online.flax import MoE
from moe_online.models.decoder import Decoder, DecoderConfig, KVCache, RMSNorm, rotate
from pallas_kernels import Activation
from tiny_decoder import CONFIG, forward, relative_l2

F32_NOISE = 2e-6  # relative L2 between two orders of summation in f32, two layers deep: measured 2e-7 to 6e-7


def empty_cache(batch, size):
    return KVCache.empty(CONFIG, batch=batch, size=size, dtype=jnp.float32)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_logits_are_f32_of_the_declared_shape(dtype):
    logits = forward(tiny_decoder.decoder(dtype=dtype), tiny_decoder.random_tokens(3, 7))
    assert (logits.shape, logits.dtype) == ((3, 7, CONFIG.vocab_size), jnp.float32)
    assert jnp.isfinite(logits).all()


def test_bf16_stays_close_to_f32():
    rounded, exact = tiny_decoder.decoder(dtype=jnp.bfloat16), tiny_decoder.decoder()
    nnx.update(exact, jax.tree.map(lambda p: p.astype(jnp.float32), nnx.state(rounded)))
    tokens = tiny_decoder.random_tokens(4, 16)
    error = relative_l2(forward(rounded, tokens), forward(exact, tokens))
    assert 1e-4 < error < 0.05  # 8 bits of mantissa; a router that changes its mind costs most


def test_a_token_sees_only_those_before_it():
    model, tokens = tiny_decoder.decoder(), tiny_decoder.random_tokens(2, 12)
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    before, after = forward(model, tokens), forward(model, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(axis=-1).all()  # and all later ones do see it


@pytest.mark.parametrize("lengths", [(12,), (5, 1, 1, 4, 1), (1,) * 12], ids=str)
def test_cached_pieces_equal_one_forward_pass(lengths):
    model, tokens = tiny_decoder.decoder(), tiny_decoder.random_tokens(2, 12)
    cache, pieces, begin = empty_cache(2, 15), [], 0
    for length in lengths:
        logits, cache = forward(model, tokens[:, begin : begin + length], cache)
        pieces.append(logits)
        begin += length
    assert int(cache.position) == 12
    assert relative_l2(jnp.concatenate(pieces, axis=1), forward(model, tokens)) < F32_NOISE


def test_a_cache_at_the_wrong_position_is_noticed():
    model, tokens = tiny_decoder.decoder(), tiny_decoder.random_tokens(2, 12)
    _, cache = forward(model, tokens[:, :6], empty_cache(2, 12))
    shifted = dataclasses.replace(cache, position=cache.position + 1)
    assert relative_l2(forward(model, tokens[:, 6:], shifted)[0], forward(model, tokens)[:, 6:]) > 0.01


def test_the_cache_that_goes_in_is_not_changed():
    model, tokens = tiny_decoder.decoder(), tiny_decoder.random_tokens(2, 4)
    cache = empty_cache(2, 8)
    _, updated = forward(model, tokens, cache)
    assert not any(leaf.any() for leaf in jax.tree.leaves(cache))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updated) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


def test_last_only_is_the_last_column():
    model, tokens = tiny_decoder.decoder(), tiny_decoder.random_tokens(2, 9)
    last = forward(model, tokens, last_only=True)
    assert relative_l2(last, forward(model, tokens)[:, -1:]) < F32_NOISE
    cached, _ = forward(model, tokens, empty_cache(2, 9), last_only=True)
    assert relative_l2(cached, last) < F32_NOISE


def test_flax_transformations_call_it_directly():
    model, tokens = tiny_decoder.decoder(), jnp.asarray(tiny_decoder.random_tokens(2, 9))
    compiled = nnx.jit(lambda m, *args, last_only: m(*args, last_only=last_only), static_argnames="last_only")
    expected = forward(model, tokens)[:, -1:]
    assert relative_l2(compiled(model, tokens, last_only=True), expected) < F32_NOISE
    logits, cache = compiled(model, tokens, empty_cache(2, 9), last_only=True)
    assert relative_l2(logits, expected) < F32_NOISE
    assert int(cache.position) == 9


@pytest.mark.smoke
def test_abstract_model_creates_no_array():
    count = tiny_decoder.num_live_arrays()
    model = nnx.eval_shape(tiny_decoder.decoder)
    assert {type(leaf) for leaf in jax.tree.leaves(nnx.state(model))} == {jax.ShapeDtypeStruct}
    graph, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    cache = jax.eval_shape(lambda: empty_cache(2, 8))
    logits, after = jax.eval_shape(lambda state, *args: nnx.merge(graph, state)(*args), state, tokens, cache)
    assert logits.shape == (2, 5, CONFIG.vocab_size)
    assert after == cache
    assert tiny_decoder.num_live_arrays() == count


def test_parameters_have_stable_names():
    names = {
        ".".join(str(key) for key in path)
        for path, _ in nnx.to_flat_state(nnx.state(nnx.eval_shape(tiny_decoder.decoder)))
    }
    layer = {f"attention.{x}_proj.kernel" for x in "qkvo"} | {"attention_norm.scale", "moe_norm.scale"}
    layer |= {f"moe.{x}" for x in ("router", "w_gate", "w_up", "w_down")}
    assert names == {"embed.embedding", "norm.scale", "lm_head.kernel"} | {
        f"layers.{i}.{x}" for i in (0, 1) for x in layer
    }


def test_the_factory_gets_the_moe_config_and_rngs():
    calls = []

    def factory(config, *, rngs):
        calls.append(config)
        return nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    model = Decoder(CONFIG, moe=factory, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    assert calls == [CONFIG.moe] * CONFIG.num_layers
    assert forward(model, tiny_decoder.random_tokens(1, 3)).shape == (1, 3, CONFIG.vocab_size)


@pytest.mark.smoke
def test_without_a_factory_the_layer_is_ours():
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    assert all(isinstance(layer.moe, MoE) for layer in model.layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}


def test_our_layer_computes_what_a_training_run_does():
    trained, ours = tiny_decoder.decoder(), tiny_decoder.decoder(seed=1, moe=MoE)
    state = nnx.to_pure_dict(nnx.state(trained))
    for layer in state["layers"].values():
        moe = layer["moe"]
        layer["moe"] = {
            "router": {"kernel": moe["router"]},
            "experts": tiny_decoder.experts(moe["w_gate"], moe["w_up"], moe["w_down"]),
        }
    nnx.update(ours, state)
    tokens = tiny_decoder.random_tokens(3, 16)
    assert relative_l2(forward(ours, tokens), forward(trained, tokens)) < F32_NOISE
    pieces, cache = [], empty_cache(3, 16)
    for begin, end in ((0, 9), (9, 10), (10, 16)):
        logits, cache = forward(ours, tokens[:, begin:end], cache)
        pieces.append(logits)
    assert relative_l2(jnp.concatenate(pieces, axis=1), forward(trained, tokens)) < F32_NOISE


def test_tied_head_is_the_transposed_embedding():
    tied, untied = tiny_decoder.decoder(tie_embeddings=True), tiny_decoder.decoder()
    assert "lm_head" not in nnx.to_pure_dict(nnx.state(tied))
    untied.lm_head.kernel[...] = untied.embed.embedding[...].T
    tokens = tiny_decoder.random_tokens(2, 6)
    assert relative_l2(forward(tied, tokens), forward(untied, tokens)) < F32_NOISE


def test_grouped_heads_equal_repeated_ones():
    grouped, full = tiny_decoder.decoder(), tiny_decoder.decoder(num_kv_heads=CONFIG.num_heads)

    def repeat(kernel):  # [H, G * D] -> [H, N * D]
        heads = kernel.reshape(CONFIG.hidden_size, CONFIG.num_kv_heads, CONFIG.head_dim)
        return jnp.repeat(heads, CONFIG.num_heads // CONFIG.num_kv_heads, axis=1).reshape(CONFIG.hidden_size, -1)

    state = nnx.to_pure_dict(nnx.state(grouped))
    for layer in state["layers"].values():
        for name in ("k_proj", "v_proj"):
            layer["attention"][name]["kernel"] = repeat(layer["attention"][name]["kernel"])
    nnx.update(full, state)
    tokens = tiny_decoder.random_tokens(2, 10)
    assert relative_l2(forward(grouped, tokens), forward(full, tokens)) < F32_NOISE


def test_rotate_is_a_complex_product():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 2000], np.int32)
    angles = positions[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:].astype(np.float64)) * np.exp(1j * angles)[None, :, None, :]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    found = rotate(jnp.asarray(x), jnp.asarray(positions), theta=10_000.0)
    assert relative_l2(found, expected) < 1e-4  # an f32 angle of 2000 is known to 1e-4
    np.testing.assert_array_equal(found[:, 0], x[:, 0])


def test_norm_works_in_f32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 512)) * 100, jnp.bfloat16)
    norm = RMSNorm(512, eps=1e-5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True) + 1e-5)
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.asarray(exact, jnp.bfloat16))  # one rounding, at the end


@pytest.mark.smoke
def test_config_survives_json():
    act = Activation("silu", limit=7.0)
    moe = dataclasses.replace(CONFIG.moe, activation=act, params_dtype=np.dtype(np.float32))
    for config in (CONFIG, dataclasses.replace(CONFIG, rope_theta=1e6, tie_embeddings=True, moe=moe)):
        assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert hash(config) != hash(CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"hidden_size": 64}, "moe.hidden_size=32 must equal hidden_size=64"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)
