"""One validated call of `grouped_matmul`: what every implementation gets, and what it decides by."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import Activation
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.product import no_gradient
from pallas_kernels.implementations import Implementation, choose
from pallas_kernels.routing import GroupMetadata

KERNELS: dict[Implementation, str] = {
    "mosaic_gpu": "pallas_kernels.grouped_matmul.mosaic_gpu",
    "mosaic_tpu": "pallas_kernels.grouped_matmul.mosaic_tpu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of `pallas_kernels.grouped_matmul`, names resolved and defaults filled in."""

    lhs: jax.Array | QuantizedArray  # [M, K]
    rhs: jax.Array | QuantizedArray  # [E, N, K], or [E, 2, I, K] with gate and up apart
    group_sizes: jax.Array  # [groups] int32
    metadata: GroupMetadata
    out_dtype: np.dtype[Any]
    activation_format: Format | None = None
    out_format: Format | None = None
    bias: jax.Array | None = None  # [E, N], or as `rhs` less K
    epilogue: Activation | None = None
    group_offset: jax.Array | int | None = None
    config: Any = None  # of the kernel's own type

    @property
    def arguments(self) -> dict[str, Any]:
        """All fields, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def dispatch(call: Call, implementation: str | None) -> jax.Array | QuantizedArray:
    """Serves a call by the kernel that `implementation` names, or the best one, or XLA."""
    kernel = choose("grouped_matmul", implementation, KERNELS, call)
    arrays = {"lhs": call.lhs, "rhs": call.rhs, "bias": call.bias}
    arrays = jax.tree.map(lambda array: no_gradient(jnp.asarray(array)), arrays)
    sizes, metadata = jax.tree.map(jnp.asarray, (call.group_sizes, call.metadata))
    call = dataclasses.replace(call, group_sizes=sizes, metadata=metadata, **arrays)
    if kernel is not None:
        out: jax.Array | QuantizedArray = kernel.run(call)
        return out
    arguments = call.arguments
    if (config := arguments.pop("config")) is not None:
        raise ValueError(f"{config=} is for a kernel, and XLA serves this call; leave it out or name implementation=")
    return reference.grouped_matmul(**arguments)
