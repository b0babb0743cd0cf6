"""Axes that names count: a tensor for each expert, for each layer, and tensors of all layers."""

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

import moe_online
from by_name import assert_same_parts
from moe_online import ConfigError, DtypeMismatch, MissingWeights, ShapeMismatch, UnexpectedWeights
from moe_online.errors import NonFiniteWeight
from moe_online.experts import abstract_experts
from moe_online.loading import open_source
from numpy_quantizer import quantize_numpy
from quick import few
from sources import BF16, WatchedSource, check_quantized, declared, nothing_left_on_the_device, ours, quiet_load, random
from tolerance import assert_same_bits

LAYERS, E, H, INNER = 3, 4, 160, 96
TREE = ours(e=E, h=H, i=INNER, layers=LAYERS)
PER_EXPERT = {
    "layers.{L}.experts.{E}.w1": "N K -> l{L}.w13_weight.gate",
    "layers.{L}.experts.{E}.w3": "N K -> l{L}.w13_weight.up",
    "layers.{L}.experts.{E}.w2": "K N -> l{L}.w2_weight",
}
SCANNED = {
    "moe.wi_0": "L E K N -> l{L}.w13_weight.gate",
    "moe.wi_1": "L E K N -> l{L}.w13_weight.up",
    "moe.wo": "E L N K -> l{L}.w2_weight",
}


def per_expert(tree=TREE):
    """`layers.0.experts.2.w1 [I, H]`, `.w3 [I, H]`, `.w2 [I, H]` turned."""
    found = {}
    for layer, (w13, w2) in enumerate((each["w13_weight"], each["w2_weight"]) for each in tree.values()):
        for e in range(len(w2)):
            name = f"layers.{layer}.experts.{e}"
            found |= {f"{name}.w1": w13[e, 0], f"{name}.w3": w13[e, 1], f"{name}.w2": w2[e].T.copy()}
    return found


def scanned(tree=TREE):
    """`wi_0 [L, E, H, I]`, `wi_1` alike, `wo [E, L, H, I]`."""
    w13, w2 = (np.stack([layer[name] for layer in tree.values()]) for name in ("w13_weight", "w2_weight"))
    turned = np.ascontiguousarray(np.swapaxes(w13, -1, -2))
    return {
        "moe.wi_0": turned[:, :, 0].copy(),
        "moe.wi_1": turned[:, :, 1].copy(),
        "moe.wo": np.swapaxes(w2, 0, 1).copy(),
    }


def check_once(source, arguments):
    watched = WatchedSource(source)
    params, report = quiet_load(declared(TREE), watched, **arguments)
    assert all((count == 1).all() for count in watched.read_counts.values())
    assert report.peak_bytes <= report.planned_peak_bytes
    assert report.read_bytes == sum(tensor.nbytes for tensor in source.tensors.values())
    return params


@pytest.mark.smoke
@pytest.mark.parametrize("unit_bytes", few([1, 100_000, 2**28], (100_000,)))
@pytest.mark.parametrize("layout", ["per expert", "scanned"])
def test_every_element_comes_once_to_its_place(layout, unit_bytes):
    source, mapping = (per_expert(), PER_EXPERT) if layout == "per expert" else (scanned(), SCANNED)
    arguments = {"mapping": mapping, "unit_bytes": unit_bytes}
    check_quantized(
        check_once(open_source(source), {**arguments, "quantization": "fp8_per_block"}), TREE, "fp8_per_block"
    )
    params = check_once(open_source(source), arguments)
    for name, layer in TREE.items():
        assert_same_bits(params[name].w13_weight, layer["w13_weight"])
        assert_same_bits(params[name].w2_weight, layer["w2_weight"])


def test_the_order_of_names_does_not_matter():
    stored = per_expert()
    names = np.random.default_rng(0).permutation(sorted(stored))
    shuffled = {name: stored[name] for name in names}
    params = quiet_load(declared(TREE), shuffled, mapping=PER_EXPERT, quantization="int8_w8a16").params
    check_quantized(params, TREE, "int8_per_channel")


def test_files_of_many_tensors(tmp_path):
    save_file(per_expert(), tmp_path / "model.safetensors")
    arguments = {"mapping": PER_EXPERT, "quantization": "int8_w8a16", "unit_bytes": 100_000}
    params, report = quiet_load(declared(TREE), tmp_path, **arguments)
    check_quantized(params, TREE, "int8_per_channel")
    assert report.tensors[0].sources[:2] == ("layers.0.experts.0.w1", "layers.0.experts.1.w1")


