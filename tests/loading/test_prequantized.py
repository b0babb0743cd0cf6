"""Checkpoints that are quantized already: taken over bit for bit, or decoded where that is allowed."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import moe_online
from by_name import assert_same_parts, by_name
from moe_online.errors import (
    CheckpointError,
    ConfigError,
    DtypeMismatch,
    MissingWeights,
    NonFiniteWeight,
    ShapeMismatch,
    UnexpectedWeights,
)
from moe_online.experts import abstract_experts
from moe_online.flax import Linear
from moe_online.loading import open_source
from moe_online.loading.reload import reload
from moe_online.schemes import QuantSpec
from numpy_quantizer import dequantize_numpy, quantize_numpy
from quick import few
from sources import BF16, WatchedSource, nothing_left_on_the_device, quiet_load, random, swapped
from tolerance import assert_same_bits

E, H, INNER = 3, 200, 160  # no multiples of 128
FP8, MXFP4 = "fp8_per_block", "mxfp4"
RULES = {
    FP8: {  # as DeepSeek-V3 has them: a tensor for each expert and scales of 128x128 blocks
        "experts.{E}.gate_proj.weight": "N K -> w13_weight.gate.values",
        "experts.{E}.gate_proj.weight_scale_inv": "N K -> w13_weight.gate.scales",
        "experts.{E}.up_proj.weight": "N K -> w13_weight.up.values",
        "experts.{E}.up_proj.weight_scale_inv": "N K -> w13_weight.up.scales",
        "experts.{E}.down_proj.weight": "N K -> w2_weight.values",
        "experts.{E}.down_proj.weight_scale_inv": "N K -> w2_weight.scales",
    },
    MXFP4: {  # as GPT-OSS has them: all experts in one, gate and up rows in turn, blocks of 16 bytes
        "gate_up_proj_blocks": "E (N S) K B -> w13_weight.values",
        "gate_up_proj_scales": "E (N S) K -> w13_weight.scales",
        "down_proj_blocks": "E N K B -> w2_weight.values",
        "down_proj_scales": "E N K -> w2_weight.scales",
    },
}
SIZES = {FP8: (E, H, INNER), MXFP4: (E, 192, 160)}


@functools.cache
def parts(fmt, sizes=None):
    """Codes and scales of both weights, in our layout."""
    e, h, inner = sizes or SIZES[fmt]
    return {
        "w13_weight": quantize_numpy(random(e, 2, inner, h, seed=3), fmt),
        "w2_weight": quantize_numpy(random(e, h, inner, seed=4), fmt),
    }


def stored(fmt, sizes=None):
    """The same as checkpoints have them."""
    (w13, s13), (w2, s2) = parts(fmt, sizes).values()
    if fmt == MXFP4:
        return {
            "gate_up_proj_blocks": interleaved(w13).reshape(*interleaved(w13).shape[:2], -1, 16),
            "gate_up_proj_scales": interleaved(swapped(s13)),
            "down_proj_blocks": w2.reshape(*w2.shape[:2], -1, 16).copy(),
            "down_proj_scales": swapped(s2),
        }
    found = {}
    for e in range(len(w2)):
        for name, codes, scales in (
            ("gate", w13[e, 0], s13[e, 0]),
            ("up", w13[e, 1], s13[e, 1]),
            ("down", w2[e], s2[e]),
        ):
            found[f"experts.{e}.{name}_proj.weight"] = codes.copy()
            found[f"experts.{e}.{name}_proj.weight_scale_inv"] = swapped(scales)
    return found


def interleaved(x):
    """`[E, 2, N, ...]` as `[E, 2N, ...]`, gate and up in turn."""
    e, _, n, *rest = x.shape
    return np.ascontiguousarray(np.swapaxes(x, 1, 2)).reshape(e, 2 * n, *rest)


def declared(fmt, dtype=BF16, sizes=None, **arguments):
    return abstract_experts(*(sizes or SIZES[fmt]), dtype, **arguments)


def decoded(fmt, sizes=None):
    """The real numbers that codes and scales stand for, in f32."""
    return {name: dequantize_numpy(each, fmt).astype(np.float32) for name, each in parts(fmt, sizes).items()}


def load(fmt, source=None, **arguments):
    source = stored(fmt) if source is None else source
    return quiet_load(declared(fmt), source, **{"mapping": RULES[fmt]} | arguments)


def check_taken_over(params, fmt, sizes=None):
    for name, expected in parts(fmt, sizes).items():
        assert getattr(params, name).format == by_name(fmt)
        assert_same_parts(getattr(params, name), expected)


def check_requantized(params, fmt, weight):
    for name, real in decoded(fmt).items():
        halves = (1,) if name == "w13_weight" else ()
        assert_same_parts(getattr(params, name), quantize_numpy(real, weight, shared_axes=halves))


def test_sizes_are_ragged():
    """What these tests are about: scales of blocks that are not whole, for 128x128."""
    source = stored(FP8)
    assert source["experts.0.gate_proj.weight_scale_inv"].shape == (2, 2)
    assert source["experts.0.gate_proj.weight"].shape == (160, 200)
    assert stored(MXFP4)["gate_up_proj_blocks"].shape == (3, 320, 6, 16)


@pytest.mark.smoke
@pytest.mark.parametrize("unit_bytes", few([1, 50_000, 2**28], quick=[1, 2**28]))
@pytest.mark.parametrize("fmt", [FP8, MXFP4])
def test_codes_and_scales_are_taken_over(fmt, unit_bytes):
    watched = WatchedSource(open_source(stored(fmt)))
    params, report = load(fmt, watched, unit_bytes=unit_bytes)
    check_taken_over(params, fmt)
    assert all((count == 1).all() for count in watched.read_counts.values())
    assert report.read_bytes == report.resident_bytes == sum(x.nbytes for x in stored(fmt).values())
    assert report.resident_bytes <= report.peak_bytes <= report.planned_peak_bytes
    for tensor in report.tensors:
        assert tensor.rule == f"as stored: {fmt}"
        assert (tensor.quantized, tensor.error, tensor.worst_expert_error) == (False, None, None)
    for child in ("values", "scales"):
        swapped_experts = jax.tree.map(jnp.copy, params)
        x = getattr(swapped_experts.w13_weight, child)
        object.__setattr__(swapped_experts.w13_weight, child, x[::-1])
        with pytest.raises(AssertionError):
            check_taken_over(swapped_experts, fmt)


def test_what_they_are_for_inputs():
    """A checkpoint that does not say gets what its like have: DeepSeek-V3 quantizes its inputs, GPT-OSS does not."""
    assert load(FP8).params.activation_format.name == "fp8_per_group"
    assert load(MXFP4).params.activation_format is None


@pytest.mark.parametrize("fmt", [FP8, MXFP4])
def test_the_same_format_may_be_asked_for(fmt):
    config = {"moe": {"weight": fmt, "activation": None}}
    for requantize in (False, True):
        params, report = load(fmt, quantization=config, requantize=requantize)
        check_taken_over(params, fmt)
        assert params.activation_format is None
        assert {tensor.rule for tensor in report.tensors} == {"moe, as stored"}


@pytest.mark.parametrize(
    ("fmt", "weight", "unit_bytes"),
    [
        (FP8, "int8_per_channel", 1),
        (MXFP4, "fp8_per_block", 50_000),
        pytest.param(FP8, "fp8_per_tensor", 2**28, marks=pytest.mark.slow),
        pytest.param(MXFP4, "nvfp4", 2**28, marks=pytest.mark.slow),
    ],
)
def test_another_format_needs_leave(fmt, weight, unit_bytes):
    arguments = {"quantization": QuantSpec(weight, None), "unit_bytes": unit_bytes}
    for function in (moe_online.plan, quiet_load):
        with nothing_left_on_the_device(), pytest.raises(ConfigError, match="requantize=True") as caught:
            function(declared(fmt), stored(fmt), mapping=RULES[fmt], **arguments)
        assert all(word in str(caught.value) for word in ("w13_weight", "w2_weight", fmt, weight))
    params, report = load(fmt, requantize=True, **arguments)
    check_requantized(params, fmt, weight)
    assert report.resident_bytes <= report.peak_bytes <= report.planned_peak_bytes
    assert {tensor.rule for tensor in report.tensors} == {f"moe, requantized from {fmt}"}
    assert all(tensor.quantized and tensor.error > 0 for tensor in report.tensors)
    doubled = {name: x * x.dtype.type(2) if x.dtype == np.float32 else x for name, x in stored(fmt).items()}
    if fmt == MXFP4:
        doubled["down_proj_scales"] += 1
    with pytest.raises(AssertionError):
        check_requantized(load(fmt, doubled, requantize=True, **arguments).params, fmt, weight)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("fmt", [FP8, MXFP4])
def test_real_numbers_need_leave(fmt, dtype):
    """Without a config: codes are decoded to the declared dtype, as numpy rounds."""
    arguments = {"mapping": RULES[fmt], "requantize": True, "unit_bytes": 60_000}
    params, report = quiet_load(declared(fmt, dtype), stored(fmt), **arguments)
    for name, real in decoded(fmt).items():
        assert_same_bits(getattr(params, name), real.astype(dtype))
    assert report.resident_bytes <= report.peak_bytes <= report.planned_peak_bytes
    assert all(not tensor.quantized for tensor in report.tensors)


def test_ignored_layers_are_not_decoded_in_silence():
    """What `ignore` leaves as it is, is quantized then too."""
    abstract = {"experts": declared(FP8), "other": abstract_experts(2, 32, 16, BF16)}
    plain = {"w13_weight": random(2, 2, 16, 32), "w2_weight": random(2, 32, 16)}
    source = stored(FP8) | {f"other.{name}": x for name, x in plain.items()}
    mapping = {name: rule.replace("-> ", "-> experts.") for name, rule in RULES[FP8].items()}
    config = {"moe": {"weight": "int8_per_channel"}, "ignore": ["experts"]}
    params, report = quiet_load(abstract, source, mapping=mapping, quantization=config)
    check_taken_over(params["experts"], FP8)
    assert params["other"].w2_weight.format == by_name("int8_per_channel")
    assert report.tensors[0].rule == f"as stored: {FP8}"


@pytest.mark.parametrize("fmt", [FP8, MXFP4])
@pytest.mark.slow
def test_files(tmp_path, fmt):
    save_file(stored(fmt), tmp_path / "model.safetensors")
    params, report = load(fmt, tmp_path, unit_bytes=50_000)
    check_taken_over(params, fmt)
    assert report.peak_bytes <= report.planned_peak_bytes


def test_scales_of_other_real_dtypes_are_cast():
    source = {name: x.astype(BF16) if "scale" in name else x for name, x in stored(FP8).items()}
    params = load(FP8, source).params
    for name, (codes, scales) in parts(FP8).items():
        assert_same_parts(getattr(params, name), (codes, scales.astype(BF16).astype(np.float32)))


def stacked(fmt):
    """Both weights of two layers, in one leaf each."""
    one = declared(fmt)
    return {"moe": jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), one)}


@pytest.mark.parametrize("unit_bytes", few([1, 2**28], quick=[1]))
@pytest.mark.parametrize("weight", [None, "int8_per_channel"])
@pytest.mark.slow
def test_leaves_of_all_layers(weight, unit_bytes):
    source = {f"layers.{i}.{name}": x for i in range(2) for name, x in stored(FP8).items()}
    mapping = {f"layers.{{L}}.{name}": rule.replace("-> ", "-> moe.") for name, rule in RULES[FP8].items()}
    arguments = {"mapping": mapping, "unit_bytes": unit_bytes, "requantize": weight is not None}
    config = None if weight is None else QuantSpec(weight, None)
    params, report = quiet_load(stacked(FP8), source, quantization=config, **arguments)
    assert report.peak_bytes <= report.planned_peak_bytes
    for layer in range(2):
        one = jax.tree.map(lambda x: x[layer], params["moe"])  # noqa: B023 (used at once)
        if weight is None:
            check_taken_over(one, FP8)
        else:
            check_requantized(one, FP8, weight)


def refused(error, fmt, source, *words, names=None, mapping=None, function=quiet_load, **arguments):
    with nothing_left_on_the_device(), pytest.raises(error) as caught:
        function(declared(fmt), source, mapping=mapping or RULES[fmt], **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if names is not None:
        assert sorted(caught.value.names) == sorted(names)


def without(fmt, *dropped):
    return {name: x for name, x in stored(fmt).items() if name not in dropped}


@pytest.mark.parametrize("function", [moe_online.plan, quiet_load])
def test_codes_and_scales_belong_together(function):
    check = functools.partial(refused, MissingWeights, function=function)
    one = without(FP8, "experts.1.up_proj.weight_scale_inv")
    check(FP8, one, names=["w13_weight.up.scales [expert 1]"])
    one = without(FP8, "experts.2.down_proj.weight")
    check(FP8, one, names=["w2_weight.values [expert 2]"])
    for child, name in (("scales", "down_proj_scales"), ("values", "down_proj_blocks")):
        rules = {key: rule for key, rule in RULES[MXFP4].items() if key != name}
        check(MXFP4, without(MXFP4, name), names=[f"w2_weight.{child}"], mapping=rules)
    codes = {name: x for name, x in stored(FP8).items() if "up_proj" not in name or "scale" not in name}
    rules = {name: rule for name, rule in RULES[FP8].items() if not rule.endswith("up.scales")}
    check(FP8, codes, names=["w13_weight.up.scales"], mapping=rules)


def test_codes_by_the_name_of_the_weight_are_no_numbers():
    """fp8 in the place of a weight has scales somewhere: without them it would be read wrong by their factor."""
    codes = {name: each[0] for name, each in parts(FP8).items()}
    with pytest.raises(MissingWeights) as caught:
        quiet_load(declared(FP8), codes)
    assert sorted(caught.value.names) == ["w13_weight.scales", "w2_weight.scales"]
    scales = {f"{name}.scales": each[1] for name, each in parts(FP8).items()}
    check_taken_over(quiet_load(declared(FP8), codes | scales).params, FP8)


@pytest.mark.parametrize("unit_bytes", few([1, 2**28], quick=[2**28]))
@pytest.mark.parametrize("requantize", few([False, True], (False,)))
@pytest.mark.parametrize(
    ("fmt", "name", "at", "value"),
    [
        (FP8, "experts.1.up_proj.weight", (159, 199), "nan"),
        (FP8, "experts.2.down_proj.weight", (0, 7), "-nan"),
        (FP8, "experts.0.gate_proj.weight_scale_inv", (1, 1), "nan"),
        (FP8, "experts.2.down_proj.weight_scale_inv", (0, 1), "inf"),
        (MXFP4, "gate_up_proj_scales", (1, 319, 5), "255"),
        (MXFP4, "down_proj_scales", (2, 0, 0), "255"),
    ],
)
def test_what_is_not_finite_is_named(fmt, name, at, value, requantize, unit_bytes):
    source = stored(fmt)
    bits = {"nan": 0x7F, "-nan": 0xFF, "255": 255}
    if source[name].dtype == np.float32:
        source[name][at] = float(value)
    else:
        source[name].view(np.uint8)[at] = bits[value]
    expert = at[0] if fmt == MXFP4 else int(name.split(".")[1])
    config = QuantSpec("int8_per_channel", None) if requantize else None
    arguments = {"unit_bytes": unit_bytes, "requantize": requantize, "quantization": config}
    with nothing_left_on_the_device(), pytest.raises(NonFiniteWeight, match=f"expert {expert}") as caught:
        load(fmt, source, **arguments)
    assert name in caught.value.names
    if not requantize:
        assert caught.value.names == (name,)


def test_the_largest_codes_are_finite():
    """0x7E is 448, and 254 the largest exponent."""
    source = stored(FP8)
    source["experts.1.up_proj.weight"].view(np.uint8)[3, 4] = 0x7E
    load(FP8, source)
    source = stored(MXFP4)
    source["down_proj_scales"][2, 0, 0] = 254
    load(MXFP4, source)


@pytest.mark.parametrize("function", [moe_online.plan, quiet_load])
def test_other_shapes(function):
    check = functools.partial(refused, ShapeMismatch, function=function)
    wrong = stored(FP8)
    wrong["experts.1.up_proj.weight_scale_inv"] = np.ones((1, 1), np.float32)  # as if edges had none
    check(FP8, wrong, "weight_scale_inv")
    wrong |= {f"experts.{e}.up_proj.weight_scale_inv": np.ones((1, 1), np.float32) for e in range(E)}
    check(FP8, wrong, names=[f"experts.{e}.up_proj.weight_scale_inv" for e in range(E)])
    wrong = stored(MXFP4)
    wrong["down_proj_scales"] = swapped(wrong["down_proj_scales"])
    check(MXFP4, wrong, names=["down_proj_scales"])
    wrong = stored(MXFP4)
    wrong["gate_up_proj_blocks"] = wrong["gate_up_proj_blocks"][:, :-2].copy()
    check(MXFP4, wrong, names=["gate_up_proj_blocks"])
    wrong = stored(MXFP4)
    wrong["down_proj_blocks"] = np.repeat(wrong["down_proj_blocks"], 2, axis=-1)  # one code in each byte
    check(MXFP4, wrong, names=["down_proj_blocks"])


@pytest.mark.parametrize(
    ("codes", "scales", "error"),
    [
        (np.int8, np.float32, CheckpointError),
        (jnp.float8_e5m2, np.float32, CheckpointError),
        (np.uint8, np.float32, CheckpointError),
        (jnp.float8_e4m3fn, np.uint8, CheckpointError),
        (jnp.float8_e4m3fn, jnp.float8_e8m0fnu, DtypeMismatch),
    ],
)
def test_kinds_of_codes_that_are_not_known(codes, scales, error):
    source = {name: np.zeros(x.shape, scales if "scale" in name else codes) for name, x in stored(FP8).items()}
    for function in (moe_online.plan, quiet_load):
        refused(error, FP8, source, "w13_weight" if error is CheckpointError else "scale_inv", function=function)


K, N = 200, 300


def kernel():
    """Codes and scales of a dense layer [N, K]."""
    return quantize_numpy(random(N, K, seed=5), FP8)


DENSE = {"w.weight": "N K -> kernel.values", "w.weight_scale_inv": "N K -> kernel.scales"}


def dense():
    codes, scales = kernel()
    return {"w.weight": codes, "w.weight_scale_inv": swapped(scales)}


def linear():
    return nnx.eval_shape(lambda: Linear(K, N, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


def test_dense_kernels_are_taken_over():
    params, report = quiet_load(linear(), dense(), mapping=DENSE, unit_bytes=1)
    found = params.kernel.get_value()
    assert_same_parts(found.weight, kernel())
    assert found.activation_format.name == "fp8_per_group"
    assert report.peak_bytes <= report.planned_peak_bytes
    x = jnp.asarray(random(3, K, dtype=np.float32))
    expected = np.asarray(x) @ dequantize_numpy(kernel(), FP8).T
    assert np.linalg.norm(np.asarray(params(x.astype(BF16))) - expected) < 0.06 * np.linalg.norm(expected)


@pytest.mark.parametrize("weight", few(["int8_per_channel", "mxfp8", None], quick=["int8_per_channel", None]))
@pytest.mark.slow
def test_dense_kernels_are_decoded(weight):
    real = dequantize_numpy(kernel(), FP8).astype(np.float32)
    abstract, source = linear(), dense()
    if weight == "mxfp8":  # whose blocks need a K that 32 divides
        abstract = nnx.eval_shape(lambda: Linear(192, N, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        source, real = (
            {"w.weight": source["w.weight"][:, :192].copy()} | {"w.weight_scale_inv": source["w.weight_scale_inv"]},
            real[:, :192],
        )
    config = None if weight is None else {"linear": {"weight": weight}}
    if weight is not None:
        with pytest.raises(ConfigError, match="requantize=True"):
            quiet_load(abstract, source, mapping=DENSE, quantization=config)
    params, report = quiet_load(abstract, source, mapping=DENSE, quantization=config, requantize=True)
    assert report.peak_bytes <= report.planned_peak_bytes
    found = params.kernel.get_value()
    if weight is None:
        assert_same_bits(found, real.T.astype(BF16))
    else:
        assert_same_parts(found.weight, quantize_numpy(real, weight))


def test_plain_kernels_cannot_hold_codes():
    abstract = {"w": {"kernel": jax.ShapeDtypeStruct((K, N), BF16)}}
    rules = {name: f"{rule.replace('kernel', 'w.kernel')} as K N" for name, rule in DENSE.items()}
    for function in (moe_online.plan, quiet_load):
        with pytest.raises(ConfigError, match=r"w\.kernel: pre-quantized, .*requantize=True"):
            function(abstract, dense(), mapping=rules)
    params, report = quiet_load(abstract, dense(), mapping=rules, requantize=True)
    real = dequantize_numpy(kernel(), FP8).astype(np.float32)
    assert_same_bits(params["w"]["kernel"], real.T.astype(BF16))
    assert report.peak_bytes <= report.planned_peak_bytes


@pytest.mark.slow
def test_leaves_of_ones_own():
    """A rule says that they are experts."""
    codes, scales = parts(FP8)["w2_weight"]
    abstract = {"w": jax.ShapeDtypeStruct(codes.shape, BF16)}
    rules = {"codes": "E N K -> w.values", "inv": "E N K -> w.scales"}
    found = quiet_load(abstract, {"codes": codes, "inv": swapped(scales)}, mapping=rules).params["w"]
    assert_same_parts(found, (codes, scales))


@pytest.mark.parametrize("staging", few(["host", "device"], quick=["host"]))
@pytest.mark.slow
def test_reload(staging):
    """Codes of the format that is loaded are taken over, others and numbers decoded where that is allowed."""
    arguments = {"mapping": RULES[FP8], "staging": staging, "progress": False, "unit_bytes": 50_000}
    params = quiet_load(declared(FP8), decoded(FP8), quantization=QuantSpec(FP8, None)).params
    params = jax.tree.map(lambda x: x.at[...].set(1), params)
    params, report = reload(params, stored(FP8), **arguments)
    check_taken_over(params, FP8)
    assert report.peak_bytes <= report.planned_peak_bytes
    assert params.activation_format is None
    for weight in ("int8_per_channel", None):
        config = None if weight is None else QuantSpec(weight, None)
        other = quiet_load(declared(FP8), {name: 2 * x for name, x in decoded(FP8).items()}, quantization=config).params
        before = [np.asarray(jnp.copy(leaf)) for leaf in jax.tree.leaves(other)]
        with nothing_left_on_the_device(), pytest.raises(ConfigError, match="requantize=True"):
            reload(other, stored(FP8), **arguments)
        for leaf, wanted in zip(jax.tree.leaves(other), before, strict=True):
            assert_same_bits(jnp.copy(leaf), wanted)
        other, report = reload(other, stored(FP8), requantize=True, **arguments)
        assert report.peak_bytes <= report.planned_peak_bytes
        if weight is not None:
            check_requantized(other, FP8, weight)
            continue
        for name, real in decoded(FP8).items():
            assert_same_bits(getattr(other, name), real.astype(BF16))


@pytest.mark.slow
def test_decoding_is_within_the_plan():
    """What is decoded counts: in f32, all of a unit. The plan would be too small without it."""
    sizes = (4, 512, 384)
    source = stored(FP8, sizes)
    for config in (QuantSpec("int8_per_channel", None), None):
        arguments = {"mapping": RULES[FP8], "requantize": True, "quantization": config, "prefetch": 0}
        plan = moe_online.plan(declared(FP8, sizes=sizes), source, **arguments)
        report = quiet_load(declared(FP8, sizes=sizes), source, **arguments).report
        unit = 4 * 2 * 384 * 512  # elements
        assert report.peak_bytes <= plan.peak_bytes == report.planned_peak_bytes
        assert plan.peak_bytes >= plan.resident_bytes + 5 * unit
        assert report.peak_bytes >= plan.resident_bytes + 2 * unit


DEVICES = """
import json
import sys

