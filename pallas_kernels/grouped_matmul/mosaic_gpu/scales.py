"""Scales of 8-bit operands: how they reach the kernel, and what they multiply there.

Scales of whole rows of tokens and weights multiply the sums once, at the end. Scales of 128x128 blocks of weights and
1x128 of tokens multiply the sums of each 128 of K, which are then added in f32: Hopper's fp8 products keep about 14
bits of their sums, so this is also what keeps them exact (DeepSeek-V3, arXiv:2412.19437, 3.3.2).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul.mosaic_gpu.work import ALIGNMENT

BLOCK = 128  # of K, and of N for weights
Of = Literal["block", "row", "matrix"]  # what one scale is of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """Those of one operand in the shape that the kernel reads."""

    values: Any  # f32: tokens [K/128, M], [M], [1]; weights [E * S, K/128, N/128], [E, N], [E * S], S gate and up apart
    of: Of = dataclasses.field(metadata={"static": True})


class Pair(NamedTuple):
    """Of both operands."""

    lhs: Scales
    rhs: Scales

    @property
    def in_blocks(self) -> bool:
        """Whether they multiply the sums of each block of K."""
        return self.lhs.of == "block"


def kind(fmt: Format, *, weights: bool) -> Of | None:
    """What a scale of a format is of, where the kernels know it: of rows of codes of 8 bits, in f32."""
    if fmt.codes_per_element != 1 or fmt.two_level or fmt.scale_dtype != np.float32:
        return None
    blocks: dict[Any, Of] = {(None, None): "matrix", (1, None): "row", (128 if weights else 1, 128): "block"}
    return blocks.get(fmt.block)


def of_tokens(lhs: QuantizedArray, block_m: int) -> Scales:
    """Those of rows, with zeros past the last one where a tile reads more than there are."""
    of = kind(lhs.format, weights=False)
    assert of is not None
    if of == "matrix":
        return Scales(values=lhs.scales.reshape(1), of=of)
    num_rows = lhs.shape[0]
    scales = jnp.pad(lhs.scales, ((0, 0), (0, max(block_m - num_rows, -num_rows % ALIGNMENT))))
    return Scales(values=scales if of == "block" else scales[0], of=of)


def of_weights(rhs: QuantizedArray) -> Scales:
    """Those of the experts' weights."""
    of = kind(rhs.format, weights=True)
    assert of is not None
    scales = rhs.scales
    if of == "matrix":
        return Scales(values=scales.reshape(-1), of=of)
    if of == "row":
        return Scales(values=scales.reshape(scales.shape[0], -1), of=of)
    return Scales(values=scales.reshape(-1, *scales.shape[-2:]), of=of)
