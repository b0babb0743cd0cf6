"""`DenseKernel`: the quantized kernel of a dense layer."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels import Format, QuantizedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseKernel:
    """What a kernel `[K, N]` becomes when it is quantized: `[N, K]`, K last as the kernels want it."""

    weight: QuantizedArray  # [N, K]
    # Of the layer's input. It travels with the weight, so a layer that was swapped in needs no second setting.
    activation_format: Format | None = dataclasses.field(default=None, metadata={"static": True})
