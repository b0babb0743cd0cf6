"""Arguments that cannot be served: ConfigError before a byte is read."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import moe_online
from moe_online.config import MoEConfig
from moe_online.errors import ConfigError
from moe_online.experts import abstract_experts
from moe_online.flax import MoE
from moe_online.loading import open_source
from moe_online.loading.rules import parse_rule
from sources import (
    BF16,
    KEN_MAPPING,
    WatchedSource,
    as_ken,
    check_quantized,
    declared,
    nothing_left_on_the_device,
    ours,
    quiet_load,
)

TREE = ours(e=2, h=48, i=32)


def assert_refused(*says, abstract=None, source=TREE, **arguments):
    abstract = declared(TREE) if abstract is None else abstract
    watched = WatchedSource(open_source(source))
    with nothing_left_on_the_device():
        for function in (quiet_load, moe_online.plan):
            with pytest.raises(ConfigError) as caught:
                function(abstract, watched, **arguments)
            for words in says:
                assert words in str(caught.value), str(caught.value)
    assert not watched.reads


def test_unknown_scheme():
    assert_refused("fp7", "fp8_per_block", "int8_w8a16", quantization="fp7")
    assert_refused("fp7", "valid names", quantization={"moe": "fp7"})
    assert_refused("valid keys", quantization={"moes": "fp8_per_block"})


def test_scheme_that_reaches_nothing():
    plain = {"wi": jax.ShapeDtypeStruct((2, 3, 4), BF16), "norm": jax.ShapeDtypeStruct((3,), BF16)}
    source = {"wi": np.ones((2, 3, 4), BF16), "norm": np.ones(3, BF16)}
    assert_refused("wi (2, 3, 4)", "E K N", abstract=plain, source=source, quantization="fp8_per_block")
    assert_refused("1 layer (l0)", quantization={"targets": {"*other": "fp8_per_block"}})
    assert_refused("reaches no leaf", quantization={"moe": "fp8_per_block", "ignore": ["*"]})
    both = {"linear": "int8_w8a16", "moe": "fp8_per_block"}
    assert_refused("linear=int8_per_channel / none reaches no linear layer", quantization=both)
    quiet_load(declared(TREE), TREE, quantization="fp8_per_block")  # what a shorthand brings along may reach nothing


def test_concrete_leaves():
    assert_refused("not abstract: a, b.c", "nnx.eval_shape", abstract={"a": jnp.ones(2), "b": {"c": np.ones(2)}})
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    assert_refused("experts.w13_weight", "router.kernel", abstract=MoE(config, rngs=nnx.Rngs(0)))
    assert_refused("no leaf", abstract={})


def test_leaves_that_are_declared_as_quantized():
    quantized = quiet_load(declared(TREE), TREE, quantization="fp8_per_block").params
    assert_refused("l0.w13_weight is declared as quantized", abstract=jax.eval_shape(lambda: quantized))


@pytest.mark.parametrize(
    ("pattern", "rule", "says"),
    [
        ("*.w", "", "must be 'AXES', '-> TARGET'"),
        ("*.w", "E K N ->", "must be 'AXES', '-> TARGET'"),
        ("*.w", "->", "must be 'AXES', '-> TARGET'"),
        ("*.w", "E K X", "'E K X'"),
        ("*.w", "E K K", "distinct"),
        ("*.w", "experts.w", "axes 'experts.w'"),
        ("*.w", "-> *.a.*", "more * than the pattern"),
        ("w", "-> *.a", "more * than the pattern"),
    ],
)
def test_malformed_mapping(pattern, rule, says):
    assert_refused(says, repr(pattern), source=as_ken(TREE), mapping={**KEN_MAPPING, pattern: rule})


def test_ambiguous_mapping():
    both = [f"l0.w_{name} ('*.w_{name}', 'l0.*')" for name in ("gate", "up", "down")]  # all are named
    assert_refused(*both, source=as_ken(TREE), mapping={**KEN_MAPPING, "l0.*": "-> x"})
    exact = {**KEN_MAPPING, "*.w_*": "-> *.x"}
    assert_refused("several mapping rules", source=as_ken(TREE), mapping=exact)


def test_an_exact_name_wins():
    mapping = {"l0.w_gate": KEN_MAPPING["*.w_gate"].replace("*", "l0"), "*.w_up": KEN_MAPPING["*.w_up"]}
    mapping |= {"*.w_*": "E K N -> *.w2_weight"}
    source = as_ken(TREE)
    with pytest.raises(ConfigError, match=r"several mapping rules match l0\.w_up"):
        quiet_load(declared(TREE), source, mapping=mapping)
    mapping["l0.w_up"] = mapping.pop("*.w_up").replace("*", "l0")
    params = quiet_load(declared(TREE), source, mapping=mapping, quantization="fp8_per_block").params
    check_quantized(params, TREE, "fp8_per_block")


def test_unused_mapping():
    assert_refused(
        "match no tensor", "*.w_out", "l0.w_down", source=as_ken(TREE), mapping={**KEN_MAPPING, "*.w_out": "E K N"}
    )


def test_two_sources_for_one_leaf():
    source = as_ken(TREE)
    source["l0"]["w_down2"] = source["l0"]["w_down"]
    mapping = {**KEN_MAPPING, "*.w_down2": "E K N -> *.w2_weight"}
    assert_refused("several tensors", "l0.w_down, l0.w_down2", source=source, mapping=mapping)
    mapping["*.w_down2"] = "-> *.w13_weight"  # a whole beside its halves
    assert_refused("several tensors", "l0.w13_weight", source=source, mapping=mapping)


@pytest.mark.parametrize(
    ("pattern", "target", "name", "expected"),
    [
        ("*.a.*", "x.*.b.*", "1.a.2", "x.1.b.2"),
        ("*.a.*", "*.b", "1.a.2", "1.b"),
        ("*.a", "b", "1.a", "b"),
        ("*", "p.*", "q.r", "p.q.r"),
        ("w[0]+", "v", "w[0]+", "v"),
        ("*.a", "*.b", "1.a.c", None),
        ("a*", "*", "a", ""),
    ],
)
def test_stars(pattern, target, name, expected):
    match = parse_rule(pattern, f"-> {target}").apply(name)
    assert (match and match.target) == expected


def test_prefix():
    tree = {"params": TREE, "opt": {"mu": np.ones(3, np.float32)}}
    check_quantized(
        quiet_load(declared(TREE), tree, prefix="params", quantization="fp8_per_block").params, TREE, "fp8_per_block"
    )
    with pytest.raises(ConfigError, match=r"prefix='parms' names nothing.* opt, params"):
        quiet_load(declared(TREE), tree, prefix="parms")


def test_sources_that_are_none():
    for wrong, says in ((3, "the source is int"), ({"a": 1.5}, "a is float"), ({}, "no leaf"), (None, "no leaf")):
        with pytest.raises(ConfigError, match=re.escape(says)):
            quiet_load(declared(TREE), wrong)


def test_shards_that_do_not_fit():
    """A mesh of one device divides everything, so this one pretends to have two."""
    mesh = jax.sharding.AbstractMesh((2, 3), ("expert", "tensor"))
    with pytest.raises(ValueError, match=re.escape("32 of w13_weight (2, 2, 32, 48) does not divide among the 3")):
        declared(TREE, mesh=mesh)


def test_mesh_places_what_has_no_sharding():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("expert", "tensor"))
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    model = MoE(config, rngs=nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)))
    loaded = quiet_load(abstract, nnx.state(model), mesh=mesh).params
    expert = NamedSharding(mesh, PartitionSpec("expert", None, "tensor", None))
    assert loaded.experts.get_value().w13_weight.sharding == expert
    assert loaded.router.kernel[...].sharding == NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize(
    "limits", [{"unit_bytes": "1MB"}, {"unit_bytes": 1e5}, {"prefetch": 1.5}, {"memory_limit": "1GB"}]
)
def test_limits_are_whole_numbers(limits):
    assert_refused(next(iter(limits)), "whole number", source=as_ken(TREE), mapping=KEN_MAPPING, **limits)


def test_a_target_that_matches_nothing():
    config = {"targets": {"l0": "fp8_per_block", "layerz.*": "fp8_per_block"}}
    says = "targets match no experts or linear layers: layerz"
    assert_refused(says, source=as_ken(TREE), mapping=KEN_MAPPING, quantization=config)


def test_a_mapping_is_a_dict_of_strings():
    assert_refused("must be a dict", source=as_ken(TREE), mapping=["*.w_up"])
    assert_refused("must be a string", source=as_ken(TREE), mapping={"*.w_up": None})


def test_names_are_unique():
    leaf = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert_refused(
        "the same name: a.b", abstract={"a": {"b": leaf}, "a.b": leaf}, source={"a": {"b": np.ones(2)}}, mapping=None
    )


def test_arguments_in_the_wrong_order():
    assert_refused("load(model, source)", abstract="checkpoint", source=as_ken(TREE), mapping=None)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("N K -> w as E K N", r"has the axes E K N, but it is (2, 3)"),
        ("E N K -> w2_weight as E K N", r"has the axes E K N, but it is (2, 3, 4) (axes E N K)"),
    ],
)
def test_axes_that_a_leaf_does_not_have(rule, says):
    name = rule.partition(" -> ")[2].partition(" ")[0]
    experts = abstract_experts(2, 3, 4, BF16)
    abstract = {"w": jax.ShapeDtypeStruct((2, 3), BF16)} if name == "w" else experts
    source = {"a": np.ones(abstract["w"].shape if name == "w" else (2, 3, 4), np.float32)}
    if name != "w":
        source["w13_weight"] = np.ones((2, 2, 4, 3), np.float32)
    assert_refused(says, abstract=abstract, source=source, mapping={"a": rule})
