"""`MoEConfig` and `OnlineQuantConfig`: what they accept, what they decide, what they refuse."""

import dataclasses
import json
import pickle
import re

import jax.numpy as jnp
import pytest

from moe_online.config import MoEConfig, OnlineQuantConfig
from moe_online.errors import ConfigError
from moe_online.models import DecoderConfig
from moe_online.schemes import SHORTHANDS, QuantSpec
from pallas_kernels import Activation
from pallas_kernels.routing import SimulatedRouting, llama4_routing

SIZES = {"num_experts": 4, "top_k": 2, "hidden_size": 32, "intermediate_size": 48}
BLOCK = QuantSpec("fp8_per_block", "fp8_per_group")
CHANNEL = QuantSpec("fp8_per_channel", "fp8_per_token")
INT8 = QuantSpec("int8_per_channel", None)
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.smoke
def test_moe_config_holds_what_it_is_given():
    act = Activation("swigluoai_uninterleave", alpha=1.702, beta=1.0, limit=7.0)
    config = MoEConfig(**SIZES, activation=act, scoring="sigmoid", params_dtype=jnp.float32)
    assert config.activation is act
    assert config.params_dtype == jnp.dtype(jnp.float32)
    assert hash(config) == hash(dataclasses.replace(config))
    assert MoEConfig(**SIZES | {"top_k": 1}, apply_router_weight_on_input=True).top_k == 1
    assert MoEConfig(**SIZES | {"top_k": 4}).activation == "silu"


DEEPSEEK = {
    "scoring": "sigmoid",
    "num_expert_group": 2,
    "topk_group": 1,
    "has_correction_bias": True,
    "routed_scaling_factor": 2.5,
    "shared_intermediate_size": 16,
    "shared_expert_gate": True,
}


@pytest.mark.smoke
def test_moe_config_of_routing_and_shared_experts():
    config = MoEConfig(**SIZES, **DEEPSEEK)
    assert {name: getattr(config, name) for name in DEEPSEEK} == DEEPSEEK
    assert config.output_scale == 1
    assert dataclasses.replace(config, apply_routed_scale_to_output=True).output_scale == 2.5
    assert config.gated
    assert not MoEConfig(**SIZES, activation="relu2_no_mul").gated
    assert not MoEConfig(**SIZES, activation=Activation("gelu_no_mul")).gated
    for changes in ({}, {"apply_routed_scale_to_output": True}, {"topk_group": 2}):
        changed = dataclasses.replace(config, **changes)
        assert {changed: "static"}[dataclasses.replace(changed)] == "static"  # jit finds what it has compiled
        assert (changed == config) == (not changes)


def test_moe_config_with_a_function_of_its_own():
    for function, same in (
        (llama4_routing, llama4_routing),
        (SimulatedRouting("zipf", seed=2), SimulatedRouting("zipf", seed=2)),
    ):
        config = MoEConfig(**SIZES, custom_routing_function=function, renormalize=False)
        assert hash(config) == hash(dataclasses.replace(config, custom_routing_function=same))
        assert config == dataclasses.replace(config, custom_routing_function=same)
        assert config != dataclasses.replace(config, custom_routing_function=SimulatedRouting("zipf"))
    on_output = {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True}
    assert MoEConfig(**SIZES, custom_routing_function=llama4_routing, **on_output).output_scale == 2.5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scoring": "sigmoid"}, "scoring='sigmoid'"),
        ({"num_expert_group": 2, "topk_group": 1}, "num_expert_group=2, topk_group=1"),
        ({"has_correction_bias": True}, "has_correction_bias=True"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
        (DEEPSEEK, "scoring='sigmoid', num_expert_group=2, topk_group=1, has_correction_bias=True, routed_scaling"),
    ],
)
def test_a_function_of_its_own_leaves_nothing_to_the_other_options(change, named):
    with pytest.raises(ConfigError, match=re.escape(f"custom_routing_function decides all that {named}")):
        MoEConfig(**SIZES, custom_routing_function=llama4_routing, **change)


