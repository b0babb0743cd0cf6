"""Tiles of the TPU grouped matmul: what they take of VMEM, and which to take for a shape."""

from __future__ import annotations

import dataclasses
import itertools

LANES = 128
ROW_PACKING = 16  # rows of a bf16 tile in VMEM
SPILLED_BYTES = 2**20  # that the compiler takes beside blocks, sums and a copy of lhs; libtpu 0.0.52: up to 0.7 MiB

# Of a row block, the least rows for each expert on average from which on it beats the next smaller one: an expert
# wastes about one block of rows, against the share of v6e's bundles that keep the MXU busy, 57, 86 and 90 %.
# From static schedules, not from times.
BLOCK_M = ((512, 4096), (256, 128), (128, 0))
BLOCK_N = (1024, 512, 256, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicTpuConfig:
    """Blocks in VMEM; none has to divide its axis.

    Raises:
      ValueError: a size that does not fill the registers' tiles; the message says which do.
    """

    block_m: int  # rows of a visit
    block_n: int  # rows of the weights
    block_k: int  # elements of K per step; where it covers K, an expert's weights stay in VMEM from visit to visit

    def __post_init__(self) -> None:
        if self.block_m < 1 or self.block_m % ROW_PACKING:
            raise ValueError(f"block_m={self.block_m} must be a multiple of {ROW_PACKING}, the rows of a bf16 tile")
        for name in ("block_n", "block_k"):
            size = getattr(self, name)
            if size < 1 or size % LANES:
                raise ValueError(f"{name}={size} must be a multiple of {LANES}, the lanes of a register")

    def vmem_bytes(self, k: int, *, itemsize: int = 2, out_itemsize: int = 2) -> int:
        """Upper bound of what a kernel over `k` takes: blocks in two buffers each, sums, the compiler's own."""
        lhs, rhs = self.block_m * self.block_k * itemsize, self.block_n * self.block_k * itemsize
        out = self.block_m * self.block_n
        sums = out * 4 if self.block_k < k else 0
        return 2 * (lhs + rhs + out * out_itemsize) + sums + lhs + SPILLED_BYTES


def heuristic(
    *, m: int, num_experts: int, n: int, k: int, vmem_limit: int, itemsize: int = 2, out_itemsize: int = 2
) -> MosaicTpuConfig:
    """The tiles for `m` rows over `num_experts` experts, weights `[n, k]` each, within `vmem_limit` bytes.

    The fewest steps along K come first: with one step weights are read once, not once for each row block, and sums
    never leave the MXU's side. Then the widest column tile, which reads the rows least often.
    """
    block_m = next(block for block, least in BLOCK_M if m >= least * num_experts)
    block_m = min(block_m, _round_up(m, ROW_PACKING))
    block_ns = [_even(n, block) for block in BLOCK_N]
    wide, narrow = block_ns[:2], block_ns[2:]  # a narrow tile would be bound by the bytes of the rows
    block_ks = [_even(k, -(-k // steps)) for steps in range(1, -(-k // LANES) + 1)]
    for block_k, block_n in itertools.chain(itertools.product(block_ks, wide), itertools.product(block_ks, narrow)):
        config = MosaicTpuConfig(block_m=block_m, block_n=block_n, block_k=block_k)
        if config.vmem_bytes(k, itemsize=itemsize, out_itemsize=out_itemsize) <= vmem_limit:
            return config
    raise ValueError(f"{vmem_limit=} bytes hold not even the smallest tiles for {m=}, {n=}, {k=}")


def _even(size: int, block: int) -> int:
    """A block of at most about `block` that cuts `size` evenly."""
    return _round_up(-(-size // -(-size // block)), LANES)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
