"""The life of one layer's experts against numpy: declared, quantized, routed, applied."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import definition
import numpy_router
from by_name import assert_same_parts, by_name
from moe_online.config import MoEConfig
from moe_online.errors import ConfigError, NonFiniteWeight
from moe_online.experts import ExpertWeights, SharedExpertWeights
from moe_online.layer import moe_layer
from moe_online.method import OnlineMoEMethodBase, get_method
from moe_online.schemes import SHORTHANDS, QuantSpec
from numpy_quantizer import WEIGHTS, quantize_numpy
from pallas_kernels import Activation
from pallas_kernels.routing import SimulatedRouting, llama4_routing
from sources import BF16, check_quantized, random
from tolerance import assert_close, assert_same_bits

E, H, INNER, T = 4, 160, 96, 33
MOE = MoEConfig(num_experts=E, top_k=2, hidden_size=H, intermediate_size=INNER)
BATCH, ROW = 4e-3, 2e-2  # three roundings to bf16, of gate and up, of the activation and of the result
CODES_BATCH, CODES_ROW = 1e-2, 5e-2  # and activation codes that fall to the other side of a tie
SCHEMES = ["fp8_per_block", "fp8_per_channel", "int8_w8a8", "int8_w8a16", None]


def even(*shape, seed):
    """Rows of one size, so that no output is a small difference of large ones."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


TREE = {
    "w13_weight": (even(E, 2, INNER, H, seed=1) / np.sqrt(H)).astype(BF16),
    "w2_weight": (even(E, H, INNER, seed=2) / np.sqrt(INNER)).astype(BF16),
}
X = even(T, H, seed=3).astype(BF16)
LOGITS = even(T, E, seed=4)
REAL = tuple(definition.real(x) for x in TREE.values())


def weights(**more):
    return ExpertWeights(**{name: jnp.asarray(x) for name, x in TREE.items()}, orig_dtype=BF16, **more)


@functools.partial(jax.jit, static_argnames="scheme")
def process(given, scheme):
    return get_method(scheme, MOE).process_weights_after_loading(given)


def processed(scheme, **more):
    return get_method(scheme, MOE), dataclasses.replace(process(weights(), scheme), **more)


@functools.partial(jax.jit, static_argnames="moe")  # one for all tests, so that each shape compiles once
def layer(given, x=X, logits=LOGITS, moe=MOE, token_mask=None):
    return get_method(None, moe).apply_monolithic(given, x, logits, token_mask=token_mask)


@jax.jit
def apply(given, topk_weights, topk_ids):
    return get_method(None, MOE).apply(given, X, topk_weights, topk_ids)


def expected(scheme, logits=LOGITS, tree=TREE, **more):
    spec = QuantSpec(None, None) if scheme is None else SHORTHANDS[scheme].moe
    weight, activation = (fmt and fmt.name for fmt in (spec.weight, spec.activation))
    w13, w2 = (definition.real(x, weight) for x in tree.values())
    routed = definition.route(logits, 2)
    return definition.fused_moe(X, w13, w2, *routed, act_format=activation, **more)


def tolerances(scheme):
    quantizes_inputs = scheme is not None and SHORTHANDS[scheme].moe.activation is not None
    return {"batch": CODES_BATCH, "worst_row": CODES_ROW} if quantizes_inputs else {"batch": BATCH, "worst_row": ROW}