@pytest.mark.parametrize(
    "activation",
    ["relu2_no_mul", Activation("situ", beta=1.5, linear_beta=2.0), Activation("swiglustep", limit=6.0)],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, DEEPSEEK | {"apply_routed_scale_to_output": True}], ids=["plain", "deepseek"])
def test_moe_config_survives_json(activation, options):
    sizes = {"vocab_size": 8, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    config = DecoderConfig(**sizes, moe=MoEConfig(**SIZES, activation=activation, **options))
    assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    function = MoEConfig(**SIZES, custom_routing_function=SimulatedRouting("zipf"))
    with pytest.raises(ConfigError, match=r"custom_routing_function=SimulatedRouting\(.* cannot be written as JSON"):
        dataclasses.replace(config, moe=function).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be a whole number, at least 1"),
        ({"top_k": 5}, "top_k=5 must be at most num_experts=4"),
        ({"num_experts": 0}, "num_experts=0 must be a whole number, at least 1"),
        ({"hidden_size": -32}, "hidden_size=-32 must be a whole number, at least 1"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be a whole number, at least 1"),
        ({"top_k": 2.0}, "top_k=2.0 must be a whole number"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor=None must be a finite number"),
        ({"routed_scaling_factor": float("nan")}, "must be a finite number"),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input needs top_k=1, not 2"),
        ({"activation": "swish"}, "unknown activation 'swish'; valid names: gelu"),
        ({"activation": "swigluoai_uninterleave"}, "needs limit"),
        ({"scoring": "tanh"}, "unknown scoring='tanh'; valid names: sigmoid, softmax"),
        ({"params_dtype": jnp.int8}, "params_dtype=int8 must be a floating dtype"),
        ({"topk_group": 1}, "num_expert_group=None, topk_group=1: grouped top-k needs both"),
        ({"num_expert_group": 2}, "num_expert_group=2, topk_group=None: grouped top-k needs both"),
        ({"num_expert_group": 2, "topk_group": 3}, "num_expert_group=2, topk_group=3: must be at least 1, and"),
        ({"num_expert_group": 2, "topk_group": 0}, "num_expert_group=2, topk_group=0: must be at least 1, and"),
        ({"num_expert_group": 2, "topk_group": 1, "top_k": 3}, "hold 2 of the 4 experts, fewer than top_k=3; raise"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size=-1 must be a whole number, at least 0"),
        ({"shared_expert_gate": True}, "shared_expert_gate=True needs shared experts: give shared_intermediate_size"),
    ],
)
def test_moe_config_refuses(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        MoEConfig(**SIZES | change)


def test_moe_config_refuses_other_types():
    with pytest.raises(TypeError, match="an activation is named by a string"):
        MoEConfig(**SIZES, activation=3)
    with pytest.raises(TypeError, match="custom_routing_function='llama4' must be a function"):
        MoEConfig(**SIZES, custom_routing_function="llama4")


@pytest.mark.smoke
def test_parse_a_shorthand():
    for name, shorthand in SHORTHANDS.items():
        config = OnlineQuantConfig.parse(name)
        assert (config.linear, config.moe) == (shorthand.linear, shorthand.moe)
        assert config == OnlineQuantConfig.parse(None, shorthand=name)
        assert config.resolve("layers.0.experts", "moe") == shorthand.moe
        assert config.resolve("layers.0.q_proj", "linear") == shorthand.linear


def test_parse_a_dict():
    config = OnlineQuantConfig.parse({"moe": {"weight": "fp8_per_block"}, "linear": "fp8_w8a16", "ignore": ["a", "b"]})
    assert config.moe == BLOCK
    assert config.linear == QuantSpec("fp8_per_channel", None)
    assert config.ignore == ("a", "b")
    assert OnlineQuantConfig.parse({"moe": "int8_per_channel", "linear": None, "targets": None}).linear is None
    assert OnlineQuantConfig.parse({"moe": INT8}, shorthand="online") == OnlineQuantConfig(moe=INT8)


def test_a_config_is_hashable_and_can_be_copied():
    config = OnlineQuantConfig(
        targets={"*.experts": "int8_w8a8", "re:.*proj": {"weight": "fp8_per_block"}}, ignore=["x"]
    )
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    assert OnlineQuantConfig.parse(config) == dataclasses.replace(config) == config
    assert dataclasses.replace(config, ignore=()).ignore == ()


def test_a_config_overrides_the_shorthand_field_by_field():
    def merged(config):
        return OnlineQuantConfig.parse(config, shorthand="fp8_per_block")

    assert merged({"ignore": ["x"]}) == OnlineQuantConfig(linear=BLOCK, moe=BLOCK, ignore=["x"])
    assert merged({"moe": "int8_w8a16"}) == OnlineQuantConfig(linear=BLOCK, moe=INT8)
    assert merged({"moe": {"activation": None}}).moe == QuantSpec("fp8_per_block", None)
    assert merged({"moe": {"weight": "int8_per_channel"}}).moe == QuantSpec("int8_per_channel", "fp8_per_group")
    assert merged({"moe": "int8_per_channel"}).moe == INT8  # a name leaves nothing out: its own default
    assert merged({"moe": {}}) == OnlineQuantConfig.parse("fp8_per_block")
    assert merged(OnlineQuantConfig(moe=INT8, ignore=["x"])) == OnlineQuantConfig(linear=BLOCK, moe=INT8, ignore=["x"])


def test_what_was_said_explicitly():
    """It must reach a layer; what a shorthand brings along need not."""

    def explicit(config, shorthand=None):
        return OnlineQuantConfig.parse(config, shorthand=shorthand).explicit

    assert explicit("fp8_per_block") == explicit(None, "fp8_per_block") == explicit({"ignore": ["x"]}, "mxfp8") == ()
    assert explicit({"moe": {"activation": None}}, "fp8_per_block") == ("moe",)
    assert explicit({"linear": "fp8_per_block", "moe": "fp8_per_block"}) == ("moe", "linear")
    assert OnlineQuantConfig(linear=BLOCK).explicit == explicit(OnlineQuantConfig(linear=BLOCK), "mxfp8") == ("linear",)
    by_shorthand = OnlineQuantConfig.parse("fp8_per_block")
    for copied in (explicit(by_shorthand), dataclasses.replace(by_shorthand, ignore=["x"]).explicit):
        assert copied == ()
    assert by_shorthand == OnlineQuantConfig(linear=BLOCK, moe=BLOCK)


@pytest.mark.parametrize(
    ("config", "shorthand", "message"),
    [
        (None, None, "requires at least one of linear, moe, targets"),
        ("online", None, "requires at least one of"),
        ({}, "online", "requires at least one of"),
        ({"ignore": ["x"], "targets": {}}, None, "requires at least one of"),
        (
            {"moe": "fp8_per_block", "targets": {"x": "fp8_per_block"}},
            None,
            "targets cannot stand beside linear or moe",
        ),
        ({"linear": "fp8_per_block", "targets": {"x": "fp8_per_block"}}, None, "targets cannot stand beside"),
        (
            {"targets": {"x": "fp8_per_block"}},
            "fp8_per_block",
            "targets cannot stand beside linear or moe (a shorthand",
        ),
        ("int3", None, "unknown quantization scheme 'int3'; valid names: experts_int8, fp8, "),
        (
            "int8_per_channel",
            None,
            "as a weight format it goes into a config: {'moe': 'int8_per_channel'}; valid names",
        ),
        ({}, "bf16", "unknown quantization scheme 'bf16'"),
        ("fp8_per_block", "fp8_per_block", "both name a scheme"),
        ({"moe": "fp9"}, None, "unknown quantization scheme 'fp9'; valid names: experts_int8, fp8, "),
        ({"moe": {"weight": "fp9"}}, None, "unknown weight format 'fp9'; valid names: fp8_per_block"),
        ({"moe": {"weight": "fp8_per_token"}}, None, "'fp8_per_token' is no weight format"),
        ({"moe": {"activation": None}}, None, "has no weight format"),
        ({"moe": {"weight": "fp8_per_block", "act": None}}, None, "unknown keys ['act']"),
        ({"linear": "experts_int8"}, None, "online shorthand 'experts_int8' does not define a linear spec"),
        ({"moe": "fp8_per_block", "ignored": []}, None, "unknown keys ['ignored'] in the quantization config"),
        ({"moe": "fp8_per_block", "ignore": "re:.*"}, None, "ignore='re:.*' must be a list of patterns: ['re:.*']"),
        ({"moe": "fp8_per_block", "ignore": [3]}, None, "a pattern in ignore or targets is a string, not int (3)"),
        ({"moe": "fp8_per_block", "ignore": ["re:(x"]}, None, "pattern 're:(x' is no regular expression: missing )"),
        ({"targets": {"re:[": "fp8_per_block"}}, None, "pattern 're:[' is no regular expression"),
        ({"targets": {3: "fp8_per_block"}}, None, "a pattern in ignore or targets is a string, not int (3)"),
        ({"targets": {"x": "int3"}}, None, "unknown quantization scheme 'int3'"),
    ],
)
def test_parse_refuses(config, shorthand, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        OnlineQuantConfig.parse(config, shorthand=shorthand)


@pytest.mark.parametrize(
    ("config", "shorthand"),
    [
        (3, None),
        (BLOCK, None),
        ({"moe": 3}, None),
        ({"moe": {"weight": 3}}, None),
        (None, 3),
        ({"targets": {"x": 3}}, None),
    ],
)
def test_parse_refuses_other_types(config, shorthand):
    with pytest.raises(TypeError, match=r"not (int|QuantSpec)"):
        OnlineQuantConfig.parse(config, shorthand=shorthand)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("model.layers.0.experts", True),
        ("layers.0.experts", False),
        ("model.layers.0", False),
        ("*experts", True),
        ("*.layers.?.*", True),
        ("experts*", False),
        ("*EXPERTS", False),
        ("re:.*experts", True),
        ("re:.*layers[.]0[.]", True),  # from the start, not to the end
        ("re:layers", False),
        ("re:.*layers[.]0$", False),
    ],
)
def test_patterns(pattern, matches):
    name = "model.layers.0.experts"
    ignored = OnlineQuantConfig(moe=BLOCK, ignore=["another", pattern]).resolve_with_rule(name, "moe")
    assert ignored == ((None, f"ignore: {pattern}") if matches else (BLOCK, "moe"))
    targeted = OnlineQuantConfig(targets={"another": INT8, pattern: BLOCK}).resolve_with_rule(name, "moe")
    assert targeted == ((BLOCK, f"targets: {pattern}") if matches else (None, "no target matches"))


def test_resolve_by_kind():
    config = OnlineQuantConfig(moe="fp8_per_block")
    assert config.resolve_with_rule("x", "moe") == (BLOCK, "moe")
    assert config.resolve_with_rule("x", "linear") == (None, "no linear scheme")
    assert config.resolve_with_rule("x", "other") == (None, "neither linear nor moe")
    assert OnlineQuantConfig(linear="int8_w8a16").resolve_with_rule("x", "linear") == (INT8, "linear")
    with pytest.raises(ValueError, match="unknown kind='experts'; valid kinds: moe, linear, other"):
        config.resolve("x", "experts")


def test_targets():
    config = OnlineQuantConfig(targets={"*.experts": "fp8_per_block", "*proj": "int8_w8a16"})
    assert config.resolve("a.experts", "moe") == BLOCK
    assert config.resolve("a.q_proj", "linear") == INT8
    assert config.resolve("a.norm", "other") is None
    with pytest.raises(ConfigError, match=r"target '\*proj' matches 'a.proj', which is neither a linear layer nor"):
        config.resolve("a.proj", "other")


def test_several_targets_are_refused():
    config = OnlineQuantConfig(targets={"*experts": "fp8_per_block", "a.*": "fp8_per_block"})
    assert config.resolve("b.experts", "moe") == BLOCK
    with pytest.raises(ConfigError, match=r"layer 'a.experts' matches more than one target: '\*experts', 'a.\*'"):
        config.resolve("a.experts", "moe")
    with pytest.raises(ConfigError, match=r"layer 'a.experts_q' matches more than one target"):
        OnlineQuantConfig(targets={"*experts_q": BLOCK, "a.*_q": BLOCK}).resolve(
            "a.fused", "linear", shards=["a.experts_q", "a.experts_k"]
        )


def test_ignore_and_targets_together_are_refused():
    config = OnlineQuantConfig(targets={"*experts": "fp8_per_block"}, ignore=["a.*"])
    assert config.resolve("b.experts", "moe") == BLOCK
    assert config.resolve("a.dense", "linear") is None
    with pytest.raises(
        ConfigError, match=r"layer 'a.experts' matches both ignore \('a.\*'\) and targets \('\*experts'\)"
    ):
        config.resolve("a.experts", "moe")


def test_a_target_without_a_spec_for_the_kind_is_refused():
    config = OnlineQuantConfig(targets={"*": "experts_int8"})
    assert config.resolve("experts", "moe") == INT8
    with pytest.raises(ConfigError, match="online shorthand 'experts_int8' does not define a linear spec"):
        config.resolve("q_proj", "linear")


@pytest.mark.parametrize("shards", [QKV, tuple(f"a.{shard}" for shard in QKV)], ids=["last", "whole"])
def test_fused_layers(shards):
    def resolve(**config):
        return OnlineQuantConfig(**config).resolve_with_rule("a.qkv_proj", "linear", shards=shards)

    assert resolve(targets={"a.qkv_proj": BLOCK}) == (BLOCK, "targets: a.qkv_proj")
    assert resolve(targets={"a.[qkv]_proj": BLOCK}) == (BLOCK, "targets: a.[qkv]_proj")
    assert resolve(targets={"*.q_proj": BLOCK, "*.[kv]_proj": BLOCK}) == (BLOCK, "targets: *.q_proj")
    assert resolve(targets={"a.q*": BLOCK}) == (BLOCK, "targets: a.q*")  # by its own name; q_proj does not matter
    assert resolve(targets={"b.*": BLOCK}) == (None, "no target matches")
    assert resolve(linear=BLOCK, ignore=["*.q_proj", "*.[kv]_proj"]) == (None, "ignore: *.q_proj")
    assert resolve(linear=BLOCK, ignore=["a.qkv_proj"]) == (None, "ignore: a.qkv_proj")
    assert resolve(linear=BLOCK, ignore=["b.*"]) == (BLOCK, "linear")
    with pytest.raises(ConfigError, match=r"Found unmatched shards of the fused layer 'a.qkv_proj': 'a.v_proj'; match"):
        resolve(targets={"a.[qk]_proj": BLOCK})
    with pytest.raises(ConfigError, match=r"Found unmatched shards of .*: 'a.q_proj', 'a.k_proj'"):
        resolve(linear=BLOCK, ignore=["a.v_proj"])
    with pytest.raises(ConfigError, match=r"targets '\*.q_proj', '\*.\[kv\]_proj' give different schemes to the fused"):
        resolve(targets={"*.q_proj": BLOCK, "*.[kv]_proj": CHANNEL})
    with pytest.raises(ConfigError, match="give different schemes"):
        resolve(targets={"a.qkv_proj": BLOCK, "a.v_proj": CHANNEL})


def test_a_prequantized_layer_is_not_touched():
    config = OnlineQuantConfig(moe=BLOCK, ignore=["*.0.*"])
    assert config.resolve("layers.0.experts", "moe", prequantized=True) is None
    assert config.resolve("layers.1.q_proj", "linear", prequantized=True) is None
    with pytest.raises(
        ConfigError, match=r"'moe' would quantize 'layers.1.experts' to fp8_per_block / .* a pre-quantized"
    ):
        config.resolve("layers.1.experts", "moe", prequantized=True)
    with pytest.raises(ConfigError, match="pre-quantized layer; add it to ignore"):
        OnlineQuantConfig(targets={"x": BLOCK}).resolve("x", "moe", prequantized=True)
