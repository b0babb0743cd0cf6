"""New weights in the place of loaded ones: the bits of numpy, in the old buffers, or nothing changed at all."""

import dataclasses
import functools
import gc
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_online
from by_name import assert_same_parts, by_name
from moe_online.config import MoEConfig
from moe_online.dense import DenseKernel
from moe_online.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    DtypeMismatch,
    MissingWeights,
    NonFiniteWeight,
    ShapeMismatch,
    UnexpectedWeights,
)
from moe_online.experts import abstract_experts
from moe_online.flax import Linear, MoE
from moe_online.loading import open_source, quantizer
from moe_online.loading import reload as reload_function
from moe_online.loading.memory import bytes_on_devices
from moe_online.loading.reload import reload
from moe_online.loading.sinks import OnDevices, OnHost
from moe_online.schemes import QuantSpec
from numpy_quantizer import WEIGHTS, quantize_numpy
from quick import few
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
    random,
    sizes_for,
    swapped,
)
from tolerance import assert_same_bits

internals = sys.modules["moe_online.loading.reload"]  # the package has the function by that name
STAGINGS = ("host", "device")
OLD, NEW = ours(layers=2), ours(layers=2, seed=50)


def again(params, source, **arguments):
    return reload(params, source, **{"progress": False} | arguments)


def load(tree, weight):
    return quiet_load(declared(tree), tree, quantization=QuantSpec(by_name(weight), None)).params


@functools.cache
def once(weight):
    return load(OLD, weight)


def loaded(weight="fp8_per_block"):
    """OLD, in arrays of its own."""
    return jax.tree.map(jnp.copy, once(weight))


def bits(tree):
    """All leaves on the host. numpy arrays that look into the buffers themselves would keep them from being donated."""
    return [np.asarray(jnp.copy(leaf)) for leaf in jax.tree.leaves(tree)]


def pointers(tree):
    return [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for shard in x.addressable_shards]


def places(tree):
    return [(leaf.aval, leaf.sharding, leaf.committed) for leaf in jax.tree.leaves(tree)]


def check_same(params, expected):
    """The bits of `bits`, in arrays that can be used."""
    for leaf, wanted in zip(jax.tree.leaves(params), expected, strict=True):
        assert not leaf.is_deleted()
        assert_same_bits(jnp.copy(leaf), wanted)


def test_the_package_has_the_function():
    assert moe_online.reload is reload_function is reload


@pytest.mark.smoke
@pytest.mark.parametrize("weight", few(WEIGHTS, quick=["fp8_per_block", "nvfp4"]))
def test_bits_are_those_of_numpy(weight):
    """Also of scales above those of blocks: none is that of the old weights."""
    old, new = (ours(*sizes_for(weight), seed=seed) for seed in (0, 50))
    new = jax.tree.map(lambda x: x * BF16.type(8), new)
    params = load(old, weight)
    structure = jax.tree.structure(params)
    for staging, unit_bytes, wanted in (("host", 1, new), ("device", 2**28, old), ("host", 1, new)):
        before = places(params)
        params, report = again(params, wanted, staging=staging, unit_bytes=unit_bytes)
        check_quantized(params, wanted, weight)
        assert jax.tree.structure(params) == structure
        assert places(params) == before
        assert report.peak_bytes <= report.planned_peak_bytes
        assert {tensor.rule for tensor in report.tensors} == {"as loaded"}
        assert all(tensor.error > 0 for tensor in report.tensors)
    with pytest.raises(AssertionError):
        check_quantized(params, old, weight)


@pytest.mark.parametrize("unit_bytes", [1, 100_000, 2**28])
def test_staging_on_the_host_fills_the_old_buffers(unit_bytes):
    params = loaded()
    old, before = jax.tree.leaves(params), pointers(params)
    params = again(params, NEW, unit_bytes=unit_bytes).params
    assert pointers(params) == before
    assert all(array.is_deleted() for array in old)
    check_quantized(params, NEW, "fp8_per_block")


def test_staging_on_the_device_leaves_the_old_arrays():
    params = loaded()
    before = bits(params)
    new, report = again(params, NEW, staging="device")
    check_same(params, before)
    check_quantized(new, NEW, "fp8_per_block")
    assert not set(pointers(new)) & set(pointers(params))
    assert report.resident_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jax.tree.map(lambda leaf: leaf.delete(), params)
    check_quantized(new, NEW, "fp8_per_block")


