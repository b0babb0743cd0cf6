"""The oracle: activations, routing and the quantized MoE in numpy, float64 sums, loops over experts.

Written from the definitions alone; nothing of `pallas_kernels` computes anything here. Codes and scales come from
`numpy_quantizer`, everything after them is float64.
"""

import math

import numpy as np

from numpy_quantizer import dequantize_numpy, quantize_numpy


def real(x, name=None, shared_axes=()):
    """float64 values of `x`, quantized on the way where a format is named; a scale of all may span these axes too."""
    if name is None:
        return np.asarray(x).astype(np.float64)
    return dequantize_numpy(quantize_numpy(x, name, shared_axes), name)


def rounded(x, dtype):
    return np.asarray(x).astype(np.float32).astype(dtype).astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


ALONE = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def activation(name, gate, up=None, alpha=1.702, beta=1.0, limit=None, linear_beta=None):
    if name.endswith("_no_mul"):
        return ALONE[name.removesuffix("_no_mul")](gate)
    if name == "swiglustep":
        return np.minimum(ALONE["silu"](gate), limit) * np.clip(up, -limit, limit)
    if name == "situ":
        value = up if linear_beta is None else linear_beta * np.tanh(up / linear_beta)
        return beta * np.tanh(gate / beta) * sigmoid(gate) * value
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    if name in ALONE:
        return ALONE[name](gate) * up
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
    """`x [T, H]` in its dtype; `w13 [E, S, I, H]` and `w2 [E, H, I]` float64, dequantized; result `[T, H]` float64.

    `act` takes S arguments: gate and up, or one. H of `w2` may be another.
    """
    dtype = x.dtype
    if act_format == "fp8_per_tensor_dynamic":  # tokens of no expert are padding: their magnitude has no say
        mapped = ids if expert_map is None else np.where((ids >= 0) & (ids < len(expert_map)), expert_map[ids], -1)
        x = np.where(((mapped >= 0) & (mapped < w2.shape[0])).any(axis=1, keepdims=True), x, np.zeros_like(x))
    rows = real(rounded(real(x) * weights, dtype) if on_input else x, act_format)
    routed, hidden = [], []
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = ids[t, j]
            if expert_map is not None:
                e = expert_map[e] if 0 <= e < len(expert_map) else -1
            if not 0 <= e < w2.shape[0]:
                continue
            sums = (w13[e, s] @ rows[t] + (0 if b13 is None else b13[e, s]) for s in range(w13.shape[1]))
            routed.append((t, j, e))
            hidden.append(rounded(act(*(rounded(each, dtype) for each in sums)), dtype))
    out = np.zeros((x.shape[0], w2.shape[1]))
    if routed:  # quantized together: a per-tensor scale spans the rows that were routed
        for (t, j, e), a in zip(routed, real(np.stack(hidden), act_format), strict=True):
            h = w2[e] @ a + (0 if b2 is None else b2[e])
            out[t] += h if on_input else h * weights[t, j]
    return out


def shared_experts(x, w13, w2, *, gate=None, **options):
    """One expert `[1, S, I, K]`, `[1, H, I]` for every token of `x [T, K]`; `gate [K]` weighs its output."""
    weights = np.ones((x.shape[0], 1)) if gate is None else sigmoid(real(x) @ gate)[:, None]
    return fused_moe(x, w13, w2, weights, np.zeros(weights.shape, np.int64), **options)
