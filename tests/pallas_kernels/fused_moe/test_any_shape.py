"""The whole layer for any numbers of tokens, experts and choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import definition
from pallas_kernels import fused_moe, get_activation
from tolerance import assert_close


@st.composite
def layers(draw):
    experts = draw(st.integers(1, 9))
    return {
        "tokens": draw(st.integers(0, 40)),
        "experts": experts,
        "top_k": draw(st.integers(1, min(experts, 4))),
        "hidden": draw(st.integers(1, 40)),
        "inner": draw(st.integers(1, 40)),
        "activation": draw(st.sampled_from(["silu", "relu2_no_mul"])),
        "lowest": draw(st.integers(-3, 0)),  # ids below 0 have no expert
        "skew": draw(st.booleans()),  # most pairs go to one expert
        "seed": draw(st.integers(0, 99)),
    }


@settings(deadline=None, max_examples=12)
@given(layers())
def test_any_shape(layer):
    t, e, k, h, i = (layer[name] for name in ("tokens", "experts", "top_k", "hidden", "inner"))
    rng = np.random.default_rng(layer["seed"])
    activation = get_activation(layer["activation"])
    shards = 2 if activation.gated else 1
    x, w13, w2, weights = (
        rng.normal(size=shape).astype(np.float32) for shape in ((t, h), (e, shards, i, h), (e, h, i), (t, k))
    )
    ids = rng.integers(layer["lowest"], e + 2, (t, k)).astype(np.int32)
    if layer["skew"]:
        ids = np.where(rng.random(ids.shape) < 0.9, e - 1, ids).astype(np.int32)
    found = jax.jit(lambda *arrays: fused_moe(*arrays, activation=activation))(
        *map(jnp.asarray, (x, w13, w2, weights, ids))
    )

    act = functools.partial(definition.activation, activation.name)
    expected = definition.fused_moe(x, w13.astype("f8"), w2.astype("f8"), weights, ids, act=act)
    assert_close(found, expected, batch=3e-6, worst_row=1e-4)