@pytest.mark.smoke
def test_create_weights():
    mesh = AbstractMesh((2, 2), ("expert", "tensor"))
    method = get_method("fp8_per_block", dataclasses.replace(MOE, has_bias=True))
    declared = method.create_weights(E, H, INNER, jnp.bfloat16, mesh=mesh)
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(declared)
    )
    assert declared.w13_weight.shape == (E, 2, INNER, H)  # declared as it is before quantization
    assert (declared.w13_bias.shape, declared.w2_bias.shape) == ((E, 2, INNER), (E, H))
    assert get_method(None, MOE).create_weights(E, H, INNER, jnp.float16).w13_bias is None
    everywhere = dataclasses.replace(MOE, num_experts=16, has_correction_bias=True, shared_intermediate_size=48)
    declared = get_method(None, everywhere).create_weights(E, H, INNER, jnp.bfloat16)
    assert (declared.num_experts, declared.e_score_correction_bias.shape) == (E, (16,))  # of experts here and elsewhere
    assert (declared.shared.w13_weight.shape, declared.shared.gate_weight) == ((1, 2, 48, H), None)
    with pytest.raises(TypeError, match="weight_loader"):
        method.create_weights(E, H, INNER, jnp.bfloat16, weight_loader=print)


@pytest.mark.parametrize("scheme", SCHEMES[:-1])
def test_process_weights(scheme):
    bias = jnp.asarray(random(E, 2, INNER))
    found = process(weights(w13_bias=bias), scheme)
    check_quantized({"l": found}, {"l": TREE}, SHORTHANDS[scheme].moe.weight.name)
    assert found.activation_format == SHORTHANDS[scheme].moe.activation
    assert_same_bits(found.w13_bias, bias)


@pytest.mark.parametrize("scheme", SCHEMES[:-1])
def test_processing_twice_is_refused(scheme):
    method, quantized = processed(scheme)
    for again in (method, get_method(None, MOE)):
        with pytest.raises(ValueError, match="w13_weight is quantized already"):
            again.process_weights_after_loading(quantized)


def test_no_scheme_leaves_weights():
    given = weights()
    assert get_method(None, MOE).process_weights_after_loading(given) is given


@pytest.mark.parametrize("scheme", SCHEMES)
def test_apply(scheme):
    method, given = processed(scheme)
    topk_weights, topk_ids = definition.route(LOGITS, 2)
    found = jax.jit(method.apply)(given, X, jnp.asarray(topk_weights, jnp.float32), jnp.asarray(topk_ids, jnp.int32))
    assert found.dtype == BF16
    assert_close(found, expected(scheme), **tolerances(scheme))
    with pytest.raises(AssertionError):
        assert_close(found, expected(scheme, LOGITS[:, ::-1]), **tolerances(scheme))


def test_apply_monolithic_routes():
    found = layer(processed("fp8_per_block")[1])
    assert_close(found, expected("fp8_per_block"), **tolerances("fp8_per_block"))
    options = {"scoring": "sigmoid", "renormalize": False, "num_expert_group": 2, "topk_group": 1}
    moe = dataclasses.replace(MOE, **options, has_correction_bias=True, routed_scaling_factor=2.5)
    bias = even(E, seed=8)
    found = layer(weights(e_score_correction_bias=jnp.asarray(bias)), moe=moe)
    for correction, is_right in ((bias, True), (-bias, False)):
        routed = numpy_router.route(
            LOGITS, 2, scoring="sigmoid", renormalize=False, groups=(2, 1), bias=correction, factor=2.5
        )
        assert routed.clear.all()
        by_definition = definition.fused_moe(X, *REAL, routed.weights, routed.ids)
        with contextlib.nullcontext() if is_right else pytest.raises(AssertionError):
            assert_close(found, by_definition, batch=BATCH, worst_row=ROW)


