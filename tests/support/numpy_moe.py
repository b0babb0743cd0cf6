"""The routed layer in numpy, quantized by `numpy_quantizer`: what the whole library is measured against."""

import dataclasses

import ml_dtypes
import numpy as np

from numpy_quantizer import dequantize_numpy, quantize_numpy


def quantized(x, name):
    """`x` after a round trip through a format, in f32; None leaves it."""
    return np.asarray(x, np.float32) if name is None else dequantize_numpy(quantize_numpy(x, name), name).astype("f4")


def bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@dataclasses.dataclass
class NumpyMoE:
    """`[T, H] -> [T, H]`, the top 2 experts of each token; what is rounded to bf16 is what the library rounds.

    `gate`, `up` `[E, H, I]` and `down` `[E, I, H]` as a training run stores them.
    """

    router: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    weight: str | None  # format
    activation: str | None  # format

    def __post_init__(self):
        self.gate, self.up, self.down = (
            quantized(np.swapaxes(np.asarray(w), 1, 2), self.weight) for w in (self.gate, self.up, self.down)
        )

    def __call__(self, x):
        x = np.asarray(x)
        scores = softmax(x.astype(np.float32) @ np.asarray(self.router, np.float32))
        ids = np.argsort(-scores, axis=-1, kind="stable")[:, :2]
        weights = np.take_along_axis(scores, ids, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        x = quantized(x, self.activation)
        y = np.zeros_like(x)
        for expert in range(len(self.down)):
            tokens, slots = np.nonzero(ids == expert)
            gate, up = bf16(x[tokens] @ self.gate[expert].T), bf16(x[tokens] @ self.up[expert].T)
            hidden = quantized(bf16(gate / (1 + np.exp(-gate)) * up), self.activation)
            y[tokens] += weights[tokens, slots, None] * (hidden @ self.down[expert].T)
        return bf16(y).astype(ml_dtypes.bfloat16)
