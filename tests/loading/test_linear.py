"""Dense layers: kernels are transposed and quantized on the way, with the bits of numpy and by a config's rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import moe_online
from by_name import assert_same_parts, by_name, whole_blocks
from moe_online.config import MoEConfig
from moe_online.dense import DenseKernel
from moe_online.errors import ConfigError, ShapeMismatch
from moe_online.flax import Linear, MoE
from moe_online.loading import quantizer, steps
from moe_online.loading.quantizer import PartLayout, temporary_bytes
from moe_online.quant_config import matches
from moe_online.schemes import SHORTHANDS, QuantSpec
from numpy_quantizer import WEIGHTS, dequantize_numpy, quantize_numpy
from quick import few
from sources import BF16, nothing_left_on_the_device, quiet_load, random, swapped
from tolerance import assert_same_bits

H, INNER, E = 160, 288, 2
MOE = MoEConfig(num_experts=E, top_k=1, hidden_size=H, intermediate_size=INNER)


class Block(nnx.Module):
    """Two dense layers, a norm, a plain `nnx.Linear` and experts."""

    def __init__(self, *, rngs):
        self.up = Linear(H, INNER, param_dtype=jnp.bfloat16, rngs=rngs)
        self.down = Linear(INNER, H, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)
        self.plain = nnx.Linear(H, H, param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.RMSNorm(H, param_dtype=jnp.bfloat16, rngs=rngs)
        self.moe = MoE(MOE, rngs=rngs)


def declared():
    return nnx.eval_shape(lambda: Block(rngs=nnx.Rngs(0)))


SOURCE = {
    "up": {"kernel": random(H, INNER), "bias": random(INNER)},
    "down": {"kernel": random(INNER, H, seed=1)},
    "plain": {"kernel": random(H, H), "bias": random(H)},
    "norm": {"scale": random(H)},
    "moe": {
        "router": {"kernel": random(H, E)},
        "experts": {"w13_weight": random(E, 2, INNER, H), "w2_weight": random(E, H, INNER)},
    },
}


def only(weight):
    return {"linear": QuantSpec(by_name(weight), None)}


def one(k, n, dtype=jnp.bfloat16):
    return nnx.eval_shape(lambda: Linear(k, n, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0)))


def check_kernel(found, stored, weight):
    """The codes and scales of `stored` `[K, N]`, transposed, are those of numpy."""
    assert isinstance(found, DenseKernel)
    assert found.weight.format == by_name(weight)
    assert_same_parts(found.weight, quantize_numpy(swapped(stored), weight))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", few([BF16, np.dtype(np.float16), np.dtype(np.float32)], (BF16,)), ids=str)
@pytest.mark.parametrize("weight", few(WEIGHTS))
def test_bits_are_those_of_numpy(weight, dtype):
    n, k = whole_blocks(weight, (200, 300))
    stored = random(k, n, dtype=dtype)
    kernel = quiet_load(one(k, n), {"kernel": stored}, quantization=only(weight)).params.kernel.get_value()
    check_kernel(kernel, stored, weight)  # of the stored dtype, though the layer is declared as bf16
    stored[:, 7] *= 2
    with pytest.raises(AssertionError):
        check_kernel(kernel, stored, weight)


@pytest.mark.parametrize("shape", [(257, 130), (1, 1), (129, 5)], ids=str)
@pytest.mark.parametrize("weight", few(WEIGHTS, ("fp8_per_block", "nvfp4")))
def test_chunks_of_rows(monkeypatch, weight, shape):
    """Several chunks along N, the last one ragged, have the bits of one: also of a scale that spans the matrix."""
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 2**10)
    n, k = whole_blocks(weight, shape)
    rows = quantizer.chunk_rows((n, k), by_name(weight))[1]
    if n == 257:
        assert 0 < 257 % rows < 257
    stored = random(k, n)
    arguments = {"quantization": only(weight), "unit_bytes": 1}  # a matrix is the least
    check_kernel(quiet_load(one(k, n), {"kernel": stored}, **arguments).params.kernel.get_value(), stored, weight)
    assert len(moe_online.plan(one(k, n), {"kernel": stored}, **arguments).units) == 1


@pytest.mark.parametrize("weight", ["fp8_per_tensor", None])
@pytest.mark.parametrize("order", ["K N", "N K"])
def test_stored_axes(weight, order):
    """A rule may say how a kernel is stored; without one it is `[K, N]`, as nnx has it."""
    kernel = SOURCE["up"]["kernel"]
    source = {"w": kernel if order == "K N" else swapped(kernel)}
    arguments = {"quantization": weight and only(weight), "mapping": {"w": f"{order} -> kernel"}}
    found = quiet_load(one(*kernel.shape), source, **arguments).params.kernel.get_value()
    if weight is None:
        assert_same_bits(found, kernel)
    else:
        check_kernel(found, kernel, weight)


def test_a_checkpoint_of_plain_nnx_needs_no_mapping(tmp_path):
    plain = nnx.Linear(H, INNER, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ocp.save(tmp_path / "c", nnx.to_pure_dict(nnx.state(plain)))
    abstract = nnx.eval_shape(lambda: Linear(H, INNER, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1)))
    linear, report = quiet_load(abstract, tmp_path / "c", quantization={"linear": "fp8_per_block"})
    check_kernel(linear.kernel.get_value(), np.asarray(plain.kernel[...]), "fp8_per_block")
    assert_same_bits(linear.bias[...], plain.bias[...])
    assert [tensor.name for tensor in report.tensors] == ["bias", "kernel"]
    assert isinstance(abstract.kernel.get_value(), jax.ShapeDtypeStruct)  # the declaration is as it was


NEVER = {  # quantized, and why
    "up.bias": "dense: bias of Linear",
    "plain.kernel": "dense: nnx.Linear",
    "plain.bias": "dense: nnx.Linear",
    "norm.scale": "dense: nnx.RMSNorm",
    "moe.router.kernel": "dense: router",
}


def rules(quantization, function=moe_online.plan):
    found = function(declared(), SOURCE, quantization=quantization)
    facts = {
        tensor.name: (tensor.scheme, tensor.rule)
        for tensor in (found.targets if function is moe_online.plan else found.report.tensors)
    }
    assert {name: facts.pop(name) for name in NEVER} == {name: (KEPT, rule) for name, rule in NEVER.items()}
    return facts


BLOCK, INT8, KEPT = "fp8_per_block / fp8_per_group", "int8_per_channel / none", "bfloat16"
EXPERTS = ("moe.experts.w13_weight", "moe.experts.w2_weight")


@pytest.mark.smoke
def test_rules_in_the_plan_and_the_report():
    def facts(up, down, experts):
        return {"up.kernel": up, "down.kernel": down} | dict.fromkeys(EXPERTS, experts)

    linear, moe = (INT8, "linear"), (BLOCK, "moe")
    both = {"linear": "int8_w8a16", "moe": "fp8_per_block"}
    assert rules(both) == rules(both, quiet_load) == facts(linear, linear, moe)
    assert rules({"linear": "int8_w8a16"}) == facts(linear, linear, (KEPT, "no moe scheme"))
    assert rules("fp8_per_block") == facts((BLOCK, "linear"), (BLOCK, "linear"), moe)
    assert rules("experts_int8") == facts(*[(KEPT, "no linear scheme")] * 2, (INT8, "moe"))
    assert rules(SHORTHANDS["fp8_per_block"].moe) == facts(*[(KEPT, "no linear scheme")] * 2, moe)  # experts alone
    assert rules(both | {"ignore": ["d*n"]}) == facts(linear, (KEPT, "ignore: d*n"), moe)
    targets = {"up": "fp8_per_block", "re:moe.e": "int8_w8a16"}
    assert rules({"targets": targets}) == facts(
        (BLOCK, "targets: up"), (KEPT, "no target matches"), (INT8, "targets: re:moe.e")
    )


def test_what_is_ignored_says_so():
    """Also where nothing would have quantized it."""
    config = {"moe": "fp8_per_block", "ignore": ["plain", "*.router", "re:no", "down"]}
    plan = moe_online.plan(declared(), SOURCE, quantization=config)
    facts = {target.name: target.rule for target in plan.targets}
    assert facts == NEVER | {
        "plain.kernel": "ignore: plain",
        "plain.bias": "ignore: plain",
        "moe.router.kernel": "ignore: *.router",
        "norm.scale": "ignore: re:no",
        "up.kernel": "no linear scheme",
        "down.kernel": "ignore: down",
    } | dict.fromkeys(EXPERTS, "moe")


class Stack(nnx.Module):
    """Three dense layers in one module, as nnx.scan takes them, and one alone."""

    def __init__(self, *, rngs):
        def make(rngs):
            return Linear(H, INNER, param_dtype=jnp.bfloat16, rngs=rngs)

        self.layers, self.head = nnx.split_rngs(splits=3)(nnx.vmap(make))(rngs), make(rngs)


STACK = {
    "layers": {"kernel": random(3, H, INNER), "bias": random(3, INNER)},
    "head": {"kernel": random(H, INNER), "bias": random(INNER)},
}


@pytest.mark.parametrize("quantization", [None, {"linear": "int8_w8a16"}])
def test_stacked_layers_stay_as_they_are(quantization):
    """Their kernel `[L, K, N]` is no matrix."""
    abstract = nnx.eval_shape(lambda: Stack(rngs=nnx.Rngs(0)))
    params, report = quiet_load(abstract, STACK, quantization=quantization)
    assert_same_bits(params.layers.kernel[...], STACK["layers"]["kernel"])
    assert_same_bits(params.layers.bias[...], STACK["layers"]["bias"])
    facts = {tensor.name: tensor.rule for tensor in report.tensors}
    if quantization is None:
        assert set(facts.values()) == {"as declared"}
        return
    check_kernel(params.head.kernel.get_value(), STACK["head"]["kernel"], "int8_per_channel")
    assert facts == {
        "layers.kernel": "dense: stacked Linear",
        "layers.bias": "dense: stacked Linear",
        "head.kernel": "linear",
        "head.bias": "dense: bias of Linear",
    }
    refused(
        "target '*' matches 'layers'", "stacked Linear", abstract=abstract, source=STACK,
        quantization={"targets": {"*": "int8_w8a16"}},
    )  # fmt: skip


def test_formats_travel_with_the_layer_that_they_were_chosen_for():
    config = {"targets": {"up": "int8_w8a8", "down": "int8_w8a16", "moe.e*": "fp8_per_block"}}
    params = quiet_load(declared(), SOURCE, quantization=config).params
    assert params.up.kernel.get_value().activation_format.name == "int8_per_token"
    assert params.down.kernel.get_value().activation_format is None
    assert params.moe.experts.get_value().activation_format.name == "fp8_per_group"
    check_kernel(params.up.kernel.get_value(), SOURCE["up"]["kernel"], "int8_per_channel")
    check_kernel(params.down.kernel.get_value(), SOURCE["down"]["kernel"], "int8_per_channel")


def test_errors_and_tables():
    plan, (_, report) = (
        function(declared(), SOURCE, quantization={"linear": "fp8_per_block"})
        for function in (moe_online.plan, quiet_load)
    )
    found = {tensor.name: tensor for tensor in report.tensors}
    for name in ("up", "down"):
        x = swapped(SOURCE[name]["kernel"]).astype(np.float64)
        error = np.linalg.norm(dequantize_numpy(quantize_numpy(x.astype(BF16), "fp8_per_block"), "fp8_per_block") - x)
        assert found[f"{name}.kernel"].error == pytest.approx(error / np.linalg.norm(x), rel=1e-3)
        assert found[f"{name}.kernel"].worst_expert_error is None
        assert found[f"{name}.kernel"].shape == x.shape
    assert found["up.bias"].error is None
    for part in (plan, report):
        row = next(line for line in str(part).splitlines() if "up.kernel" in line)
        assert all(words in row for words in (BLOCK, "linear"))


# --- what is refused, before a byte is read ---------------------------------------------------------------------------


def refused(*says, abstract=None, source=SOURCE, error=ConfigError, **arguments):
    for function in (moe_online.plan, quiet_load):
        with nothing_left_on_the_device(), pytest.raises(error) as caught:
            function(declared() if abstract is None else abstract, source, **arguments)
        for words in says:
            assert words in str(caught.value), str(caught.value)


def test_a_linear_scheme_that_reaches_nothing():
    abstract = nnx.eval_shape(lambda: MoE(MOE, rngs=nnx.Rngs(0)))
    says = ("1 layer (experts) of kind 'moe'", "no layer of kind 'linear'", "moe_online.flax.Linear")
    refused(*says, abstract=abstract, source=SOURCE["moe"], quantization={"linear": "int8_w8a16"})
    refused("2 layers (", "(moe.experts)", "nope", quantization={"targets": {"nope": "fp8_per_block"}})
    for both in ({"linear": "int8_w8a16", "moe": "fp8_per_block"}, dict.fromkeys(("linear", "moe"), "fp8_per_block")):
        refused("reaches no linear layer", *says, abstract=abstract, source=SOURCE["moe"], quantization=both)
        refused("reaches no moe layer", abstract=one(H, INNER), source={"kernel": random(H, INNER)}, quantization=both)


@pytest.mark.parametrize("change", [{}, {"moe": {"activation": None}}, {"ignore": ["router"]}], ids=str)
def test_what_a_shorthand_brings_along_may_reach_nothing(change):
    abstract = nnx.eval_shape(lambda: MoE(MOE, rngs=nnx.Rngs(0)))
    config = moe_online.OnlineQuantConfig.parse(change, shorthand="fp8_per_block")
    for once_more in (config, moe_online.OnlineQuantConfig.parse(config), dataclasses.replace(config)):
        plan = moe_online.plan(abstract, SOURCE["moe"], quantization=once_more)
        assert [target.rule for target in plan.targets if target.spec is not None] == ["moe", "moe"]


def test_layers_that_match_both_ignore_and_targets():
    config = {"targets": {"up": "fp8_per_block"}, "ignore": ["u*"]}
    refused("layer 'up' matches both ignore ('u*') and targets ('up')", quantization=config)
    refused("does not define a linear spec", quantization={"targets": {"up": "experts_int8"}})


@pytest.mark.parametrize("pattern", ["*", "re:up|plain", "re:moe", "re:moe.experts|norm"])
def test_targets_of_what_cannot_be_quantized(pattern):
    """Also where they reach something else."""
    matched = [name for name in ("plain", "norm", "moe.router") if matches(pattern, name)]
    assert matched
    for name in matched:
        says = f"target {pattern!r} matches {name!r}, which is neither a linear layer nor routed experts"
        refused(says, "moe_online.flax.Linear", quantization={"targets": {pattern: "int8_w8a16"}})
    if "plain" in matched:
        refused("(nnx.Linear; only moe_online.flax.Linear", quantization={"targets": {pattern: "int8_w8a16"}})


def test_targets_of_plain_leaves():
    """In a pytree no layer stands around a matrix."""
    experts = {"experts": nnx.eval_shape(lambda: MoE(MOE, rngs=nnx.Rngs(0))).experts.get_value()}
    abstract = experts | {"head": {"kernel": jax.ShapeDtypeStruct((H, INNER), BF16)}}
    source = {"experts": SOURCE["moe"]["experts"], "head": {"kernel": random(H, INNER)}}
    for pattern in ("head", "head.kernel", "*"):
        config = {"targets": {"experts": "int8_w8a16", pattern: "int8_w8a16"}}
        says = (f"target {pattern!r} matches 'head", "axes not stated")
        refused(*says, abstract=abstract, source=source, quantization=config)


@pytest.mark.parametrize("pattern", ["lm_haed", "up.kernel", "*.up", "re:own"])
def test_patterns_of_ignore_that_match_nothing(pattern):
    config = {"moe": "fp8_per_block", "linear": "fp8_per_block", "ignore": ["down", pattern]}
    refused(f"ignore matches no layers: {pattern}; the model has 2 layers (down, up)", quantization=config)


def test_a_block_that_does_not_divide():
    """All offenders at once, experts and dense layers alike."""
    config = {"linear": "int4_per_group", "moe": "int4_per_group"}
    says = (f"{name} (K={k} of shape=" for name, k in (("up.kernel", H), ("down.kernel", INNER), (EXPERTS[1], INNER)))
    refused(*says, f"({INNER}, {H}) must be a multiple of 128", "ignore", quantization=config)


class Narrow(nnx.Module):
    """Each K has a remainder of its own."""

    def __init__(self, *, rngs):
        moe = MoEConfig(num_experts=E, top_k=1, hidden_size=48, intermediate_size=40)
        self.moe, self.up = MoE(moe, rngs=rngs), Linear(24, 8, use_bias=False, rngs=rngs)


@pytest.mark.parametrize(("activation", "wrong"), [("mxfp8", (48, 40, 24)), ("nvfp4_per_token", (40, 24))])
def test_inputs_that_do_not_divide(activation, wrong):
    """The format of a layer's inputs must fit as well as that of its weights: they meet along K."""
    abstract = nnx.eval_shape(lambda: Narrow(rngs=nnx.Rngs(0)))
    source = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(abstract)))
    spec = QuantSpec("int8_per_channel", activation)
    layers = {"moe.experts.w13_weight": 48, "moe.experts.w2_weight": 40, "up.kernel": 24}
    says = (f"{name} (inputs: K={k} of shape=" for name, k in layers.items() if k in wrong)
    says = (*says, f"{len(wrong)} tensors", f"the block of format {activation}")
    refused(*says, abstract=abstract, source=source, quantization=moe_online.OnlineQuantConfig(spec, spec))


