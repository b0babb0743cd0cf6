"""`moe_online.flax.MoE`: the functional layer as an nnx module."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import definition
from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights
from moe_online.flax import MoE
from moe_online.loading.tree import flatten
from pallas_kernels import UnsupportedError
from sources import BF16, quiet_load, random
from tolerance import assert_close, assert_same_bits

pytestmark = pytest.mark.smoke
E, H, INNER = 4, 96, 64
CONFIG = MoEConfig(num_experts=E, top_k=2, hidden_size=H, intermediate_size=INNER)
X = np.random.default_rng(0).standard_normal((2, 5, H), np.float32).astype(BF16)
run = nnx.jit(lambda moe, x: moe(x))


def by_definition(moe, x, act_format=None):
    """Of a module that is not quantized."""
    experts = moe.experts.get_value()
    tokens = np.asarray(x).reshape(-1, H)
    logits = definition.real(tokens) @ definition.real(moe.router.kernel[...])
    w13, w2 = definition.real(experts.w13_weight), definition.real(experts.w2_weight)
    return definition.fused_moe(tokens, w13, w2, *definition.route(logits, 2), act_format=act_format).reshape(x.shape)


def test_names_shapes_and_dtypes():
    moe = nnx.eval_shape(lambda: MoE(dataclasses.replace(CONFIG, has_bias=True), rngs=nnx.Rngs(0)))
    assert {leaf.name: (leaf.aval.shape, leaf.aval.dtype.name) for leaf in flatten(moe).leaves} == {
        "experts.w13_weight": ((E, 2, INNER, H), "bfloat16"),
        "experts.w2_weight": ((E, H, INNER), "bfloat16"),
        "experts.w13_bias": ((E, 2, INNER), "bfloat16"),
        "experts.w2_bias": ((E, H), "bfloat16"),
        "router.kernel": ((H, E), "bfloat16"),
    }


def test_matches_definition():
    moe = MoE(CONFIG, rngs=nnx.Rngs(0))
    assert_close(run(moe, X), by_definition(moe, X), batch=4e-3, worst_row=2e-2)
    with pytest.raises(AssertionError):
        assert_close(run(MoE(CONFIG, rngs=nnx.Rngs(1)), X), by_definition(moe, X), batch=4e-3, worst_row=2e-2)


def test_dtypes():
    moe = MoE(CONFIG, rngs=nnx.Rngs(0), dtype=None, param_dtype=jnp.float32)
    assert moe.experts.get_value().w2_weight.dtype == moe.experts.get_value().orig_dtype == np.float32
    assert run(moe, X.astype(np.float32)).dtype == np.float32
    assert run(MoE(CONFIG, rngs=nnx.Rngs(0)), X.astype(np.float32)).dtype == BF16
    assert_close(run(moe, X.astype(np.float32)), by_definition(moe, X.astype(np.float32)), batch=1e-5, worst_row=1e-4)


def test_initial_scale():
    """Each expert's matrix maps unit inputs to unit outputs, whatever E is."""
    experts = MoE(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.float32).experts.get_value()
    assert np.std(experts.w13_weight) * np.sqrt(H) == pytest.approx(1, abs=0.02)
    assert np.std(experts.w2_weight) * np.sqrt(INNER) == pytest.approx(1, abs=0.02)
    assert not np.array_equal(experts.w13_weight[:, 0], experts.w13_weight[:, 1])


@pytest.fixture(scope="module")
def quantized():
    abstract = nnx.eval_shape(lambda: MoE(CONFIG, rngs=nnx.Rngs(0)))
    source = {
        "router": {"kernel": random(H, E)},
        "experts": {"w13_weight": random(E, 2, INNER, H), "w2_weight": random(E, H, INNER)},
    }
    return quiet_load(abstract, source, quantization="fp8_per_block").params


def test_quantized_split_merge_and_state(quantized):
    graph, state = nnx.split(quantized)
    assert_same_bits(run(nnx.merge(graph, state), X), run(quantized, X))
    assert isinstance(state["experts"].get_value(), ExpertWeights)
    moved = jax.tree.map(lambda leaf: leaf + jnp.zeros_like(leaf) if leaf.dtype == jnp.float32 else leaf, state)
    assert_same_bits(run(nnx.merge(graph, moved), X), run(quantized, X))


def test_quantized_under_scan(quantized):
    graph, state = nnx.split(quantized)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)

    def layer(x, state):
        return nnx.merge(graph, state)(x), None

    found, _ = jax.jit(lambda x, layers: jax.lax.scan(layer, x, layers))(X, stacked)
    assert_same_bits(found, run(quantized, run(quantized, X)))


def test_no_silent_gradient():
    moe = MoE(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(UnsupportedError, match="no gradient"):
        nnx.grad(lambda moe, x: jnp.sum(moe(x).astype(jnp.float32)))(moe, X)
