"""Checkpoints that transformers saves, and pre-quantized ones as the Hub has them, through the shipped mappings.

What is wanted comes from the parameters of the torch modules, by the code of this file, and never from a mapping.
"""

import dataclasses
import functools
import importlib.resources
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from by_name import assert_same_parts, by_name
from moe_online import ConfigError, MissingWeights, UnexpectedWeights, load
from moe_online.experts import abstract_experts
from moe_online.flax import Linear
from moe_online.loading.mappings import MAPPINGS, get_mapping
from numpy_quantizer import E4M3, dequantize_numpy, quantize_numpy
from quick import few
from tolerance import assert_same_bits

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed: install the extra `parity`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: install the extra `parity`")
safetensors_torch = pytest.importorskip("safetensors.torch")

EXPERTS, HIDDEN, WIDTH, SHARED = 12, 160, 96, 2  # 12: names of experts do not sort as numbers do
FILE = "model.safetensors"
DTYPES = {"bf16": (torch.bfloat16, np.dtype(ml_dtypes.bfloat16)), "f32": (torch.float32, np.dtype(np.float32))}
FORMS = {  # arguments of save_pretrained
    "as published": {},
    "in several files": {"max_shard_size": "200KB"},
    "as in memory": {"save_original_format": False},
}
RENAMED = {"q_a_layernorm": "q_a_norm", "kv_a_layernorm": "kv_a_norm", "kv_a_proj_with_mqa": "kv_a_proj"}
ATTENTION = "layers.1.attention."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    mapping: str
    model: str  # of transformers: the classes `{model}Config` and `{model}ForCausalLM`
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has: tuple[str, ...] = ()  # leaves that make it worth a test
    interleaved: bool = False  # gate and up rows take turns, and experts' weights are [E, in, out]

    def make(self, dtype):
        """The model of transformers with random numbers everywhere, also in norms and biases."""
        sizes = {
            "vocab_size": 48,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "eos_token_id": None,
        }
        config = getattr(transformers, f"{self.model}Config")(**sizes | dict(self.settings))
        model = getattr(transformers, f"{self.model}ForCausalLM")(config).to(dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("e_score_correction_bias"):
                    tensor.data = tensor.float()  # as it is published, whatever the rest is in
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        return model


LATENT = {
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": SHARED,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 56,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MIXTRAL = Family(mapping="mixtral", model="Mixtral", settings={"num_local_experts": EXPERTS})
QWEN3_MOE = Family(
    mapping="qwen3_moe",
    model="Qwen3Moe",
    settings={
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": 56,
        "head_dim": 8,
        "mlp_only_layers": [0],
    },
    has=("layers.0.mlp.down_proj.kernel", f"{ATTENTION}k_norm.scale"),
)
GPT_OSS = Family(
    mapping="gpt_oss",
    model="GptOss",
    settings={"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    has=(f"{ATTENTION}sinks", f"{ATTENTION}o_proj.bias", "layers.1.moe.router.bias", "layers.1.moe.experts.w13_bias"),
    interleaved=True,
)
DEEPSEEK_V3 = Family(
    mapping="deepseek_v3",
    model="DeepseekV3",
    settings=LATENT,
    has=(
        "layers.0.mlp.gate_proj.kernel",
        f"{ATTENTION}q_a_norm.scale",
        f"{ATTENTION}kv_a_proj.kernel",
        "layers.1.moe.experts.e_score_correction_bias",
        "layers.1.moe.experts.shared.w13_weight",
    ),
)
FAMILIES = {
    "Mixtral": MIXTRAL,
    "Qwen3-MoE": QWEN3_MOE,
    "OLMoE": Family(
        mapping="olmoe", model="Olmoe", settings={"num_experts": EXPERTS}, has=(f"{ATTENTION}q_norm.scale",)
    ),
    "GPT-OSS": GPT_OSS,
    "DeepSeek-V3": DEEPSEEK_V3,
}
VARIANTS = {
    "Mixtral, tied": dataclasses.replace(
        MIXTRAL, settings={**MIXTRAL.settings, "tie_word_embeddings": True}, has=("embed.embedding",)
    ),
    "Qwen3-MoE, biases": dataclasses.replace(
        QWEN3_MOE, settings={**QWEN3_MOE.settings, "attention_bias": True}, has=(f"{ATTENTION}q_proj.bias",)
    ),
    "DeepSeek-V3, queries at once": dataclasses.replace(
        DEEPSEEK_V3, settings={**LATENT, "q_lora_rank": None}, has=(f"{ATTENTION}q_proj.kernel",)
    ),
    "DeepSeek-V3, biases": dataclasses.replace(
        DEEPSEEK_V3, settings={**LATENT, "attention_bias": True}, has=(f"{ATTENTION}kv_a_proj.bias",)
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small, torch's threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def array(tensor):
    """With the same bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def leaves(family, model):
    """What every leaf must hold, by its name."""
    found = {"embed.embedding": model.model.embed_tokens.weight, "norm.scale": model.model.norm.weight}
    if not model.config.tie_word_embeddings:
        found["lm_head.kernel"] = model.lm_head.weight.T
    for i, layer in enumerate(model.model.layers):
        here = {
            "attention_norm.scale": layer.input_layernorm.weight,
            "moe_norm.scale": layer.post_attention_layernorm.weight,
        }
        here |= dense_leaves("attention", layer.self_attn)
        if hasattr(layer.self_attn, "sinks"):
            here["attention.sinks"] = layer.self_attn.sinks
        here |= moe_leaves(family, layer.mlp) if hasattr(layer.mlp, "experts") else dense_leaves("mlp", layer.mlp)
        found |= {f"layers.{i}.{name}": tensor for name, tensor in here.items()}
    return {name: array(tensor) for name, tensor in found.items()}


def dense_leaves(prefix, module):
    """Of linear layers and norms within a module."""
    found = {}
    for name, child in module.named_children():
        name = f"{prefix}.{RENAMED.get(name, name)}"
        if isinstance(child, torch.nn.Linear):
            found[f"{name}.kernel"] = child.weight.T
            if child.bias is not None:
                found[f"{name}.bias"] = child.bias
        elif hasattr(child, "weight"):
            found[f"{name}.scale"] = child.weight
    return found


def moe_leaves(family, mlp):
    experts, router = mlp.experts, mlp.router if family.interleaved else mlp.gate
    found = {"router.kernel": router.weight.T}
    if family.interleaved:
        in_turn = experts.gate_up_proj.mT
        found["experts.w13_weight"] = torch.stack([in_turn[:, 0::2], in_turn[:, 1::2]], dim=1)
        found["experts.w2_weight"] = experts.down_proj.mT
        in_turn = experts.gate_up_proj_bias
        found["experts.w13_bias"] = torch.stack([in_turn[:, 0::2], in_turn[:, 1::2]], dim=1)
        found["experts.w2_bias"] = experts.down_proj_bias
        found["router.bias"] = router.bias
    else:
        found["experts.w13_weight"] = torch.stack(experts.gate_up_proj.chunk(2, dim=1), dim=1)
        found["experts.w2_weight"] = experts.down_proj
    if hasattr(router, "e_score_correction_bias"):
        found["experts.e_score_correction_bias"] = router.e_score_correction_bias
    if hasattr(mlp, "shared_experts"):
        shared = mlp.shared_experts
        rows = torch.stack([shared.gate_proj.weight, shared.up_proj.weight])
        found["experts.shared.w13_weight"], found["experts.shared.w2_weight"] = (
            rows[None],
            shared.down_proj.weight[None],
        )
    return {f"moe.{name}": tensor for name, tensor in found.items()}


def declare(family, wanted, dtype):
    """The abstract model: experts from the sizes of the config, the rest as large as it is."""
    declared = {}
    for name, x in wanted.items():
        path, inside, _ = name.partition(".experts.")
        if inside:
            latent = family.model == "DeepseekV3"
            declared[f"{path}.experts"] = abstract_experts(
                EXPERTS,
                HIDDEN,
                WIDTH,
                dtype,
                has_bias=family.interleaved,
                num_correction_biases=EXPERTS if latent else 0,
                shared_intermediate_size=SHARED * WIDTH if latent else 0,
            )
        else:
            declared[name] = jax.ShapeDtypeStruct(x.shape, dtype)
    return declared


def leaf_of(params, name):
    """What was loaded under this name."""
    path, inside, field = name.partition(".experts.")
    return operator.attrgetter(field)(params[f"{path}.experts"]) if inside else params[name]


def check(params, wanted, quantized=None):
    """Every leaf has the bits that are wanted, weights of experts after `quantized`, if it is given."""
    for name, x in wanted.items():
        found = leaf_of(params, name)
        try:
            if quantized and name.endswith(("w13_weight", "w2_weight")):
                assert_same_parts(found, quantize_numpy(x, quantized))
            else:
                assert_same_bits(found, x)
        except AssertionError as error:
            error.add_note(name)
            raise


@functools.cache
def problem(name, dtype="bf16"):
    """A model of transformers, what each leaf must hold, and the declaration."""
    family = (FAMILIES | VARIANTS)[name]
    model = family.make(DTYPES[dtype][0])
    wanted = leaves(family, model)
    return model, wanted, declare(family, wanted, DTYPES[dtype][1])


def stored(folder):
    """The tensors of a file, by name."""
    return safetensors_torch.load((folder / FILE).read_bytes())


def saved(folder, name, **changes):
    """Saves a model, and then its file again with other tensors: None drops one."""
    problem(name)[0].save_pretrained(folder)
    tensors = {key: x for key, x in (stored(folder) | changes).items() if x is not None}
    safetensors_torch.save_file(tensors, folder / FILE)
    return folder


def quiet_load(name, folder, mapping=None, **options):
    family = (FAMILIES | VARIANTS)[name]
    mapping = get_mapping(family.mapping) if mapping is None else mapping
    return load(problem(name, options.pop("dtype", "bf16"))[2], folder, mapping=mapping, progress=False, **options)


CASES = [
    *((name, dtype, "as published") for name in FAMILIES for dtype in DTYPES),
    *((name, "bf16", form) for name in FAMILIES for form in ("in several files", "as in memory")),
    *((name, "bf16", "as published") for name in VARIANTS),
]


QUICK = [(name, "bf16", "as published") for name in FAMILIES] + [("GPT-OSS", "bf16", "as in memory")]


@pytest.mark.parametrize(
    ("name", "dtype", "form"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_every_tensor_gets_to_its_place(tmp_path, name, dtype, form):
    model, wanted, abstract = problem(name, dtype)
    assert set((FAMILIES | VARIANTS)[name].has) <= set(wanted)
    assert len(jax.tree.leaves(abstract)) == len(wanted)
    model.save_pretrained(tmp_path, **FORMS[form])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "in several files")
    params, report = quiet_load(name, tmp_path, dtype=dtype)
    check(params, wanted)
    assert report.read_bytes == sum(x.nbytes for x in wanted.values())


@pytest.mark.parametrize("name", few(FAMILIES, ("Mixtral", "GPT-OSS")))
def test_experts_are_quantized_as_numpy_does(tmp_path, name):
    model, wanted, _ = problem(name)
    model.save_pretrained(tmp_path)
    params, _ = quiet_load(name, tmp_path, quantization="int8_w8a16")
    check(params, wanted, "int8_per_channel")


SWAPS = {  # rules that are wrong in a way that no shape shows
    "Mixtral": {".w1.weight": (".gate", ".up"), ".w3.weight": (".up", ".gate")},
    "Qwen3-MoE": {".gate_proj.weight": (".gate ", ".up "), ".up_proj.weight": (".up ", ".gate ")},
    "OLMoE": {".gate_proj.weight": (".gate ", ".up "), ".up_proj.weight": (".up ", ".gate ")},
    "GPT-OSS": {".gate_up_proj": ("(N S)", "(S N)")},
    "DeepSeek-V3": {".gate_proj.weight": (".gate ", ".up "), ".up_proj.weight": (".up ", ".gate ")},
}


@pytest.mark.parametrize("name", few(FAMILIES, ("Mixtral", "GPT-OSS")))
def test_gate_and_up_in_each_others_place_are_other_bits(tmp_path, name):
    rules = get_mapping(FAMILIES[name].mapping)
    for pattern, text in rules.items():
        for suffix, (old, new) in SWAPS[name].items():
            if ".experts." in pattern and pattern.endswith(suffix):
                assert old in text
                rules[pattern] = text.replace(old, new)
    assert rules != get_mapping(FAMILIES[name].mapping)
    params, _ = quiet_load(name, saved(tmp_path, name), mapping=rules)
    wanted = problem(name)[1]
    weights = [key for key in wanted if key.endswith(".experts.w13_weight")]
    check(params, {key: x for key, x in wanted.items() if key not in weights})
    for key in weights:
        with pytest.raises(AssertionError, match="differ"):
            check(params, {key: wanted[key]})


LOST = {  # of each family a tensor of one expert, and the leaf that then lacks something
    "Mixtral": ("model.layers.1.block_sparse_moe.experts.10.w3.weight", "layers.1.moe.experts.w13_weight"),
    "Qwen3-MoE": ("model.layers.1.mlp.experts.3.down_proj.weight", "layers.1.moe.experts.w2_weight"),
    "OLMoE": ("model.layers.0.mlp.experts.0.gate_proj.weight", "layers.0.moe.experts.w13_weight"),
    "GPT-OSS": ("model.layers.0.mlp.experts.gate_up_proj_bias", "layers.0.moe.experts.w13_bias"),
    "DeepSeek-V3": ("model.layers.1.mlp.shared_experts.up_proj.weight", "layers.1.moe.experts.shared.w13_weight"),
}


@pytest.mark.parametrize("name", few(LOST, ("Qwen3-MoE", "GPT-OSS")))
def test_a_tensor_by_another_name_is_missed(tmp_path, name):
    tensor, leaf = LOST[name]
    problem(name)[0].save_pretrained(tmp_path)
    kept = stored(tmp_path)[tensor]
    with pytest.raises(MissingWeights) as caught:
        quiet_load(name, saved(tmp_path, name, **{tensor: None, f"{tensor}_renamed": kept}))
    assert [found for found in caught.value.names if found.startswith(leaf)] == list(caught.value.names)


@pytest.mark.parametrize("name", few(FAMILIES, ("DeepSeek-V3",)))
def test_a_tensor_too_many_is_named(tmp_path, name):
    extra = "model.layers.1.self_attn.adapter"
    with pytest.raises(UnexpectedWeights) as caught:
        quiet_load(name, saved(tmp_path, name, **{extra: torch.ones(3)}))
    assert caught.value.names == (extra,)


SKIPPED = {
    "Mixtral": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "DeepSeek-V3": {
        "model.layers.61.eh_proj.weight": torch.ones(8, 16),
        "model.layers.61.mlp.experts.0.gate_proj.weight": torch.ones(4, 8),
        "model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv": torch.ones(1, 1),
    },
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_a_mapping_skips(tmp_path, name):
    folder, rules = saved(tmp_path, name, **SKIPPED[name]), get_mapping(FAMILIES[name].mapping)
    check(quiet_load(name, folder)[0], problem(name)[1])
    with pytest.raises((UnexpectedWeights, ConfigError)):
        quiet_load(name, folder, mapping={key: text for key, text in rules.items() if text != "skip"})


def test_a_mapping_is_extended_with_rules(tmp_path):
    name = "Mixtral, tied"  # the head is stored all the same, and there is something of one's own
    folder = saved(tmp_path, name, **{"lm_head.weight": torch.ones(48, HIDDEN), "ours.scale": torch.ones(3)})
    with pytest.raises(UnexpectedWeights) as caught:
        quiet_load(name, folder)
    assert set(caught.value.names) == {"lm_head.weight", "ours.scale"}
    mapping = get_mapping("mixtral") | {"lm_head.weight": "skip", "ours.*": "skip"}
    check(quiet_load(name, folder, mapping=mapping)[0], problem(name)[1])


def test_names_of_mappings():
    files = importlib.resources.files("moe_online.loading.mappings").iterdir()
    assert {f"{name}.toml" for name in MAPPINGS} == {file.name for file in files if file.name.endswith(".toml")}
    for family in (FAMILIES | VARIANTS).values():
        assert getattr(transformers, f"{family.model}Config").model_type == family.mapping
    with pytest.raises(ConfigError, match=f"'llama'; there are {', '.join(MAPPINGS)}"):
        get_mapping("llama")


# Pre-quantized experts. Codes and scales are random, not what a quantizer would make of anything: none could make them
# again, so those that are loaded were taken over.

RNG = np.random.default_rng(0)
SHAPES = {"w13_weight": (EXPERTS, 2, WIDTH, HIDDEN), "w2_weight": (EXPERTS, HIDDEN, WIDTH)}
SHARED_SHAPES = {
    "shared.w13_weight": (1, 2, SHARED * WIDTH, HIDDEN),
    "shared.w2_weight": (1, HIDDEN, SHARED * WIDTH),
}


def random_parts(name, shape):
    """Codes and scales in our layout: `[..., N, K]` and `[..., K blocks, N blocks]`."""
    fmt = by_name(name)
    codes = RNG.integers(0, 256, fmt.values_shape(shape), np.uint8)
    if name == "mxfp4":
        return codes, RNG.integers(110, 130, fmt.scales_shape(shape), np.uint8)
    codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8).view(E4M3)  # no NaN
    return codes, RNG.uniform(1e-4, 1e-2, fmt.scales_shape(shape)).astype(np.float32)


def tensor(x):
    """Of torch, with the same bits."""
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn) if x.dtype == E4M3 else torch.from_numpy(x)


def as_mxfp4(parts, prefix):
    """GPT-OSS on the Hub: rows of gate and up in turn, bytes of a block as an axis, scales `[E, N, K blocks]`."""
    found = {}
    for field, theirs in (("w13_weight", "gate_up_proj"), ("w2_weight", "down_proj")):
        codes, scales = parts[field]
        scales = scales.swapaxes(-1, -2)
        if field == "w13_weight":
            codes, scales = (x.swapaxes(1, 2).reshape(EXPERTS, 2 * WIDTH, -1) for x in (codes, scales))
        found[f"{prefix}.{theirs}_blocks"] = tensor(codes.reshape(*scales.shape, 16))
        found[f"{prefix}.{theirs}_scales"] = tensor(scales)
        found[f"{prefix}.{theirs}"] = None
    return found


def as_fp8(parts, prefix):
    """DeepSeek-V3 on the Hub: one tensor per expert and matrix, scales `[N blocks, K blocks]`."""
    found = {}

    def put(name, codes, scales):
        found[f"{name}.weight"], found[f"{name}.weight_scale_inv"] = tensor(codes), tensor(scales.T)

    for e in range(EXPERTS):
        for half, theirs in enumerate(("gate_proj", "up_proj")):
            put(f"{prefix}.experts.{e}.{theirs}", *(x[e, half] for x in parts["w13_weight"]))
        put(f"{prefix}.experts.{e}.down_proj", *(x[e] for x in parts["w2_weight"]))
    for half, theirs in enumerate(("gate_proj", "up_proj")):
        put(f"{prefix}.shared_experts.{theirs}", *(x[0, half] for x in parts["shared.w13_weight"]))
    put(f"{prefix}.shared_experts.down_proj", *(x[0] for x in parts["shared.w2_weight"]))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prequantized:
    family: str
    format: str
    schemes: tuple[str, ...]  # that take it over
    shapes: Mapping[str, tuple[int, ...]]
    layers: tuple[int, ...]

    @functools.cached_property
    def parts(self):
        return {
            f"layers.{i}.moe.experts.{field}": random_parts(self.format, shape)
            for i in self.layers
            for field, shape in self.shapes.items()
        }

    def save(self, folder):
        changes = {}
        for i in self.layers:
            here = {field: self.parts[f"layers.{i}.moe.experts.{field}"] for field in self.shapes}
            if self.format == "mxfp4":
                changes |= as_mxfp4(here, f"model.layers.{i}.mlp.experts")
            else:
                changes |= as_fp8(here, f"model.layers.{i}.mlp")
        return saved(folder, self.family, **changes)

    def check_rest(self, params):
        """All that is not quantized."""
        check(params, {name: x for name, x in problem(self.family)[1].items() if name not in self.parts})


PREQUANTIZED = {
    "mxfp4": Prequantized(
        family="GPT-OSS", format="mxfp4", schemes=("mxfp4", "mxfp4_w4a16"), shapes=SHAPES, layers=(0, 1)
    ),
    "fp8": Prequantized(
        family="DeepSeek-V3",
        format="fp8_per_block",
        schemes=("fp8_per_block",),
        shapes={**SHAPES, **SHARED_SHAPES},
        layers=(1,),
    ),
}


@pytest.mark.parametrize(("name", "scheme"), [(name, s) for name, case in PREQUANTIZED.items() for s in case.schemes])
def test_codes_and_scales_are_taken_over(tmp_path, name, scheme):
    case = PREQUANTIZED[name]
    params, report = quiet_load(case.family, case.save(tmp_path), quantization=scheme)
    for leaf, parts in case.parts.items():
        found = leaf_of(params, leaf)
        assert found.format == by_name(case.format)
        assert_same_parts(found, parts)
    case.check_rest(params)
    assert report.read_bytes == sum(x.numel() * x.element_size() for x in stored(tmp_path).values())


def test_mxfp4_means_what_transformers_makes_of_it():
    parts = dict(zip(SHAPES, (random_parts("mxfp4", shape) for shape in SHAPES.values()), strict=True))
    theirs = as_mxfp4(parts, "")
    unpack = transformers.integrations.mxfp4.convert_moe_packed_tensors
    w13, w2 = (
        unpack(theirs[f".{name}_blocks"], theirs[f".{name}_scales"], dtype=torch.float32).mT.numpy()
        for name in ("gate_up_proj", "down_proj")
    )
    np.testing.assert_array_equal(
        np.stack([w13[:, 0::2], w13[:, 1::2]], 1), dequantize_numpy(parts["w13_weight"], "mxfp4")
    )
    np.testing.assert_array_equal(w2, dequantize_numpy(parts["w2_weight"], "mxfp4"))


@pytest.mark.parametrize("name", PREQUANTIZED)
def test_another_format_needs_leave(tmp_path, name):
    case = PREQUANTIZED[name]
    folder = case.save(tmp_path)
    with pytest.raises(ConfigError, match="requantize=True"):
        quiet_load(case.family, folder, quantization="int8_w8a16")
    params, _ = quiet_load(case.family, folder, quantization="int8_w8a16", requantize=True)
    for leaf, parts in case.parts.items():
        real = dequantize_numpy(parts, case.format).astype(np.float32)
        assert_same_parts(leaf_of(params, leaf), quantize_numpy(real, "int8_per_channel"))
    case.check_rest(params)


LOST_SCALES = {  # what their names end in, and the leaf
    "mxfp4": ("layers.1.mlp.experts.down_proj_scales", "layers.1.moe.experts.w2_weight"),
    "fp8, of one": (".experts.7.up_proj.weight_scale_inv", "layers.1.moe.experts.w13_weight"),
    "fp8, of all": (".down_proj.weight_scale_inv", "layers.1.moe.experts."),
}


@pytest.mark.parametrize("name", LOST_SCALES)
@pytest.mark.parametrize("quantized", few([True, False], (True,)))
def test_scales_that_are_gone_are_missed(tmp_path, name, quantized):
    case, (suffix, leaf) = PREQUANTIZED[name.partition(",")[0]], LOST_SCALES[name]
    folder = case.save(tmp_path)
    tensors = stored(folder)
    kept = {key: x for key, x in tensors.items() if not key.endswith(suffix)}
    assert len(kept) < len(tensors)
    safetensors_torch.save_file(kept, folder / FILE)
    with pytest.raises(MissingWeights) as caught:  # codes alone are never taken for numbers
        quiet_load(case.family, folder, quantization=case.schemes[0] if quantized else None)
    assert all(found.startswith(leaf) and "scales" in found for found in caught.value.names)


class Node(nnx.Module):
    """Whatever is set on it."""


def as_module(abstract):
    """The same names as a module whose matrices are those of `Linear`, which can be quantized."""

    def make():
        root = Node()
        for name, declared in abstract.items():
            *path, field = name.split(".")
            node = root
            for key in path[:-1] if field in ("kernel", "bias") else path:
                if not hasattr(node, key):
                    setattr(node, key, Node())
                node = getattr(node, key)
            if field == "kernel":
                options = {"use_bias": f"{'.'.join(path)}.bias" in abstract, "param_dtype": declared.dtype}
                setattr(node, path[-1], Linear(*declared.shape, rngs=nnx.Rngs(0), **options))
            elif field != "bias":
                setattr(node, field, nnx.Param(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), declared)))
        return root

    return nnx.eval_shape(make)


def test_dense_layers_are_taken_over_too(tmp_path):
    """DeepSeek-V3 as it is on the Hub: all matrices but embedding, routers and head are fp8."""
    case, (_, wanted, abstract) = PREQUANTIZED["fp8"], problem("DeepSeek-V3")
    back = {ours: theirs for theirs, ours in RENAMED.items()}
    kernels, changes = {}, {}
    for name, x in wanted.items():
        layer, _, rest = name.removesuffix(".kernel").rpartition(".")
        if name.endswith("_proj.kernel"):
            codes, scales = kernels[name] = random_parts("fp8_per_block", x.T.shape)
            theirs = f"model.{layer.replace('attention', 'self_attn')}.{back.get(rest, rest)}.weight"
            changes |= {theirs: tensor(codes), f"{theirs}_scale_inv": tensor(scales.T)}
    assert len(kernels) == 2 * 5 + 3
    folder = case.save(tmp_path)
    safetensors_torch.save_file(stored(folder) | changes, folder / FILE)
    model, _ = load(
        as_module(abstract),
        folder,
        mapping=get_mapping("deepseek_v3"),
        quantization="fp8_per_block",
        progress=False,
    )
    for name, parts in kernels.items():
        found = functools.reduce(getattr, name.split("."), model).get_value()
        assert_same_parts(found.weight, parts)
