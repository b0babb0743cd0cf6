"""The shipped model on its held-out text, under every scheme, against a numpy quantizer in the same model.

Bits per byte are those of the first half of the text (docs/quality.md has all of it); KL is compared on its first
16 kB, where both quantizers predict the same bytes, because numpy would need minutes for the rest and the bound is a
factor of 2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from moe_online.evaluate import evaluate, log_probabilities
from moe_online.schemes import SHORTHANDS
from numpy_moe import NumpyMoE
from shipped import SHIPPED, heldout, load_shipped

WINDOW, BATCH = 512, 16
SCHEMES = {spec.moe: name for name, spec in reversed(SHORTHANDS.items()) if spec.moe}  # each once, whatever its names
MOST_BITS = {8: 1.01, 4: 1.06}  # bits per byte, relative to bf16's, that weights of 8 and of 4 bits may need
QUICK = ("int8_w8a16",)  # .ci/run takes this one
TEXT_BYTES = 2**16
KL_BLOCKS = 2  # of text, WINDOW * BATCH bytes each
KL_BYTES = KL_BLOCKS * WINDOW * BATCH


def text():
    return heldout()[:TEXT_BYTES]


@functools.cache
def bf16():
    """The model as it was trained, what it predicts, and its bits per byte."""
    model = load_shipped(None)
    blocks = [np.asarray(block) for block in log_probabilities(model, text(), window=WINDOW, batch=BATCH)]
    return model, blocks, evaluate(model, text(), window=WINDOW, batch=BATCH).bits_per_byte


def numpy_kl(model, spec) -> float:
    """KL to bf16, in bits per byte of the first `KL_BYTES`, of `model` with `spec` put in by numpy alone."""
    moes = [numpy_moe(layer, spec) for layer in stored_layers()]
    blocks = text()[:KL_BYTES].reshape(KL_BLOCKS, BATCH, WINDOW).astype(np.int32)
    total = 0.0
    for tokens, reference in zip(blocks, bf16()[1], strict=False):  # the reference goes on to the end of the text
        found = predict(model, moes, tokens).astype(np.float64)
        total += np.sum(np.exp(reference.astype(np.float64)) * (reference - found))
    return total / KL_BYTES / np.log(2)


@functools.cache
def stored_layers():
    """The experts as plain Orbax reads them."""
    on_cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    path = SHIPPED / "checkpoint"
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_cpu), ocp.metadata(path).metadata
    )
    return [layer["moe"] for _, layer in sorted(ocp.load(path, abstract)["params"]["layers"].items())]


def numpy_moe(layer, spec) -> NumpyMoE:
    weight, activation = (None, None) if spec is None else (f and f.name for f in (spec.weight, spec.activation))
    return NumpyMoE(layer["router"], layer["w_gate"], layer["w_up"], layer["w_down"], weight, activation)


def predict(model, moes, tokens):
    """f32 log-probabilities of the decoder around other routed layers."""
    x = model.embed.embedding[...][tokens].astype(model.dtype)
    for layer, moe in zip(model.layers, moes, strict=True):
        x = x + attention(*nnx.split((layer.attention, layer.attention_norm)), x)
        y = moe(np.asarray(layer.moe_norm(x)).reshape(-1, x.shape[-1]))
        x = x + jnp.asarray(y).reshape(x.shape)
    logits = model.lm_head(model.norm(x)).astype(jnp.float32)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@functools.partial(jax.jit, static_argnums=0)
def attention(graph, state, x):
    attend, norm = nnx.merge(graph, state)
    return attend(norm(x), None, jnp.zeros((), jnp.int32))[0]


def test_the_text_is_long_enough():
    assert len(heldout()) >= 100_000
    assert len(text()) == TEXT_BYTES


@pytest.mark.slow
def test_numpy_layer_is_the_same_model():
    model, *_ = bf16()
    assert numpy_kl(model, None) < 6e-4  # other orders of sums, so other roundings to bf16: 4e-4, by the version of jax


def scheme(spec, name):
    return pytest.param(spec, id=name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("spec", [scheme(spec, name) for spec, name in SCHEMES.items()])
def test_schemes_are_as_good_as_numpy(spec):
    model, reference, bits = bf16()
    found = evaluate(load_shipped({"moe": spec}), text(), window=WINDOW, batch=BATCH, reference=reference)
    by_numpy = numpy_kl(model, spec)
    kl, relative = float(found.kl[:KL_BYTES].mean(dtype=np.float64)), found.bits_per_byte / bits
    print(f"{SCHEMES[spec]}: KL {kl:.6f}, numpy {by_numpy:.6f}, {found.bits_per_byte:.4f} of {bits:.4f} bits per byte")
    assert 1e-5 < kl <= 2 * by_numpy
    assert 0.99 < relative < MOST_BITS[spec.weight.bits]


def test_rotated_experts_are_noticed():
    model, _, bits = bf16()
    graph, state = nnx.split(model)
    rotated = nnx.merge(graph, jax.tree.map_with_path(_roll_experts, state))
    assert evaluate(rotated, text(), window=WINDOW, batch=BATCH).bits_per_byte > 1.2 * bits


def _roll_experts(path, leaf):
    return jnp.roll(leaf, 1, axis=0) if any(getattr(key, "key", None) == "experts" for key in path) else leaf
