"""Shared experts, which every token visits, beside the routed ones: against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from by_name import assert_same_parts, by_name
from moe_online.config import MoEConfig
from moe_online.errors import ConfigError, NonFiniteWeight
from moe_online.method import get_method
from moe_online.schemes import SHORTHANDS, QuantSpec
from numpy_quantizer import quantize_numpy
from sources import BF16
from tolerance import assert_close, assert_same_bits

E, H, INNER, SHARED, WIDE, T = 4, 160, 32, 96, 224, 9
PLAIN = MoEConfig(num_experts=E, top_k=2, hidden_size=H, intermediate_size=INNER, shared_intermediate_size=SHARED)
GATED = dataclasses.replace(PLAIN, shared_expert_gate=True)
NOT_GATED = dataclasses.replace(GATED, activation="relu2_no_mul")  # the activation: w13 is one matrix
F32 = np.dtype(np.float32)
LOGITS = np.random.default_rng(4).standard_normal((T, E), np.float32)


def inputs(width, dtype=BF16, seed=3):
    return np.random.default_rng(seed).standard_normal((T, width), np.float32).astype(dtype)


X = inputs(H)


def made(moe=PLAIN, dtype=BF16, width=H, seed=0):
    """Weights that keep rows at one size; the shared experts take inputs of this width."""
    rng = np.random.default_rng(seed)

    def normal(leaf):
        return (rng.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.shape[-1])).astype(leaf.dtype)

    def of_width(leaf):
        return jax.ShapeDtypeStruct((*leaf.shape[:-1], width if leaf.shape[-1] == H else leaf.shape[-1]), leaf.dtype)

    declared = get_method(None, moe).create_weights(E, H, INNER, dtype)
    declared = dataclasses.replace(declared, shared=jax.tree.map(of_width, declared.shared))
    return jax.tree.map(normal, declared)


def changed(weights, **shared):
    return dataclasses.replace(weights, shared=dataclasses.replace(weights.shared, **shared))


@functools.partial(jax.jit, static_argnames=("scheme", "shared"))
def process(weights, scheme=None, shared=None):
    return get_method(scheme, PLAIN, shared=shared).process_weights_after_loading(weights)


@functools.partial(jax.jit, static_argnames="moe")
def layer(moe, weights, x=X, **more):
    return get_method(None, moe).apply_monolithic(weights, x, LOGITS, **more)


def halves(weights, moe=PLAIN, x=X, *, scheme=None, shared=None, shared_input=None):
    """What the routed and the shared experts make, by the definition; `weights` are not quantized."""
    own = weights.shared

    def real(of, name, kind):
        """Weights as they are quantized, and what else the definition wants to know."""
        spec = QuantSpec(None, None) if name is None else getattr(SHORTHANDS[name], kind)
        weight, activation = (fmt and fmt.name for fmt in (spec.weight, spec.activation))
        options = {"act": functools.partial(definition.activation, moe.activation), "act_format": activation}
        return [
            definition.real(of.w13_weight, weight, shared_axes=(1,)),
            definition.real(of.w2_weight, weight),
        ], options

    arrays, options = real(weights, scheme, "moe")
    routed = definition.fused_moe(x, *arrays, *definition.route(LOGITS, 2), **options)
    arrays, options = real(own, shared, "linear")
    gate = None if own.gate_weight is None else definition.real(own.gate_weight)
    x = x if shared_input is None else shared_input
    return routed, definition.shared_experts(x, *arrays, gate=gate, **options)


REAL = {"batch": 2.5e-3, "worst_row": 4e-3}  # rounding the result to bf16 costs 1.7e-3 and 2e-3
CODES = {"batch": 4e-3, "worst_row": 1.5e-2}  # and some activation codes fall to the other side of a tie
EXACT = {"batch": 1e-6, "worst_row": 3e-6}  # f32 sums cost 3e-7
CASES = {
    "f32": (GATED, F32, None, None, EXACT),
    "bf16": (NOT_GATED, BF16, None, None, REAL),
    "fp8 beside bf16": (GATED, BF16, None, "fp8_per_block", CODES),
    "bf16 beside int8": (PLAIN, BF16, "int8_w8a8", None, CODES),
    "int8 beside mxfp4": (GATED, BF16, "mxfp4", "int8_w8a8", CODES),
    "mxfp4 beside fp8, not gated": (NOT_GATED, BF16, "fp8_per_block", "mxfp4", CODES),
}


@pytest.mark.parametrize(
    ("moe", "dtype", "scheme", "shared", "tolerance"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.smoke if "beside mx" in name else ())
        for name, case in CASES.items()
    ],
)
def test_matches_definition(moe, dtype, scheme, shared, tolerance):
    """Each half has formats of its own."""
    given, x = made(moe, dtype), X.astype(dtype)
    quantized = process(given, scheme, shared)
    found = layer(moe, quantized, x)
    assert found.dtype == dtype
    assert_close(found, sum(halves(given, moe, x, scheme=scheme, shared=shared)), **tolerance)
    wrong = [halves(changed(given, w2_weight=given.shared.w2_weight[:, ::-1]), moe, x, scheme=scheme, shared=shared)]
    if moe is GATED:
        wrong.append(
            halves(changed(given, gate_weight=-given.shared.gate_weight), moe, x, scheme=scheme, shared=shared)
        )
    if scheme != shared:
        wrong += [halves(given, moe, x, scheme=both, shared=both) for both in (scheme, shared)]
    for each in wrong:
        with pytest.raises(AssertionError):
            assert_close(found, sum(each), **tolerance)


@pytest.mark.parametrize("width", [H, WIDE])
def test_another_input(width):
    """As where `x` is a projection of it, and the gate looks at it too."""
    given, wide = made(GATED, width=width), inputs(width, seed=5)
    expected = sum(halves(given, GATED, shared_input=wide))
    if width == H:
        routed = definition.route(LOGITS, 2)
        routed = (jnp.asarray(part, dtype) for part, dtype in zip(routed, (jnp.float32, jnp.int32), strict=True))
        found = jax.jit(get_method(None, GATED).apply)(given, X, *routed, wide)
    else:
        found = layer(GATED, given, shared_experts_input=wide)
    assert_close(found, expected, **REAL)
    with pytest.raises(AssertionError):
        assert_close(found, sum(halves(given, GATED, shared_input=wide[::-1])), **REAL)


def test_tokens_without_routed_experts_visit_them_all_the_same():
    given = made(GATED)
    routed, shared = halves(given, GATED)
    everywhere, mask = np.full(T, True), np.arange(T) % 3 > 0

    def call(places, mask):
        return layer(GATED, dataclasses.replace(given, expert_map=np.int32(places)), token_mask=mask)

    assert_close(call([-1] * E, everywhere), shared, **REAL)
    assert_close(call(range(E), mask), np.where(mask[:, None], shared + routed, 0), **REAL)  # padding is no token
    with pytest.raises(AssertionError):
        assert_close(call(range(E), everywhere), shared + np.where(mask[:, None], routed, 0), **REAL)


@pytest.mark.parametrize("shared", ["int8_w8a8", "fp8_per_tensor"])
def test_padding_has_no_say(shared):
    """Even where one scale spans all tokens."""
    weights, mask = process(made(GATED), None, shared), np.arange(T) % 3 > 0

    def call(padding):
        return np.asarray(layer(GATED, weights, np.where(mask[:, None], X, BF16.type(padding)), token_mask=mask))[mask]

    expected = call(0)
    for padding in (1e4, np.nan):
        assert_same_bits(call(padding), expected)
    given = halves(made(GATED), GATED, np.where(mask[:, None], X, BF16.type(0)), shared=shared)
    assert_close(expected, sum(given)[mask], **CODES)
    if shared == "fp8_per_tensor":
        with pytest.raises(AssertionError):
            assert_close(expected, sum(halves(made(GATED), GATED, 100 * X, shared=shared))[mask], **CODES)


def test_both_halves_are_rounded_once():
    """Between 256 and 512 bf16 has every second number: 257 becomes 256 and so would 256 + 0.5, but 257.5 is 258."""
    moe = MoEConfig(
        num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, shared_intermediate_size=1, activation="relu2"
    )
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, BF16), get_method(None, moe).create_weights(1, 1, 1, BF16))

    def call(size):
        weights = changed(ones, w2_weight=jnp.full((1, 1, 1), size, BF16))
        arguments = jnp.full((1, 1), 257.0), jnp.zeros((1, 1), jnp.int32)
        return float(jax.jit(get_method(None, moe).apply)(weights, jnp.ones((1, 1), BF16), *arguments)[0, 0])

    assert [call(0), call(0.5)] == [256, 258]


def test_the_routed_scale_leaves_them_alone():
    given = made()
    routed, shared = halves(given)
    moe = dataclasses.replace(PLAIN, routed_scaling_factor=4.0, apply_routed_scale_to_output=True)
    found = layer(moe, given)
    assert_close(found, 4 * routed + shared, **REAL)
    with pytest.raises(AssertionError):
        assert_close(found, 4 * (routed + shared), **REAL)


def test_no_tokens():
    given, none = made(GATED), (np.zeros((0, H), BF16), np.zeros((0, E), np.float32))
    apply = get_method(None, GATED).apply_monolithic
    declared = jax.eval_shape(lambda weights: apply(process(weights, "int8_w8a8", "fp8_per_block"), *none), given)
    for found in (jax.jit(apply)(given, *none), declared):
        assert (found.shape, found.dtype) == ((0, H), BF16)


@pytest.mark.parametrize("weight", ["fp8_per_tensor", "nvfp4", "fp8_per_block"])
def test_codes_are_numpys_and_gate_and_up_share_a_scale_of_all(weight):
    given = made(GATED)
    given.shared.w13_weight[:, 1] *= 8
    found = process(given, None, QuantSpec(by_name(weight), "mxfp8")).shared
    assert_same_parts(found.w13_weight, quantize_numpy(given.shared.w13_weight, weight, shared_axes=(1,)))
    assert_same_parts(found.w2_weight, quantize_numpy(given.shared.w2_weight, weight))
    assert_same_bits(found.gate_weight, given.shared.gate_weight)
    assert found.activation_format.name == "mxfp8"


def test_names_are_those_of_vllm():
    quantized = jax.eval_shape(lambda weights: process(weights, "fp8_per_block", "int8_w8a8"), made(GATED))
    tensors = quantized.named_tensors()
    names = {f"shared_experts.{name}" for name in ("w13_weight", "w13_scale", "w2_weight", "w2_scale", "gate_weight")}
    assert {name for name in tensors if name.startswith("shared")} == names
    assert {name for name in tensors if not name.startswith("shared")} >= {"w13_weight", "w13_weight_scale_inv"}
    assert tensors["shared_experts.w13_weight"] is quantized.shared.w13_weight.values
    assert "shared_experts.gate_weight" not in made(PLAIN).named_tensors()


@pytest.mark.parametrize("scheme", [None, "int8_w8a8"])
def test_processing_twice_is_refused(scheme):
    quantized = jax.eval_shape(lambda weights: process(weights, scheme, "mxfp4"), made())
    with pytest.raises(ValueError, match=r"shared\.w13_weight is quantized already, as 'mxfp4'"):
        process(quantized, scheme, None)


def test_no_scale_for_what_is_not_finite():
    given = made()
    given.shared.w2_weight[0, 1, 2] = np.nan
    with pytest.raises(NonFiniteWeight, match=r"elements in shared\.w2_weight; no scale") as caught:
        get_method(None, PLAIN, shared="fp8_per_block").process_weights_after_loading(given)
    assert caught.value.names == ("shared.w2_weight",)
    assert get_method(None, PLAIN).process_weights_after_loading(given).shared is given.shared  # as it is: no scale


def test_what_is_refused():
    method, given = get_method(None, PLAIN), made()
    routed = jnp.ones((T, 2)), jnp.zeros((T, 2), jnp.int32)
    with pytest.raises(ValueError, match="the weights have no shared experts; drop it"):
        method.apply(dataclasses.replace(given, shared=None), X, *routed, X)
    for tokens in (1, T - 1):  # neither is added to all tokens
        with pytest.raises(ValueError, match=rf"shared_input\.shape=\({tokens}, {H}\), which must be \({T}, {H}\)"):
            jax.eval_shape(method.apply, given, X, *routed, X[:tokens])
    with pytest.raises(ValueError, match=r"w13\.shape="):
        jax.eval_shape(method.apply, given, X, *routed, inputs(WIDE))


def test_their_scheme_is_that_of_dense_layers():
    assert get_method("mxfp8", PLAIN).shared is None
    assert get_method(None, PLAIN, shared="int8_w8a8").shared == SHORTHANDS["int8_w8a8"].linear
    with pytest.raises(ConfigError, match="'experts_int8' does not define a linear spec"):
        get_method(None, PLAIN, shared="experts_int8")