def test_arrays_that_numpy_looks_into_are_left_to_it():
    params = loaded()
    views = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    expected = [view.copy() for view in views]
    check_quantized(again(params, NEW).params, NEW, "fp8_per_block")
    for view, wanted in zip(views, expected, strict=True):
        assert_same_bits(view, wanted)


E, ANYWHERE, H, INNER = 3, 5, 160, 96
EVERYTHING = {"moe": QuantSpec("nvfp4", "fp8_per_token"), "linear": QuantSpec("fp8_per_channel", None)}


def everything(seed):
    """A source with all that experts can have, a dense layer, a leaf of one's own and arrays of other kinds."""
    experts = {
        "w13_weight": random(E, 2, INNER, H, seed=seed),
        "w2_weight": random(E, H, INNER, seed=seed + 1),
        "w13_bias": random(E, 2, INNER, seed=seed + 2),
        "w2_bias": random(E, H, seed=seed + 3),
        "e_score_correction_bias": random(ANYWHERE, dtype=np.float32, seed=seed + 4),
        "shared": {
            "w13_weight": random(1, 2, 224, H, seed=seed + 5),
            "w2_weight": random(1, H, 224, seed=seed + 6),
            "gate_weight": random(H, seed=seed + 7),
        },
    }
    return {
        "l0": {"experts": experts, "norm": random(H, seed=seed + 8)},
        "own": random(E, H, INNER, seed=seed + 9),  # [E, K, N]
        "scalar": np.asarray(seed, np.float32),
        "ids": np.arange(seed, seed + 12, dtype=np.int32).reshape(3, 4),
        "mask": np.asarray([seed > 5, True, False]),
        "none": np.zeros((0, 4), np.float32),
    }


def declared_everything(expert_map):
    experts = abstract_experts(
        E,
        H,
        INNER,
        BF16,
        has_bias=True,
        num_correction_biases=ANYWHERE,
        shared_intermediate_size=224,
        shared_gate=True,
    )
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), everything(0))
    plain["l0"]["experts"] = dataclasses.replace(experts, expert_map=expert_map)
    plain["own"] = jax.ShapeDtypeStruct((E, INNER, H), BF16)
    return plain


def check_everything(params, source):
    found, stored = params["l0"]["experts"], source["l0"]["experts"]
    for name, halves in (("w13_weight", (1,)), ("w2_weight", ())):
        assert_same_parts(getattr(found, name), quantize_numpy(stored[name], "nvfp4", shared_axes=halves))
        shared = getattr(found.shared, name)
        assert_same_parts(shared, quantize_numpy(stored["shared"][name], "fp8_per_channel"))
    for name in ("w13_bias", "w2_bias", "e_score_correction_bias"):
        assert_same_bits(getattr(found, name), stored[name])
    assert_same_bits(found.shared.gate_weight, stored["shared"]["gate_weight"])
    assert_same_bits(params["l0"]["norm"], source["l0"]["norm"])
    assert_same_parts(params["own"], quantize_numpy(swapped(source["own"]), "nvfp4"))
    for name in ("scalar", "ids", "none"):
        assert_same_bits(params[name], source[name])
    np.testing.assert_array_equal(params["mask"], source["mask"])


@pytest.mark.parametrize("staging", few(STAGINGS, quick=["host"]))
def test_everything_that_experts_can_have(staging):
    expert_map = jnp.asarray([0, -1, 1, -1, 2], jnp.int32)
    mapping = {"own": "E K N"}
    arguments = {"mapping": mapping, "unit_bytes": 50_000}
    old, new = everything(0), everything(20)
    params = quiet_load(declared_everything(expert_map), old, quantization=EVERYTHING, **arguments).params
    structure, before = jax.tree.structure(params), places(params)
    check_everything(jax.tree.map(jnp.copy, params), old)
    params, report = again(params, new, staging=staging, **arguments)
    check_everything(params, new)
    assert params["l0"]["experts"].expert_map is expert_map
    assert jax.tree.structure(params) == structure  # which has the formats of inputs
    assert places(params) == before
    schemes = {tensor.name: tensor.scheme for tensor in report.tensors}
    assert schemes["l0.experts.w2_weight"] == "nvfp4 / fp8_per_token"
    assert schemes["l0.experts.shared.w2_weight"] == "fp8_per_channel / none"
    assert schemes["l0.norm"] == "bfloat16"
    with pytest.raises(AssertionError):
        check_everything(params, old)