sys.path[:0] = json.loads(sys.argv[1])
import jax

jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import Mesh

import test_prequantized as here

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "tensor"))
rows = []
for fmt, sizes in ((here.FP8, (4, 200, 512)), (here.MXFP4, (4, 192, 128))):
    for unit_bytes in (1, 2**28):
        abstract = here.declared(fmt, sizes=sizes, mesh=mesh)
        source = here.stored(fmt, sizes)
        for spec in (None, here.QuantSpec("int8_per_channel", None)):
            arguments = {"mapping": here.RULES[fmt], "unit_bytes": unit_bytes}
            params, report = here.quiet_load(
                abstract, source, quantization=spec, requantize=spec is not None, **arguments
            )
            rows.append([report.peak_bytes, report.planned_peak_bytes])
            for name, real in here.decoded(fmt, sizes).items():
                weight = getattr(params, name)
                assert weight.values.sharding == getattr(abstract, name).sharding
                if spec is not None:
                    here.assert_same_parts(weight, here.quantize_numpy(real, "int8_per_channel"))
            if spec is None:
                here.check_taken_over(params, fmt, sizes)
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_four_devices(request):
    paths = [str(request.config.rootpath / "tests" / folder) for folder in ("support", "loading")]
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, json.dumps(paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 8
    assert all(0 < peak <= planned for peak, planned in rows)


def test_a_kernel_that_stays_real_goes_where_the_mesh_says():
    """Also one that is declared on one device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": {"kernel": jax.ShapeDtypeStruct((K, N), BF16, sharding=one)}}
    rules = {name: f"{rule.replace('kernel', 'w.kernel')} as K N" for name, rule in DENSE.items()}
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("expert", "tensor"))
    params, _ = quiet_load(abstract, dense(), mapping=rules, requantize=True, mesh=mesh)
    assert params["w"]["kernel"].sharding == NamedSharding(mesh, PartitionSpec())


def test_a_scale_that_the_format_has_not_is_no_weight():
    """It would have to be multiplied with: left out, the weights would be wrong."""
    codes, scales = quantize_numpy(random(2, 128, 128), FP8)
    source = {"w2_weight": {"values": codes, "scales": scales, "global_scale": np.full(2, 5, np.float32)}}
    source["w13_weight"] = random(2, 2, 128, 128)
    with pytest.raises(UnexpectedWeights, match=r"w2_weight\.global_scale \(fp8_per_block has no global_scale\)"):
        quiet_load(abstract_experts(2, 128, 128, BF16), source)