@pytest.mark.parametrize("chunk_bytes", [None, 2 * H * INNER * 2])
def test_no_chunk_of_scanned_layers_is_decoded_twice(tmp_path, chunk_bytes):
    """Orbax stores all layers as one chunk; leaves that are parts of it follow one another, and share it."""
    context = ocp.Context()
    if chunk_bytes is not None:
        context.array.saving.storage_options.chunk_byte_size = chunk_bytes
        context.array.saving.storage_options.shard_axes = (0, 1)
    with context:
        ocp.save(tmp_path / "scanned", scanned())
    source = open_source(tmp_path / "scanned")
    arguments = {"mapping": SCANNED, "unit_bytes": 100_000}
    params = check_once(source, {**arguments, "quantization": "fp8_per_block"})
    check_quantized(params, TREE, "fp8_per_block")
    plan = moe_online.plan(declared(TREE), source, **arguments)
    largest = max(tensor.nbytes for tensor in source.tensors.values())
    if chunk_bytes is None:
        assert set(plan.coarse_tensors) == set(SCANNED)
        # gate and up are there together, one of them twice
        assert 0 <= plan.host_peak_bytes - 3 * largest <= 7 * plan.largest_unit_bytes
    else:
        assert not plan.coarse_tensors
        assert plan.host_peak_bytes == 7 * plan.largest_unit_bytes


def stacked(dtype=BF16):
    one = abstract_experts(E, H, INNER, dtype)
    return {"moe": jax.tree.map(lambda x: jax.ShapeDtypeStruct((LAYERS, *x.shape), x.dtype), one)}


@pytest.mark.parametrize("unit_bytes", few([1, 100_000, 2**28], (1, 100_000)))
@pytest.mark.parametrize(
    "quantization", few([None, "fp8_per_block", "fp8_per_tensor", "int4_w4a16"], ("fp8_per_tensor",))
)
def test_leaves_of_all_layers(quantization, unit_bytes):
    """As nnx.vmap makes them: quantized as the experts of each layer are."""
    h, i = (256, 128) if quantization == "int4_w4a16" else (H, INNER)
    tree = ours(e=E, h=h, i=i, layers=LAYERS)
    one = abstract_experts(E, h, i, BF16)
    abstract = {"moe": jax.tree.map(lambda x: jax.ShapeDtypeStruct((LAYERS, *x.shape), x.dtype), one)}
    mapping = {name: text.replace("l{L}", "moe") for name, text in PER_EXPERT.items()}
    arguments = {"quantization": quantization, "unit_bytes": unit_bytes}
    w13, w2 = (np.stack([layer[name] for layer in tree.values()]) for name in ("w13_weight", "w2_weight"))
    for source, rules in ((per_expert(tree), mapping), ({"moe": {"w13_weight": w13, "w2_weight": w2}}, None)):
        params, report = quiet_load(abstract, source, mapping=rules, **arguments)
        assert report.peak_bytes <= report.planned_peak_bytes
        for found, wanted, shared in ((params["moe"].w13_weight, w13, (2,)), (params["moe"].w2_weight, w2, ())):
            if quantization is None:
                assert_same_bits(found, wanted)
            else:
                assert_same_parts(found, quantize_numpy(wanted, found.format.name, shared_axes=shared))


def test_leaves_of_ones_own():
    source = {f"e{e}.w": random(5, 6, seed=e) for e in range(3)}
    abstract = {"w": jax.ShapeDtypeStruct((3, 6, 5), BF16)}
    wanted = np.stack([x.T for x in source.values()])
    found = quiet_load(abstract, source, mapping={"e{E}.w": "K N -> w"}).params["w"]
    assert_same_bits(found, wanted)
    found = quiet_load(abstract, source, mapping={"e{E}.w": "K N -> w"}, quantization="int8_w8a16").params["w"]
    assert_same_parts(found, quantize_numpy(wanted, "int8_per_channel"))
    kernel = random(5, 6)
    turned = {"k": jax.ShapeDtypeStruct((6, 5), BF16)}
    assert_same_bits(quiet_load(turned, {"k": kernel}, mapping={"k": "N K -> k as K N"}).params["k"], kernel.T)


def refused(error, source, *words, mapping=PER_EXPERT, names=None, **arguments):
    for function in (moe_online.plan, quiet_load):
        with nothing_left_on_the_device(), pytest.raises(error) as caught:
            function(declared(TREE), source, mapping=mapping, **arguments)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        if names is not None:
            assert sorted(caught.value.names) == sorted(names)


def without(*names):
    return {name: x for name, x in per_expert().items() if name not in names}


@pytest.mark.smoke
def test_what_is_missing_is_named():
    missing = without("layers.1.experts.2.w3", "layers.2.experts.0.w2")
    refused(MissingWeights, missing, names=["l1.w13_weight.up [expert 2]", "l2.w2_weight [expert 0]"])
    halves = {name: x for name, x in per_expert().items() if not name.endswith("0.w3") or "layers.0" not in name}
    refused(MissingWeights, halves, names=["l0.w13_weight.up [expert 0]"])