class Block(nnx.Module):
    """Quantized and plain dense layers, a norm and experts."""

    def __init__(self, *, rngs):
        self.up = Linear(64, 96, param_dtype=jnp.bfloat16, rngs=rngs)
        self.plain = nnx.Linear(96, 64, param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.RMSNorm(64, param_dtype=jnp.bfloat16, rngs=rngs)
        self.moe = MoE(
            MoEConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=48, shared_intermediate_size=32),
            rngs=rngs,
        )

    def __call__(self, x):
        return self.moe(self.plain(self.up(x))) * self.norm.scale[None]


@functools.cache
def trained(seed):
    """What a trainer has of a Block: unquantized, on the device. Nobody may change it."""
    state = nnx.to_pure_dict(nnx.state(Block(rngs=nnx.Rngs(seed))))
    return jax.tree.map(lambda x: x * (1 + seed), state)


@functools.cache
def served_once(seed, quantization):
    abstract = nnx.eval_shape(lambda: Block(rngs=nnx.Rngs(0)))
    return nnx.split(quiet_load(abstract, trained(seed), quantization=quantization).params)


def served(seed, quantization="int8_w8a16"):
    """A Block that was loaded, in arrays of its own."""
    graph, state = served_once(seed, quantization)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def parts(model):
    """A module of it, and variables."""
    return model.moe, model.moe.experts, model.up.kernel, model.norm.scale


class Compilations:
    """Counts what XLA compiles while it is entered."""

    def __init__(self):
        self.count, self.active = 0, False
        jax.monitoring.register_event_duration_secs_listener(self.note)

    def note(self, event, duration, **_):
        self.count += self.active and event.endswith("backend_compile_duration")

    def __enter__(self):
        self.active = True
        return self

    def __exit__(self, *_):
        self.active = False


@pytest.mark.parametrize(
    ("quantization", "staging"),
    [
        pytest.param("int8_w8a16", "host", marks=pytest.mark.slow),
        ("int8_w8a16", "device"),
        pytest.param(None, "host", marks=pytest.mark.slow),
        pytest.param(None, "device", marks=pytest.mark.slow),
    ],
)
def test_modules_are_updated_in_place_and_compiled_once(quantization, staging):
    model, fresh = served(0, quantization), served(1, quantization)
    graph, traces = nnx.graphdef(model), []

    @nnx.jit
    def forward(model, x):
        traces.append(x)
        return model(x)

    x = jnp.asarray(random(5, 64))
    stale, expected = np.asarray(forward(model, x)), np.asarray(forward(fresh, x))
    assert (stale != expected).any()
    held = parts(model)
    result = again(model, trained(1), staging=staging)
    assert result.params is model
    assert all(a is b for a, b in zip(held, parts(model), strict=True))
    assert nnx.graphdef(model) == graph
    check_same(nnx.state(model), bits(nnx.state(fresh)))
    with Compilations() as compiled:
        found = forward(model, x)
    assert_same_bits(found, expected)
    assert (len(traces), compiled.count) == (1, 0)
    with compiled:  # the counts can tell
        forward(model, x[:3])
    assert len(traces) == 2
    assert compiled.count > 0


def test_plain_trees_with_dense_kernels():
    """As linen has them: no module says that they are kernels."""
    new = trained(1)
    params = nnx.to_pure_dict(nnx.state(served(0)))
    assert isinstance(params["up"]["kernel"], DenseKernel)
    structure = jax.tree.structure(params)
    found = again({"params": params}, {"params": new}).params["params"]
    assert jax.tree.structure(found) == structure
    check_same(found, bits(nnx.state(served(1))))
    kernel = np.asarray(new["up"]["kernel"])
    assert_same_parts(found["up"]["kernel"].weight, quantize_numpy(swapped(kernel), "int8_per_channel"))


