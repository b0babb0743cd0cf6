"""Stored axes that are several of a leaf's: fused gate and up, packed or in turn; experts one below the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from by_name import assert_same_parts
from moe_online import ConfigError, ExpertWeights, ShapeMismatch, SharedExpertWeights, load, plan
from numpy_quantizer import quantize_numpy
from pallas_kernels import deinterleave
from quick import few
from sources import BF16
from tolerance import assert_same_bits

E, INNER, H, J = 6, 32, 64, 96
RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape, np.float32).astype(BF16)


W13, W2, BIAS = random(E, 2, INNER, H), random(E, H, INNER), random(E, 2, INNER)
SHARED13, SHARED2, GATE = random(1, 2, J, H), random(1, H, J), random(H)


def declare(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


ABSTRACT = {
    "x": ExpertWeights(
        w13_weight=declare(W13),
        w2_weight=declare(W2),
        w13_bias=declare(BIAS),
        shared=SharedExpertWeights(w13_weight=declare(SHARED13), w2_weight=declare(SHARED2), gate_weight=declare(GATE)),
        orig_dtype=BF16,
    )
}
REST = {"x.w2_weight": W2, "x.w13_bias": BIAS, "x.shared.w2_weight": SHARED2, "x.shared.gate_weight": GATE}
ROUTED = {"x.w13_weight": W13}
SHARED = {"x.shared.w13_weight": SHARED13}
LAYOUTS = {  # what is stored, and the rules that say how
    "packed": (
        {"gate_up": W13.reshape(E, 2 * INNER, H), **REST, **SHARED},
        {"gate_up": "E (S N) K -> x.w13_weight"},
    ),
    "in turn, transposed": (
        {"gate_up": W13.transpose(0, 3, 2, 1).reshape(E, H, 2 * INNER), **REST, **SHARED},
        {"gate_up": "E K (N S) -> x.w13_weight"},
    ),
    "one expert below the other": (
        {"w1": W13[:, 0].reshape(E * INNER, H), "w3": W13[:, 1].reshape(E * INNER, H), **REST, **SHARED},
        {"w1": "(E N) K -> x.w13_weight.gate", "w3": "(E N) K -> x.w13_weight.up"},
    ),
    "biases in turn": (
        {**REST, **ROUTED, **SHARED, "x.w13_bias": BIAS.transpose(0, 2, 1).reshape(E, 2 * INNER)},
        {"x.w13_bias": "E (N S)"},
    ),
    "shared experts as dense layers": (
        {
            **{name: x for name, x in REST.items() if "shared" not in name},
            **ROUTED,
            "s.gate": SHARED13[0, 0].T,
            "s.up": SHARED13[0, 1].T,
            "s.down": SHARED2[0],
            "s.weigh": GATE[None],
        },
        {
            "s.gate": "K N -> x.shared.w13_weight.gate",
            "s.up": "K N -> x.shared.w13_weight.up",
            "s.down": "N K -> x.shared.w2_weight",
            "s.weigh": "1 K -> x.shared.gate_weight",
        },
    ),
    "shared experts, fused": (
        {**REST, **ROUTED, "s.gate_up": SHARED13.reshape(2 * J, H)},
        {"s.gate_up": "(S N) K -> x.shared.w13_weight"},
    ),
}


@pytest.mark.parametrize(("stored", "mapping"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scheme", few([None, "int8_w8a16"], (None,)))
def test_every_element_gets_to_its_place(stored, mapping, scheme):
    options = {"mapping": mapping, "unit_bytes": 3 * W13[0].nbytes, "progress": False}
    params, report = load(ABSTRACT, stored, quantization=scheme and {"moe": scheme, "linear": scheme}, **options)
    found = params["x"]
    wanted = {"w13_weight": W13, "w2_weight": W2}
    for holder, tree in ((found, wanted), (found.shared, {"w13_weight": SHARED13, "w2_weight": SHARED2})):
        for name, x in tree.items():
            if scheme is None:
                assert_same_bits(getattr(holder, name), x)
            else:
                assert_same_parts(getattr(holder, name), quantize_numpy(x, "int8_per_channel"))
    assert_same_bits(found.w13_bias, BIAS)
    assert_same_bits(found.shared.gate_weight, GATE)
    assert report.read_bytes == sum(x.nbytes for x in stored.values())
    assert report.peak_bytes <= report.planned_peak_bytes


@pytest.mark.smoke
def test_in_turn_is_what_deinterleave_turns():
    stored = RNG.standard_normal((E, 2 * INNER, H), np.float32)
    declared = {"x": ExpertWeights(w13_weight=declare(W13), w2_weight=declare(W2), orig_dtype=BF16)}
    tree = {"w": stored, "x.w2_weight": W2}
    params, _ = load(declared, tree, mapping={"w": "E (N S) K -> x.w13_weight"}, progress=False)
    turned = deinterleave(jnp.asarray(stored)).reshape(W13.shape).astype(jnp.bfloat16)
    assert_same_bits(params["x"].w13_weight, turned)


def test_a_file_is_read_once_in_pieces(tmp_path):
    stored, mapping = LAYOUTS["one expert below the other"]
    save_file({name: np.ascontiguousarray(x) for name, x in stored.items()}, tmp_path / "model.safetensors")
    options = {"mapping": mapping, "unit_bytes": 3 * W13[0].nbytes}
    params, report = load(ABSTRACT, tmp_path, progress=False, **options)
    assert_same_bits(params["x"].w13_weight, W13)
    assert report.read_bytes == sum(x.nbytes for x in stored.values())
    units = [unit for unit in plan(ABSTRACT, tmp_path, **options).units if unit.target.name == "x.w13_weight"]
    assert [(unit.start, unit.stop) for unit in units] == [(0, 3), (3, 6)]


@pytest.mark.parametrize(
    ("axes", "error", "says"),
    [
        ("E (S K) N", ShapeMismatch, r"gate_up \(6, 64, 64\) \(axes E \(SK\) N\), needed \(6, 128, 32\)"),
        ("(N E) K", ConfigError, "must have E first within its parentheses"),
        ("E (S N K", ConfigError, "must be 'AXES'"),
        ("E (S N) N", ConfigError, "distinct letters"),
        ("E (S X) K", ConfigError, "distinct letters"),
    ],
)
def test_axes_that_do_not_fit(axes, error, says):
    stored, _ = LAYOUTS["packed"]
    with pytest.raises(error, match=says):
        plan(ABSTRACT, stored, mapping={"gate_up": f"{axes} -> x.w13_weight"})