def test_a_kernel_that_is_declared_as_quantized():
    loaded = quiet_load(declared(), SOURCE, quantization={"linear": "fp8_per_block"}).params
    refused("down.kernel is declared as quantized", "checkpoint", abstract=nnx.eval_shape(lambda: loaded))


@pytest.mark.parametrize("quantization", [None, {"linear": "fp8_per_block"}])
def test_another_shape(quantization):
    source = {"kernel": random(INNER, H)}
    refused(
        f"kernel ({INNER}, {H})",
        f"needed ({H}, {INNER})",
        abstract=one(H, INNER),
        source=source,
        error=ShapeMismatch,
        quantization=quantization,
    )


# --- memory -----------------------------------------------------------------------------------------------------------


class Tower(nnx.Module):
    """Six kernels of 4 and 2 MiB."""

    def __init__(self, *, rngs):
        options = {"use_bias": False, "param_dtype": jnp.bfloat16, "rngs": rngs}
        self.layers = nnx.List(Linear(*sizes, **options) for _ in range(3) for sizes in ((512, 4096), (256, 4096)))


@pytest.mark.parametrize("prefetch", few([0, 1, 2], (0, 1)))
@pytest.mark.parametrize(
    "scheme", few(["fp8_per_block", "fp8_per_tensor", "nvfp4_w4a16", "int8_w8a16", None], ("fp8_per_tensor", None))
)
def test_measured_peak_is_within_the_plan(monkeypatch, scheme, prefetch):
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 2**13)  # so that temporaries hide nothing
    abstract = nnx.eval_shape(lambda: Tower(rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda leaf: np.ones(leaf.shape, BF16), nnx.to_pure_dict(nnx.state(abstract)))
    arguments = {"prefetch": prefetch, "quantization": scheme and {"linear": scheme}, "unit_bytes": 2**20}
    plan = moe_online.plan(abstract, zeros, **arguments)
    params, report = quiet_load(abstract, zeros, **arguments)
    assert report.resident_bytes == plan.resident_bytes == sum(x.nbytes for x in jax.tree.leaves(nnx.state(params)))
    assert report.resident_bytes <= report.peak_bytes <= plan.peak_bytes == report.planned_peak_bytes
    assert plan.largest_unit_bytes == (2**20 if scheme is None else 2**22)  # a matrix is the least
    assert plan.peak_bytes - plan.resident_bytes < (1 + prefetch) * plan.largest_unit_bytes + 2**21  # hides none
    assert report.compiled_steps == 2  # one for each size
    assert not plan.coarse_tensors


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["N K", "K N"])
@pytest.mark.parametrize("weight", few(WEIGHTS))
def test_temporaries_of_a_step(monkeypatch, weight, order):
    """What XLA reserves for a compiled step is within what the plan counts."""
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 2**16)
    n, k, fmt = 1536, 1024, by_name(weight)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = jax.eval_shape(lambda x: moe_online.loading.quantizer.quantize(x, fmt), jnp.zeros((n, k)))
    stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), stored)
    part = jax.ShapeDtypeStruct(tuple((n, k)[axis] for axis in order), BF16, sharding=sharding)
    step = steps.StepCache().get(stored, (PartLayout(permutation=order, half=None),), [part])
    assert step.temporary_bytes <= temporary_bytes((n, k), fmt) < part.size * 2
