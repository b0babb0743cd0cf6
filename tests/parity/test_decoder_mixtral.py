"""Our decoder against Hugging Face's Mixtral: same random weights, same logits, same greedy tokens."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny_decoder
from moe_online.assets.train import EinsumMoE
from moe_online.config import MoEConfig
from moe_online.flax import MoE
from moe_online.models.decoder import Decoder, DecoderConfig
from moe_online.models.generate import generate
from tolerance import assert_close

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed: install the extra `parity`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: install the extra `parity`")

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,  # 8 heads of 16: not hidden_size / num_heads
    rope_theta=1e6,
    norm_eps=1e-5,
    moe=MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=96, params_dtype=np.dtype(jnp.float32)),
)


@pytest.fixture(scope="module")
def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        head_dim=CONFIG.head_dim,
        intermediate_size=CONFIG.moe.intermediate_size,
        num_local_experts=CONFIG.moe.num_experts,
        num_experts_per_tok=CONFIG.moe.top_k,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        rms_norm_eps=CONFIG.norm_eps,
        sliding_window=None,
        initializer_range=0.3,  # logits that differ: the default 0.02 makes every token equally likely
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.MixtralForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # ones would hide a scale that is left out
    return model


def fill_einsum(moe, gate, up, down):
    """[E, out, in] of torch to the [E, in, out] of a training run."""
    for parameter, weight in ((moe.w_gate, gate), (moe.w_up, up), (moe.w_down, down)):
        parameter[...] = jnp.asarray(weight.swapaxes(1, 2))


def fill_ours(moe, gate, up, down):
    moe.experts.set_value(tiny_decoder.experts(*(jnp.asarray(w.swapaxes(1, 2)) for w in (gate, up, down))))


LAYERS = {"training run": (EinsumMoE, fill_einsum), "ours": (MoE, fill_ours)}


def convert(mixtral, moe, fill) -> Decoder:
    """Our decoder around the layer `moe`, with Mixtral's weights; `fill(layer, gate, up, down)` sets the experts'."""
    factory = functools.partial(moe, dtype=jnp.float32, param_dtype=jnp.float32)
    model = Decoder(CONFIG, moe=factory, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    weights = {name: tensor.numpy().copy() for name, tensor in mixtral.state_dict().items()}

    def put(parameter, name, transpose=True):
        weight = weights.pop(f"{name}.weight")
        parameter[...] = jnp.asarray(weight.T if transpose else weight)

    put(model.embed.embedding, "model.embed_tokens", transpose=False)
    put(model.norm.scale, "model.norm")
    put(model.lm_head.kernel, "lm_head")
    for i, layer in enumerate(model.layers):
        name = f"model.layers.{i}"
        put(layer.attention_norm.scale, f"{name}.input_layernorm")
        put(layer.moe_norm.scale, f"{name}.post_attention_layernorm")
        for x in "qkvo":
            put(getattr(layer.attention, f"{x}_proj").kernel, f"{name}.self_attn.{x}_proj")
        put(layer.moe.router.kernel if moe is MoE else layer.moe.router, f"{name}.mlp.gate")
        gate, up = np.split(weights.pop(f"{name}.mlp.experts.gate_up_proj"), 2, axis=1)
        fill(layer.moe, gate, up, weights.pop(f"{name}.mlp.experts.down_proj"))
    assert not weights, f"nothing took {list(weights)}"
    return model


@pytest.fixture(scope="module", params=LAYERS.values(), ids=LAYERS)
def decoder(mixtral, request):
    return convert(mixtral, *request.param)


def reference_logits(mixtral, tokens):
    with torch.no_grad():
        return mixtral(torch.from_numpy(tokens).long()).logits.numpy()


def test_logits(mixtral, decoder):
    tokens = tiny_decoder.random_tokens(4, 48, vocab_size=CONFIG.vocab_size)
    expected = reference_logits(mixtral, tokens)
    assert expected.std() > 1  # the comparison means something
    tolerance = {"batch": 1e-4, "worst_row": 1e-3}  # f32 noise; a token on the edge of two experts may stand out
    assert_close(tiny_decoder.forward(decoder, tokens), expected, **tolerance)

    query = decoder.layers[1].attention.q_proj.kernel
    kept = query[...]
    query[...] = jnp.roll(kept, CONFIG.head_dim, axis=1)  # the heads change places
    with pytest.raises(AssertionError, match="of the batch exceeds"):
        assert_close(tiny_decoder.forward(decoder, tokens), expected, **tolerance)
    query[...] = kept


def test_greedy_tokens_with_the_cache(mixtral, decoder):
    prompts = tiny_decoder.random_tokens(3, 9, seed=1, vocab_size=CONFIG.vocab_size)
    ids = torch.from_numpy(prompts).long()
    options = {"do_sample": False, "use_cache": True, "max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 0}
    expected = mixtral.generate(ids, attention_mask=torch.ones_like(ids), **options).numpy()[:, 9:]
    assert len(np.unique(expected)) > 10  # not one token over and over
    np.testing.assert_array_equal(generate(decoder, prompts, max_new_tokens=32), expected)
