"""Peak memory: what is planned, what is measured, and that a source which stays alive is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_online
from by_name import by_name
from moe_online.errors import MemoryBudgetError
from moe_online.loading import open_source, quantizer, steps
from moe_online.loading.quantizer import PartLayout, temporary_bytes
from moe_online.schemes import QuantSpec
from numpy_quantizer import WEIGHTS
from pallas_kernels import QuantizedArray
from quick import few
from sources import (
    BF16,
    KEN_MAPPING,
    WatchedSource,
    as_ken,
    check_quantized,
    declared,
    nothing_left_on_the_device,
    quiet_load,
)

LAYERS, E, H, INNER = 6, 8, 512, 512  # 12.6 MB a layer
CHUNK = 64 * 2**20


@pytest.fixture(scope="module")
def tree():
    zeros = {"w13_weight": np.ones((E, 2, INNER, H), BF16), "w2_weight": np.ones((E, H, INNER), BF16)}
    return {f"l{layer}": zeros for layer in range(LAYERS)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that temporaries hide nothing: one unit must show."""
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 2**16)


def check_peak(report, plan):
    bound = plan.resident_bytes + (1 + plan.prefetch) * plan.largest_unit_bytes + CHUNK
    assert report.resident_bytes <= report.peak_bytes, "the meter saw less than what is kept"
    assert report.peak_bytes <= plan.peak_bytes, f"{report.peak_bytes=} is above {plan.peak_bytes=}"
    assert plan.peak_bytes <= bound, f"{plan.peak_bytes=} is above {bound=}"


@pytest.mark.parametrize(
    ("scheme", "unit_bytes", "prefetch"),
    [
        ("fp8_per_block", 2**28, 1),
        ("fp8_per_block", 2**20, 2),
        ("fp8_per_channel", 2**22, 1),
        ("int8_w8a16", 2**22, 0),
        (None, 2**28, 0),
        (None, 2**21, 1),
    ],
)
def test_measured_peak_is_within_the_plan(tree, scheme, unit_bytes, prefetch):
    arguments = {"quantization": scheme, "unit_bytes": unit_bytes, "prefetch": prefetch}
    plan = moe_online.plan(declared(tree), tree, **arguments)
    params, report = quiet_load(declared(tree), tree, **arguments)
    check_peak(report, plan)
    assert report.planned_peak_bytes == plan.peak_bytes
    assert report.resident_bytes == plan.resident_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert plan.largest_unit_bytes <= min(unit_bytes, 8 * 2**20)
    assert (
        plan.peak_bytes - plan.resident_bytes < (1 + prefetch) * plan.largest_unit_bytes + 2**21
    )  # no slack to hide in


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_source_that_stays_is_noticed(tree, monkeypatch, prefetch):
    arguments = {"quantization": "fp8_per_block", "unit_bytes": 2**22, "prefetch": prefetch}
    plan = moe_online.plan(declared(tree), tree, **arguments)
    kept = []  # a deletion that does not happen, and a reference that somebody holds
    monkeypatch.setattr(type(jnp.zeros(())), "delete", lambda array: kept.append(array))
    report = quiet_load(declared(tree), tree, **arguments).report
    with pytest.raises(AssertionError, match="is above plan"):
        check_peak(report, plan)
    assert report.peak_bytes > plan.peak_bytes + plan.read_bytes // 4


def test_one_unit_too_many_is_noticed(tree, monkeypatch):
    """The bound is tight: reading one unit further ahead than planned breaks it."""
    arguments = {"quantization": "fp8_per_block", "unit_bytes": 2**28, "prefetch": 0}
    plan = moe_online.plan(declared(tree), tree, **arguments)
    kept, delete = [], type(jnp.zeros(())).delete

    def late(array):
        kept.append(array)
        if len(kept) > 1:
            delete(kept.pop(0))

    monkeypatch.setattr(type(jnp.zeros(())), "delete", late)
    report = quiet_load(declared(tree), tree, **arguments).report
    with pytest.raises(AssertionError, match="is above plan"):
        check_peak(report, plan)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_more_units_exist_than_planned(tree, prefetch):
    """Read ahead, never further: counted at each read, by their dtype."""
    source, seen = WatchedSource(open_source(tree)), []

    def source_bytes():
        return sum(array.nbytes for array in jax.live_arrays() if array.dtype == BF16)

    def read(name, index):
        seen.append(source_bytes() - before)
        return WatchedSource.read(source, name, index)

    source.read, before = read, source_bytes()
    arguments = {"prefetch": prefetch, "quantization": "int8_w8a16", "unit_bytes": 2**22}
    plan = moe_online.plan(declared(tree), source, **arguments)
    quiet_load(declared(tree), source, **arguments)
    assert len(seen) == len(plan.units)
    assert max(seen) <= prefetch * plan.largest_unit_bytes  # the one being read is not there yet
    assert prefetch == 0 or max(seen) > 0


