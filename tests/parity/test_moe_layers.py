"""Our MoE layer against transformers' own modules: same random weights, same output, same gradients, all in f32."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_online.config import MoEConfig
from moe_online.experts import ExpertWeights, SharedExpertWeights
from moe_online.layer import moe_layer
from moe_online.method import get_method
from pallas_kernels import Activation, deinterleave
from pallas_kernels.routing import llama4_routing
from tolerance import assert_close

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed: install the extra `parity`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: install the extra `parity`")

BATCH, HIDDEN, WIDTH, SHARED_WIDTH = (2, 128), 32, 24, 40  # widths: I of experts
F32 = np.dtype(np.float32)
TOLERANCE = {"batch": 2e-6, "worst_row": 1e-5}  # f32 noise; measured are 5e-7 and 2e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """A layer that must not pass: ours with another config, or with tensors that are not the converted ones."""

    moe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A module of transformers, its config, and ours that says the same."""

    module: str  # `model.Class`
    config: str
    settings: Mapping[str, Any]
    moe: Mapping[str, Any]
    transposed: bool = False  # experts' weights are [E, in, out]
    interleaved: bool = False  # gate and up take turns
    controls: Mapping[str, Control]

    def our_config(self) -> MoEConfig:
        sizes = {"num_experts": 8, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "params_dtype": F32}
        return MoEConfig(**sizes | dict(self.moe))

    def their_module(self):
        model, name = self.module.split(".")
        config = getattr(transformers, self.config)(hidden_size=HIDDEN, experts_implementation="eager", **self.settings)
        return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)(config)


def rotated(w):
    """Every expert in its neighbour's place."""
    return jnp.roll(w, 1, axis=0)


def swapped(w):
    """Up before gate."""
    return jnp.flip(w, axis=1)


def as_halves(w13):
    """Undoes `deinterleave`: rows that take turns, read as gate rows and then up rows."""
    return jnp.stack([w13[:, 0], w13[:, 1]], axis=2).reshape(w13.shape)


ROTATED = Control(tensors={"w13_weight": rotated, "w2_weight": rotated})
SWAPPED = Control(tensors={"w13_weight": swapped})
NO_CORRECTION_BIAS = Control(tensors={"e_score_correction_bias": jnp.zeros_like})
NO_GROUPS = Control(moe={"num_expert_group": None, "topk_group": None})
NO_SHARED = Control(tensors={"shared.w2_weight": jnp.zeros_like})