@pytest.mark.slow
def test_live_weights_of_a_trainer_stay_as_they_are():
    source = jax.tree.map(jnp.copy, trained(1))
    before = bits(source)
    model = served(0)
    for staging in STAGINGS:
        again(model, source, staging=staging, unit_bytes=1000)
        check_same(source, before)
    jax.tree.map(lambda leaf: leaf.delete(), source)
    check_same(nnx.state(model), bits(nnx.state(served(1))))


class Failing(WatchedSource):
    """Raises at one read."""

    def __init__(self, source, at, error):
        super().__init__(source)
        self.at, self.error = at, error

    def read(self, name, index):
        if len(self.reads) == self.at:
            self.reads.append(name)
            raise self.error(f"{name} is broken", names=[name]) if self.error is CorruptCheckpoint else self.error(name)
        return super().read(name, index)


def reads(tree, unit_bytes):
    """How many there are of a source."""
    source = WatchedSource(open_source(tree))
    quiet_load(declared(tree), source, unit_bytes=unit_bytes)
    return len(source.reads)


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("error", few([CorruptCheckpoint, OSError, KeyboardInterrupt], quick=[CorruptCheckpoint]))
def test_a_read_that_fails_changes_nothing(error, place, staging):
    unit_bytes = 40_000
    count = reads(NEW, unit_bytes)
    assert count >= 8
    at = {"first": 0, "middle": count // 2, "last": count - 1}[place]
    params = loaded()
    before = bits(params)
    source = Failing(open_source(NEW), at, error)
    with nothing_left_on_the_device(), pytest.raises(error):
        again(params, source, staging=staging, unit_bytes=unit_bytes)
    assert len(source.reads) > at
    check_same(params, before)
    check_quantized(again(params, NEW, staging=staging).params, NEW, "fp8_per_block")


def changed(tree=NEW, **leaves):
    """The same with other leaves of its last layer."""
    return tree | {"l1": {**tree["l1"], **leaves}}


def with_nan(at):
    """Not a number in one expert of the last leaf."""
    x = NEW["l1"]["w2_weight"].copy()
    x[at] = np.nan
    return changed(w2_weight=x)


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize(
    ("source", "error", "names"),
    [
        (with_nan((2, 159, 95)), NonFiniteWeight, ["l1.w2_weight"]),
        (with_nan((0, 0, 0)), NonFiniteWeight, ["l1.w2_weight"]),
        (changed(w2_weight=random(3, 160, 95)), ShapeMismatch, ["l1.w2_weight"]),
        (changed(w2_weight=np.zeros((3, 160, 96), np.int32)), DtypeMismatch, ["l1.w2_weight"]),
        ({"l0": NEW["l0"]}, MissingWeights, ["l1.w13_weight", "l1.w2_weight"]),
        (changed(w1=random(3)), UnexpectedWeights, ["l1.w1"]),
    ],
    ids=["NaN at the end", "NaN", "shape", "dtype", "missing", "unexpected"],
)
def test_a_source_that_does_not_fit_changes_nothing(source, error, names, staging):
    params = loaded()
    before = bits(params)
    with nothing_left_on_the_device(), pytest.raises(error) as caught:
        again(params, source, staging=staging, unit_bytes=1)
    assert list(caught.value.names) == names
    check_same(params, before)


@pytest.mark.parametrize("sink", [OnHost, OnDevices])
@pytest.mark.parametrize("at", [1, 5, 12])
def test_memory_that_runs_out_changes_nothing(monkeypatch, sink, at):
    """Where a unit begins, the most of it that fits being on the device."""
    params = loaded()
    before = bits(params)
    begun, begin = [], sink.begin

    def full(self, unit):
        begun.append(unit)
        if len(begun) == at:
            raise MemoryError
        return begin(self, unit)

    monkeypatch.setattr(sink, "begin", full)
    with nothing_left_on_the_device(), pytest.raises(MemoryError):
        again(params, NEW, staging="host" if sink is OnHost else "device", unit_bytes=1)
    assert len(begun) == at
    check_same(params, before)


def test_no_checkpoint_changes_nothing(tmp_path):
    params = loaded()
    before = bits(params)
    with pytest.raises(CheckpointNotFound):
        again(params, tmp_path / "nowhere")
    check_same(params, before)


@pytest.mark.slow
def test_from_files(tmp_path):
    moe_online.save_quantized(load(NEW, "fp8_per_block"), tmp_path / "export")
    params = loaded()
    before = pointers(params)
    params, report = again(params, tmp_path / "export", unit_bytes=20_000)
    assert not any(tensor.quantized for tensor in report.tensors)  # taken over
    assert pointers(params) == before
    check_quantized(params, NEW, "fp8_per_block")
    other = loaded("mxfp8")
    before = bits(other)
    with pytest.raises(ConfigError, match="requantize=True"):
        again(other, tmp_path / "export")
    check_same(other, before)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("l1.w2_weight", ["l1.w2_weight"]),
        ("l1", ["l1.w13_weight", "l1.w2_weight"]),  # the layer
        (["*.w13_weight", "l1"], ["l0.w13_weight", "l1.w13_weight", "l1.w2_weight"]),
        ("re:l[01].w2", ["l0.w2_weight", "l1.w2_weight"]),
        ("*", ["l0.w13_weight", "l0.w2_weight", "l1.w13_weight", "l1.w2_weight"]),
    ],
)
@pytest.mark.parametrize("staging", STAGINGS)
def test_names(names, chosen, staging):
    params = loaded()
    source = WatchedSource(open_source(NEW | {"surplus": random(3)}))
    new, report = again(params, source, names=names, staging=staging)
    assert [tensor.name for tensor in report.tensors] == chosen
    assert set(source.reads) == set(chosen)
    for layer in OLD:
        for field in OLD[layer]:
            found, old = (getattr(tree[layer], field) for tree in (new, params))
            is_new = f"{layer}.{field}" in chosen
            assert (found is not old) == is_new
            halves = (1,) if field == "w13_weight" else ()
            wanted = quantize_numpy((NEW if is_new else OLD)[layer][field], "fp8_per_block", shared_axes=halves)
            assert_same_parts(found, wanted)