MANY = {"num_experts": 16, "top_k": 3}
ROUTING = {
    "groups": {"num_expert_group": 4, "topk_group": 2},
    "correction bias": {"has_correction_bias": True, "scoring": "sigmoid"},
    "both": {"num_expert_group": 4, "topk_group": 2, "has_correction_bias": True, "scoring": "sigmoid"},
    "sqrtsoftplus": {"scoring": "sqrtsoftplus", "has_correction_bias": True},
    "no renormalization": {"renormalize": False},
    "factor": {"routed_scaling_factor": 2.5},
    "factor of the output": {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
}


@pytest.mark.parametrize("options", ROUTING.values(), ids=ROUTING)
def test_what_the_config_says_of_routing_reaches_the_router(options):
    moe, logits, bias = dataclasses.replace(MOE, **MANY, **options), even(T, 16, seed=7), even(16, seed=8)
    given = weights(e_score_correction_bias=jnp.asarray(bias) if moe.has_correction_bias else None)
    found_weights, found_ids = jax.jit(get_method(None, moe).route)(given, X, logits)
    expected = numpy_router.route(
        logits,
        moe.top_k,
        scoring=moe.scoring,
        renormalize=moe.renormalize,
        groups=None if moe.topk_group is None else (moe.num_expert_group, moe.topk_group),
        bias=bias if moe.has_correction_bias else None,
        factor=1 if moe.apply_routed_scale_to_output else moe.routed_scaling_factor,
    )
    assert expected.clear.all()
    assert np.array_equal(found_ids, expected.ids)
    assert_close(found_weights, expected.weights, batch=1e-6, worst_row=2e-6)
    plain = numpy_router.route(logits, moe.top_k, scoring=moe.scoring)
    same_ids = np.array_equal(found_ids, plain.ids)
    assert same_ids == (moe.topk_group is None and not moe.has_correction_bias)
    same = same_ids and np.allclose(found_weights, plain.weights, rtol=1e-5)
    assert same == moe.apply_routed_scale_to_output  # each of the others matters


@pytest.mark.parametrize(
    "function", [llama4_routing, SimulatedRouting("uniform_random", seed=3)], ids=["llama4", "uniform"]
)
def test_routing_functions(function):
    seen, mask = [], np.arange(T) % 4 > 0

    def watched(*arguments):
        seen.append(arguments)
        return function(*arguments)

    def routed(**more):
        moe = dataclasses.replace(MOE, custom_routing_function=watched, renormalize=False)
        return get_method(None, moe).route(weights(), X, LOGITS, **more)

    expected = function(X, LOGITS, 2, False)
    for found, wanted in zip(routed(), expected, strict=True):
        assert_same_bits(found, wanted)
    ((hidden, logits, *options),) = seen
    assert hidden is X
    assert logits is LOGITS
    assert options == [2, False]
    for found, wanted, nothing in zip(routed(token_mask=mask), expected, (0, -1), strict=True):
        assert_same_bits(found, np.where(mask[:, None], wanted, np.full_like(wanted, nothing)))


def test_llama4():
    """Its weight goes on the input; a factor of the output is no factor of the input."""
    on_input = {"apply_router_weight_on_input": True, "apply_routed_scale_to_output": True}
    moe = dataclasses.replace(
        MOE, top_k=1, custom_routing_function=llama4_routing, routed_scaling_factor=3.0, **on_input
    )
    found, ids = layer(weights(), moe=moe), LOGITS.argmax(axis=1)[:, None]
    routed = definition.sigmoid(np.take_along_axis(definition.real(LOGITS), ids, axis=1))
    assert_close(found, 3 * definition.fused_moe(X, *REAL, routed, ids, on_input=True), batch=BATCH, worst_row=ROW)
    with pytest.raises(AssertionError):
        assert_close(found, definition.fused_moe(X, *REAL, 3 * routed, ids, on_input=True), batch=BATCH, worst_row=ROW)


@pytest.mark.parametrize("on_output", [False, True])
def test_a_routed_scale_in_the_router_and_of_the_output_do_the_same(on_output):
    moe = dataclasses.replace(MOE, routed_scaling_factor=4.0, apply_routed_scale_to_output=on_output)
    assert_same_bits(layer(weights(), moe=moe), 4 * np.asarray(layer(weights())))


def test_a_correction_bias_belongs_to_the_weights():
    """The config says only whether to declare one."""
    with_bias = weights(e_score_correction_bias=jnp.asarray(even(E, seed=8)))
    declared = dataclasses.replace(MOE, has_correction_bias=True)
    assert_same_bits(layer(with_bias), layer(with_bias, moe=declared))
    assert not np.array_equal(layer(with_bias), layer(weights()))
    with pytest.raises(ValueError, match="has_correction_bias=True, but the weights have no e_score_correction_bias"):
        get_method(None, declared).apply_monolithic(weights(), X, LOGITS)
    own = dataclasses.replace(MOE, custom_routing_function=llama4_routing)
    with pytest.raises(ValueError, match="which custom_routing_function does not get"):
        get_method(None, own).apply_monolithic(with_bias, X, LOGITS)


SITU = {"beta": 1.5, "linear_beta": 2.0}
ACTIVATIONS = [
    ("relu2_no_mul", {}, "fp8_per_block"),
    ("silu_no_mul", {}, "int8_w8a8"),
    ("gelu_tanh_no_mul", {}, "mxfp4"),
    (Activation("situ", **SITU), SITU, None),
]


@pytest.mark.parametrize(
    ("activation", "parameters", "scheme"), ACTIVATIONS, ids=["relu2", "silu", "gelu_tanh", "situ"]
)
def test_activations_with_biases(activation, parameters, scheme):
    """Where there is no gate w13 holds one matrix."""
    moe = dataclasses.replace(MOE, activation=activation, has_bias=True)
    method, shards = get_method(scheme, moe), 2 if moe.gated else 1
    declared = method.create_weights(E, H, INNER, BF16)
    assert (declared.w13_weight.shape, declared.w13_bias.shape) == ((E, shards, INNER, H), (E, shards, INNER))
    rng = np.random.default_rng(1)

    def normal(leaf):
        return (rng.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.shape[-1])).astype(BF16)

    given = jax.tree.map(normal, declared)
    tree = {name: getattr(given, name) for name in TREE}
    quantized = process(given, scheme)
    if scheme is not None:
        check_quantized({"l": quantized}, {"l": tree}, SHORTHANDS[scheme].moe.weight.name)
    act = functools.partial(definition.activation, getattr(activation, "name", activation), **parameters)
    found = layer(quantized, moe=moe)
    for b13, is_right in ((given.w13_bias, True), (np.roll(given.w13_bias, 1, axis=0), False)):
        biases = {"b13": definition.real(b13), "b2": definition.real(given.w2_bias)}
        with contextlib.nullcontext() if is_right else pytest.raises(AssertionError):
            assert_close(found, expected(scheme, tree=tree, act=act, **biases), **tolerances(scheme))


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_numbers_of_tokens(tokens):
    found = layer(weights(), X[:tokens], LOGITS[:tokens])
    assert (found.shape, found.dtype) == ((tokens, H), BF16)
    assert_close(found, expected(None)[:tokens], batch=BATCH, worst_row=ROW)


