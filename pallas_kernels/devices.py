"""What there is to know of the device that a call is traced for."""

from __future__ import annotations

import jax
from jax.extend import backend

INTERPRETED_CORES = 2  # where a CPU stands in for the device: enough for two blocks to meet


def num_cores() -> int:
    """Streaming multiprocessors of a GPU: of the current mesh's devices, else of the default device."""
    if (device := jax.sharding.get_abstract_mesh().abstract_device) is not None and device.num_cores:
        return int(device.num_cores)
    return int(getattr(backend.get_default_device(), "core_count", INTERPRETED_CORES))