def test_names_of_modules():
    model = served(0)
    before = dict(zip(nnx.to_flat_state(nnx.state(model)).paths, pointers_by_leaf(nnx.state(model)), strict=True))
    for names, chosen in (
        ("norm", ["norm.scale"]),
        ("up", ["up.bias", "up.kernel"]),
        ("moe.experts", ["moe.experts.w13_weight", "moe.experts.w2_weight"]),
        ("moe.experts.shared", ["moe.experts.shared.w13_weight", "moe.experts.shared.w2_weight"]),
        ("plain.*", ["plain.bias", "plain.kernel"]),
    ):
        report = again(model, trained(1), names=names, staging="device").report
        assert [tensor.name for tensor in report.tensors] == chosen
    after = dict(zip(nnx.to_flat_state(nnx.state(model)).paths, pointers_by_leaf(nnx.state(model)), strict=True))
    assert {path for path in before if before[path] == after[path]} == {("moe", "router", "kernel")}


def pointers_by_leaf(state):
    return [tuple(pointers(value)) for _, value in nnx.to_flat_state(state)]


@pytest.mark.parametrize("names", ["l2", [], ["l1", "w2_weight", "l*.w3"]])
def test_names_that_match_nothing(names):
    params = loaded()
    before = bits(params)
    with pytest.raises(ConfigError, match="match no leaf and no layer") as caught:
        again(params, NEW, names=names)
    assert "l0.w13_weight" in str(caught.value)
    assert "'l1'" not in str(caught.value)
    check_same(params, before)


PER_EXPERT = {
    "layers.{L}.experts.{E}.w1": "N K -> l{L}.w13_weight.gate",
    "layers.{L}.experts.{E}.w3": "N K -> l{L}.w13_weight.up",
    "layers.{L}.experts.{E}.w2": "N K -> l{L}.w2_weight",
}


def per_expert(tree):
    found = {}
    for layer, leaves in enumerate(tree.values()):
        for e, (w13, w2) in enumerate(zip(leaves["w13_weight"], leaves["w2_weight"], strict=True)):
            name = f"layers.{layer}.experts.{e}"
            found |= {f"{name}.w1": w13[0], f"{name}.w3": w13[1], f"{name}.w2": w2}
    return found


