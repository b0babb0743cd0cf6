"""What the README promises: ten lines that load someone's own checkpoint into their own model."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import their_model
from numpy_moe import bf16, quantized
from pallas_kernels import QuantizedArray
from their_model import Model
from tiny_decoder import relative_l2

README = pathlib.Path(__file__).parents[1] / "README.md"


def swap_lines() -> str:
    """The code block below the marker."""
    found = re.search(r"<!-- test: swap -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, "the README has no code block below '<!-- test: swap -->'"
    return found.group(1)


@pytest.fixture
def trained(tmp_path):
    """Their model, and the training state that they saved."""
    model = Model(rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moments = jax.tree.map(jnp.zeros_like, params)
    ocp.save(tmp_path / "run", {"step": jnp.int32(7), "params": params, "opt_state": {"mu": moments, "nu": moments}})
    return model, tmp_path / "run"


def run(path) -> dict:
    """Executes the README's lines as their reader would."""
    names = {"nnx": nnx, "Model": Model, "path": path}
    exec(compile(swap_lines(), str(README), "exec"), names)
    return names


class NumpyQuantized(nnx.Module):
    """Their layer with weights and inputs of its matmuls through numpy round trips: fp8_per_block, fp8_per_group."""

    def __init__(self, theirs, rotate):
        self.theirs = theirs
        for name in ("w_gate", "w_up", "w_down"):
            weight = np.swapaxes(np.asarray(getattr(theirs, name)[...]), 1, 2)
            setattr(self, name, np.roll(np.swapaxes(quantized(weight, "fp8_per_block"), 1, 2), rotate, axis=0))

    def __call__(self, x):
        scores = jax.nn.softmax(x.astype(jnp.float32) @ self.theirs.router.kernel[...].astype(jnp.float32))
        weights, ids = jax.lax.top_k(scores, their_model.TOP_K)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        combine = np.asarray(jnp.sum(jax.nn.one_hot(ids, their_model.EXPERTS) * weights[..., None], axis=-2))
        real = quantized(np.asarray(x), "fp8_per_group")
        gate, up = (bf16(np.einsum("...h,ehi->...ei", real, w)) for w in (self.w_gate, self.w_up))
        hidden = quantized(bf16(gate / (1 + np.exp(-gate)) * up), "fp8_per_group")
        y = np.einsum("...ei,eih,...e->...h", hidden, self.w_down, combine, optimize=True)
        return jnp.asarray(y.astype(np.float32)).astype(x.dtype)


def with_numpy_experts(model, *, rotate=0):
    """Their model around such layers."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    for layer in copy.layers:
        layer.moe = NumpyQuantized(layer.moe, rotate)
    return copy


def test_their_model_is_theirs():
    assert "moe_online" not in pathlib.Path(their_model.__file__).read_text()
    assert "pallas_kernels" not in pathlib.Path(their_model.__file__).read_text()


def test_the_lines_are_ten():
    assert len([line for line in swap_lines().splitlines() if line.strip()]) <= 10


@jax.numpy_dtype_promotion("standard")  # their model, and flax's norm, let JAX promote
@jax.numpy_rank_promotion("allow")
@pytest.mark.slow
def test_ten_lines_load_their_checkpoint(trained):
    theirs, path = trained
    names = run(path)
    ours = names["model"]
    assert type(ours) is Model
    for layer in ours.layers:
        for weight in (layer.moe.experts.w13_weight, layer.moe.experts.w2_weight):
            assert isinstance(weight, QuantizedArray)
            assert weight.format.name == "fp8_per_block"
    tokens = np.random.default_rng(0).integers(0, their_model.VOCAB, (8, 32), dtype=np.int32)
    expected, found = theirs(tokens), ours(tokens)
    by_numpy = relative_l2(with_numpy_experts(theirs)(tokens), expected)
    assert 0.8 * by_numpy < relative_l2(found, expected) < 1.2 * by_numpy
    assert relative_l2(with_numpy_experts(theirs, rotate=1)(tokens), expected) > 4 * by_numpy
    assert names["report"].resident_bytes < 0.6 * names["report"].read_bytes
