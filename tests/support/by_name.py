"""Formats by the names that `numpy_quantizer` gives them."""

import jax

from numpy_quantizer import BLOCKS
from pallas_kernels import get_format
from tolerance import assert_same_bits


def by_name(name):
    """The Format; `int4_per_group_32` has groups of 32."""
    base, _, group = name.partition("_per_group_")
    return get_format(f"{base}_per_group", group=int(group)) if group else get_format(name)


def whole_blocks(name, shape):
    """`shape` with K raised to what the format can store."""
    block = 1 if name in ("fp8_per_block", "fp8_per_group") else BLOCKS[name][1] or 1
    return (*shape[:-1], -(-shape[-1] // block) * block)


def assert_same_parts(q, expected):
    """Codes, scales and second-level scales have the bits of what `quantize_numpy` returned."""
    for found, wanted in zip(jax.tree.leaves(q), expected, strict=True):
        assert_same_bits(found, wanted)
