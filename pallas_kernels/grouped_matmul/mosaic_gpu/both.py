"""Both matmuls of experts in one launch on NVIDIA Hopper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax

from pallas_kernels.devices import interpreting, num_cores
from pallas_kernels.formats import QuantizedArray
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.mosaic_gpu import tuned
from pallas_kernels.grouped_matmul.mosaic_gpu.work import max_tiles
from pallas_kernels.hopper import unsupported_here

if TYPE_CHECKING:
    from pallas_kernels.fused_moe.experts import ExpertsCall

__all__ = ["run", "unsupported", "unsupported_anywhere"]


MOST_BYTES = 28 << 20  # of rows that are there beside the results of both: of 32 MB that a layer may take


def unsupported(call: ExpertsCall) -> str | None:
    """Why it cannot serve a call, or None."""
    return unsupported_anywhere(call) or unsupported_here()


def unsupported_anywhere(call: ExpertsCall) -> str | None:
    """Why it cannot serve a call on any Hopper GPU, or None."""
    first, second = call.first, call.second(call.hidden)
    reason = mosaic_gpu.unsupported_anywhere(first) or mosaic_gpu.unsupported_anywhere(second)
    if reason is not None:
        return reason
    if 0 in (*first.lhs.shape, *first.rhs.shape):
        return "there are no rows or no experts"
    if first.activation_format is not None or second.activation_format is not None:
        return "rows are quantized on their way to the experts"
    if first.epilogue is not None and first.epilogue.name in mosaic_gpu.NOT_IN_KERNELS:
        return f"{first.epilogue.name} is applied between the matmuls"
    if first.out_format is not None and not mosaic_gpu.quantizes(first, first.out_format):
        return f"results are quantized to {first.out_format} between the matmuls"
    config, n = mosaic_gpu.config_of(first), second.rhs.shape[1]
    rows = first.lhs.values if isinstance(first.lhs, QuantizedArray) else first.lhs
    if rows.size * rows.dtype.itemsize > MOST_BYTES:
        return "the rows of the first matmul would take memory until the second one ends"
    if config.split_rows:
        return f"with {config.block_m=} tensor cores bind, and two launches are faster"
    other = second.config if (second.config, first.config) != (None, None) else tuned.config_for(second)
    if other not in (None, config):
        return f"w13 has {config} and w2 {other}: in one launch they are the same"
    return f"{config.block_n=} is above N={n}" if config.block_n > n else None


def run(call: ExpertsCall) -> jax.Array:
    """Serves a call that `unsupported` let pass."""
    from pallas_kernels.grouped_matmul.mosaic_gpu.sm90 import grouped_matmuls_sm90

    first, second = call.first, call.second(call.hidden)
    config = mosaic_gpu.config_of(first)
    most = max_tiles(first.lhs.shape[0], first.rhs.shape[0], config.block_m)
    widest = max(math.prod(each.rhs.shape[1:-1]) for each in (first, second))
    out: jax.Array
    out, _ = grouped_matmuls_sm90(
        *mosaic_gpu.rows_of(first, config.block_m),
        (mosaic_gpu.weights_of(first), mosaic_gpu.weights_of(second)),
        mosaic_gpu.plan_of(first, config.block_m),
        config=config,
        # The interpreter runs one program after the other: none may wait for a later one.
        num_programs=1 if interpreting.get() is not None else min(num_cores(), most * -(-widest // config.block_n)),
    )
    return out