IDS = {
    "one takes all": np.full((T, 2), 3),
    "two take all": np.stack([np.arange(T) % 2, np.full(T, 2)], axis=1),
    "one takes one": np.where(np.arange(2 * T).reshape(T, 2) == 5, 1, -1),
    "out of range": np.resize([0, E, -(2**31), 2**31 - 1, 3], (T, 2)),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_spreads_of_tokens_over_experts(ids):
    """The weight of an id that is no expert's does not matter, though it is no number."""
    routed, ids = np.random.default_rng(5).uniform(size=ids.shape).astype(np.float32), ids.astype(np.int32)
    is_expert = (ids >= 0) & (ids < E)
    found = apply(weights(), np.where(is_expert, routed, np.float32(np.nan)), ids)
    assert_close(found, definition.fused_moe(X, *REAL, routed, ids), batch=BATCH, worst_row=ROW)
    with pytest.raises(AssertionError):
        assert_close(found, definition.fused_moe(X, *REAL, routed[::-1], ids), batch=BATCH, worst_row=ROW)


def test_biases():
    b13, b2 = (even(*shape, seed=9).astype(BF16) for shape in ((E, 2, INNER), (E, H)))
    found = layer(processed("int8_w8a16", w13_bias=jnp.asarray(b13), w2_bias=jnp.asarray(b2))[1])
    by_definition = expected("int8_w8a16", b13=definition.real(b13), b2=definition.real(b2))
    assert_close(found, by_definition, batch=BATCH, worst_row=ROW)


def test_expert_map():
    """Of 8 experts anywhere 4 are here; the others contribute nothing."""
    places = np.int32([-1, 0, -1, 1, 2, -1, -1, 3])
    logits = even(T, 8, seed=5)
    found = layer(processed("fp8_per_block", expert_map=jnp.asarray(places))[1], X, logits)
    by_definition = expected("fp8_per_block", logits, expert_map=places)
    assert_close(found, by_definition, **tolerances("fp8_per_block"))


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in ("int4_per_group", "int4_per_group_64")])
def test_codes_are_numpys_and_gate_and_up_share_a_scale_of_all(name):
    spec = QuantSpec(by_name(name), None)
    given = jax.jit(get_method(spec, MOE).process_weights_after_loading)(weights())
    assert_same_parts(given.w13_weight, quantize_numpy(TREE["w13_weight"], name, shared_axes=(1,)))
    assert_same_parts(given.w2_weight, quantize_numpy(TREE["w2_weight"], name))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_scale_for_what_is_not_finite(value):
    given = weights()
    given = dataclasses.replace(given, w2_weight=given.w2_weight.at[1, 2, 3].set(value))
    with pytest.raises(NonFiniteWeight, match="NaN or infinite elements in w2_weight; no scale") as caught:
        get_method("mxfp8", MOE).process_weights_after_loading(given)
    assert caught.value.names == ("w2_weight",)


