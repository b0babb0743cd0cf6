"""NVIDIA Hopper: whether its kernels can run here."""

from __future__ import annotations

import jax

from pallas_kernels.devices import target_device

FIRST_JAX = (0, 11)
HOPPER = ("H100", "H200", "GH200", "H800", "H20")  # in `device_kind`


def unsupported_here() -> str | None:
    """Why this jax and the device that is traced for cannot run them, or None."""
    if jax.__version_info__[:2] < FIRST_JAX:
        return f"it needs jax >= 0.11, and this is {jax.__version__}"
    device = target_device()
    if device.platform != "gpu" or any(chip in device.device_kind for chip in HOPPER):
        return None  # of other platforms, `choose` decides
    return f"it is for NVIDIA Hopper ({', '.join(HOPPER)}), and this is {device.device_kind}"