def test_what_is_too_much_is_named():
    more = per_expert() | {"layers.0.experts.4.w1": random(INNER, H)}
    refused(UnexpectedWeights, more, "expert 4 of 4", names=["layers.0.experts.4.w1"])
    quiet_load(declared(TREE), more, mapping=PER_EXPERT, unexpected="ignore")
    quiet_load(declared(TREE), more, mapping=PER_EXPERT | {"layers.*.experts.4.*": "skip"})
    more = per_expert() | {"layers.3.experts.0.w1": random(INNER, H)}
    refused(UnexpectedWeights, more, "mapped to l3.w13_weight.gate", names=["layers.3.experts.0.w1"])
    refused(
        UnexpectedWeights,
        {name: np.concatenate([x, x[:1]], axis=0) if name != "moe.wo" else x for name, x in scanned().items()},
        "l3.w13_weight",
        mapping=SCANNED,
        names=["moe.wi_0", "moe.wi_1"],
    )


def test_what_is_doubled_is_named():
    doubled = per_expert() | {"again.0.experts.2.w1": random(INNER, H)}
    mapping = PER_EXPERT | {"again.{L}.experts.{E}.w1": "N K -> l{L}.w13_weight.gate"}
    refused(ConfigError, doubled, "l0.w13_weight.gate", "again.0.experts.2.w1, layers.0", mapping=mapping)
    whole = per_expert() | {"all": random(E, H, INNER)}
    refused(
        ConfigError, whole, "several tensors", "l0.w2_weight", mapping=PER_EXPERT | {"all": "E N K -> l0.w2_weight"}
    )


def test_parts_that_are_not_alike():
    other = per_expert() | {"layers.1.experts.1.w1": random(INNER + 1, H)}
    refused(ShapeMismatch, other, names=["layers.1.experts.1.w1"])
    other = per_expert() | {"layers.1.experts.1.w1": random(INNER, H, dtype=np.float32)}
    refused(DtypeMismatch, other, "float32", "bfloat16")
    other = {name: x.T.copy() for name, x in per_expert().items()}
    refused(ShapeMismatch, other, names=list(other))


def test_a_number_that_is_not_finite_is_found_in_its_tensor():
    source = per_expert()
    source["layers.1.experts.2.w2"][3, 4] = np.nan
    for unit_bytes in (1, 2**28):
        with nothing_left_on_the_device(), pytest.raises(NonFiniteWeight, match="expert 2") as caught:
            quiet_load(declared(TREE), source, mapping=PER_EXPERT, quantization="int8_w8a16", unit_bytes=unit_bytes)
        assert caught.value.names == ("layers.1.experts.2.w2",)


@pytest.mark.parametrize(
    ("pattern", "text", "says"),
    [
        ("w.{E}", "E N K -> w", "can be one of them"),
        ("w.{N}", "K -> w", "numbers of a name are"),
        ("w", "N K -> w{E}", "neither in the pattern nor an axis"),
        ("{E}.w.{E}", "N K -> w", "twice"),
        ("w", "L E N K -> w{L}.{E}", "two axes"),
        ("w", "E B K N -> w", "right behind K"),
        ("w", "E N K -> w as E N X", "distinct letters"),
        ("w", "skip it", "distinct letters"),
    ],
)
def test_rules_that_say_nothing_clear(pattern, text, says):
    with pytest.raises(ConfigError, match=says):
        moe_online.plan({"w": jax.ShapeDtypeStruct((2, 2), BF16)}, {"w": random(2, 2)}, mapping={pattern: text})


def test_names_that_count_an_unknown_axis():
    abstract = {"w": jax.ShapeDtypeStruct((3, 6), BF16)}
    source = {f"e{e}.w": random(6, seed=e) for e in range(3)}
    with pytest.raises(ConfigError, match="as an axis that is known"):
        moe_online.plan(abstract, source, mapping={"e{E}.w": "-> w"})
    found = quiet_load(abstract, source, mapping={"e{E}.w": "N -> w as E N"}).params["w"]
    assert_same_bits(found, np.stack(list(source.values())))


def test_rules_that_may_match_nothing():
    optional = {**PER_EXPERT, "*.w1.bias": "N -> *.w13_bias.gate ?", "*.inv_freq": "skip"}
    quiet_load(declared(TREE), per_expert(), mapping=optional)
    with pytest.raises(ConfigError, match=r"match no tensor.*w1\.bias"):
        quiet_load(declared(TREE), per_expert(), mapping={**PER_EXPERT, "*.w1.bias": "N -> *.w13_bias.gate"})
    more = per_expert() | {"a.inv_freq": random(3)}
    quiet_load(declared(TREE), more, mapping=optional)
