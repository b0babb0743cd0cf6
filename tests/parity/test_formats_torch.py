"""Codes and scales against torch, and against the code by which transformers dequantizes checkpoints.

For 8-bit formats the definition is written down in torch once more; its casts, dtypes and divisions are the oracle.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantizedArray, codes, quantize
from sources import BF16, random
from tolerance import assert_same_bits

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed: install the extra `parity`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: install the extra `parity`")

W = random(3, 160, 256, seed=1)  # [E, N, K] bf16, rows of very different size
W[0, 3, 32:64] = 0  # an empty block; the scales of whole rows and matrices are not
ours = jax.jit(quantize, static_argnums=1)


def to_torch(x, dtype=None):
    """The same bits; of a dtype that numpy has no name for, where one is given."""
    x = torch.from_numpy(np.array(x.view(np.uint8) if dtype else x))  # a copy, since jax shares none to write to
    return x.view(dtype) if dtype else x


def as_bytes(x):
    """The bits, as torch's small floats are not those of ml_dtypes."""
    return x.contiguous().view(torch.uint8).numpy() if isinstance(x, torch.Tensor) else np.asarray(x).view(np.uint8)


def changed(x, y):
    """Share of the codes that differ."""
    return np.mean(as_bytes(x) != as_bytes(y))


def n_first(scales):
    """[E, N blocks, K blocks], as all others have them."""
    return np.ascontiguousarray(np.swapaxes(scales, -1, -2))


# --- quantizers written in torch ------------------------------------------------------------------------------------


def fp8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_per_tensor(w):
    scale = w.abs().amax(dim=(1, 2), keepdim=True) / 448
    return fp8(w * (1 / scale)), scale


