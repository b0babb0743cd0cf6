"""`ExpertWeights`: declaration, names, and a leading expert axis on every tensor."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights, abstract_experts, default_sharding
from moe_online.method import get_method
from sizes import nbytes
from sources import BF16, random

pytestmark = pytest.mark.smoke
E, H, INNER = 4, 160, 96
MESH = AbstractMesh((2, 2), ("expert", "tensor"))


def weights(**more):
    return ExpertWeights(
        w13_weight=jnp.asarray(random(E, 2, INNER, H)),
        w2_weight=jnp.asarray(random(E, H, INNER)),
        orig_dtype=BF16,
        **more,
    )


def test_declared_without_a_mesh():
    declared = abstract_experts(E, H, INNER, jnp.float16, has_bias=True)
    assert {name: leaf.shape for name, leaf in declared.named_tensors().items()} == {
        "w13_weight": (E, 2, INNER, H),
        "w2_weight": (E, H, INNER),
        "w13_bias": (E, 2, INNER),
        "w2_bias": (E, H),
    }
    here = SingleDeviceSharding(jax.devices()[0])
    assert all((leaf.dtype, leaf.sharding) == (np.float16, here) for leaf in jax.tree.leaves(declared))
    assert declared.orig_dtype == np.float16
    assert declared.num_experts == E
    assert nbytes(declared) == 2 * (3 * E * H * INNER + 2 * E * INNER + E * H)


def test_declared_on_a_mesh():
    declared = abstract_experts(E, H, INNER, BF16, has_bias=True, mesh=MESH)
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(declared)] == [
        PartitionSpec("expert", None, "tensor", None),
        PartitionSpec("expert", None, "tensor"),
        PartitionSpec("expert", None, "tensor"),
        PartitionSpec("expert", None),
    ]
    other = AbstractMesh((4,), ("ep",))
    declared = abstract_experts(E, H, INNER, BF16, mesh=other, expert_axis="ep")
    assert declared.w13_weight.sharding == NamedSharding(other, PartitionSpec("ep", None, None, None))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "mesh", [MESH, AbstractMesh((4,), ("expert",)), AbstractMesh((2,), ("tensor",)), None], ids=str
)
def test_declared_with_shared_experts_and_a_correction_bias(gated, mesh):
    """Both lie whole on each device that holds other experts; the shared ones are cut along their I."""
    declared = abstract_experts(
        E,
        H,
        INNER,
        BF16,
        gated=gated,
        num_correction_biases=16,
        shared_intermediate_size=48,
        shared_gate=True,
        mesh=mesh,
    )
    shards = 2 if gated else 1
    expert, tensor = (name if mesh is not None and name in mesh.axis_names else None for name in ("expert", "tensor"))
    expected = {
        "w13_weight": ((E, shards, INNER, H), (expert, None, tensor, None)),
        "w2_weight": ((E, H, INNER), (expert, None, tensor)),
        "shared_experts.w13_weight": ((1, shards, 48, H), (None, None, tensor, None)),
        "shared_experts.w2_weight": ((1, H, 48), (None, None, tensor)),
        "shared_experts.gate_weight": ((H,), (None,)),
        "e_score_correction_bias": ((16,), (None,)),
    }
    tensors = declared.named_tensors()
    assert set(tensors) == set(expected)
    for name, (shape, spec) in expected.items():
        assert tensors[name].shape == shape
        assert tensors[name].dtype == (np.float32 if name == "e_score_correction_bias" else BF16)
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
        assert tensors[name].sharding == sharding
    first, second = (abstract_experts(E, H, INNER, BF16, shared_intermediate_size=size).shared for size in (0, 48))
    assert first is None
    assert second.gate_weight is None


@pytest.mark.parametrize(
    ("experts", "intermediate", "shared", "says"),
    [
        (3, INNER, 0, "3 of w13_weight"),
        (E, 95, 0, "95 of w13_weight"),
        (
            E,
            INNER,
            47,
            "47 of shared.w13_weight (1, 2, 47, 160) does not divide among the 2 devices of mesh axis 'tensor'",
        ),
    ],
)
def test_sizes_that_do_not_divide(experts, intermediate, shared, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        abstract_experts(experts, H, intermediate, BF16, shared_intermediate_size=shared, mesh=MESH)
    assert "2 devices of mesh axis" in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "w13", "w2", "block"),
    [  # semantics.md section 2
        ("fp8_per_channel", "w13_weight_scale", "w2_weight_scale", None),
        ("fp8_per_block", "w13_weight_scale_inv", "w2_weight_scale_inv", (128, 128)),
        ("int8_w8a16", "w13_scale", "w2_scale", None),
    ],
)
def test_names_are_those_of_vllm(scheme, w13, w2, block):
    moe = MoEConfig(num_experts=E, top_k=2, hidden_size=H, intermediate_size=INNER)
    quantized = jax.eval_shape(get_method(scheme, moe).process_weights_after_loading, weights())
    tensors = quantized.named_tensors()
    assert set(tensors) == {"w13_weight", "w2_weight", w13, w2}
    assert tensors["w13_weight"] is quantized.w13_weight.values
    assert tensors[w13] is quantized.w13_weight.scales
    assert tensors[w2] is quantized.w2_weight.scales
    assert quantized.weight_block_size == block
    assert quantized.orig_dtype == BF16


def test_names_of_what_is_not_quantized():
    bias, expert_map = jnp.ones((E, 2, INNER)), jnp.arange(E, dtype=jnp.int32)
    found = weights(w13_bias=bias, expert_map=expert_map, e_score_correction_bias=jnp.ones(E))
    names = {"w13_weight", "w2_weight", "w13_bias", "expert_map", "e_score_correction_bias"}
    assert set(found.named_tensors()) == names
    assert found.weight_block_size is None
    assert found.w13_input_scale is found.w2_input_scale is None


def test_a_pytree_that_leads_with_experts():
    found = weights()
    first = jax.tree.map(lambda leaf: leaf[:1], found)
    assert first.num_experts == 1
    assert dataclasses.replace(first, w13_weight=None).w2_weight.shape == (1, H, INNER)
    assert jax.jit(lambda w: w)(found).orig_dtype == BF16


def test_default_sharding():
    assert default_sharding(jax.ShapeDtypeStruct((2,), BF16)) == SingleDeviceSharding(jax.devices()[0])
    sharding = NamedSharding(MESH, PartitionSpec("expert"))
    assert default_sharding(jax.ShapeDtypeStruct((2,), BF16, sharding=sharding)) == sharding
