"""Every format in numpy and ml_dtypes, written from the definitions: an oracle that shares no code with the kernels.

All arithmetic is f32, in which numpy divides and multiplies as IEEE 754 demands. `int4_per_group` with a group other
than 128 is named `int4_per_group_32` and `int4_per_group_64` here.
"""

import ml_dtypes
import numpy as np

E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
TINY = np.float32(2.0**-126)  # smaller magnitudes count as zero
CHANNEL_FLOOR = np.float32(1 / (448 * 512))
BLOCKS = {  # (bn, bk) elements that share a scale; None = all
    "fp8_per_tensor": (None, None),
    "fp8_per_channel": (1, None),
    "fp8_per_block": (128, 128),
    "int8_per_channel": (1, None),
    "int4_per_group": (1, 128),
    "int4_per_group_64": (1, 64),
    "int4_per_group_32": (1, 32),
    "nvfp4": (1, 16),
    "mxfp8": (1, 32),
    "mxfp4": (1, 32),
    "fp8_per_tensor_dynamic": (None, None),
    "fp8_per_token": (1, None),
    "fp8_per_group": (1, 128),
    "int8_per_token": (1, None),
    "nvfp4_per_token": (1, 16),
}
WEIGHTS = tuple(BLOCKS)[:10]
ACTIVATIONS = tuple(BLOCKS)[8:]  # mxfp8 and mxfp4 are both
PACKED = tuple(name for name in BLOCKS if "4" in name)  # two codes to a byte


def quantize_numpy(x, name, shared_axes=()):
    """`(codes, scales)` of `x` `[..., N, K]` (bf16, f16 or f32), for nvfp4 also the second-level scales.

    Codes are `[..., N, K]`, or `[..., N, K / 2]` bytes; scales `[..., K blocks, N blocks]`. Scales of whole matrices
    are shared over `shared_axes`.
    """
    x = np.asarray(x).astype(np.float32)
    x = np.where(np.abs(x) < TINY, np.float32(0), x)
    if name.startswith("nvfp4"):
        codes, scales, second = _nvfp4(x, shared_axes, per_token=name == "nvfp4_per_token")
        return _packed(codes), scales, second
    *lead, n, k = x.shape
    bn, bk = (block or size for block, size in zip(BLOCKS[name], (n, k), strict=True))
    codes, scales = np.zeros(x.shape, np.float32), np.zeros((*lead, -(-k // bk), -(-n // bn)), np.float32)
    rows = [(slice(None), -1)] if bn == 1 else [(slice(i, i + bn), (-2, -1)) for i in range(0, n, bn)]
    for block_k, column in enumerate(range(0, k, bk)):
        for block_n, (row, axes) in enumerate(rows):
            at = (..., row, slice(column, column + bk))  # the last ones are short
            amax = np.max(np.abs(x[at]), axis=axes, keepdims=True)
            if shared_axes and BLOCKS[name] == (None, None):
                amax = np.broadcast_to(amax.max(axis=shared_axes, keepdims=True), amax.shape)
            codes[at], scale = RULES[name.removesuffix("_64").removesuffix("_32")](x[at], amax)
            scales[..., block_k, slice(None) if bn == 1 else slice(block_n, block_n + 1)] = scale[..., 0]
    if name in ("mxfp8", "mxfp4"):
        scales = (np.log2(scales).astype(np.int32) + 127).astype(np.uint8)  # of powers of two: exact
    if name in PACKED:
        return _packed(codes.astype(E2M1) if name == "mxfp4" else codes.astype(np.int8)), scales
    return codes.astype(np.int8 if name.startswith("int8") else E4M3), scales


def dequantize_numpy(parts, name):
    """The real values `[..., N, K]` of what `quantize_numpy` returns, exact but for the second level, in float64."""
    codes, scales, *second = parts
    real = unpacked(codes, name).astype(np.float64)
    n, k = real.shape[-2:]
    bn, bk = (block or size for block, size in zip(BLOCKS[name], (n, k), strict=True))
    scales = 2.0 ** (scales.astype(np.float64) - 127) if name in ("mxfp8", "mxfp4") else scales.astype(np.float64)
    scales = np.swapaxes(scales, -1, -2)
    real = real * np.repeat(np.repeat(scales, bn, axis=-2)[..., :n, :], bk, axis=-1)[..., :k]
    return real * second[0].astype(np.float64).reshape(*real.shape[:-2], -1, 1) if second else real


def unpacked(codes, name):
    """One number per code."""
    if name not in PACKED:
        return codes
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    if name.startswith("int4"):
        return nibbles.astype(np.int8) - np.int8(16) * (nibbles > 7)
    return nibbles.view(E2M1).astype(np.float32)


def _packed(codes):
    bits = codes.view(np.uint8) & np.uint8(15)
    return bits[..., ::2] | (bits[..., 1::2] << 4)


def _fp8(x):
    return np.clip(x, -448, 448).astype(E4M3).astype(np.float32)  # the cast makes NaN of anything above 464


def _int(x, largest):
    return np.clip(np.rint(x), -largest, largest)


def _fp8_tensor(x, amax):
    scale = np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(448), TINY))
    return _fp8(x * (np.float32(1) / scale)), scale


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
    return _int(x / scale, 127), scale


def _int8_token(x, amax):
    amax = np.maximum(amax, np.float32(1e-10))
    return _int(x * (np.float32(127) / amax), 127), amax / np.float32(127)


def _int4_group(x, amax):
    scale = np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(7), TINY))
    return _int(x / scale, 7), scale


