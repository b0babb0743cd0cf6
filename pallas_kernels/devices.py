"""What there is to know of the device that a call is traced for."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend import backend

INTERPRETED_CORES = 2  # where a CPU stands in for the device: enough for two blocks to meet


def target_device() -> Any:
    """A device of the current mesh (abstract: `platform`, `device_kind`, `num_cores`), else the default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or backend.get_default_device()


def num_cores() -> int:
    """Streaming multiprocessors of a GPU."""
    device = target_device()
    cores = getattr(device, "num_cores", None) or getattr(device, "core_count", None) or INTERPRETED_CORES
    return int(cores)
