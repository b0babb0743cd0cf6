"""Numbers that quantizers get wrong: zeros, subnormal and huge ones, ties, and neighbours of where a rule changes."""

import ml_dtypes
import numpy as np

from numpy_quantizer import E4M3


def normal(*shape, seed=0):
    """Normal numbers whose size changes from row to row, so that no two scales are equal."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * rng.uniform(0.01, 1, (*shape[:-1], 1))).astype(np.float32)


def cast(x, dtype):
    """`x` in `dtype`; what is too large for it becomes its largest number."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -largest, largest).astype(dtype)


def midpoints(codes, largest):
    """Numbers exactly between two neighbouring codes, under a scale of exactly 1, with both signs."""
    codes = np.unique(codes[codes >= 0])
    middle = (codes[1:] + codes[:-1]) / 2
    row = np.resize(np.concatenate([middle, -middle]), (3, 384))
    row[:, ::16] = largest  # in every block
    return row.astype(np.float32)


E4M3_CODES = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float64)
E2M1_CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
X = normal(3, 384, seed=1)
SPECIAL = {
    "zeros": 0 * np.abs(X),
    "negative zeros": -0.0 * np.abs(X),
    "one zero row": X * np.array([[1], [0], [1]], np.float32),
    "zero blocks": X * (np.arange(384) // 128 == 1),
    "small zero blocks": X * (np.arange(384) // 16 % 3 == 1),
    "blocks far below the rest": X * np.float32(10) ** -(np.arange(384) // 16 % 12).astype(np.float32),
    "subnormal": X / np.abs(X).max() * np.float32(1e-39),
    "partly subnormal": X * np.float32(2.0**-125),
    "tiny": X * np.float32(1e-36),
    "below the floors": X * np.float32(1e-11),
    "around the floors": X * np.float32(10) ** np.linspace(-12, 0, 384, dtype=np.float32),
    "huge": X / np.abs(X).max() * np.float32(3.4e38),
    "the largest numbers": np.sign(X) * np.finfo(np.float32).max,
    "next to the largest code": np.resize(
        np.array([448, -448, 447.99997, 449, 464, 127, 126.99999], np.float32), X.shape
    ),
    "midpoints of e4m3": midpoints(E4M3_CODES, 448),
    "midpoints of int8": midpoints(np.arange(128), 127),
    "midpoints of int4": midpoints(np.arange(8), 7),
    "midpoints of e2m1": midpoints(E2M1_CODES, 6),
    "next to where an exponent changes": np.resize(
        np.array([1.75, -1.75, np.nextafter(np.float32(1.75), np.float32(2)), 1.7499999, 3.5, 448.00003], np.float32),
        X.shape,
    )
    * np.float32(2) ** (np.arange(384) // 16 - 12).astype(np.float32),
    "all exponents": np.sign(X) * np.float32(2) ** (120 - 10 * (np.arange(384) // 16)).astype(np.float32),
    "one large element": np.where(np.arange(384) == 200, np.float32(1e6), X),
}


def special():
    """All cases along the leading axis, where each has scales of its own."""
    return np.stack([np.asarray(case, np.float32) for case in SPECIAL.values()])


def special_experts(*, alone):
    """All cases as rows of one expert `[1, 128, 384]`; with `alone` each is an expert `[128, 384]` of its own."""
    if alone:
        return np.stack([np.resize(case, (128, 384)) for case in special()])
    rows = special().reshape(-1, 384)
    assert len(rows) <= 128
    return np.resize(rows, (1, 128, 384))