def test_permuted_experts_change_nothing():
    order, bias = np.array([2, 0, 3, 1]), jnp.asarray(even(E, seed=8) / 8)
    moe = dataclasses.replace(MOE, scoring="sigmoid", has_correction_bias=True)  # softmax adds in the order of experts
    _, given = processed("fp8_per_block", e_score_correction_bias=bias)
    moved = jax.tree.map(lambda leaf: leaf[order], given)
    expected = layer(given, moe=moe)
    assert_same_bits(layer(moved, X, LOGITS[:, order], moe), expected)
    for wrong in (
        layer(moved, moe=moe),
        layer(dataclasses.replace(moved, e_score_correction_bias=bias), X, LOGITS[:, order], moe),
    ):
        with pytest.raises(AssertionError):
            assert_close(wrong, expected, batch=BATCH, worst_row=ROW)


@pytest.mark.parametrize("scheme", [None, "fp8_per_block"])
def test_tokens_know_nothing_of_each_other(scheme):
    """Neither their order nor padding, whatever it holds, changes a bit of theirs."""
    _, given = processed(scheme)
    expected, order = np.asarray(layer(given)), np.random.default_rng(0).permutation(T)
    assert_same_bits(layer(given, X[order], LOGITS[order]), expected[order])
    x, logits = (np.concatenate([a, np.full((7, a.shape[1]), np.nan, a.dtype)]) for a in (X, LOGITS))
    found = np.asarray(layer(given, x, logits, token_mask=np.arange(T + 7) < T))
    assert_same_bits(found[:T], expected)
    assert not found[T:].any()
    with pytest.raises(AssertionError):
        assert_same_bits(found[:T], expected[order])


def test_a_power_of_two_in_the_weights_is_one_in_the_output():
    topk_weights, topk_ids = (
        np.asarray(part, dtype) for part, dtype in zip(definition.route(LOGITS, 2), (np.float32, np.int32), strict=True)
    )
    once = np.asarray(apply(weights(), topk_weights, topk_ids))
    for factor in (0.25, 8):
        assert_same_bits(apply(weights(), np.float32(factor) * topk_weights, topk_ids), once * BF16.type(factor))