@pytest.mark.parametrize("staging", few(STAGINGS, quick=["host"]))
@pytest.mark.slow
def test_mappings(staging):
    params = loaded()
    params = again(params, per_expert(NEW), mapping=PER_EXPERT, staging=staging, unit_bytes=40_000).params
    check_quantized(params, NEW, "fp8_per_block")
    params = again(params, {"step": as_ken(OLD)}, mapping=KEN_MAPPING, staging=staging, prefix="step").params
    check_quantized(params, OLD, "fp8_per_block")
    params = again(params, per_expert(NEW), mapping=PER_EXPERT, staging=staging, names="l1").params
    check_quantized({"l0": params["l0"]}, {"l0": OLD["l0"]}, "fp8_per_block")
    check_quantized({"l1": params["l1"]}, {"l1": NEW["l1"]}, "fp8_per_block")


@pytest.mark.parametrize("unit_bytes", few([1, 40_000, 2**28], quick=[1]))
@pytest.mark.parametrize("weight", few(["fp8_per_block", "fp8_per_tensor", None], quick=["fp8_per_tensor", None]))
@pytest.mark.slow
def test_leaves_of_all_layers(weight, unit_bytes):
    """`[L, E, ...]`, as nnx.vmap makes them."""
    one = declared(OLD)["l0"]
    abstract = {"moe": jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), one)}
    old, new = (
        {"moe": {name: np.stack([layer[name] for layer in tree.values()]) for name in tree["l0"]}}
        for tree in (OLD, NEW)
    )
    params = quiet_load(abstract, old, quantization=weight and QuantSpec(weight, None)).params
    before = places(params), pointers(params)
    params, report = again(params, new, unit_bytes=unit_bytes)
    assert report.peak_bytes <= report.planned_peak_bytes
    assert (places(params), pointers(params)) == before
    for name, halves in (("w13_weight", (2,)), ("w2_weight", ())):
        found, wanted = getattr(params["moe"], name), new["moe"][name]
        if weight is None:
            assert_same_bits(found, wanted)
        else:
            assert_same_parts(found, quantize_numpy(wanted, weight, shared_axes=halves))


def test_a_hundred_reloads_leave_nothing_behind(request):
    trees = [ours(2, 32, 16, seed=seed) for seed in (0, 50)]
    trees = [tree | {"norm": random(32, seed=i), "step": np.asarray(i, np.int32)} for i, tree in enumerate(trees)]
    abstract = declared({"l0": trees[0]["l0"]})
    abstract |= {name: jax.ShapeDtypeStruct(trees[0][name].shape, trees[0][name].dtype) for name in ("norm", "step")}
    params = quiet_load(abstract, trees[0], quantization="int8_w8a16").params
    total = jax.jit(lambda params: sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(params)))
    total(params)
    for i in (1, 0):
        params = again(params, trees[i], unit_bytes=2048).params
    before = pointers([params["l0"], params["norm"]])
    gc.collect()
    gc.freeze()  # each reload collects: what other tests have left need not be looked through a hundred times
    request.addfinalizer(gc.unfreeze)
    live, steps, writers = len(jax.live_arrays()), len(internals._STEPS), internals._writer.cache_info().currsize
    bytes_live = sum(array.nbytes for array in jax.live_arrays())
    with Compilations() as compiled:
        for i in range(100):
            params = again(params, trees[i % 2], unit_bytes=2048).params
            total(params)
    assert compiled.count == 0
    assert (len(internals._STEPS), internals._writer.cache_info().currsize) == (steps, writers)
    gc.collect()
    assert len(jax.live_arrays()) == live
    assert sum(array.nbytes for array in jax.live_arrays()) == bytes_live
    assert total._cache_size() == 1
    assert pointers([params["l0"], params["norm"]]) == before
    check_quantized({"l0": params["l0"]}, {"l0": trees[1]["l0"]}, "int8_per_channel")
    assert int(params["step"]) == 1
    with compiled:  # the counts can tell
        again(params, trees[0], unit_bytes=2**20)
    assert compiled.count > 0
    assert len(internals._STEPS) > steps


