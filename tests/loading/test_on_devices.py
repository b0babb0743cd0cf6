"""Sources that lie on the devices as they are needed there: quantized where they are, in one piece, and left alone."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import moe_online
from by_name import by_name
from eight_devices import in_eight_devices
from moe_online.errors import NonFiniteWeight
from moe_online.loading import open_source, quantizer, stream
from moe_online.loading.reload import reload
from moe_online.loading.source import MemorySource, prefixed
from moe_online.schemes import QuantSpec
from pallas_kernels.devices import INTERPRETED, interpreting
from quick import few
from sources import KEN_MAPPING, WatchedSource, as_ken, check_quantized, declared, ours, quiet_load
from tolerance import assert_same_bits

internals = sys.modules["moe_online.loading.reload"]  # the package has the function by that name
FORMATS = few(("fp8_per_block", "fp8_per_tensor", "int8_per_channel", "nvfp4"), quick=("fp8_per_block", "nvfp4"))


class Asked(MemorySource):
    """Notes what is read, and what is given as it is."""

    def __init__(self, tree):
        super().__init__(tree)
        self.read_names, self.given = [], []

    def read(self, name, index):
        self.read_names.append(name)
        return super().read(name, index)

    def array(self, name):
        self.given.append(name)
        return super().array(name)


def on_devices(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("weight", FORMATS)
def test_it_is_not_copied_and_not_freed(weight, monkeypatch):
    tree = ours(h=256, i=128, layers=2)
    source, taken, store = Asked(on_devices(tree)), [], stream._store

    def watched(unit, parts, *rest):
        taken.extend(parts)
        return store(unit, parts, *rest)

    monkeypatch.setattr(stream, "_store", watched)
    spec = QuantSpec(by_name(weight), None)
    params, report = quiet_load(declared(tree), source, quantization=spec, unit_bytes=1)
    assert {id(array) for array in taken} == {id(array) for array in source._arrays.values()}
    assert report.resident_bytes <= report.peak_bytes <= report.planned_peak_bytes
    check_quantized(params, tree, weight)
    assert not source.read_names
    assert sorted(source.given) == sorted(source.tensors)
    for name, array in source._arrays.items():
        layer, _, field = name.partition(".")
        assert_same_bits(array, tree[layer][field])


def test_the_plan_counts_no_copy():
    tree = ours(h=256, i=128, layers=2)
    on_host, there = (
        moe_online.plan(declared(tree), source, quantization="fp8_per_block") for source in (tree, on_devices(tree))
    )
    assert (there.largest_unit_bytes, len(there.units)) == (0, 4)
    assert there.host_peak_bytes == 0 < on_host.host_peak_bytes
    assert there.read_bytes == on_host.read_bytes
    assert there.peak_bytes + on_host.largest_unit_bytes < on_host.peak_bytes


def test_what_lies_otherwise_is_copied():
    """Other axes and gate and up apart are as they are needed; so are other dtypes; parts of one array are not."""
    tree = ours(h=256, i=128)
    w13, w2 = tree["l0"].values()
    apart = on_devices(as_ken(tree))
    source = Asked(apart)
    check_quantized(
        quiet_load(declared(tree), source, mapping=KEN_MAPPING, quantization="fp8_per_block").params,
        tree,
        "fp8_per_block",
    )
    assert not source.read_names
    fused = Asked(on_devices({"both": w13.reshape(3, 256, 256), "down": w2}))
    rules = {"both": "E (S N) K -> l0.w13_weight", "down": "-> l0.w2_weight"}
    check_quantized(
        quiet_load(declared(tree), fused, mapping=rules, quantization="fp8_per_block").params, tree, "fp8_per_block"
    )
    assert set(fused.read_names) == {"both"}
    assert fused.given == ["down"]
    each = Asked(on_devices({f"{i}": w2[i] for i in range(3)} | {"w13": w13}))
    rules = {"{E}": "N K -> l0.w2_weight", "w13": "-> l0.w13_weight"}
    quiet_load(declared(tree), each, mapping=rules)
    assert set(each.read_names) == {"0", "1", "2"}
    wide = Asked(on_devices({"l0": {"w13_weight": w13, "w2_weight": w2.astype(np.float32)}}))
    assert_same_bits(quiet_load(declared(tree), wide).params["l0"].w2_weight, w2)
    assert not wide.read_names


def test_another_layout_is_copied():
    tree = ours(h=256, i=128)
    sources = []
    for name, x in tree["l0"].items():
        array = jnp.asarray(x)
        turned = Layout(tuple(range(array.ndim))[::-1])
        sources.append((name, jax.device_put(array, Format(turned, array.sharding))))
    source = Asked({"l0": dict(sources)})
    params = quiet_load(declared(tree), source, quantization="fp8_per_block").params
    check_quantized(params, tree, "fp8_per_block")
    assert not source.given
    params = reload(params, source, staging="device", progress=False).params
    check_quantized(params, tree, "fp8_per_block")


def test_a_limit_makes_units_smaller_beside_what_stays():
    tree = ours(h=256, i=128, e=8)["l0"]
    abstract = declared({"l0": tree})
    source = {"l0": {"w13_weight": jnp.asarray(tree["w13_weight"]), "w2_weight": tree["w2_weight"]}}
    whole = moe_online.plan(abstract, source)
    limited = moe_online.plan(abstract, source, memory_limit=whole.peak_bytes - 1)
    assert limited.unit_bytes == tree["w2_weight"].nbytes // 2


def test_plans_are_kept_only_where_they_hold():
    old, new = ({"w": np.full((3, 8), value)} for value in (1.5, 2.5))  # f64
    params = quiet_load({"w": jax.ShapeDtypeStruct((3, 8), "float32")}, old).params
    for wide in (False, True, False):
        jax.config.update("jax_enable_x64", wide)
        try:
            found = reload(params, new, staging="device", progress=False).params
        finally:
            jax.config.update("jax_enable_x64", False)
        assert (np.asarray(found["w"]) == 2.5).all()


class Listed(Asked):
    """Describes shapes as lists, as JSON has them: they are no key."""

    @property
    def tensors(self):
        return {name: dataclasses.replace(t, shape=list(t.shape)) for name, t in super().tensors.items()}


def test_plans_that_cannot_be_kept_are_made_anew():
    old, new = ({"w": np.full((3, 8), value, np.float32)} for value in (1.5, 2.5))
    params = quiet_load({"w": jax.ShapeDtypeStruct((3, 8), "float32")}, old).params
    internals._planned.cache_clear()
    found = reload(params, Listed(new), staging="device", progress=False).params
    assert (np.asarray(found["w"]) == 2.5).all()
    assert internals._planned.cache_info().currsize == 0


def test_sources_of_others_need_not_know_of_it():
    """One that lists tensors on devices, but only reads."""
    tree = ours(h=256, i=128)
    for source in (WatchedSource(open_source(on_devices(tree))), WatchedSource(open_source(on_devices({"x": tree})))):
        inner = source if "l0.w2_weight" in source.tensors else prefixed(source, "x")
        check_quantized(quiet_load(declared(tree), inner, quantization="fp8_per_block").params, tree, "fp8_per_block")
        assert source.reads
    below = Asked(on_devices({"x": tree}))
    quiet_load(declared(tree), below, prefix="x", quantization="fp8_per_block")
    assert not below.read_names


def test_all_that_is_not_finite_is_named_and_the_source_left():
    tree = ours(h=256, i=128, layers=2)
    tree["l0"]["w2_weight"][1, 3, 5] = np.nan
    tree["l1"]["w13_weight"][2, 1, 3, 5] = np.inf
    source = on_devices(tree)
    with pytest.raises(NonFiniteWeight, match="first in expert 1") as raised:
        quiet_load(declared(tree), source, quantization="fp8_per_block")
    assert set(raised.value.names) == {"l0.w2_weight", "l1.w13_weight"}
    assert not any(array.is_deleted() for array in jax.tree.leaves(source))


def test_a_reload_on_the_device_takes_it_too_and_is_planned_once():
    old, new = (ours(h=256, i=128, layers=2, seed=seed) for seed in (0, 9))
    params = quiet_load(declared(old), old, quantization="fp8_per_block").params
    source = Asked(on_devices(new))
    internals._planned.cache_clear()
    for _ in range(3):
        params, report = reload(params, source, staging="device", progress=False)
    check_quantized(params, new, "fp8_per_block")
    assert not source.read_names
    assert internals._planned.cache_info()[:2] == (2, 1)  # hits, misses
    assert report.planned_peak_bytes < report.resident_bytes + 2**20
    others = on_devices(new | {"l1": {name: x[::-1] for name, x in new["l1"].items()}})
    params = reload(params, others, staging="device", progress=False).params  # the same plan, other numbers
    check_quantized(params, jax.tree.map(np.asarray, others), "fp8_per_block")
    assert internals._planned.cache_info()[:2] == (3, 1)


def test_what_is_staged_on_the_host_comes_in_units():
    old, new = (ours(h=256, i=128, seed=seed) for seed in (0, 9))
    params = quiet_load(declared(old), old, quantization="fp8_per_block").params
    source = Asked(on_devices(new))
    params, _ = reload(params, source, staging="host", unit_bytes=1, progress=False)
    check_quantized(params, new, "fp8_per_block")
    assert not source.given
    assert len(source.read_names) == 6  # expert by expert


@pytest.mark.parametrize("half", [None, 1])
def test_accelerators_copy_at_once_what_a_cpu_copies_in_turns(half):
    out = jnp.zeros((5, 4, 6) if half is None else (5, 2, 4, 6), jnp.float32)
    part = jnp.arange(3.0 * 4 * 6).reshape(3, 4, 6).at[1, 2, 3].set(jnp.nan)
    layout = quantizer.PartLayout(permutation=(0, 1, 2), half=half)
    found = []
    for device in (None, INTERPRETED["gpu"]):
        token = interpreting.set(device)
        step = quantizer.copy_step(jax.ShapeDtypeStruct(out.shape, out.dtype), [layout])
        text = str(jax.make_jaxpr(step)(out, [part], jnp.int32(2)))
        assert ("while" in text) == (device is None)
        found.append(jax.jit(step)(out, [part], jnp.int32(2)))
        interpreting.reset(token)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert_same_bits(one, other)
    assert np.asarray(found[0][1].finite).tolist() == [[True, False, True]]
    expected = np.zeros(out.shape, np.float32)
    (expected if half is None else expected[:, half])[2:5] = part
    assert_same_bits(found[1][0], expected)


def test_on_a_mesh(request):
    assert in_eight_devices(request, "test_on_devices", "sharded") == ["taken", "taken", "copied"]


def sharded():
    """Sharded as they are to be; by a mesh that XLA does not follow; otherwise."""
    tree = ours(e=4, h=512, i=512)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("expert", "tensor"))
    typed = jax.make_mesh((2, 4), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    expected = quiet_load(declared(tree, mesh=mesh), tree, quantization="fp8_per_block").params
    found = []
    for of, place in ((mesh, True), (typed, True), (mesh, False)):
        leaves = declared(tree, mesh=mesh)["l0"]
        specs = {name: getattr(leaves, name).sharding.spec if place else PartitionSpec() for name in tree["l0"]}
        source = Asked(
            {"l0": {name: jax.device_put(x, NamedSharding(of, specs[name])) for name, x in tree["l0"].items()}}
        )
        params = quiet_load(declared(tree, mesh=mesh), source, quantization="fp8_per_block").params
        jax.tree.map(assert_same_bits, params, expected)
        assert not any(array.is_deleted() for array in source._arrays.values())
        found.append("copied" if source.read_names else "taken")
    print(json.dumps(found))
