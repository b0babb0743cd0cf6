"""The life of one layer's experts against numpy: declared, quantized, applied."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import definition
from by_name import assert_same_parts, by_name
from moe_online.config import MoEConfig, OnlineQuantConfig
from moe_online.errors import ConfigError, NonFiniteWeight
from moe_online.experts import ExpertWeights
from moe_online.layer import moe_layer
from moe_online.method import OnlineMoEMethodBase, get_method, register_scheme
from moe_online.schemes import SHORTHANDS, QuantSpec
from numpy_quantizer import WEIGHTS, quantize_numpy
from pallas_kernels import UnsupportedError
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


def weights(**more):
    return ExpertWeights(**{name: jnp.asarray(x) for name, x in TREE.items()}, orig_dtype=BF16, **more)


def processed(scheme, moe=MOE, **more):
    method = get_method(scheme, moe)
    return method, jax.jit(method.process_weights_after_loading)(weights(**more))


def expected(scheme, logits=LOGITS, top_k=2, **more):
    spec = QuantSpec(None, None) if scheme is None else SHORTHANDS[scheme].moe
    weight, activation = (fmt and fmt.name for fmt in (spec.weight, spec.activation))
    w13, w2 = (definition.real(x, weight) for x in TREE.values())
    routed = definition.route(logits, top_k)
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
    with pytest.raises(TypeError, match="weight_loader"):
        method.create_weights(E, H, INNER, jnp.bfloat16, weight_loader=print)


@pytest.mark.parametrize("scheme", SCHEMES[:-1])
def test_process_weights(scheme):
    bias = jnp.asarray(random(E, 2, INNER))
    _, found = processed(scheme, w13_bias=bias)
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
    swapped = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), given)
    with pytest.raises(AssertionError):
        assert_close(jax.jit(method.apply_monolithic)(swapped, X, LOGITS), expected(scheme), **tolerances(scheme))


def test_apply_monolithic_routes():
    method, given = processed("fp8_per_block")
    found = jax.jit(method.apply_monolithic)(given, X, LOGITS)
    assert_close(found, expected("fp8_per_block"), **tolerances("fp8_per_block"))
    moe = dataclasses.replace(MOE, top_k=3, renormalize=False, scoring="sigmoid", routed_scaling_factor=2.5)
    routed = definition.route(LOGITS, 3, scoring="sigmoid", renormalize=False, factor=2.5)
    by_definition = definition.fused_moe(X, *(definition.real(x) for x in TREE.values()), *routed)
    assert_close(
        get_method(None, moe).apply_monolithic(weights(), X, LOGITS), by_definition, batch=BATCH, worst_row=ROW
    )


def test_correction_bias_is_not_ignored():
    given = weights(e_score_correction_bias=jnp.ones(E))
    with pytest.raises(UnsupportedError, match="e_score_correction_bias"):
        get_method(None, MOE).apply_monolithic(given, X, LOGITS)


def test_biases():
    b13, b2 = (even(*shape, seed=9).astype(BF16) for shape in ((E, 2, INNER), (E, H)))
    method, given = processed("int8_w8a16", w13_bias=jnp.asarray(b13), w2_bias=jnp.asarray(b2))
    found = jax.jit(method.apply_monolithic)(given, X, LOGITS)
    by_definition = expected("int8_w8a16", b13=definition.real(b13), b2=definition.real(b2))
    assert_close(found, by_definition, batch=BATCH, worst_row=ROW)


def test_expert_map():
    """Of 8 experts anywhere 4 are here; the others contribute nothing."""
    places = np.int32([-1, 0, -1, 1, 2, -1, -1, 3])
    logits = even(T, 8, seed=5)
    method, given = processed("fp8_per_block", expert_map=jnp.asarray(places))
    found = jax.jit(method.apply_monolithic)(given, X, logits)
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
    order = np.array([2, 0, 3, 1])
    method, given = processed("fp8_per_block")
    moved = jax.tree.map(lambda leaf: leaf[order], given)
    expected = jax.jit(method.apply_monolithic)(given, X, LOGITS)
    found = jax.jit(method.apply_monolithic)(moved, X, LOGITS[:, order])
    assert_close(found, expected, batch=BATCH, worst_row=ROW)
    with pytest.raises(AssertionError):
        assert_close(jax.jit(method.apply_monolithic)(moved, X, LOGITS), expected, batch=BATCH, worst_row=ROW)


@pytest.mark.smoke
def test_functional_layer():
    router = even(H, E, seed=6).astype(BF16)
    x = X[:32].reshape(4, 8, H)
    _, given = processed("int8_w8a16")
    found = jax.jit(moe_layer, static_argnums=3)(x, router, given, MOE)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    logits = X.astype(np.float64) @ router.astype(np.float64)
    by_definition = expected("int8_w8a16", logits)[:32].reshape(x.shape)
    assert_close(found, by_definition, batch=BATCH, worst_row=ROW)


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
    found = jax.jit(method.apply_monolithic)(method.process_weights_after_loading(weights()), X, LOGITS)
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


OWN = QuantSpec("mxfp8", "int8_per_token")


@pytest.fixture
def own_schemes():
    """Registers, and forgets when the test is over."""
    with mock.patch.dict(SHORTHANDS):
        register_scheme("my_formats", OWN)
        register_scheme("my_method", Halving)
        yield


@pytest.mark.usefixtures("own_schemes")
def test_schemes_of_ones_own():
    config = OnlineQuantConfig.parse("my_formats")
    assert get_method("my_formats", MOE).spec == OWN == config.moe == config.linear
    assert OnlineQuantConfig(targets={"x": "my_formats"}).resolve("x", "moe") == OWN
    method = get_method("my_method", MOE)
    assert isinstance(method, Halving)
    assert method.moe is MOE


@pytest.mark.usefixtures("own_schemes")
@pytest.mark.parametrize("config", ["my_method", {"moe": "my_method"}, {"targets": {"*": "my_method"}}], ids=str)
def test_configs_take_formats_only(config):
    says = "'my_method' is the method Halving, and loading and configs take formats only: load without quantization"
    with pytest.raises(ConfigError, match=says):
        OnlineQuantConfig.parse(config)


@pytest.mark.usefixtures("own_schemes")
def test_a_name_can_be_registered_again_where_that_is_meant():
    for scheme in (Halving, OWN):
        for taken in ("my_method", "my_formats"):
            with pytest.raises(ConfigError, match=f"a scheme '{taken}' already; choose another name, or give replace"):
                register_scheme(taken, scheme)
    register_scheme("my_method", OWN, replace=True)
    register_scheme("my_formats", Halving, replace=True)
    assert get_method("my_method", MOE).spec == OWN
    assert isinstance(get_method("my_formats", MOE), Halving)


@pytest.mark.usefixtures("own_schemes")
@pytest.mark.parametrize("taken", ["mxfp8", "fp8_per_block_static", "nvfp4", "int4_per_group_64", "fp8_per_token"])
def test_what_the_library_names_stays(taken):
    for scheme in (Halving, OWN):
        with pytest.raises(ConfigError, match=f"there is a scheme or format '{taken}' already"):
            register_scheme(taken, scheme, replace=True)


@pytest.mark.usefixtures("own_schemes")
@pytest.mark.parametrize("name", ["", "a,b", "a b", "a\n", "online", "bf16", "BF16", "none", "all", "auto"])
def test_names_that_no_scheme_can_have(name):
    for scheme in (Halving, OWN):
        with pytest.raises(ConfigError, match=re.escape(f"no scheme can have the name {name!r}")):
            register_scheme(name, scheme)


@pytest.mark.usefixtures("own_schemes")
def test_what_no_scheme_can_be():
    with pytest.raises(TypeError, match="a QuantSpec or a subclass of OnlineMoEMethodBase, not 3"):
        register_scheme("other", 3)
    with pytest.raises(TypeError, match=r"a scheme is named by a string, not int \(3\)"):
        register_scheme(3, OWN)
    with pytest.raises(ConfigError, match="has no weight format"):
        register_scheme("other", QuantSpec(None, "int8_per_token"))
    assert "other" not in SHORTHANDS
