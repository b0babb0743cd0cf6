"""The oracle: activations, routing and the quantized MoE in numpy, float64 sums, loops over experts.

Written from the definitions alone; nothing of `pallas_kernels` computes anything here. Codes and scales come from
`numpy_quantizer`, everything after them is float64.
"""

import math

import numpy as np

from numpy_quantizer import dequantize_numpy, quantize_numpy


def real(x, name=None):
    """float64 values of `x`, quantized on the way where a format is named."""
    if name is None:
        return np.asarray(x).astype(np.float64)
    return dequantize_numpy(quantize_numpy(x, name), name)


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
            gate, up = (rounded(w13[e, s] @ rows[t] + (0 if b13 is None else b13[e, s]), dtype) for s in (0, 1))
            routed.append((t, j, e))
            hidden.append(rounded(act(gate, up), dtype))
    out = np.zeros(x.shape)
    if routed:  # quantized together: a per-tensor scale spans the rows that were routed
        for (t, j, e), a in zip(routed, real(np.stack(hidden), act_format), strict=True):
            h = w2[e] @ a + (0 if b2 is None else b2[e])
            out[t] += h if on_input else h * weights[t, j]
    return out
