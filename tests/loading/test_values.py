"""What is loaded: codes and scales of numpy, bit for bit; plain leaves exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import moe_online
from by_name import assert_same_parts, by_name
from moe_online.config import MoEConfig
from moe_online.errors import ConfigError
from moe_online.experts import ExpertWeights, abstract_experts
from moe_online.flax import MoE
from moe_online.loading import open_source, quantizer
from moe_online.schemes import SHORTHANDS, QuantSpec
from numpy_quantizer import WEIGHTS, quantize_numpy
from pallas_kernels import QuantizedArray
from quick import few, few_cases
from sources import (
    BF16,
    KEN_MAPPING,
    WatchedSource,
    as_ken,
    check_quantized,
    declared,
    ours,
    quiet_load,
    random,
    sizes_for,
    swapped,
)
from tolerance import assert_same_bits


def only(weight):
    return None if weight is None else QuantSpec(by_name(weight), None)


DTYPES = [BF16, np.dtype(np.float16), np.dtype(np.float32)]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", few(DTYPES, (BF16, np.float32)), ids=str)
@pytest.mark.parametrize("weight", few(WEIGHTS, ("fp8_per_tensor", "fp8_per_block", "int4_per_group", "nvfp4")))
def test_bits_are_those_of_numpy(weight, dtype):
    tree = ours(*sizes_for(weight), dtype=dtype)
    params, report = quiet_load(declared(tree, dtype=BF16), tree, quantization=only(weight))
    check_quantized(params, tree, weight)  # of the stored dtype, though the model is declared as bf16
    assert params["l0"].orig_dtype == BF16
    assert report.compiled_steps == 2
    tree["l0"]["w13_weight"][1, 1, 2] *= 2
    with pytest.raises(AssertionError):
        check_quantized(params, tree, weight)


def test_every_shorthand_sets_its_formats():
    tree = ours(e=1, h=128, i=128)
    for name, shorthand in SHORTHANDS.items():
        plan = moe_online.plan(declared(tree), tree, quantization=name)
        assert [target.spec for target in plan.targets] == [shorthand.moe] * 2
    params, _ = quiet_load(declared(tree), tree, quantization="int8_w8a8")
    assert params["l0"].activation_format.name == "int8_per_token"


@pytest.mark.parametrize("weight", few(["fp8_per_block", None], ("fp8_per_block",)))
@pytest.mark.parametrize("order", ["E K N", "E N K", "K N E", "N E K"])
def test_stored_axes_and_halves(weight, order):
    tree = ours()
    layer = tree["l0"]
    apart = {"gate": layer["w13_weight"][:, 0], "up": layer["w13_weight"][:, 1], "down": layer["w2_weight"]}
    letters = order.replace(" ", "")
    axes = tuple("ENK".index(letter) for letter in letters)
    source = {name: np.ascontiguousarray(np.transpose(x, axes)) for name, x in apart.items()}
    mapping = {
        "gate": f"{order} -> l0.w13_weight.gate",
        "up": f"{order} -> l0.w13_weight.up",
        "down": f"{order} -> l0.w2_weight",
    }
    params, _ = quiet_load(declared(tree), source, quantization=only(weight), mapping=mapping, unit_bytes=2**15)
    if weight is None:
        assert_same_bits(params["l0"].w13_weight, layer["w13_weight"])
        assert_same_bits(params["l0"].w2_weight, layer["w2_weight"])
    else:
        check_quantized(params, tree, weight)


@pytest.mark.parametrize("weight", few(WEIGHTS))
def test_gate_and_up_in_one_stored_axis_order(weight):
    tree = ours(*sizes_for(weight))
    source = {"w": np.ascontiguousarray(np.transpose(tree["l0"]["w13_weight"], (1, 0, 3, 2)))}
    tree["l0"].pop("w2_weight")
    abstract = {"w13": jax.ShapeDtypeStruct(tree["l0"]["w13_weight"].shape, BF16)}
    params, _ = quiet_load(abstract, source, quantization=only(weight), mapping={"w": "S E K N -> w13"})
    assert_same_parts(params["w13"], quantize_numpy(tree["l0"]["w13_weight"], weight, shared_axes=(1,)))


@pytest.mark.parametrize("weight", few(WEIGHTS))
def test_plain_leaf_with_stated_axes(weight):
    _, k, _ = sizes_for(weight)
    stored = random(2, k, 200)
    abstract = {"mlp": {"wi": jax.ShapeDtypeStruct((2, 200, k), BF16)}, "norm": jax.ShapeDtypeStruct((3,), "float32")}
    source = {"mlp": {"wi": stored}, "norm": np.ones(3, np.float32)}
    params, report = quiet_load(abstract, source, quantization=only(weight), mapping={"mlp.wi": "E K N"})
    assert_same_parts(params["mlp"]["wi"], quantize_numpy(swapped(stored), weight))
    assert [tensor.rule for tensor in report.tensors] == ["moe", "dense: rank 1"]


@pytest.mark.parametrize("weight", few(WEIGHTS, ("fp8_per_block", "nvfp4")))
@pytest.mark.parametrize(
    ("sizes", "layout"),
    few_cases(
        [((2, 130, 257), "ours"), ((2, 130, 257), "apart"), ((1, 1, 1), "ours"), ((3, 5, 129), "apart")],
        [((2, 130, 257), "ours"), ((3, 5, 129), "apart")],
    ),
    ids=str,
)
def test_chunks_of_rows(monkeypatch, weight, sizes, layout):
    """Several chunks along N, the last one ragged, have the bits of one."""
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 2**10)
    sizes = sizes_for(weight, *sizes)
    tree = ours(*sizes)
    source, mapping = (tree, None) if layout == "ours" else (as_ken(tree), KEN_MAPPING)
    rows = quantizer.chunk_rows((sizes[0], 2, sizes[2], sizes[1]), by_name(weight))[1]
    if sizes == (2, 130, 257):
        assert 0 < 257 % rows < 257
    params, _ = quiet_load(declared(tree), source, quantization=only(weight), mapping=mapping)
    check_quantized(params, tree, weight)


UNITS = [*itertools.product([1, 50_000], [0, 1, 2]), (2**28, 1)]
MARKS = dict.fromkeys([(1, 1), (50_000, 0), (50_000, 2)], pytest.mark.slow)


@pytest.mark.parametrize(("unit_bytes", "prefetch"), [pytest.param(*u, marks=MARKS.get(u, ())) for u in UNITS])
def test_units_and_prefetch_do_not_matter(unit_bytes, prefetch):
    tree = ours(e=5, h=96, i=64, layers=2)
    plan_arguments = {"quantization": "fp8_per_block", "unit_bytes": unit_bytes, "prefetch": prefetch}
    plan = moe_online.plan(declared(tree), tree, **plan_arguments)
    assert len(plan.units) == {1: 20, 50_000: 10, 2**28: 4}[unit_bytes]
    params, report = quiet_load(declared(tree), tree, **plan_arguments)
    check_quantized(params, tree, "fp8_per_block")
    assert report.read_bytes == plan.read_bytes == sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("chunk_rows", [1, 3, 4])
def test_no_chunk_is_read_twice(chunk_rows):
    tree = ours(e=7, h=32, i=16)
    source = WatchedSource(
        open_source(tree),
        chunks={"l0.w13_weight": (chunk_rows, 1, 16, 32), "l0.w2_weight": (chunk_rows, 32, 8)},
    )
    params, _ = quiet_load(declared(tree), source, quantization="int8_w8a16", unit_bytes=2 * 32 * 16 * 2 * 2)
    check_quantized(params, tree, "int8_per_channel")
    assert all((count == 1).all() for count in source.read_counts.values())
    plan = moe_online.plan(declared(tree), source, unit_bytes=2 * 32 * 16 * 2 * 2)
    assert ("l0.w13_weight" in plan.coarse_tensors) == (chunk_rows > 2)


def test_no_chunk_of_a_checkpoint_is_read_twice(tmp_path):
    """Chunks of a few experts make units of a few; Orbax's own choice spans all experts, which the plan says."""
    tree = ours(e=8, h=64, i=32)
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 8192
    with context:
        ocp.save(tmp_path / "coarse", as_ken(tree))
    context.array.saving.storage_options.shard_axes = (0,)
    with context:
        ocp.save(tmp_path / "fine", as_ken(tree))
    arguments = {"quantization": "fp8_per_block", "mapping": KEN_MAPPING, "unit_bytes": 20_000}
    for name, reads, rows in (("coarse", 3, 8), ("fine", 10, 2)):
        source = WatchedSource(open_source(tmp_path / name))
        params, _ = quiet_load(declared(tree), source, **arguments)
        check_quantized(params, tree, "fp8_per_block")
        assert all((count == 1).all() for count in source.read_counts.values())
        assert len(source.reads) == reads
        plan = moe_online.plan(declared(tree), tmp_path / name, **arguments)
        assert name == "coarse" or all(unit.start % rows == 0 for unit in plan.units)
        assert bool(plan.coarse_tensors) == (name == "coarse")
        assert ("shard_axes" in str(plan)) == (name == "coarse")


