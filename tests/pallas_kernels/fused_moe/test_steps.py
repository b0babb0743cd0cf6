"""The layer's three steps by themselves: what lies between them is what parallel code would move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from pallas_kernels import finalize, fused_moe, grouped_matmul, prepare, quantize, run_experts
from tolerance import assert_close, assert_same_bits

T, E, K, H, INNER = 21, 6, 2, 64, 32
OPTIONS = {"activation_format": "int8_per_token"}


def problem(k=K):
    rng = np.random.default_rng(0)
    shapes = (T, H), (E, 2, INNER, H), (E, H, INNER)
    x, w13, w2 = (jnp.asarray(rng.normal(size=s) / s[-1] ** 0.5, jnp.float32).astype(jnp.bfloat16) for s in shapes)
    weights = jnp.asarray(rng.uniform(size=(T, k)), jnp.float32)
    return x, w13, w2, weights, jnp.asarray(rng.integers(-1, E + 1, (T, k)), jnp.int32)


def in_steps(x, w13, w2, weights, ids, *, on_input=False, **formats):
    prepared = prepare(x, weights, ids, w2.shape[0], apply_router_weight_on_input=on_input, **formats)
    return finalize(run_experts(prepared, w13, w2), prepared)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("formats", [{}, OPTIONS], ids=["real", "quantized"])
def test_steps_are_the_whole(formats, on_input):
    arrays = problem(1 if on_input else K)
    whole = functools.partial(fused_moe, apply_router_weight_on_input=on_input, **formats)
    steps = functools.partial(in_steps, on_input=on_input, **formats)
    assert_same_bits(jax.jit(steps)(*arrays), jax.jit(whole)(*arrays))


@pytest.mark.smoke
def test_experts_of_two_devices():
    """Rows are prepared once; each half of the experts computes its own, and the sum is that of one device."""
    x, w13, w2, weights, ids = problem()
    q13, q2 = (jax.jit(quantize, static_argnums=1)(w, "fp8_per_channel") for w in (w13, w2))
    half = E // 2

    @jax.jit
    def run(x, weights, ids, expert_map, mine):
        prepared = prepare(x, weights, ids, half, expert_map=expert_map)
        return prepared, run_experts(prepared, *mine)

    total = np.zeros((T, H))
    for start in (0, half):
        mine = jax.tree.map(lambda leaf, start=start: leaf[start : start + half], (q13, q2))
        places = jnp.where((jnp.arange(E) >= start) & (jnp.arange(E) < start + half), jnp.arange(E) - start, -1)
        prepared, rows = run(x, weights, ids, places.astype(jnp.int32), mine)
        assert rows.dtype == jnp.float32
        assert not np.asarray(rows[int(prepared.order.group_sizes.sum()) :]).any()
        total += np.asarray(finalize(rows, prepared, dtype=jnp.float32), np.float64)
    dequantized = (definition.real(w, "fp8_per_channel") for w in (w13, w2))
    expected = definition.fused_moe(np.asarray(x), *dequantized, np.asarray(weights), np.asarray(ids))
    assert_close(total, expected, batch=4e-3, worst_row=1.2e-2)


@pytest.mark.slow
def test_rows_may_travel():
    """Each expert computes its rows elsewhere, alone; they come back in any order and are put into their places."""
    x, w13, w2, weights, ids = problem()
    prepared = prepare(x, weights, ids, E)
    starts, sizes = np.asarray(prepared.order.metadata.group_starts), np.asarray(prepared.order.group_sizes)
    back = jnp.full((T * K, H), jnp.nan)
    for expert in (3, 0, 5, 1, 4, 2):
        rows = prepared.rows[starts[expert] : starts[expert] + sizes[expert]]
        alone = grouped_matmul(rows, w13[expert].reshape(1, -1, H), jnp.array([len(rows)], jnp.int32), epilogue="silu")
        out = grouped_matmul(alone, w2[expert][None], jnp.array([len(rows)], jnp.int32), out_dtype=jnp.float32)
        back = back.at[starts[expert] : starts[expert] + sizes[expert]].set(out)
    back = back.at[sizes.sum() :].set(0)
    whole = fused_moe(x, w13, w2, weights, ids)
    assert_close(finalize(back, prepared), whole, batch=1e-3, worst_row=4e-3)
    with pytest.raises(AssertionError):
        assert_close(finalize(jnp.roll(back, 1, axis=0), prepared), whole, batch=0.1, worst_row=0.1)


def test_steps_that_do_not_fit():
    x, w13, w2, weights, ids = problem()
    prepared = prepare(x, weights, ids, E)
    with pytest.raises(ValueError, match="has 2 experts, and the rows were prepared for 6"):
        run_experts(prepared, w13[:2], w2[:2])
    with pytest.raises(ValueError, match="'relu2_no_mul'"):
        run_experts(prepared, w13, w2, activation="relu2_no_mul")
    with pytest.raises(ValueError, match="the 42 rows prepared"):
        finalize(jnp.zeros((5, H)), prepared)
    with pytest.raises(ValueError, match="needs top_k 1, not 2"):
        prepare(x, weights, ids, E, apply_router_weight_on_input=True)
    with pytest.raises(ValueError, match="int32"):
        prepare(x, weights, ids.astype(jnp.uint8), E)


def test_a_device_without_experts():
    x, w13, w2, weights, ids = problem()
    assert not np.asarray(fused_moe(x, w13[:0], w2[:0], weights, ids)).any()


def test_pairs_are_sorted_once():
    text = str(jax.make_jaxpr(functools.partial(fused_moe, **OPTIONS))(*problem()))
    assert text.count(" sort[") == 1
