"""What there is to know of the device that a call is traced for."""

from __future__ import annotations

import contextvars
from typing import Any, NamedTuple

import jax
from jax.extend import backend


class Interpreted(NamedTuple):
    """What stands in for a device where its kernels are interpreted on a CPU."""

    platform: str
    device_kind: str
    num_cores: int = 2  # enough for two blocks to meet


INTERPRETED = {"gpu": Interpreted("gpu", "interpreted H100"), "tpu": Interpreted("tpu", "interpreted TPU")}
interpreting: contextvars.ContextVar[Interpreted | None] = contextvars.ContextVar("interpreting", default=None)


def target_device() -> Any:
    """The interpreted device, else one of the current mesh, else the default device.

    It has a `platform` and a `device_kind`. Where arrays lie is not asked: while a function is traced nobody knows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return interpreting.get() or mesh.abstract_device or backend.get_default_device()


def num_cores() -> int:
    """Streaming multiprocessors of the GPU that calls are traced for."""
    device = target_device()
    cores: int | None = getattr(device, "num_cores", None) or getattr(device, "core_count", None)
    assert cores is not None, f"{device.device_kind} is no GPU"
    return cores


def xla_partitions() -> bool:
    """Whether XLA spreads what is traced over several devices: a mesh of several outside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    return any(size > 1 and kind != manual for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True))
