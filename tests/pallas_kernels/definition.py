"""The oracle: formats, routing and the quantized MoE in numpy, float64 sums, loops over experts.

Written from the definitions alone; nothing of `pallas_kernels` computes anything here. Codes and scales are f32
arithmetic as defined, everything after them is float64.
"""

import math

import ml_dtypes
import numpy as np

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
TINY = np.float32(2.0**-126)


def e4m3(codes):
    return np.clip(codes, -448, 448).astype(E4M3).astype(np.float32)


def int8(codes):
    return np.clip(np.rint(codes), -127, 127).astype(np.float32)


def blocks(x, block_n, block_k):
    """For every block of the last two axes: its index and its view; ragged ends are short."""
    n, k = x.shape[-2:]
    for i in range(0, n, block_n):
        for j in range(0, k, block_k):
            yield (..., slice(i, i + block_n), slice(j, j + block_k))


def quantize(x, name):
    """Dequantized values of `x` `[..., N, K]`, float64."""
    x = np.asarray(x).astype(np.float32)
    x = np.where(np.abs(x) < TINY, np.float32(0), x)
    k = x.shape[-1]
    sizes = {"fp8_per_block": (128, 128), "fp8_per_group": (1, 128)}
    out = np.zeros(x.shape, np.float64)
    for at in blocks(x, *sizes.get(name, (1, k))):
        part = x[at]
        amax = np.max(np.abs(part), axis=(-2, -1), keepdims=True)
        codes, scale = CODES[name](part, amax)
        out[at] = codes.astype(np.float64) * scale.astype(np.float64)
    return out


def _fp8_channel(x, amax):
    scale = np.maximum(amax / np.float32(448), np.float32(1 / (448 * 512)))
    return e4m3(x / scale), scale


def _fp8_block(x, amax):
    scale = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
    return e4m3(x * (np.float32(1) / scale)), scale


def _fp8_group(x, amax):
    scale = np.maximum(amax, np.float32(1e-10)) / np.float32(448)
    return e4m3(x / scale), scale


def _int8_channel(x, amax):
    scale = np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(127), TINY))
    return int8(x / scale), scale


def _int8_token(x, amax):
    amax = np.maximum(amax, np.float32(1e-10))
    return int8(x * (np.float32(127) / amax)), amax / np.float32(127)


CODES = {
    "fp8_per_channel": _fp8_channel,
    "fp8_per_token": _fp8_channel,
    "fp8_per_block": _fp8_block,
    "fp8_per_group": _fp8_group,
    "int8_per_channel": _int8_channel,
    "int8_per_token": _int8_token,
}


def real(x, name=None):
    """float64 values of `x`, quantized on the way where a format is named."""
    return np.asarray(x).astype(np.float64) if name is None else quantize(x, name)


def rounded(x, dtype):
    return np.asarray(x).astype(np.float32).astype(dtype).astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def activation(name, gate, up, alpha=1.702, beta=1.0, limit=None):
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    if name == "silu":
        return gate * sigmoid(gate) * up
    if name == "gelu":
        return gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2 * up
    if name == "gelu_tanh":
        return gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2 * up
    if name == "relu2":
        return np.maximum(gate, 0) ** 2 * up
    return gate * sigmoid(alpha * gate) * (up + beta)


def grouped_matmul(lhs, rhs, sizes, bias=None, offset=0):
    """`lhs [M, K]`, `rhs [E, N, K]`, float64; rows of no expert at hand are zero."""
    out = np.zeros((lhs.shape[0], rhs.shape[1]))
    start = 0
    for group, size in enumerate(sizes):
        expert = group - offset
        if 0 <= expert < rhs.shape[0]:
            rows = lhs[start : start + size] @ rhs[expert].T
            out[start : start + size] = rows if bias is None else rows + bias[expert]
        start += size
    return out


def route(logits, top_k, scoring="softmax", renormalize=True, factor=1.0):
    logits = np.asarray(logits).astype(np.float64)
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores = e / e.sum(axis=-1, keepdims=True) if scoring == "softmax" else sigmoid(logits)
    ids = np.argsort(-scores.astype(np.float32), axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights * factor, ids


def silu(gate, up):
    return activation("silu", gate, up)


def fused_moe(
    x, w13, w2, weights, ids, *, act=silu, act_format=None, b13=None, b2=None, expert_map=None, on_input=False
):
    """`x [T, H]` in its dtype; `w13 [E, 2, I, H]` and `w2 [E, H, I]` float64, dequantized; result `[T, H]` float64."""
    dtype = x.dtype
    out = np.zeros(x.shape)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = ids[t, j]
            if expert_map is not None:
                e = expert_map[e] if 0 <= e < len(expert_map) else -1
            if not 0 <= e < w2.shape[0]:
                continue
            row = rounded(real(x[t]) * weights[t, j], dtype) if on_input else real(x[t])
            row = real(row[None], act_format)[0]
            gate, up = (rounded(w13[e, s] @ row + (0 if b13 is None else b13[e, s]), dtype) for s in (0, 1))
            a = rounded(act(gate, up), dtype)
            h = w2[e] @ real(a[None], act_format)[0] + (0 if b2 is None else b2[e])
            out[t] += h if on_input else h * weights[t, j]
    return out