def test_compiles_once_for_a_number_of_tokens():
    traced = []

    @jax.jit
    def run(given, x, logits):
        traced.append(x.shape)
        return get_method(None, MOE).apply_monolithic(given, x, logits)

    given = weights()
    for seed, logits in enumerate((even(T, E, seed=11), np.zeros((T, E), np.float32), LOGITS * np.float32(100))):
        run(jax.tree.map(lambda leaf: -leaf, given), even(T, H, seed=seed).astype(BF16), logits)
    assert traced == [(T, H)]
    run(given, X[:5], LOGITS[:5])
    assert traced == [(T, H), (5, H)]


def test_nothing_runs_on_the_host():
    options = {"num_expert_group": 2, "topk_group": 1, "has_correction_bias": True, "shared_intermediate_size": INNER}
    method = get_method("fp8_per_block", dataclasses.replace(MOE, **options), shared="int8_w8a8")
    declared = method.create_weights(E, H, INNER, BF16)

    def whole(given, x, logits):
        return method.apply_monolithic(method.process_weights_after_loading(given), x, logits)

    def watched(given, x, logits):
        out = whole(given, x, logits)
        return jax.pure_callback(np.asarray, jax.typeof(out), out)

    for function, expected in ((whole, False), (watched, True)):
        traced = jax.jit(function).trace(declared, X, LOGITS)
        assert [("callback" in text) for text in (str(traced.jaxpr), traced.lower().as_text())] == [expected] * 2


@pytest.mark.smoke
def test_functional_layer():
    router = even(H, E, seed=6).astype(BF16)
    x = X[:32].reshape(4, 8, H)
    _, given = processed("int8_w8a16")
    bias, mask = even(E, seed=7), np.arange(32).reshape(4, 8) % 5 > 0
    run = jax.jit(moe_layer, static_argnums=3)
    found = run(x, router, given, MOE, router_bias=bias, token_mask=mask)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    logits = X.astype(np.float64) @ router.astype(np.float64)
    for added, is_right in ((bias, True), (0, False)):
        by_definition = expected("int8_w8a16", logits + added)[:32].reshape(x.shape) * mask[:, :, None]
        with contextlib.nullcontext() if is_right else pytest.raises(AssertionError):
            assert_close(found, by_definition, batch=BATCH, worst_row=ROW)


def test_what_weights_and_logits_lack_is_missed():
    method = get_method(None, MOE)
    for width in (E - 1, E + 3):
        with pytest.raises(ValueError, match=rf"must be \[T, {E}\], one for each expert of the config"):
            method.apply_monolithic(weights(), X, even(T, width, seed=1))
    places = jnp.asarray([0, 1, -1, 2, 3], jnp.int32)
    with pytest.raises(ValueError, match=r"must be \[T, 5\], one for each expert of the expert map"):
        method.apply_monolithic(weights(expert_map=places), X, LOGITS)
    for options, says in (
        ({"has_bias": True}, "lack w13_bias or w2_bias"),
        ({"shared_intermediate_size": 8}, "no shared"),
    ):
        with pytest.raises(ValueError, match=says):
            get_method(None, dataclasses.replace(MOE, **options)).apply_monolithic(weights(), X, LOGITS)


def test_shapes_of_masks_and_routers():
    x, router = X[:32].reshape(4, 8, H), even(H, E, seed=6)
    for mask in (np.ones((8, 4), bool), np.ones(32, bool)):
        with pytest.raises(ValueError, match=r"token_mask\.shape=.* must be \(4, 8\)"):
            moe_layer(x, router, weights(), MOE, token_mask=mask)
    for wrong in ({"router": router.T}, {"router_bias": np.ones(1, np.float32)}):
        with pytest.raises(ValueError, match=r"must be \[H, E\]"):
            moe_layer(x, weights=weights(), config=MOE, **{"router": router} | wrong)
    llama = get_method(None, dataclasses.replace(MOE, custom_routing_function=llama4_routing))
    for mask, error in ((np.ones(1, bool), ValueError), (np.ones(T, np.int32), TypeError)):
        with pytest.raises(error, match="token_mask"):
            llama.apply_monolithic(weights(), X, LOGITS, token_mask=mask)