QWEN3 = Family(
    module="qwen3_moe.Qwen3MoeSparseMoeBlock",
    config="Qwen3MoeConfig",
    settings={"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": WIDTH, "norm_topk_prob": True},
    moe={"top_k": 3},
    controls={"not renormalized": Control(moe={"renormalize": False})},
)
DEEPSEEK_V3 = Family(
    module="deepseek_v3.DeepseekV3MoE",
    config="DeepseekV3Config",
    settings={
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": WIDTH,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    moe={
        "num_experts": 16,
        "top_k": 3,
        "scoring": "sigmoid",
        "num_expert_group": 4,
        "topk_group": 2,
        "has_correction_bias": True,
        "routed_scaling_factor": 2.5,
        "shared_intermediate_size": 2 * WIDTH,
    },
    controls={
        "no groups": NO_GROUPS,
        "no correction bias": NO_CORRECTION_BIAS,
        "no shared experts": NO_SHARED,
    },
)
FAMILIES = {
    "Mixtral": Family(
        module="mixtral.MixtralSparseMoeBlock",
        config="MixtralConfig",
        settings={"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": WIDTH},
        moe={"top_k": 2},
        controls={"experts rotated": ROTATED, "up before gate": SWAPPED},
    ),
    "Qwen3-MoE": QWEN3,
    "Qwen3-MoE, not renormalized": dataclasses.replace(
        QWEN3,
        settings={**QWEN3.settings, "norm_topk_prob": False},
        moe={**QWEN3.moe, "renormalize": False},
        controls={"renormalized": Control(moe={"renormalize": True})},
    ),
    "OLMoE": Family(
        module="olmoe.OlmoeSparseMoeBlock",
        config="OlmoeConfig",
        settings={"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": WIDTH, "norm_topk_prob": False},
        moe={"top_k": 4, "renormalize": False},
        controls={"sigmoid": Control(moe={"scoring": "sigmoid"})},
    ),
    "DeepSeek-V2": Family(
        module="deepseek_v2.DeepseekV2Moe",
        config="DeepseekV2Config",
        settings={
            "n_routed_experts": 16,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": WIDTH,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
        moe={
            "num_experts": 16,
            "top_k": 3,
            "renormalize": False,
            "num_expert_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "shared_intermediate_size": 2 * WIDTH,
        },
        controls={"no groups": NO_GROUPS, "no shared experts": NO_SHARED},
    ),
    "DeepSeek-V3": DEEPSEEK_V3,
    "DeepSeek-V3, output scaled": dataclasses.replace(
        DEEPSEEK_V3,
        moe={**DEEPSEEK_V3.moe, "apply_routed_scale_to_output": True},
        controls={"experts rotated": ROTATED},
    ),
    "GPT-OSS": Family(
        module="gpt_oss.GptOssMLP",
        config="GptOssConfig",
        settings={"num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": WIDTH},
        moe={"top_k": 4, "activation": "swigluoai", "has_bias": True},
        transposed=True,
        interleaved=True,
        controls={
            "read as halves": Control(tensors={"w13_weight": as_halves, "w13_bias": as_halves}),
            "no limit": Control(moe={"activation": Activation("swigluoai", limit=1e9)}),
            "no router bias": Control(tensors={"router_bias": jnp.zeros_like}),
            "no bias up": Control(tensors={"w13_bias": jnp.zeros_like}),
            "no bias down": Control(tensors={"w2_bias": jnp.zeros_like}),
        },
    ),
    "Qwen2-MoE": Family(
        module="qwen2_moe.Qwen2MoeSparseMoeBlock",
        config="Qwen2MoeConfig",
        settings={
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": SHARED_WIDTH,
            "norm_topk_prob": False,
        },
        moe={"top_k": 2, "renormalize": False, "shared_intermediate_size": SHARED_WIDTH, "shared_expert_gate": True},
        controls={
            "no gate": Control(tensors={"shared.gate_weight": jnp.zeros_like}),
            "up before gate": Control(tensors={"shared.w13_weight": swapped}),
        },
    ),
    "Llama 4": Family(
        module="llama4.Llama4TextMoe",
        config="Llama4TextConfig",
        settings={"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": WIDTH},
        moe={
            "top_k": 1,
            "apply_router_weight_on_input": True,
            "custom_routing_function": llama4_routing,
            "shared_intermediate_size": WIDTH,
        },
        transposed=True,
        controls={
            "weight on output": Control(moe={"apply_router_weight_on_input": False}),
            "no shared experts": NO_SHARED,
        },
    ),
    "Nemotron-H": Family(
        module="nemotron_h.NemotronHMoE",
        config="NemotronHConfig",
        settings={
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": WIDTH,
            "moe_shared_expert_intermediate_size": SHARED_WIDTH,
            "routed_scaling_factor": 2.5,
        },
        moe={
            "top_k": 3,
            "activation": "relu2_no_mul",
            "scoring": "sigmoid",
            "has_correction_bias": True,
            "routed_scaling_factor": 2.5,
            "shared_intermediate_size": SHARED_WIDTH,
        },
        controls={"silu": Control(moe={"activation": "silu_no_mul"}), "no correction bias": NO_CORRECTION_BIAS},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On matrices this small, torch's threads wait for each other a hundred times as long as they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(rng, name, shape):
    """Logits near 1; experts' rows near 4, so that some pass GPT-OSS's limit of 7."""
    if name.endswith("e_score_correction_bias"):
        # Large enough to change choices. Above 0, because releases of transformers differ in whether experts of a
        # dropped group score 0 or, as ours do, -inf: the same choices where all others score more than 0.
        return rng.uniform(0, 0.4, shape).astype(F32)
    return (rng.standard_normal(shape) * (0.6 if "expert" in name else 0.2)).astype(F32)


def converted(family, theirs):
    """Our tensors by name, out of theirs. Numbers only change places, so it converts weights and gradients alike."""
    left = dict(theirs)

    def take(*names):
        return next((left.pop(name) for name in names if name in left), None)

    def shared(name):
        return take(f"shared_expert.{name}_proj.weight", f"shared_experts.{name}_proj.weight")

    w13, w2 = take("experts.gate_up_proj", "experts.up_proj"), take("experts.down_proj")
    w13_bias = take("experts.gate_up_proj_bias")
    if family.transposed:
        w13, w2 = w13.swapaxes(1, 2), w2.swapaxes(1, 2)
    if family.interleaved:
        w13, w13_bias = deinterleave(jnp.asarray(w13)), deinterleave(jnp.asarray(w13_bias), axis=-1)
    ours = {
        "router": take("gate.weight", "router.weight").T,
        "router_bias": take("router.bias"),
        "e_score_correction_bias": take("gate.e_score_correction_bias"),
        "w13_weight": w13.reshape(w13.shape[0], -1, WIDTH, HIDDEN),
        "w2_weight": w2,
        "w13_bias": None if w13_bias is None else w13_bias.reshape(-1, 2, WIDTH),
        "w2_bias": take("experts.down_proj_bias"),
    }
    if rows := [w for w in (shared("gate"), shared("up")) if w is not None]:
        ours |= {"shared.w13_weight": np.stack(rows)[None], "shared.w2_weight": shared("down")[None]}
    if (gate := take("shared_expert_gate.weight")) is not None:
        ours["shared.gate_weight"] = gate[0]
    assert not left, f"nothing took {list(left)}"
    return {name: jnp.asarray(tensor) for name, tensor in ours.items() if tensor is not None}


def expert_weights(tensors) -> ExpertWeights:
    shared = {name.removeprefix("shared."): t for name, t in tensors.items() if name.startswith("shared.")}
    return ExpertWeights(
        **{name: t for name, t in tensors.items() if not name.startswith(("shared.", "router"))},
        shared=SharedExpertWeights(**shared) if shared else None,
        orig_dtype=F32,
    )


# Compiling takes nearly all the time here. This halves it: XLA's program stays the same, LLVM does less with it.
@functools.partial(jax.jit, static_argnames="moe", compiler_options={"xla_backend_optimization_level": 0})
def run(tensors, x, direction, *, moe):
    """The output, and the gradients of its product with `direction` by every tensor."""

    def layer(tensors, x):
        return moe_layer(x, tensors["router"], expert_weights(tensors), moe, router_bias=tensors.get("router_bias"))

    out, pullback = jax.vjp(layer, tensors, x)
    by_tensor, by_x = pullback(direction)
    return out, by_tensor | {"x": by_x}


@functools.cache
def problem(family_name):
    """Our tensors, x and direction; the output and the gradients of transformers."""
    family, rng = FAMILIES[family_name], np.random.default_rng(0)
    module = family.their_module().float().eval()
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(random(rng, name, tensor.shape)))
    x, direction = (rng.standard_normal((*BATCH, HIDDEN), F32) for _ in range(2))
    x_there = torch.tensor(x, requires_grad=True)
    out = module(x_there)
    out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
    out.backward(torch.from_numpy(direction))
    given = {name: tensor.detach().numpy() for name, tensor in state.items()}
    gradients = {name: (torch.zeros_like(t) if t.grad is None else t.grad).numpy() for name, t in state.items()}
    gradients = converted(family, gradients) | {"x": x_there.grad.numpy()}
    return converted(family, given), x, direction, out.detach().numpy(), gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_output_and_gradients(name):
    moe = FAMILIES[name].our_config()
    tensors, x, direction, expected, gradients = problem(name)
    declared = get_method(None, moe).create_weights(moe.num_experts, HIDDEN, WIDTH, F32)
    assert jax.tree.map(jnp.shape, expert_weights(tensors)) == jax.tree.map(jnp.shape, declared)

    out, found = run(tensors, x, direction, moe=moe)
    assert_close(out, expected, **TOLERANCE)
    assert found.keys() == gradients.keys()
    for tensor, gradient in gradients.items():
        assert np.any(gradient) == (tensor != "e_score_correction_bias"), tensor  # all take part, but for choosing
        try:
            assert_close(found[tensor], gradient, **TOLERANCE)
        except AssertionError as error:
            error.add_note(f"gradient by {tensor}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize(("name", "control"), [(name, c) for name, f in FAMILIES.items() for c in f.controls])
def test_another_layer_fails(name, control):
    family = FAMILIES[name]
    tensors, x, direction, expected, gradients = problem(name)
    change = family.controls[control]
    changed = tensors | {tensor: make(tensors[tensor]) for tensor, make in change.tensors.items()}
    out, found = run(changed, x, direction, moe=dataclasses.replace(family.our_config(), **change.moe))
    for actual, wanted in ((out, expected), (found["x"], gradients["x"])):
        with pytest.raises(AssertionError, match="of the batch exceeds"):
            assert_close(actual, wanted, **TOLERANCE)