@pytest.mark.parametrize("staging", STAGINGS)
def test_arrays_of_no_device_in_particular(staging):
    """As `jnp.zeros` makes them. Those that are copied into stay so, for which functions were compiled."""
    params = {"w": jnp.zeros((4, 6)), "s": jnp.zeros(()), "b": jnp.zeros((0, 3))}
    new = {"w": random(4, 6, dtype=np.float32), "s": np.asarray(2, np.float32), "b": np.zeros((0, 3), np.float32)}
    function = jax.jit(lambda params: params["w"] * params["s"])
    function(params)
    before = places(params)
    params = again(params, new, staging=staging).params
    for name, x in new.items():
        assert_same_bits(params[name], x)
    function(params)
    if staging == "host":
        assert places(params) == before
    assert function._cache_size() == (1 if staging == "host" else 2)


@pytest.mark.parametrize("staging", STAGINGS)
def test_one_array_in_two_places(staging):
    one = jax.device_put(random(4, 6, dtype=np.float32), jax.devices()[0])
    new = {name: random(4, 6, dtype=np.float32, seed=seed) for seed, name in enumerate("ab", 1)}
    params = again({"a": one, "b": one}, new, staging=staging).params
    for name, x in new.items():
        assert_same_bits(params[name], x)


LAYERS, WIDE = 3, 512


@pytest.fixture
def large(monkeypatch):
    """Weights of several units, and chunks so small that temporaries hide nothing."""
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 2**16)
    monkeypatch.setattr(internals, "_STEPS", type(internals._STEPS)())
    ones = {"w13_weight": np.ones((8, 2, WIDE, WIDE), BF16), "w2_weight": np.ones((8, WIDE, WIDE), BF16)}
    return {f"l{layer}": ones for layer in range(LAYERS)}


def check_peak(report, prefetch, largest_unit_bytes):
    assert report.peak_bytes <= report.planned_peak_bytes, f"{report.peak_bytes=} > {report.planned_peak_bytes=}"
    bound = (1 + prefetch) * largest_unit_bytes + largest_unit_bytes // 2 + 2**21
    assert report.planned_peak_bytes <= bound, f"{report.planned_peak_bytes=} is above {bound=}"
    assert report.peak_bytes > largest_unit_bytes


@pytest.mark.parametrize(
    ("unit_bytes", "prefetch"),
    [(2**22, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2**28, 0), (2**21, 2)))],
)
def test_staging_on_the_host_takes_some_units_of_the_device(monkeypatch, large, unit_bytes, prefetch):
    params = load(large, "fp8_per_block")
    start = device_bytes()
    during, writer = [], internals._writer
    monkeypatch.setattr(internals, "_writer", lambda *args: watched(writer(*args), during))
    params, report = again(params, large, unit_bytes=unit_bytes, prefetch=prefetch)
    check_peak(report, prefetch, min(unit_bytes, 8 * 2 * WIDE * WIDE * 2))
    assert len(during) >= 4 * LAYERS
    assert start < max(during) <= start + min(unit_bytes, 8 * 2 * WIDE * WIDE) < start + report.planned_peak_bytes
    gc.collect()
    assert device_bytes() == start
    resident = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert report.planned_host_peak_bytes > resident
    assert report.peak_bytes < resident


def device_bytes():
    return sum(bytes_on_devices(array) for array in jax.live_arrays())


def watched(write, during):
    """Notes how much there is before each piece is written into the old array, with which it shares memory then."""

    def noted(*args):
        during.append(device_bytes())
        return write(*args)

    return noted


def test_a_unit_that_stays_is_noticed(monkeypatch, large):
    params, kept = load(large, "fp8_per_block"), []
    monkeypatch.setattr(type(jnp.zeros(())), "delete", lambda array: kept.append(array))
    report = again(params, large, unit_bytes=2**22).report
    with pytest.raises(AssertionError, match="planned_peak_bytes="):
        check_peak(report, 1, 2**22)


def test_staging_on_the_device_takes_what_a_load_takes(large):
    params = load(large, "fp8_per_block")
    arguments = {"unit_bytes": 2**22}
    plan = moe_online.plan(declared(large), large, quantization="fp8_per_block", **arguments)
    new, report = again(params, large, staging="device", **arguments)
    assert report.planned_peak_bytes == plan.peak_bytes
    assert report.resident_bytes <= report.peak_bytes <= plan.peak_bytes
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, new)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"staging": "disk"}, "staging='disk' must be one of 'host', 'device'"),
        ({"unit_bytes": 0}, "unit_bytes=0 must be a whole number"),
        ({"prefetch": -1}, "prefetch=-1 must be a whole number"),
        ({"prefix": "l7"}, "prefix='l7' names nothing"),
        ({"mapping": {"*.w9": "skip", "l3": "E N K"}}, "match no tensor"),
    ],
)
def test_wrong_arguments(arguments, says):
    params = loaded()
    before = bits(params)
    with pytest.raises(ConfigError, match=says):
        again(params, NEW, **arguments)
    check_same(params, before)