PLAIN = {
    "f32": random(3, 5, dtype=np.float32),
    "bf16": random(4, 6, 130),
    "f16": random(7, dtype=np.float16),
    "deep": random(2, 3, 4, 5, dtype=np.float32),
    "scalar": np.asarray(1.5, np.float32),
    "step": np.asarray(41, np.int32),
    "ids": np.arange(12, dtype=np.int32).reshape(3, 4),
    "mask": np.asarray([True, False, True]),
    "bytes": np.arange(10, dtype=np.uint8),
    "fp8": random(3, 4).astype(jnp.float8_e4m3fn),
}


@pytest.mark.smoke
@pytest.mark.parametrize(("unit_bytes", "chunk"), [(1, 16), (2**28, 16), (2**28, 2**21)])
def test_plain_leaves_are_equal(monkeypatch, unit_bytes, chunk):
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", chunk)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PLAIN)
    params, report = quiet_load(abstract, PLAIN, unit_bytes=unit_bytes)
    jax.tree.map(
        assert_same_bits,
        *(
            jax.tree.map(lambda x: x.view(np.uint8) if x.dtype == bool else x, jax.device_get(t))
            for t in (params, PLAIN)
        ),
    )
    assert all(tensor.error is None for tensor in report.tensors)


def test_real_dtypes_are_cast_as_numpy_rounds():
    dtypes = [np.dtype(np.float16), np.dtype(np.float32), BF16]
    source = {str(dtype): random(5, 77, dtype=np.float32).astype(dtype) for dtype in dtypes}
    for wanted in dtypes:
        abstract = {name: jax.ShapeDtypeStruct((5, 77), wanted) for name in source}
        params, _ = quiet_load(abstract, source)
        for name, x in source.items():
            assert_same_bits(params[name], x.astype(wanted))


