"""Which implementation serves a call: validate an explicit choice, or take the best one for this device."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, cast

import jax

from pallas_kernels.devices import INTERPRETED, interpreting, target_device, xla_partitions

Implementation = Literal["xla", "mosaic_gpu", "mosaic_tpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "mosaic_gpu", "mosaic_tpu")

# What a device of this platform runs by itself, where there is a kernel for the call.
NATIVE: dict[str, Implementation] = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
_PLATFORMS = {implementation: platform for platform, implementation in NATIVE.items()}


class UnsupportedError(NotImplementedError):
    """No implementation, or not the named one, can serve this call; the message says why."""


class Kernel(Protocol):
    """A module that holds the kernel of one operation for one kind of device.

    It can be imported wherever the rest of the package can: what it needs beyond that it imports when it runs, and
    names in `unsupported` while it is missing.
    """

    def unsupported(self, call: Any) -> str | None:
        """Why it cannot serve this (already validated) call, or None."""
        ...

    def unsupported_anywhere(self, call: Any) -> str | None:
        """The part of `unsupported` that neither the device nor jax's version decides: docs/formats.md shows it."""
        ...

    def run(self, call: Any) -> Any:
        """Serves the call."""
        ...


def choose(
    op: str,
    implementation: str | None,
    kernels: Mapping[Implementation, str],
    call: Any = None,
    *,
    warn: bool = True,
) -> Kernel | None:
    """The kernel that serves this call; None for XLA.

    Args:
      op: The operation's name, for messages.
      implementation: `None` for the best one on the device that the call is traced for (`target_device`), or a name.
      kernels: The module of each kernel that the operation has, imported on first use.
      call: Passed to the kernel's `unsupported`.
      warn: Whether to say, once, why the device's own kernel cannot serve.

    Raises:
      ValueError: an unknown name.
      UnsupportedError: the named implementation cannot serve this call, or does not run on this device.
    """
    platform: str = target_device().platform
    if implementation is None:
        native = NATIVE.get(platform, "xla")
        if native == "xla" or not kernels:
            return None
        kernel, reason = _find(native, kernels, call)
        if reason is not None and warn:
            _warn_fallback(op, native, reason)
        return kernel
    for known in IMPLEMENTATIONS:
        if implementation == known:
            return None if known == "xla" else _explicit(op, known, kernels, call, platform)
    raise ValueError(f"{implementation=} must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}")


@contextlib.contextmanager
def interpreted(implementation: Implementation, **parameters: Any) -> Iterator[None]:
    """Runs kernels on a CPU, slowly and with checks: for tests and debugging.

    Args:
      implementation: `"mosaic_gpu"` or `"mosaic_tpu"`; what is traced inside is traced for such a device.
      parameters: Of jax's `InterpretGPUParams` or `InterpretParams`, such as `detect_races=True`.

    Raises:
      ValueError: another implementation.
      UnsupportedError: this version of jax has no interpreter for it.
    """
    if implementation not in _PLATFORMS:
        raise ValueError(f"{implementation=} must be one of {', '.join(map(repr, _PLATFORMS))}")
    if implementation == "mosaic_gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if not hasattr(plgpu, "force_gpu_interpret_mode"):
            raise UnsupportedError(f"interpreting Mosaic GPU kernels needs jax >= 0.11, and this is {jax.__version__}")
        if "inline_mgpu" in {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}:
            # Waits between blocks, which jax cannot interpret: one block runs after another.
            parameters = {"inline_mgpu": "ignore", **parameters}
        forced = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**parameters))
    else:
        from jax.experimental.pallas import tpu as pltpu

        forced = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**parameters))
    token = interpreting.set(INTERPRETED[_PLATFORMS[implementation]])
    try:
        with forced:
            yield
    finally:
        interpreting.reset(token)


def _explicit(op: str, name: Implementation, kernels: Mapping[Implementation, str], call: Any, platform: str) -> Kernel:
    kernel, reason = _find(name, kernels, call)
    if reason is None and platform != _PLATFORMS[name]:
        reason = f"it runs on a {_PLATFORMS[name]} and this call is traced for a {platform}"
    if kernel is None or reason is not None:
        raise UnsupportedError(f"{op}: {name!r} cannot serve this call: {reason}; use 'xla'")
    return kernel


def _find(name: Implementation, kernels: Mapping[Implementation, str], call: Any) -> tuple[Kernel | None, str | None]:
    """The kernel of this name, or the reason why it cannot serve; an error while importing it is a bug and surfaces."""
    if name not in kernels:
        return None, "there is no kernel for it yet"
    kernel = cast(Kernel, importlib.import_module(kernels[name]))
    reason = kernel.unsupported(call)
    if reason is None and xla_partitions():
        reason = "XLA cannot spread a kernel over the devices of a mesh; call it inside jax.shard_map"
    return (kernel, None) if reason is None else (None, reason)


_warned: set[tuple[str, str, str]] = set()


def _warn_fallback(op: str, native: str, reason: str) -> None:
    if (op, native, reason) not in _warned:
        _warned.add((op, native, reason))
        warnings.warn(f"{op} runs through XLA on this device: {native!r} cannot serve it: {reason}", stacklevel=4)
