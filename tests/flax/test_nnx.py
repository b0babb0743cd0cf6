"""`moe_online.flax.MoE`: the functional layer as an nnx module."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import definition
import numpy_router
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


OPTIONS = dataclasses.replace(
    CONFIG,
    activation="relu2_no_mul",
    scoring="sigmoid",
    num_expert_group=2,
    topk_group=1,
    has_correction_bias=True,
    routed_scaling_factor=2.5,
    shared_intermediate_size=48,
    shared_expert_gate=True,
    has_bias=True,
)


def test_names_shapes_and_dtypes_of_all_options():
    moe = nnx.eval_shape(lambda: MoE(OPTIONS, rngs=nnx.Rngs(0)))
    assert {leaf.name: (leaf.aval.shape, leaf.aval.dtype.name) for leaf in flatten(moe).leaves} == {
        "experts.w13_weight": ((E, 1, INNER, H), "bfloat16"),
        "experts.w2_weight": ((E, H, INNER), "bfloat16"),
        "experts.w13_bias": ((E, 1, INNER), "bfloat16"),
        "experts.w2_bias": ((E, H), "bfloat16"),
        "experts.e_score_correction_bias": ((E,), "float32"),
        "experts.shared.w13_weight": ((1, 1, 48, H), "bfloat16"),
        "experts.shared.w2_weight": ((1, H, 48), "bfloat16"),
        "experts.shared.gate_weight": ((H,), "bfloat16"),
        "router.kernel": ((H, E), "bfloat16"),
    }


@pytest.fixture(scope="module")
def module():
    """With all options, in f32."""
    return MoE(OPTIONS, rngs=nnx.Rngs(0), dtype=None, param_dtype=jnp.float32)


def test_all_options_match_the_definition(module):
    experts, x = module.experts.get_value(), X.reshape(-1, H).astype(np.float32)
    shared, act = experts.shared, functools.partial(definition.activation, "relu2_no_mul")
    logits = definition.real(x) @ definition.real(module.router.kernel[...])
    for bias, is_right in ((np.zeros(E), True), (np.array([2, 0, 0, 1]), False)):
        routed = numpy_router.route(logits, 2, scoring="sigmoid", groups=(2, 1), bias=bias, factor=2.5)
        assert routed.clear.all()
        w13, w2 = (definition.real(w) for w in (experts.w13_weight, experts.w2_weight))
        expected = definition.fused_moe(x, w13, w2, routed.weights, routed.ids, act=act)
        w13, w2, gate = (definition.real(w) for w in (shared.w13_weight, shared.w2_weight, shared.gate_weight))
        expected += definition.shared_experts(x, w13, w2, gate=gate, act=act)
        with contextlib.nullcontext() if is_right else pytest.raises(AssertionError):
            assert_close(run(module, x), expected, batch=1e-6, worst_row=1e-5)


def test_initial_values(module):
    """Biases are zeros; gates and matrices map unit inputs to unit outputs; the same seed makes the same."""
    experts = module.experts.get_value()
    for bias in (experts.w13_bias, experts.w2_bias, experts.e_score_correction_bias):
        assert not np.asarray(bias).any()
    for weight in (experts.w13_weight, experts.shared.w13_weight, experts.shared.w2_weight):
        assert np.std(weight) * np.sqrt(weight.shape[-1]) == pytest.approx(1, abs=0.05)
    assert np.std(experts.shared.gate_weight) * np.sqrt(H) == pytest.approx(1, abs=0.2)
    again, other = (MoE(OPTIONS, rngs=nnx.Rngs(seed), dtype=None, param_dtype=jnp.float32) for seed in (0, 1))
    jax.tree.map(assert_same_bits, nnx.state(again), nnx.state(module))
    same = [
        np.array_equal(*leaves)
        for leaves in zip(*map(jax.tree.leaves, (experts, other.experts.get_value())), strict=True)
    ]
    assert same.count(True) == 3  # the biases


def total(moe, x):
    return jnp.sum(jnp.square(moe(x).astype(jnp.float32)))


def test_gradients(module):
    """By every parameter that has a say: what the correction bias chooses, it does not weigh."""
    x = X.astype(np.float32)
    found = nnx.jit(nnx.grad(total))(module, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    silent = [name for name, leaf in found["experts"].get_value().named_tensors().items() if not np.asarray(leaf).any()]
    assert silent == ["e_score_correction_bias"]
    assert np.asarray(found["router"]["kernel"][...]).any()


def test_no_gradient_of_codes(quantized):
    """By the input there is one, through quantized experts."""
    with pytest.raises(UnsupportedError, match="gradient"):
        nnx.grad(total)(quantized, X)
    found = jax.jit(jax.grad(lambda x: total(quantized, x)))(X)
    assert np.isfinite(found.astype(np.float32)).all()
    assert np.asarray(found).any()