def test_biases_are_never_quantized():
    e, h, i = 3, 40, 24
    tree = {**ours(e, h, i)["l0"], "w13_bias": random(e, 2, i), "w2_bias": random(e, h)}
    abstract = abstract_experts(e, h, i, BF16, has_bias=True)
    params, _ = quiet_load(abstract, tree, quantization="fp8_per_channel")
    check_quantized({"l0": params}, {"l0": {k: tree[k] for k in ("w13_weight", "w2_weight")}}, "fp8_per_channel")
    assert_same_bits(params.w13_bias, tree["w13_bias"])
    assert_same_bits(params.w2_bias, tree["w2_bias"])


@pytest.mark.parametrize("unit_bytes", [1, 2**28])
def test_halves_of_a_bias(unit_bytes):
    e, h, i = 3, 40, 24
    weights, gate, up = ours(e, h, i)["l0"], random(e, i), random(e, i, seed=1)
    source = {**weights, "b_gate": gate, "b_up": up, "w2_bias": random(e, h)}
    mapping = {"b_gate": "E N -> w13_bias.gate", "b_up": "-> w13_bias.up"}
    abstract = abstract_experts(e, h, i, BF16, has_bias=True)
    params, _ = quiet_load(abstract, source, quantization="fp8_per_channel", mapping=mapping, unit_bytes=unit_bytes)
    assert_same_bits(params.w13_bias, np.stack([gate, up], axis=1))


def test_expert_map_and_correction_bias():
    tree = {**ours(2, 16, 8)["l0"], "e_score_correction_bias": random(4, dtype=np.float32)}
    expert_map = jnp.asarray([0, -1, 1, -1], jnp.int32)
    declared_weights = declared({"l0": tree})["l0"]
    abstract = ExpertWeights(
        w13_weight=declared_weights.w13_weight,
        w2_weight=declared_weights.w2_weight,
        e_score_correction_bias=jax.ShapeDtypeStruct((4,), jnp.float32),
        expert_map=expert_map,
        orig_dtype=BF16,
    )
    params, _ = quiet_load(abstract, tree, quantization="fp8_per_block")
    assert params.expert_map is expert_map
    assert_same_bits(params.e_score_correction_bias, tree["e_score_correction_bias"])


def test_a_numpy_source_is_copied():
    """Arrays on a CPU may share memory with numpy: the result must not."""
    tree, plain = ours(), random(64, 64, dtype=np.float32)
    abstract = {**declared(tree), "plain": jax.ShapeDtypeStruct(plain.shape, plain.dtype)}
    expected, before = plain.copy(), {"l0": {k: v.copy() for k, v in tree["l0"].items()}}
    params, _ = quiet_load(abstract, {**tree, "plain": plain}, quantization="fp8_per_block")
    for x in (plain, *tree["l0"].values()):
        assert x.any()
        x[...] = 0
    check_quantized({"l0": params["l0"]}, before, "fp8_per_block")
    assert_same_bits(params["plain"], expected)


