"""Every format in numpy and ml_dtypes, written from the definitions: an oracle that shares no code with the kernels.

All arithmetic is f32, in which numpy divides and multiplies as IEEE 754 demands.
"""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
TINY = np.float32(2.0**-126)  # smaller magnitudes count as zero
CHANNEL_FLOOR = np.float32(1 / (448 * 512))
BLOCKS = {  # (bn, bk) elements that share a scale; None = all of K
    "fp8_per_channel": (1, None),
    "fp8_per_token": (1, None),
    "fp8_per_block": (128, 128),
    "fp8_per_group": (1, 128),
    "int8_per_channel": (1, None),
    "int8_per_token": (1, None),
}
WEIGHTS = ("fp8_per_channel", "fp8_per_block", "int8_per_channel")
ACTIVATIONS = ("fp8_per_token", "fp8_per_group", "int8_per_token")


def quantize_numpy(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[..., N, K]` and scales `[..., K blocks, N blocks]` of `x` `[..., N, K]` (bf16, f16 or f32)."""
    x = np.asarray(x).astype(np.float32)
    x = np.where(np.abs(x) < TINY, np.float32(0), x)
    *lead, n, k = x.shape
    bn, bk = BLOCKS[name]
    bk = bk or k
    codes = np.zeros(x.shape, np.int8 if name.startswith("int8") else E4M3)
    scales = np.zeros((*lead, -(-k // bk), -(-n // bn)), np.float32)
    rows = [(slice(None), -1)] if bn == 1 else [(slice(i, i + bn), (-2, -1)) for i in range(0, n, bn)]
    for block_k, column in enumerate(range(0, k, bk)):
        for block_n, (row, axes) in enumerate(rows):
            at = (..., row, slice(column, column + bk))  # the last ones are short
            amax = np.max(np.abs(x[at]), axis=axes, keepdims=True)
            codes[at], scale = RULES[name](x[at], amax)
            scales[..., block_k, slice(None) if bn == 1 else slice(block_n, block_n + 1)] = scale[..., 0]
    return codes, scales


def dequantize_numpy(codes: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    """The real values `[..., N, K]`, exact, in float64."""
    n, k = codes.shape[-2:]
    bn, bk = BLOCKS[name]
    scales = np.swapaxes(scales, -1, -2).astype(np.float64)
    scales = np.repeat(np.repeat(scales, bn, axis=-2)[..., :n, :], bk or k, axis=-1)[..., :k]
    return codes.astype(np.float64) * scales


def _fp8(x):
    return np.clip(x, -448, 448).astype(E4M3)  # the cast makes NaN of anything above 464


def _int8(x):
    return np.clip(np.rint(x), -127, 127).astype(np.int8)


def _fp8_channel(x, amax):
    scale = np.maximum(amax / np.float32(448), CHANNEL_FLOOR)
    return _fp8(x / scale), scale


def _fp8_block(x, amax):
    scale = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
    return _fp8(x * (np.float32(1) / scale)), scale


def _fp8_group(x, amax):
    scale = np.maximum(amax, np.float32(1e-10)) / np.float32(448)
    return _fp8(x / scale), scale


def _int8_channel(x, amax):
    scale = np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(127), TINY))
    return _int8(x / scale), scale


def _int8_token(x, amax):
    amax = np.maximum(amax, np.float32(1e-10))
    return _int8(x * (np.float32(127) / amax)), amax / np.float32(127)


RULES = {
    "fp8_per_channel": _fp8_channel,
    "fp8_per_token": _fp8_channel,
    "fp8_per_block": _fp8_block,
    "fp8_per_group": _fp8_group,
    "int8_per_channel": _int8_channel,
    "int8_per_token": _int8_token,
}