def test_memory_limit(tree):
    plan = moe_online.plan(declared(tree), tree, quantization="fp8_per_block")
    assert (
        moe_online.plan(declared(tree), tree, quantization="fp8_per_block", memory_limit=plan.peak_bytes).peak_bytes
        == plan.peak_bytes
    )
    arguments = {"quantization": "fp8_per_block", "memory_limit": plan.peak_bytes - 1}
    smaller = moe_online.plan(declared(tree), tree, **arguments)
    assert smaller.peak_bytes < plan.peak_bytes
    assert smaller.unit_bytes < plan.largest_unit_bytes
    assert smaller.largest_unit_bytes <= smaller.unit_bytes
    params, report = quiet_load(declared(tree), tree, **arguments)
    assert report.peak_bytes <= smaller.peak_bytes == report.planned_peak_bytes
    check_quantized(params, tree, "fp8_per_block")


def test_a_memory_limit_that_nothing_fits(tree):
    arguments = {"quantization": "fp8_per_block", "prefetch": 2}
    least = moe_online.plan(declared(tree), tree, unit_bytes=1, **arguments)
    fitting = moe_online.plan(declared(tree), tree, memory_limit=least.peak_bytes, **arguments)
    assert fitting.peak_bytes == least.peak_bytes
    with nothing_left_on_the_device(), pytest.raises(MemoryBudgetError, match="prefetch=0 would fit") as caught:
        quiet_load(declared(tree), tree, memory_limit=least.peak_bytes - 1, **arguments)
    assert len(caught.value.names) == 2 * LAYERS
    with pytest.raises(MemoryBudgetError, match="quantize more") as caught:
        quiet_load(declared(tree), tree, memory_limit=least.resident_bytes, **arguments)
    assert "would fit" not in str(caught.value)


def test_compiled_steps_do_not_grow_with_layers(tree):
    counts = []
    for layers in (1, LAYERS):
        part = {f"l{layer}": tree[f"l{layer}"] for layer in range(layers)}
        arguments = {"quantization": "int8_w8a16", "unit_bytes": 3 * 2**21}
        counts.append(quiet_load(declared(part), part, **arguments).report.compiled_steps)
    assert counts[0] == counts[1] <= 4  # w13 and w2, each with whole units and a last smaller one


CASES = [  # leaf, E K N halves
    ((8, 2, 256, 512), False),
    ((8, 2, 256, 512), True),
    ((4, 512, 256), False),
    ((2, 300, 4096), False),
    ((3, 2, 129, 1024), True),
]


@pytest.mark.parametrize("weight", few([*WEIGHTS, None], ("fp8_per_block", "nvfp4")))
@pytest.mark.parametrize(("shape", "apart"), CASES, ids=str)
def test_temporaries_of_a_step(shape, apart, weight):
    """What XLA reserves for a compiled step is within what the plan counts."""
    fmt = None if weight is None else by_name(weight)
    found = step_memory(shape, apart, fmt)
    assert found <= temporary_bytes(shape, fmt), f"{found=}"
    assert temporary_bytes(shape, fmt) <= CHUNK


@pytest.mark.parametrize("shape", [(4000, 700), (70_000,), (7, 9, 11, 130), (2, 100_000), ()], ids=str)
def test_temporaries_of_copies(shape):
    assert step_memory(shape, False, None, dtype=np.float32) <= temporary_bytes(shape, None)


def step_memory(shape, apart, fmt, dtype=BF16):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def aval(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    stored = aval(shape, BF16)
    if fmt is not None:
        second = fmt.global_shape(shape)
        stored = QuantizedArray(
            values=aval(fmt.values_shape(shape), fmt.storage),
            scales=aval(fmt.scales_shape(shape), fmt.scale_dtype),
            global_scale=None if second is None else aval(second, np.float32),
            format=fmt,
        )
    if apart:
        e, _, n, k = shape
        layouts = tuple(PartLayout(permutation=(0, 2, 1), half=half) for half in (0, 1))
        parts = [aval((e, k, n), dtype)] * 2
    else:
        layouts, parts = (PartLayout(permutation=tuple(range(len(shape))), half=None),), [aval(shape, dtype)]
    return steps.StepCache().get(stored, layouts, parts).temporary_bytes


def test_the_check_of_temporaries_can_fail(monkeypatch):
    """A step that works on all experts at once takes more than one chunk."""
    fmt = QuantSpec("fp8_per_block", None).weight

    def at_once(fmt, layouts, *, axis_names):
        def step(out, parts, start):
            q = quantizer.quantize(parts[0].astype(jnp.float32), fmt)
            real = jax.lax.optimization_barrier(q.dequantize(jnp.float32))
            error = jnp.sum(jnp.square(real - parts[0].astype(jnp.float32)), axis=tuple(range(1, real.ndim)))
            finite = jnp.isfinite(jnp.max(jnp.abs(parts[0]), axis=tuple(range(1, parts[0].ndim))))[None]
            return q, quantizer.Stats(finite=finite, error=error, norm=error)

        return step

    monkeypatch.setattr(quantizer, "quantize_step", at_once)
    assert step_memory((32, 2, 256, 512), False, fmt) > temporary_bytes((32, 2, 256, 512), fmt)


def test_halves_count_as_one_unit(tree):
    layer = {"l0": tree["l0"]}
    plan = moe_online.plan(declared(layer), as_ken(layer), mapping=KEN_MAPPING)
    assert [unit.nbytes for unit in plan.units] == [E * 2 * INNER * H * 2, E * H * INNER * 2]