def test_a_source_on_the_device_stays_usable():
    tree = ours()
    source = jax.tree.map(jnp.asarray, {**tree, "plain": np.ones(3, np.float32), "step": np.asarray(3, np.int32)})
    abstract = {
        **declared(tree),
        "plain": jax.ShapeDtypeStruct((3,), np.float32),
        "step": jax.ShapeDtypeStruct((), np.int32),
    }
    params, _ = quiet_load(abstract, source, quantization="fp8_per_block", unit_bytes=1)
    check_quantized({"l0": params["l0"]}, tree, "fp8_per_block")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((source, params)))
    jax.tree.map(lambda leaf: leaf.delete(), source)
    assert (float(params["plain"].sum()), int(params["step"])) == (3, 3)


MOE = MoEConfig(num_experts=4, top_k=2, hidden_size=32, intermediate_size=48)


forward = nnx.jit(lambda model, x: model(x))


def test_leaves_without_elements():
    source = {
        "rows": np.zeros((0, 4), np.float32),
        "columns": np.zeros((3, 0), np.float32),
        "x": np.ones(2, np.float32),
    }
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in source.items()}
    params, report = quiet_load(abstract, source)
    assert {name: leaf.shape for name, leaf in params.items()} == {"rows": (0, 4), "columns": (3, 0), "x": (2,)}
    assert report.resident_bytes == 8


@pytest.mark.smoke
def test_nnx_modules_come_back_as_modules(tmp_path):
    model = MoE(MOE, rngs=nnx.Rngs(0))
    ocp.save(tmp_path / "c", nnx.to_pure_dict(nnx.state(model)))
    abstract = nnx.eval_shape(lambda: MoE(MOE, rngs=nnx.Rngs(1)))
    x = jnp.asarray(random(5, 32))
    loaded = quiet_load(abstract, tmp_path / "c").params
    assert isinstance(loaded, MoE)
    assert_same_bits(forward(loaded, x), forward(model, x))
    quantized = quiet_load(abstract, nnx.state(model), quantization="int8_w8a16").params
    assert isinstance(quantized.experts.get_value().w2_weight, QuantizedArray)
    expected, found = (np.float64(forward(m, x)) for m in (model, quantized))
    assert 0 < np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    assert isinstance(abstract.router.kernel.get_value(), jax.ShapeDtypeStruct)  # the declaration is as it was


def test_linen_variables():
    tree = {"params": {"block": {"experts": ours()["l0"], "dense": {"kernel": random(4, 5)}}}}
    dense = {"kernel": jax.ShapeDtypeStruct((4, 5), BF16)}
    abstract = {"params": {"block": {"experts": declared(ours())["l0"], "dense": dense}}}
    params, report = quiet_load(abstract, tree, quantization="fp8_per_block")
    assert [tensor.name for tensor in report.tensors] == [
        "params.block.dense.kernel",
        "params.block.experts.w13_weight",
        "params.block.experts.w2_weight",
    ]
    check_quantized({"l0": params["params"]["block"]["experts"]}, ours(), "fp8_per_block")
    assert_same_bits(params["params"]["block"]["dense"]["kernel"], tree["params"]["block"]["dense"]["kernel"])


@pytest.mark.parametrize("quantization", [None, {"moe": "int8_w8a16"}])
def test_twice_stacked_experts_stay_as_they_are(quantization):
    """Layers of layers: nothing says which axis is what."""
    one, several = ours(layers=2)["l0"], {name: np.stack([x, 2 * x])[:, None] for name, x in ours()["l0"].items()}
    tree = {"one": one, "several": several}
    abstract = declared({"one": one}) | {"several": declared({"one": one})["one"]}
    abstract["several"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, 1, *x.shape), x.dtype), abstract["several"])
    params, report = quiet_load(abstract, tree, quantization=quantization)
    for name, x in several.items():
        assert_same_bits(getattr(params["several"], name), x)
    rules = {tensor.name: tensor.rule for tensor in report.tensors}
    if quantization is not None:
        check_quantized({"l0": params["one"]}, {"l0": one}, "int8_per_channel")
        assert rules["several.w13_weight"] == "dense: stacked experts"
        with pytest.raises(ConfigError, match=r"reaches no leaf.*several.w13_weight \(2, "):
            moe_online.plan({"several": abstract["several"]}, {"several": several}, quantization=quantization)


def test_targets_choose_layers():
    tree = ours(layers=2)
    config = moe_online.OnlineQuantConfig(targets={"*l1": "int8_w8a16"})
    params, report = quiet_load(declared(tree), tree, quantization=config)
    assert isinstance(params["l0"].w2_weight, jax.Array)
    assert params["l1"].w2_weight.format.name == "int8_per_channel"
    assert {tensor.rule for tensor in report.tensors} == {"no target matches", "targets: *l1"}


def test_a_wrong_unit_size_is_refused():
    tree = ours()
    for wrong in ({"unit_bytes": 0}, {"prefetch": -1}):
        with pytest.raises(ConfigError, match="whole number, at least"):
            quiet_load(declared(tree), tree, **wrong)
