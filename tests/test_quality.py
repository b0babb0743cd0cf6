"""The shipped model on all of its held-out text, under every scheme, against a numpy quantizer in the same model."""

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
SCHEMES = {spec.moe: name for name, spec in reversed(SHORTHANDS.items())}  # each once, whatever its names


@functools.cache
def bf16():
    """The model as it was trained, what it predicts, and its bits per byte."""
    model = load_shipped(None)
    blocks = [np.asarray(block) for block in log_probabilities(model, heldout(), window=WINDOW, batch=BATCH)]
    return model, blocks, evaluate(model, heldout(), window=WINDOW, batch=BATCH).bits_per_byte


def numpy_kl(model, spec) -> float:
    """KL to bf16, in bits per byte, of `model` with `spec` put in by numpy alone."""
    moes = [numpy_moe(layer, spec) for layer in stored_layers()]
    total = count = 0.0
    for start, reference in zip(range(0, len(heldout()) - 1, WINDOW * BATCH), bf16()[1], strict=True):
        tokens = np.zeros(WINDOW * BATCH, np.int32)
        part = heldout()[start : start + WINDOW * BATCH]
        tokens[: len(part)] = part
        found = predict(model, moes, tokens.reshape(BATCH, WINDOW)).astype(np.float64)
        kl = np.sum(np.exp(reference.astype(np.float64)) * (reference - found), axis=-1).ravel()
        kl = kl[: len(heldout()) - 1 - start]
        total, count = total + kl.sum(), count + kl.size
    assert count == len(heldout()) - 1
    return total / count / np.log(2)


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


def test_numpy_layer_is_the_same_model():
    model, *_ = bf16()
    assert numpy_kl(model, None) < 4e-4  # what is left: other orders of sums, so other roundings to bf16


@pytest.mark.parametrize("spec", SCHEMES, ids=SCHEMES.get)
def test_schemes_are_as_good_as_numpy(spec):
    model, reference, bits = bf16()
    found = evaluate(load_shipped(SCHEMES[spec]), heldout(), window=WINDOW, batch=BATCH, reference=reference)
    by_numpy = numpy_kl(model, spec)
    print(f"{SCHEMES[spec]}: KL {found.kl_per_byte:.6f}, numpy {by_numpy:.6f}, {found.bits_per_byte:.4f} of {bits:.4f}")
    assert 1e-5 < found.kl_per_byte <= 2 * by_numpy
    assert abs(found.bits_per_byte / bits - 1) < 0.01


def test_rotated_experts_are_noticed():
    model, _, bits = bf16()
    graph, state = nnx.split(model)
    rotated = nnx.merge(graph, jax.tree.map_with_path(_roll_experts, state))
    assert evaluate(rotated, heldout(), window=WINDOW, batch=BATCH).bits_per_byte > 1.2 * bits


def _roll_experts(path, leaf):
    return jnp.roll(leaf, 1, axis=0) if any(getattr(key, "key", None) == "experts" for key in path) else leaf