def _mxfp8(x, amax):
    mantissa, exponent = np.frexp(np.maximum(amax, TINY).astype(np.float64))  # amax = mantissa * 2**exponent, below 1
    e = np.where(mantissa * 2 <= 1.75, exponent - 1 - 8, exponent - 1 - 7)
    scale = _power_of_two(e, amax)
    return _fp8(x * (1 / scale)), scale


def _mxfp4(x, amax):
    rounded = (amax.view(np.uint32) + np.uint32(0x200000)) & np.uint32(0x7F800000)
    scale = _power_of_two((rounded >> 23).astype(np.int32) - 127 - 2, amax)
    return np.clip(x * (1 / scale), -6, 6).astype(E2M1).astype(np.float32), scale


def _power_of_two(e, amax):
    return np.where(amax == 0, np.float32(1), np.ldexp(np.float32(1), np.clip(e, -126, 127)))


def _nvfp4(x, shared_axes, *, per_token):
    *lead, n, k = x.shape
    whole = np.abs(x).max(axis=-1 if per_token else (-2, -1), keepdims=True)
    if shared_axes and not per_token:
        whole = np.broadcast_to(whole.max(axis=shared_axes, keepdims=True), whole.shape)
    whole = np.maximum(whole, np.float32(1e-8))
    second = whole / np.float32(2688)
    encode = np.float32(1) / second if per_token else np.float32(2688) / whole
    codes, scales = np.zeros(x.shape, E2M1), np.zeros((*lead, k // 16, n), E4M3)
    for block in range(k // 16):
        part = x[..., 16 * block : 16 * (block + 1)]
        units = np.abs(part).max(axis=-1, keepdims=True) * np.float32(1 / 6)
        scale = np.clip(encode * units, -448, 448).astype(E4M3)
        real = scale.astype(np.float32)
        inverse = np.where(real == 0, np.float32(0), encode / np.where(real == 0, np.float32(1), real))
        codes[..., 16 * block : 16 * (block + 1)] = np.clip(part * inverse, -6, 6).astype(E2M1)
        scales[..., block, :] = scale[..., 0]
    return codes, scales, second[..., 0] if per_token else second[..., 0, 0]


RULES = {
    "fp8_per_tensor": _fp8_tensor,
    "fp8_per_tensor_dynamic": _fp8_tensor,
    "fp8_per_channel": _fp8_channel,
    "fp8_per_token": _fp8_channel,
    "fp8_per_block": _fp8_block,
    "fp8_per_group": _fp8_group,
    "int8_per_channel": _int8_channel,
    "int8_per_token": _int8_token,
    "int4_per_group": _int4_group,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
}
