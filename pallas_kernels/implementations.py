"""Which implementation serves a call: validate an explicit choice, or take the best one for this device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import jax

Implementation = Literal["xla", "mosaic_gpu", "mosaic_tpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "mosaic_gpu", "mosaic_tpu")

# What a device of this platform would run by itself, were there a kernel for the call.
_NATIVE: dict[str, Implementation] = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


class UnsupportedError(NotImplementedError):
    """No implementation, or not the named one, can serve this call; the message says why."""


def choose(op: str, implementation: str | None, unsupported: Mapping[Implementation, str]) -> Implementation:
    """The implementation that runs `op`.

    Args:
      op: The operation's name, for messages.
      implementation: `None` for the best one on the default backend, or a name.
      unsupported: For each implementation that cannot serve this call, the reason.

    Raises:
      ValueError: an unknown name.
      UnsupportedError: the named implementation is in `unsupported`.
    """
    if implementation is None:
        native = _NATIVE.get(jax.default_backend(), "xla")
        if native in unsupported:
            _warn_fallback(op, native, unsupported[native])
            return "xla"
        return native
    for known in IMPLEMENTATIONS:
        if implementation == known:
            if known in unsupported:
                raise UnsupportedError(f"{op}: {known!r} cannot serve this call: {unsupported[known]}; use 'xla'")
            return known
    raise ValueError(f"{implementation=} must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}")


_warned: set[tuple[str, str, str]] = set()


def _warn_fallback(op: str, native: str, reason: str) -> None:
    if (op, native, reason) not in _warned:
        _warned.add((op, native, reason))
        warnings.warn(f"{op} runs through XLA on this device: {native!r} cannot serve it: {reason}", stacklevel=4)
