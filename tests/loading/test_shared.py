"""Shared experts, correction biases and experts that are not gated: loaded with the bits of numpy."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import moe_online
from by_name import assert_same_parts, by_name
from moe_online.config import MoEConfig
from moe_online.errors import ConfigError, MissingWeights, NonFiniteWeight, ShapeMismatch
from moe_online.experts import abstract_experts
from moe_online.flax import MoE
from moe_online.method import get_method
from moe_online.schemes import SHORTHANDS
from numpy_quantizer import quantize_numpy
from sources import BF16, nothing_left_on_the_device, quiet_load, random, swapped
from tolerance import assert_same_bits

E, ANYWHERE, H, INNER = 3, 8, 160, 96
SIZES = (H, INNER, 224)  # the last of all shared experts together
WEIGHTS = ("w13_weight", "w2_weight")


def declared(shards=2, sizes=SIZES, mesh=None):
    hidden, inner, shared = sizes
    experts = abstract_experts(
        E,
        hidden,
        inner,
        BF16,
        gated=shards == 2,
        num_correction_biases=ANYWHERE,
        shared_intermediate_size=shared,
        shared_gate=True,
        mesh=mesh,
    )
    return {"l0": {"experts": experts}}


def ours(shards=2, sizes=SIZES):
    """What `declared` asks for."""
    hidden, inner, shared = sizes
    experts = {
        "w13_weight": random(E, shards, inner, hidden),
        "w2_weight": random(E, hidden, inner, seed=1),
        "e_score_correction_bias": random(ANYWHERE, dtype=np.float32),
        "shared": {
            "w13_weight": random(1, shards, shared, hidden, seed=2),
            "w2_weight": random(1, hidden, shared, seed=3),
            "gate_weight": random(hidden, seed=4),
        },
    }
    return {"l0": {"experts": experts}}


def check(params, tree, routed, shared):
    """Weights have the codes and scales that numpy gives them, or their own bits; the rest stays."""
    found, source = params["l0"]["experts"], tree["l0"]["experts"]
    for part, stored, weight in ((found, source, routed), (found.shared, source["shared"], shared)):
        for name in WEIGHTS:
            if weight is None:
                assert_same_bits(getattr(part, name), stored[name])
            else:
                assert getattr(part, name).format == by_name(weight)
                halves = tuple(range(1, stored[name].ndim - 2))
                assert_same_parts(getattr(part, name), quantize_numpy(stored[name], weight, shared_axes=halves))
    assert_same_bits(found.shared.gate_weight, source["shared"]["gate_weight"])
    assert_same_bits(found.e_score_correction_bias, source["e_score_correction_bias"])


@pytest.mark.smoke
def test_every_shorthand_means_them_where_it_means_dense_layers():
    for name, shorthand in SHORTHANDS.items():
        plan = moe_online.plan(declared(sizes=(256, 128, 384)), ours(sizes=(256, 128, 384)), quantization=name)
        specs = {target.name.removeprefix("l0.experts."): target.spec for target in plan.targets}
        assert [specs.pop(name) for name in WEIGHTS] == [shorthand.moe] * 2
        assert [specs.pop(f"shared.{name}") for name in WEIGHTS] == [shorthand.linear] * 2
        assert specs == dict.fromkeys(("shared.gate_weight", "e_score_correction_bias"))


CASES = {  # the config, formats of routed and shared experts and of their inputs, matrices in w13, and the source
    "one each": (
        {"moe": "fp8_per_block", "linear": "mxfp8"},
        ("fp8_per_block", "fp8_per_group"),
        ("mxfp8", "mxfp8"),
        2,
        "Orbax",
    ),
    "experts alone": ("int8_per_channel_weight_only", ("int8_per_channel", None), (None, None), 1, "memory"),
    "linear alone": (
        {"linear": "fp8_per_tensor"},
        (None, None),
        ("fp8_per_tensor", "fp8_per_tensor_dynamic"),
        2,
        "memory",
    ),
}


@pytest.mark.parametrize(("quantization", "routed", "shared", "shards", "stored"), CASES.values(), ids=CASES)
def test_each_has_the_formats_of_its_kind(tmp_path, quantization, routed, shared, shards, stored):
    tree = source = ours(shards)
    if stored == "Orbax":
        source = tmp_path / "checkpoint"
        ocp.save(source, tree)
    params, report = quiet_load(declared(shards), source, quantization=quantization)
    check(params, tree, routed[0], shared[0])
    found = params["l0"]["experts"]
    for part, fmt in ((found, routed[1]), (found.shared, shared[1])):
        assert (part.activation_format and part.activation_format.name) == fmt
    assert report.resident_bytes <= report.peak_bytes <= report.planned_peak_bytes
    rules = {tensor.name: tensor.rule for tensor in report.tensors}
    assert rules["l0.experts.shared.gate_weight"] == "dense: gate of shared experts"
    assert rules["l0.experts.e_score_correction_bias"] == "dense: bias of experts"
    expected = "linear" if shared[0] else "no linear scheme"
    assert {rules[f"l0.experts.shared.{name}"] for name in WEIGHTS} == {expected}
    tree["l0"]["experts"]["shared"]["w13_weight"][0, -1, 2] *= 2
    with pytest.raises(AssertionError):
        check(params, tree, routed[0], shared[0])


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("quantization", "routed", "shared"),
    [
        ({"ignore": ["*.experts.shared"]}, "moe", "ignore: *.experts.shared"),
        ({"ignore": ["*.experts"]}, "ignore: *.experts", "linear"),
        ({"targets": {"l0.experts.shared": "int8_w8a8"}}, "no target matches", "targets: l0.experts.shared"),
        (
            {"targets": {"*.experts": "int8_w8a8", "re:.*shared$": "mxfp8"}},
            "targets: *.experts",
            "targets: re:.*shared$",
        ),
        ({"targets": {"*.experts*": "int8_w8a8"}}, "targets: *.experts*", "targets: *.experts*"),
    ],
)
def test_patterns_mean_shared_experts_by_name(quantization, routed, shared):
    config = moe_online.OnlineQuantConfig.parse(quantization, shorthand="mxfp8" if "ignore" in quantization else None)
    plan = moe_online.plan(declared(), ours(), quantization=config)
    rules = {target.name.removeprefix("l0.experts."): target.rule for target in plan.targets}
    assert [rules[name] for name in WEIGHTS] == [routed] * 2
    assert [rules[f"shared.{name}"] for name in WEIGHTS] == [shared] * 2


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"targets": {"*.experts*": "experts_int8"}}, "'experts_int8' does not define a linear spec"),
        ({"targets": {"*.shared.w13_weight": "mxfp8"}}, "(l0.experts.shared) of kind 'linear'"),
        ({"moe": "mxfp8", "ignore": ["re:.*shared", "shared"]}, "ignore matches no layers: shared; the model has"),
        ({"linear": "int4_w4a16"}, "l0.experts.shared.w13_weight (K=160"),
    ],
)
def test_what_does_not_reach_or_fit_them(quantization, says):
    for function in (moe_online.plan, quiet_load):
        with nothing_left_on_the_device(), pytest.raises(ConfigError) as caught:
            function(declared(), ours(), quantization=quantization)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("order", "weight"), [("E K N", "fp8_per_block"), ("E N K", "fp8_per_tensor"), ("N E K", None)]
)
def test_gate_and_up_of_shared_experts_come_apart(order, weight):
    tree = ours()
    experts = dict(tree["l0"]["experts"])
    shared = experts.pop("shared")
    axes = tuple("ENK".index(letter) for letter in order.replace(" ", ""))

    def stored(x):
        return np.ascontiguousarray(np.transpose(x, axes))

    source = {
        "l0": experts,
        "dense": {
            "gate": stored(shared["w13_weight"][:, 0]),
            "up": stored(shared["w13_weight"][:, 1]),
            "down": stored(shared["w2_weight"]),
            "weigh": shared["gate_weight"],
        },
    }
    mapping = {
        "l0.*": "-> l0.experts.*",
        "dense.gate": f"{order} -> l0.experts.shared.w13_weight.gate",
        "dense.up": f"{order} -> l0.experts.shared.w13_weight.up",
        "dense.down": f"{order} -> l0.experts.shared.w2_weight",
        "dense.weigh": "-> l0.experts.shared.gate_weight",
    }
    config = None if weight is None else {"linear": {"weight": weight}}
    params, _ = quiet_load(declared(), source, mapping=mapping, quantization=config)
    check(params, tree, None, weight)


UP = {
    "up": "E K N -> w13_weight",
    "down": "E K N -> w2_weight",
    "up_bias": "E N -> w13_bias",
    "down_bias": "-> w2_bias",
}


@pytest.mark.parametrize("weight", ["fp8_per_tensor", None])
def test_one_matrix_where_others_have_gate_and_up(weight):
    """Of experts that are not gated it may be stored without that axis."""
    w13, w2, b13, b2 = random(E, 1, INNER, H), random(E, H, INNER), random(E, 1, INNER), random(E, H)
    abstract = abstract_experts(E, H, INNER, BF16, gated=False, has_bias=True)
    source = {"up": swapped(w13[:, 0]), "down": swapped(w2), "up_bias": b13[:, 0], "down_bias": b2}
    config = None if weight is None else {"moe": {"weight": weight}}
    found, _ = quiet_load(abstract, source, mapping=UP, quantization=config, unit_bytes=1)
    for name, x in (("w13_weight", w13), ("w2_weight", w2)):
        if weight is None:
            assert_same_bits(getattr(found, name), x)
        else:
            assert_same_parts(getattr(found, name), quantize_numpy(x, weight))
    assert_same_bits(found.w13_bias, b13)
    assert_same_bits(found.w2_bias, b2)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"up": "-> w13_weight"},
            ShapeMismatch,
            f"up ({E}, {H}, {INNER}) (axes E S N K), needed ({E}, 1, {INNER}, {H})",
        ),
        ({"up": "E N -> w13_weight"}, ShapeMismatch, f"up ({E}, {H}, {INNER}) (axes E N), needed"),
        ({"up": "E K N -> w13_weight.gate"}, MissingWeights, "names that the model does not have: 1 tensor (up "),
        ({"up_bias": "E N -> w13_bias.up"}, MissingWeights, "names that the model does not have: 1 tensor (up_bias "),
        ({"down": "E N K -> w13_weight"}, ConfigError, "several tensors"),
    ],
)
def test_what_cannot_be_that_matrix(changes, error, says):
    abstract = abstract_experts(E, H, INNER, BF16, gated=False, has_bias=True)
    source = {
        "up": random(E, H, INNER),
        "down": random(E, INNER, H),
        "up_bias": random(E, INNER),
        "down_bias": random(E, H),
    }
    assert [len(target.parts) for target in moe_online.plan(abstract, source, mapping=UP).targets] == [1] * 4
    with pytest.raises(error) as caught:
        moe_online.plan(abstract, source, mapping=UP | changes)
    assert says in str(caught.value)


def test_no_scale_for_what_is_not_finite():
    tree = ours()
    tree["l0"]["experts"]["shared"]["w2_weight"][0, 5, 7] = np.inf
    with nothing_left_on_the_device(), pytest.raises(NonFiniteWeight) as caught:
        quiet_load(declared(), tree, quantization={"linear": "mxfp8"})
    assert caught.value.names == ("l0.experts.shared.w2_weight",)


def test_stacked_shared_experts_stay_as_they_are():
    """Of several layers in one, as nnx.vmap makes them."""
    tree = jax.tree.map(lambda x: np.stack([x, x]), ours())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), declared())
    check(quiet_load(abstract, tree).params, tree, None, None)
    plan = moe_online.plan({"a": abstract, "b": declared()}, {"a": tree, "b": ours()}, quantization="mxfp8")
    rules = {target.name: target.rule for target in plan.targets}
    assert [rules[f"{layer}.l0.experts.shared.w13_weight"] for layer in "ab"] == [
        "dense: stacked shared experts",
        "linear",
    ]


MODULE = MoEConfig(
    num_experts=4,
    top_k=2,
    hidden_size=32,
    intermediate_size=48,
    activation="relu2_no_mul",
    has_correction_bias=True,
    shared_intermediate_size=40,
    shared_expert_gate=True,
)


def test_a_module_of_nnx(tmp_path):
    model = MoE(MODULE, rngs=nnx.Rngs(0))
    ocp.save(tmp_path / "checkpoint", nnx.to_pure_dict(nnx.state(model)))
    abstract = nnx.eval_shape(lambda: MoE(MODULE, rngs=nnx.Rngs(1)))
    loaded = quiet_load(abstract, tmp_path / "checkpoint").params
    assert isinstance(loaded, MoE)
    jax.tree.map(assert_same_bits, nnx.state(loaded), nnx.state(model))
    plan = moe_online.plan(abstract, tmp_path / "checkpoint", quantization={"linear": "fp8_per_channel"})
    assert {target.name for target in plan.targets if target.spec is not None} == {
        f"experts.shared.{name}" for name in WEIGHTS
    }


def test_shared_experts_that_are_declared_as_quantized():
    method = get_method(None, MODULE, shared="int8_w8a16")
    quantized = jax.eval_shape(method.process_weights_after_loading, method.create_weights(4, 32, 48, BF16))
    with pytest.raises(ConfigError, match=r"shared\.w13_weight is declared as quantized; declare it as it is in the"):
        moe_online.plan(quantized, ours())


DEVICES = """
import json
import sys

