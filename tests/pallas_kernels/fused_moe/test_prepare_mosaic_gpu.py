"""Pairs sorted and tokens sent in one launch on Hopper, interpreted on a CPU: what numpy and `quantize` have."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prepared
from by_name import by_name
from pallas_kernels import prepare
from pallas_kernels.fused_moe import mosaic_gpu
from pallas_kernels.fused_moe.prepare_call import PrepareCall
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from quick import few_cases
from races import no_races
from tolerance import assert_same_bits

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__[:2] < FIRST_JAX, reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels"
)
# Tokens, slots, experts, K, format, pairs that are sorted in one launch, cores. In blocks that are filled or not, of
# one token or of several for a warpgroup; more experts than a side, and a whole side of them; several chunks.
CASES = [
    (16, 8, 8, 512, "fp8_per_group", 2048, 132),
    (19, 6, 70, 1024, "fp8_per_group", 2048, 2),
    (64, 8, 64, 512, "fp8_per_group", 2048, 2),
    (7, 1, 3, 512, "fp8_per_token", 2048, 132),
    (70, 1, 5, 1024, "int8_per_token", 2048, 2),
    (33, 2, 5, 512, "fp8_per_tensor_dynamic", 2048, 2),
    (3, 64, 200, 136, None, 2048, 2),
    (40, 2, 5, 136, None, 32, 2),
    (30, 6, 65, 512, "fp8_per_token", 32, 132),
    (40, 6, 65, 512, "fp8_per_group", 32, 6),
    (1, 8, 8, 1024, "int8_per_token", 2048, 2),
]
QUICK = [CASES[1], CASES[4], CASES[7]]


def run(x, ids, num_experts, **options):
    return prepare(x, jnp.ones(ids.shape, jnp.float32), ids, num_experts, **options)


@pytest.mark.interpreted
@needs_interpreter
@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "k", "name", "at_once", "cores"), few_cases(CASES, QUICK))
def test_order_tiles_and_rows(tokens, top_k, num_experts, k, name, at_once, cores, monkeypatch):
    from pallas_kernels.fused_moe.mosaic_gpu.prepare import sort_and_send
    from pallas_kernels.routing.mosaic_gpu import kernel

    monkeypatch.setattr(kernel, "AT_ONCE", at_once)
    monkeypatch.setattr(kernel, "num_cores", lambda: cores)
    sort_and_send.clear_cache()  # its keys do not have these numbers
    x, ids = prepared.problem(tokens, top_k, num_experts, k)
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads="uninitialized"):
        found = run(x, ids, num_experts, activation_format=name)
    sort_and_send.clear_cache()
    prepared.check(found, x, ids, num_experts, None if name is None else by_name(name))


@pytest.mark.interpreted
@needs_interpreter
def test_experts_of_this_device():
    x, ids = prepared.problem(9, 2, 6, 512)
    places = jnp.array([-1, -1, 0, 1, 2, -1], jnp.int32)
    with interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = run(x, ids, 3, activation_format="fp8_per_group", expert_map=places)
    here = np.where((ids >= 0) & (ids < 6), np.asarray(places)[np.clip(ids, 0, 5)], -1)
    prepared.check(found, x, here, 3, by_name("fp8_per_group"))


@pytest.mark.interpreted
@needs_interpreter
def test_gradient_of_copies():
    """Of 16-bit numbers with few bits: each token's is the sum over its rows, in f32."""
    x, ids = prepared.problem(9, 2, 3, 128)
    by_rows = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (18, 128)), jnp.bfloat16)
    with interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        order = run(x, ids, 3).order
        _, pull = jax.vjp(lambda x: run(x, ids, 3).rows, x)
        (by_x,) = pull(by_rows)
    routed = jnp.where(order.routed[..., None], by_rows[order.rows], 0)
    assert_same_bits(by_x, jnp.sum(routed.astype(jnp.float32), axis=1).astype(jnp.bfloat16))


@needs_interpreter
@pytest.mark.parametrize(
    ("dtype", "name", "kernel"),
    [
        (jnp.bfloat16, "fp8_per_group", "sort_by_expert_fp8_per_group"),
        (jnp.bfloat16, None, "sort_by_expert_copied"),
        (jnp.float32, None, "sort_by_expert"),  # and then a gather
    ],
)
def test_which_kernel_serves(dtype, name, kernel):
    x, ids = jnp.zeros((4, 512), dtype), jnp.zeros((4, 2), jnp.int32)

    def kernels(**options):
        call = functools.partial(run, num_experts=3, activation_format=name, **options)
        return set(re.findall(r"name=(sort_by\w+|tokens_\w+)", str(jax.make_jaxpr(lambda *a: call(*a).rows)(x, ids))))

    with interpreted("mosaic_gpu"):
        assert kernels() == {kernel}
        assert kernels(implementation="xla") == set()


@pytest.mark.parametrize(
    ("says", "tokens", "top_k", "k", "dtype", "name"),
    [
        ("at most 64 slots, not 65", 2, 65, 512, jnp.bfloat16, None),
        ("multiple of 512", 2, 2, 640, jnp.bfloat16, "fp8_per_token"),
        ("at most 7168 elements", 2, 2, 7680, jnp.bfloat16, "fp8_per_token"),
        ("copies rows of 16 bits", 2, 2, 512, jnp.float32, None),
        ("sorts 1 to", 0, 2, 512, jnp.bfloat16, None),
    ],
)
def test_what_it_cannot_serve(says, tokens, top_k, k, dtype, name):
    call = PrepareCall(
        x=jnp.zeros((tokens, k), dtype),
        ids=jnp.zeros((tokens, top_k), jnp.int32),
        num_experts=3,
        format=None if name is None else by_name(name),
    )
    assert says in mosaic_gpu.unsupported_anywhere(call)