def fp8_per_channel(w):
    scale = (w.abs().amax(dim=2, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    return fp8(w / scale), scale


def fp8_per_block(w):
    padded = torch.nn.functional.pad(w, (0, 0, 0, -w.shape[1] % 128))
    blocks = padded.unfold(1, 128, 128).unfold(2, 128, 128)  # [E, N blocks, K blocks, 128, 128]
    scale = blocks.abs().amax(dim=(3, 4)).clamp(min=1e-4) / 448
    factor = (1 / scale).repeat_interleave(128, dim=1)[:, : w.shape[1]].repeat_interleave(128, dim=2)
    return fp8(w * factor), scale


def int8_per_channel(w):
    scale = w.abs().amax(dim=2, keepdim=True) / 127
    return (w / scale).round().clamp(-127, 127).to(torch.int8), scale


def mxfp8(w):
    blocks = w.unflatten(2, (-1, 32))
    amax = blocks.abs().amax(dim=3, keepdim=True)
    mantissa, exponent = torch.frexp(amax.double() / 448)
    exponent = exponent - (mantissa == 0.5).int()  # the smallest power of two that amax / 448 does not exceed
    scale = torch.where(amax == 0, 1.0, torch.ldexp(torch.ones_like(amax), exponent))
    return fp8(blocks / scale).flatten(2), scale[..., 0].to(torch.float8_e8m0fnu)


RECIPES = (fp8_per_tensor, fp8_per_channel, fp8_per_block, int8_per_channel, mxfp8)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_8_bit_weights(recipe):
    q, (values, scale) = ours(W, recipe.__name__), recipe(to_torch(W.astype(np.float32)))
    assert_same_bits(as_bytes(n_first(q.scales)), as_bytes(scale))
    assert_same_bits(as_bytes(q.values), as_bytes(values))
    assert changed(ours(W[::-1], recipe.__name__).values, values) > 0.5


def test_other_arithmetic_is_noticed():
    """A product with the reciprocal, where the format divides, changes few codes."""
    q, w = ours(W, "fp8_per_channel"), to_torch(W.astype(np.float32))
    assert 0 < changed(q.values, fp8(w * (1 / to_torch(n_first(q.scales))))) < 0.01


# --- casts and dtypes -----------------------------------------------------------------------------------------------


def test_every_bf16_number_as_e4m3():
    """Up to 448, so that the scale is 1."""
    x = np.arange(2**16, dtype=np.uint16).view(BF16)
    x = x[(np.abs(x.astype(np.float32)) <= 448) & (np.abs(x.astype(np.float32)) >= 2.0**-126)][None]
    q = ours(x, "fp8_per_tensor")
    assert q.scales.tolist() == [[1.0]]
    x = to_torch(x.astype(np.float32))
    assert_same_bits(as_bytes(q.values), as_bytes(x.to(torch.float8_e4m3fn)))
    assert changed(q.values, x.to(torch.float8_e4m3fnuz)) > 0.1


def test_values_of_codes():
    """e4m3 and E8M0 mean the same numbers to torch."""
    every = np.arange(256, dtype=np.uint8)
    e4m3 = QuantizedArray.from_parts(
        jnp.asarray(every[None]).view(jnp.float8_e4m3fn), jnp.ones((1, 1)), "fp8_per_tensor"
    ).dequantize()
    np.testing.assert_array_equal(e4m3[0], to_torch(every, torch.float8_e4m3fn).float())  # a NaN equals a NaN
    normal = every[1:255]  # 0 is 2**-127 and 255 NaN; no scale is either
    assert_same_bits(codes.e8m0_values(jnp.asarray(normal)), to_torch(normal, torch.float8_e8m0fnu).float().numpy())


# --- transformers ---------------------------------------------------------------------------------------------------


def gpt_oss(q):
    """Blocks `[E, N, K / 32, 16]` of bytes and scales `[E, N, K / 32]` give `[E, K, N]`."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = np.asarray(q.values).reshape(*q.values.shape[:2], -1, 16)
    real = convert_moe_packed_tensors(to_torch(blocks), to_torch(n_first(q.scales)), dtype=torch.float32)
    return np.swapaxes(real.numpy(), 1, 2)


def test_mxfp4_of_gpt_oss():
    rng = np.random.default_rng(0)
    any_bytes = rng.integers(0, 256, (3, 160, 128), dtype=np.uint8)
    exponents = rng.integers(2, 250, (3, 8, 160), dtype=np.uint8)  # within which all numbers are normal
    for q in (ours(W, "mxfp4"), QuantizedArray.from_parts(jnp.asarray(any_bytes), jnp.asarray(exponents), "mxfp4")):
        expected = gpt_oss(q)
        assert_same_bits(q.dequantize(), expected)
        swapped = QuantizedArray.from_parts((q.values >> 4) | (q.values << 4), q.scales, "mxfp4")
        others = QuantizedArray.from_parts(q.values, jnp.roll(q.scales, 1, axis=2), "mxfp4")
        for wrong in (swapped, others):
            assert np.mean(np.asarray(wrong.dequantize()) != expected) > 0.5


@pytest.mark.parametrize("name", ["fp8_per_block", "mxfp8", "mxfp4", "nvfp4"])
def test_checkpoints_of_fp8_quantizers(name):
    """What transformers does with `weight` and `weight_scale_inv`; the grid of scales says what shares one."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module, "Fp8Dequantize"):
        pytest.skip(f"transformers {transformers.__version__} has no Fp8Dequantize")
    q = ours(random(2, 256, 384, seed=2), name)
    values = to_torch(q.values, torch.int8 if q.values.dtype == np.uint8 else torch.float8_e4m3fn)
    scales = n_first(q.scales.astype(jnp.float32) if name == "nvfp4" else q.scales)

    def theirs(scales):
        both = {"weight": values, "weight_scale_inv": to_torch(scales)}
        found = module.Fp8Dequantize(None).convert(both)["weight"].float().numpy()
        return found if q.global_scale is None else found * np.asarray(q.global_scale)[:, None, None]

    expected = q.dequantize(jnp.bfloat16 if scales.dtype == np.uint8 else jnp.float32)  # as they do
    assert_same_bits(expected.astype(jnp.float32), theirs(scales))
    assert np.mean(np.asarray(expected) != theirs(np.roll(scales, 1, axis=1))) > 0.5
