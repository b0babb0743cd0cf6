"""On a GPU: the same bits as on a CPU, and the peak that the allocator measured."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import gpu_peak
from by_name import assert_same_parts, by_name
from leaves import amax_of, check_loss, leaf, weights
from moe_online import load, reload
from moe_online.errors import NonFiniteWeight
from moe_online.evaluate import evaluate, log_probabilities
from moe_online.experts import abstract_experts
from moe_online.schemes import SHORTHANDS
from numpy_quantizer import BLOCKS, WEIGHTS, quantize_numpy
from pallas_kernels import quantize
from pallas_kernels.quantize import kernel_for, quantize_into
from shipped import heldout, load_shipped
from special_numbers import cast, special_experts
from tolerance import assert_same_bits

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


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


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_quantize_has_numpys_bits(name, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 512, 640)) * np.exp2(rng.integers(-12, 8, (4, 512, 1)))).astype(dtype)
    expected = quantize_numpy(x, name)
    for function in (quantize, jax.jit(quantize, static_argnums=1)):
        assert_same_parts(function(jnp.asarray(x), by_name(name)), expected)


@pytest.mark.parametrize("name", WEIGHTS)
def test_experts_quantized_in_place_have_numpys_bits(name):
    """By the kernel: ordinary numbers, and those that quantizers get wrong."""
    hard = [cast(special_experts(alone=alone), ml_dtypes.bfloat16)[:, None] for alone in (True, False)]
    for x in (weights((4, 2, 384, 1280)), weights((3, 2, 128, 4096), seed=1), *hard):
        out = leaf(name, x.shape)
        assert kernel_for(out, jnp.asarray(x)) is not None
        out, loss = jax.jit(quantize_into)(out, jnp.asarray(x), 0, amax=amax_of(out, x))
        assert_same_parts(out, quantize_numpy(x, name, shared_axes=(1,)))
        if x.shape[-1] != 384:
            check_loss(loss, x, name)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_kernels_tell_what_is_not_finite(name, value):
    step = jax.jit(quantize_into)
    for column in (0, 101, 255):
        x = weights()
        x[2, 1, 100, column] = value
        out = leaf(name)
        _, loss = step(out, jnp.asarray(x), 0, amax=amax_of(out, x))
        assert np.asarray(loss.finite).tolist() == [True, True, False, True]


@pytest.mark.parametrize("scheme", sorted(SHORTHANDS))
def test_experts_that_lie_like_the_leaf_have_the_bits_of_the_cpu(scheme):
    """Kernels take them whole; gate and up together, and apart."""
    w13, w2 = weights((4, 2, 256, 384)), weights((4, 2, 384, 256))[:, 0]
    abstract = {"moe": abstract_experts(4, 384, 256, jnp.bfloat16)}
    mapping = {"g": "E N K -> moe.w13_weight.gate", "u": "E N K -> moe.w13_weight.up", "d": "E N K -> moe.w2_weight"}
    for source, rules in (
        ({"moe": {"w13_weight": w13, "w2_weight": w2}}, None),
        ({"g": w13[:, 0].copy(), "u": w13[:, 1].copy(), "d": w2}, mapping),
    ):
        here = load(abstract, source, quantization=scheme, mapping=rules, unit_bytes=w13.nbytes // 2, progress=False)
        with jax.default_device(jax.devices("cpu")[0]):
            there = load(abstract, source, quantization=scheme, mapping=rules, progress=False)
        for found, expected in zip(jax.tree.leaves(here.params), jax.tree.leaves(there.params), strict=True):
            assert_same_bits(found, expected)
        for found, expected in zip(here.report.tensors, there.report.tensors, strict=True):
            assert found.error == pytest.approx(expected.error, rel=1e-3)


@pytest.mark.parametrize("scheme", sorted(SHORTHANDS))
def test_arrays_on_the_gpu_are_quantized_where_they_are(scheme):
    """In one piece, by a load and by a reload; the bits are those of the same weights from the host, in units."""
    trees = [
        {"moe": {"w13_weight": weights((4, 2, 256, 384), seed=i), "w2_weight": weights((4, 2, 384, 256), seed=i)[:, 0]}}
        for i in range(3)
    ]
    abstract = {"moe": abstract_experts(4, 384, 256, jnp.bfloat16)}
    first, second = (load(abstract, tree, quantization=scheme, unit_bytes=1, progress=False) for tree in trees[:2])
    there = [jax.tree.map(jnp.asarray, tree) for tree in trees]
    found = load(abstract, there[0], quantization=scheme, progress=False)
    assert found.report.planned_peak_bytes < first.report.planned_peak_bytes
    jax.tree.map(assert_same_bits, found.params, first.params)
    assert [t.error for t in found.report.tensors] == pytest.approx([t.error for t in first.report.tensors], rel=1e-5)
    fresh = reload(found.params, there[1], staging="device", progress=False).params
    jax.tree.map(assert_same_bits, fresh, second.params)
    jax.tree.map(assert_same_bits, found.params, first.params)  # the old ones stay
    jax.tree.map(assert_same_bits, there, trees)
    there[2]["moe"]["w2_weight"] = there[2]["moe"]["w2_weight"].at[2, 300, 7].set(jnp.nan)
    with pytest.raises(NonFiniteWeight, match="first in expert 2"):
        reload(fresh, there[2], staging="device", progress=False)
    jax.tree.map(assert_same_bits, fresh, second.params)


def test_model_runs_as_on_the_cpu():
    text = heldout()[:8193]
    for scheme in (None, "fp8_per_block", "int8_w8a8"):
        with jax.default_device(jax.devices("cpu")[0]):
            reference = [
                np.asarray(b)
                for b in log_probabilities(load_shipped(scheme and {"moe": scheme}), text, window=512, batch=8)
            ]
        found = evaluate(load_shipped(scheme and {"moe": scheme}), text, window=512, batch=8, reference=reference)
        print(f"{scheme}: KL of GPU to CPU {found.kl_per_byte:.6f}, {found.bits_per_byte:.4f} bits per byte")
        assert found.kl_per_byte < 6e-3  # other orders of sums, so other roundings to bf16 and other activation codes


def load_alone(scheme, unit_bytes, prefetch, *, keep_sources=False) -> dict:
    """The report of a load in a process of its own, whose allocator has one piece of memory, as it has by itself.

    One that asks for memory bit by bit counts up to 128 MiB more for an array than it takes: it does not split what is
    left over.
    """
    arguments = json.dumps([scheme, unit_bytes, prefetch, keep_sources])
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05"}
    command = [sys.executable, gpu_peak.__file__, arguments]
    child = subprocess.run(command, env=os.environ | memory, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    planned, peak, kept = (f"{report[f'{key}_bytes'] / 1e6:.1f} MB" for key in ("planned_peak", "peak", "resident"))
    print(
        f"{scheme}, units of {unit_bytes >> 20} MiB, prefetch {prefetch}: peak {peak}, planned {planned}, kept {kept}, "
        f"{report['seconds']:.2f} s, steps {report['step_seconds']:.2f} s"
    )
    return report


@pytest.mark.parametrize(
    ("scheme", "unit_bytes", "prefetch"),
    [
        (None, 2**28, 1),
        ("fp8_per_block", 2**28, 1),
        ("fp8_per_channel", 2**25, 2),
        ("fp8_per_channel", 2**28, 1),
        ("int8_w8a16", 2**26, 0),
    ],
)
def test_allocator_peak_is_within_the_plan(scheme, unit_bytes, prefetch):
    report = load_alone(scheme, unit_bytes, prefetch)
    assert report["resident_bytes"] <= report["peak_bytes"] <= report["planned_peak_bytes"] <= report["bound"]


def test_a_source_that_stays_is_noticed():
    report = load_alone("fp8_per_block", 2**25, 1, keep_sources=True)
    assert report["peak_bytes"] > report["planned_peak_bytes"] + report["read_bytes"] // 2