def test_parameters_that_are_none():
    params = loaded()
    with pytest.raises(ConfigError, match=r"no loaded arrays.*l0\.w13_weight.*the order is reload\(params, source\)"):
        again(NEW, params)
    with pytest.raises(ConfigError, match="no loaded arrays"):
        again(declared(OLD), NEW)
    with pytest.raises(ConfigError, match="no loaded arrays"):
        again(jax.eval_shape(lambda: params), NEW)
    new = again(params, NEW).params
    with pytest.raises(ConfigError, match=r"are deleted.*l1\.w2_weight.*the last reload"):
        again(params, OLD)
    check_quantized(new, NEW, "fp8_per_block")


DEVICES = """
import json
import sys

sys.path[:0] = json.loads(sys.argv[1])
import jax

jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import test_reload as here

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "tensor"))
old, new = (here.ours(e=4, h=320, i=256, layers=2, seed=seed) for seed in (0, 50))
norm = NamedSharding(mesh, PartitionSpec("tensor"))
rows = []
for weight in ("fp8_per_block", "fp8_per_tensor", "nvfp4", None):
    quantization = None if weight is None else here.QuantSpec(weight, None)
    abstract = here.declared(old, mesh=mesh) | {"norm": jax.ShapeDtypeStruct((320,), "bfloat16", sharding=norm)}
    source = old | {"norm": here.random(320)}
    params = here.quiet_load(abstract, source, quantization=quantization).params
    compiled = jax.jit(lambda params: jax.tree.map(lambda x: x + x, params))
    compiled(params)
    for staging, unit_bytes, tree in (("host", 1, new), ("device", 2**28, old), ("host", 300_000, new)):
        before, memory = here.places(params), here.pointers(params)
        live = jax.tree.map(jax.numpy.asarray, tree) if unit_bytes == 1 else tree
        source = live | {"norm": here.random(320, seed=unit_bytes % 7)}
        params, report = here.again(params, source, staging=staging, unit_bytes=unit_bytes)
        assert here.places(params) == before
        assert (here.pointers(params) == memory) == (staging == "host")
        here.assert_same_bits(params["norm"], source["norm"])
        experts = {name: params[name] for name in tree}
        if weight is None:
            for name, layer in tree.items():
                for field, x in layer.items():
                    here.assert_same_bits(jax.numpy.copy(getattr(experts[name], field)), x)
        else:
            here.check_quantized(jax.tree.map(jax.numpy.copy, experts), tree, weight)
        compiled(params)
        params = jax.tree.map(jax.numpy.copy, params) if staging == "device" else params
        rows.append([report.peak_bytes, report.planned_peak_bytes])
    assert compiled._cache_size() == 1
    failing = here.Failing(here.open_source(old | {"norm": here.random(320)}), 5, here.CorruptCheckpoint)
    before = here.bits(params)
    for staging in here.STAGINGS:
        try:
            with here.nothing_left_on_the_device():
                here.again(params, failing, staging=staging, unit_bytes=1)
        except here.CorruptCheckpoint:
            here.check_same(params, before)
            failing.reads.clear()
        else:
            raise AssertionError("no error")

# A mesh whose shardings are a part of types.
typed = NamedSharding(jax.make_mesh((2, 2), ("expert", "tensor")), PartitionSpec("expert", "tensor"))
params = {"w": jax.device_put(np.zeros((8, 6), np.float32), typed)}
for staging in here.STAGINGS:
    before = here.places(params)
    x = here.random(8, 6, dtype=np.float32)
    params = here.again(params, {"w": x}, staging=staging, unit_bytes=1).params
    assert here.places(params) == before
    assert params["w"].sharding.mesh == typed.mesh
    here.assert_same_bits(params["w"], x)
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
    assert len(rows) == 12
    assert all(0 < peak <= planned for peak, planned in rows)
