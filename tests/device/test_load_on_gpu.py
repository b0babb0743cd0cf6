"""On a GPU: the same bits as on a CPU, and the peak that the allocator measured."""

import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import moe_online
from moe_online.evaluate import evaluate, log_probabilities
from moe_online.experts import abstract_experts
from moe_online.schemes import SHORTHANDS
from numpy_quantizer import WEIGHTS, quantize_numpy
from pallas_kernels import quantize
from shipped import heldout, load_shipped
from tolerance import assert_same_bits

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
CHUNK = 64 * 2**20


@pytest.mark.parametrize("scheme", sorted(SHORTHANDS))
def test_weights_have_the_bits_of_the_cpu(scheme):
    here = load_shipped(scheme)
    with jax.default_device(jax.devices("cpu")[0]):
        there = load_shipped(scheme)
    pairs = zip(jax.tree.leaves(nnx.state(here)), jax.tree.leaves(nnx.state(there)), strict=True)
    for found, expected in pairs:
        assert {d.platform for d in found.devices()} == {"gpu"}
        assert {d.platform for d in expected.devices()} == {"cpu"}
        assert_same_bits(found, expected)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_quantize_has_numpys_bits(name, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 512, 640)) * np.exp2(rng.integers(-12, 8, (4, 512, 1)))).astype(dtype)
    codes, scales = quantize_numpy(x, name)
    for function in (quantize, jax.jit(quantize, static_argnums=1)):
        found = function(jnp.asarray(x), name)
        assert_same_bits(found.values, codes)
        assert_same_bits(found.scales, scales)


def test_model_runs_as_on_the_cpu():
    text = heldout()[:8193]
    for scheme in (None, "fp8_per_block", "int8_w8a8"):
        with jax.default_device(jax.devices("cpu")[0]):
            reference = [np.asarray(b) for b in log_probabilities(load_shipped(scheme), text, window=512, batch=8)]
        found = evaluate(load_shipped(scheme), text, window=512, batch=8, reference=reference)
        print(f"{scheme}: KL of GPU to CPU {found.kl_per_byte:.6f}, {found.bits_per_byte:.4f} bits per byte")
        assert found.kl_per_byte < 6e-3  # other orders of sums, so other roundings to bf16 and other activation codes


def experts(layers=6, num_experts=8, hidden=2048, intermediate=2048):
    """Declared experts, and their source in memory: about 200 MB per layer."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, 1, hidden, intermediate)).astype(ml_dtypes.bfloat16)
    abstract = {f"l{i}": abstract_experts(num_experts, hidden, intermediate, jnp.bfloat16) for i in range(layers)}
    w13 = np.ascontiguousarray(np.broadcast_to(np.swapaxes(row, 2, 3), (num_experts, 2, intermediate, hidden)))
    w2 = np.ascontiguousarray(np.broadcast_to(row[0], (num_experts, hidden, intermediate)))
    return abstract, {f"l{i}": {"w13_weight": w13, "w2_weight": w2} for i in range(layers)}


def bound(plan):
    return plan.resident_bytes + (1 + plan.prefetch) * plan.largest_unit_bytes + CHUNK


@pytest.mark.parametrize("scheme", [None, "fp8_per_block", "fp8_per_channel", "int8_w8a16"])
@pytest.mark.parametrize(("unit_bytes", "prefetch"), [(2**28, 1), (2**25, 2), (2**26, 0)])
def test_allocator_peak_is_within_the_plan(scheme, unit_bytes, prefetch):
    abstract, source = experts()
    arguments = {"quantization": scheme, "unit_bytes": unit_bytes, "prefetch": prefetch}
    plan = moe_online.plan(abstract, source, **arguments)
    gc.collect()  # what earlier tests left would be freed while this one measures
    report = moe_online.load(abstract, source, **arguments, progress=False).report
    megabytes = (report.peak_bytes, plan.peak_bytes, bound(plan), report.resident_bytes)
    peak, planned, allowed, kept = (f"{size / 1e6:.1f} MB" for size in megabytes)
    print(
        f"{scheme}, units of {unit_bytes >> 20} MiB, prefetch {prefetch}: peak {peak} of {planned} planned, {allowed} "
        f"allowed, kept {kept}, {report.read_bytes / report.seconds / 1e9:.2f} GB/s"
    )
    assert report.resident_bytes <= report.peak_bytes <= plan.peak_bytes <= bound(plan)


def test_a_source_that_stays_is_noticed(monkeypatch):
    abstract, source = experts()
    kept = []
    monkeypatch.setattr(type(jnp.zeros(())), "delete", lambda array: kept.append(array))
    gc.collect()
    report = moe_online.load(abstract, source, quantization="fp8_per_block", unit_bytes=2**25, progress=False).report
    assert report.peak_bytes > report.planned_peak_bytes + report.read_bytes // 2