def test_padding_that_is_no_number_spoils_no_gradient():
    moe = dataclasses.replace(MOE, shared_intermediate_size=INNER)
    shared = SharedExpertWeights(
        w13_weight=jnp.asarray(TREE["w13_weight"][:1]), w2_weight=jnp.asarray(TREE["w2_weight"][:1])
    )
    given, mask = weights(shared=shared), np.arange(T) < 20
    router = jnp.asarray(even(H, E, seed=6))

    def total(given, router, padding):
        x = jnp.where(mask[:, None], jnp.asarray(X), jnp.asarray(padding, jnp.bfloat16))
        return jnp.sum(moe_layer(x, router, given, moe, token_mask=mask).astype(jnp.float32) ** 2)

    gradients = jax.jit(jax.grad(total, (0, 1)))
    clean = gradients(given, router, 0.0)
    for found, right in zip(jax.tree.leaves(gradients(given, router, jnp.nan)), jax.tree.leaves(clean), strict=True):
        assert np.isfinite(np.asarray(right, np.float32)).all()
        assert_same_bits(found, right)


def test_a_simulated_load_on_a_real_model():
    moe = dataclasses.replace(
        MOE, scoring="sigmoid", routed_scaling_factor=2.5, custom_routing_function=SimulatedRouting("zipf")
    )
    given = weights(e_score_correction_bias=jnp.ones(E))
    found, ids = get_method(None, moe).route(given, X, LOGITS)
    assert_same_bits(ids, SimulatedRouting("zipf")(X, LOGITS, 2, True)[1])
    assert_same_bits(found, np.ones((T, 2), np.float32))


def test_flags_and_refusals():
    method = get_method("fp8_per_block", MOE)
    assert method.uses_meta_device
    assert method.supports_eplb
    with pytest.raises(ValueError, match=r"SpecMethod\.maybe_make_prepare_finalize must not be called"):
        method.maybe_make_prepare_finalize()
    topk_weights, topk_ids = jnp.ones((T, 2)), jnp.zeros((T, 2), jnp.int32)
    with pytest.raises(ValueError, match="no shared experts"):
        method.apply(weights(), X, topk_weights, topk_ids, shared_experts_input=X)
    with pytest.raises(TypeError, match="abstract"):
        OnlineMoEMethodBase(MOE)


class Halving(OnlineMoEMethodBase):
    """A scheme with arithmetic of its own: the output at half its size."""

    def process_weights_after_loading(self, weights):
        return dataclasses.replace(weights, w2_weight=weights.w2_weight / 2)


def test_a_method_of_ones_own():
    method = Halving(MOE)
    with pytest.raises(ValueError, match=r"Halving\.maybe_make_prepare_finalize"):
        method.maybe_make_prepare_finalize()
    found = layer(method.process_weights_after_loading(weights()))
    assert_close(found, expected(None) / 2, batch=BATCH, worst_row=ROW)


@pytest.mark.parametrize(
    ("scheme", "error", "says"),
    [
        ("fp7", ConfigError, "valid names: .*fp8_per_block"),
        ({"activation": "fp8_per_token"}, ConfigError, "no weight format"),
        ({"weights": "fp8_per_block"}, ConfigError, "unknown keys"),
        (QuantSpec(None, None), ConfigError, "no weight format"),
        (8, TypeError, "not int"),
    ],
)
def test_unknown_schemes(scheme, error, says):
    with pytest.raises(error, match=says):
        get_method(scheme, MOE)


@pytest.mark.parametrize(
    "scheme", ["int8_per_channel", {"weight": "int8_per_channel"}, QuantSpec("int8_per_channel", None)]
)
def test_ways_to_name_a_scheme(scheme):
    assert get_method(scheme, MOE).spec == QuantSpec("int8_per_channel", None)