sys.path[:0] = json.loads(sys.argv[1])
import jax

jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import test_shared as here
from moe_online.errors import ConfigError

mesh = Mesh(np.array(jax.devices()).reshape(1, 2), ("expert", "tensor"))
tree = here.ours(sizes=(160, 96, 512))
for weight, on_mesh in (("fp8_per_block", None), ("fp8_per_tensor", mesh)):
    abstract = here.declared(sizes=(160, 96, 512), mesh=on_mesh)
    params = here.quiet_load(abstract, tree, mesh=mesh, quantization={"linear": weight}).params
    here.check(params, tree, None, weight)
    found = params["l0"]["experts"]
    for leaf in (found.shared.gate_weight, found.e_score_correction_bias):
        assert leaf.sharding.is_fully_replicated, leaf.sharding
        assert len(leaf.sharding.device_set) == 2
    w13, w2 = found.shared.w13_weight.values, found.shared.w2_weight.values
    assert w13.sharding.spec == PartitionSpec(None, None, "tensor", None), w13.sharding
    assert w2.sharding.spec == PartitionSpec(None, None, "tensor"), w2.sharding
    assert w13.addressable_shards[0].data.nbytes * 2 == w13.nbytes
try:
    here.quiet_load(here.declared(mesh=mesh), here.ours(), quantization={"linear": "fp8_per_block"})
except ConfigError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_two_devices(request):
    """Each holds all shared experts, half of their I, with the bits of one device."""
    paths = [str(request.config.rootpath / "tests" / folder) for folder in ("support", "loading")]
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, json.dumps(paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    says = json.loads(done.stdout.splitlines()[-1])
    assert all(
        words in says for words in ("l0.experts.shared.w13_weight", "l0.experts.shared.w2_weight", "112", "block")
    )
