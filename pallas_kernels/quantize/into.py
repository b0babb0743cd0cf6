"""`quantize_into`: experts of a finished leaf, quantized in place in one pass over their source."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.bits import update
from pallas_kernels.formats import QuantizedArray
from pallas_kernels.implementations import Implementation, Kernel, choose
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.api import check_dtype

KERNELS: dict[Implementation, str] = {"mosaic_gpu": "pallas_kernels.quantize.mosaic_gpu"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """What quantization did, expert by expert."""

    error: Any  # f32 [e]: sum of squares of what it changed
    norm: Any  # f32 [e]: sum of squares of the source
    finite: Any  # bool [e]: whether all of the source is


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntoCall:
    """The validated arguments of a call."""

    out: QuantizedArray
    x: Any  # [e, (2,) N, K]
    start: Any
    half: int | None
    amax: Any  # [e], or None

    def written(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """A child of the leaf with that of these experts, laid out like `x`, in its place."""
        place = (self.start,) if self.half is None else (self.start, self.half)
        return update(old, new if self.half is None else new[:, None], (*place, *(0,) * (old.ndim - len(place))))


def quantize_into(
    out: QuantizedArray,
    x: Float[Array, "e *S N K"],
    start: Int32[Array, ""] | int = 0,
    *,
    half: int | None = None,
    amax: Float[Array, "e"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[QuantizedArray, QuantizationLoss]:
    """Writes the quantized experts `[start, start + e)` into `out` `[E, (S,) N, K]`.

    In place where `out` is donated to the compiled program that this is in. The bits are those of `quantize`.

    Args:
      out: The leaf so far.
      x: bf16, f16 or f32, laid out like `out`; with `half` without its second axis.
      start: The first expert's place in `out`; moved so that all fit.
      half: Which index of the second axis of `out` this is, for a leaf whose halves come one at a time.
      amax: The largest magnitude of each expert, over all that shares its scale; needed where a scale, of whichever
        level, spans whole matrices (`Format.whole_matrix`), and only there.
      implementation: `None` for the best on this device, or a name.

    Returns:
      The leaf, and what was lost.

    Raises:
      TypeError: `x` is not a floating-point array of 16 or 32 bits.
      ValueError: shapes that do not fit, `amax` missing or of no use, or an unknown implementation.
      UnsupportedError: the named implementation cannot serve; the message says why.
    """
    call = _validated(out, x, start, half, amax)
    kernel = choose("quantize_into", implementation, KERNELS, call)
    result: tuple[QuantizedArray, QuantizationLoss] = (_xla if kernel is None else kernel.run)(call)
    return result


def kernel_for(out: QuantizedArray, x: Any, half: int | None = None) -> Kernel | None:
    """The kernel that `quantize_into` would take on this device, which needs no temporaries; None for XLA."""
    call = IntoCall(out=out, x=x, start=0, half=half, amax=None)
    return choose("quantize_into", None, KERNELS, call, warn=False)


def _validated(out: QuantizedArray, x: Any, start: Any, half: int | None, amax: Any) -> IntoCall:
    shape = out.shape
    check_dtype(x)
    expected = shape[1:] if half is None else shape[2:]
    if x.ndim < 3 or x.shape[1:] != expected or (half is not None and (len(shape) != 4 or not 0 <= half < shape[1])):
        raise ValueError(f"{x.shape=} with {half=} must be [e, *{expected}] for a leaf of shape {shape}")
    if x.shape[0] > shape[0]:
        raise ValueError(f"{x.shape=} has more experts than the leaf, which has {shape[0]}")
    if out.format.whole_matrix != (amax is not None) or (amax is not None and amax.shape != x.shape[:1]):
        need = f"be {x.shape[:1]}" if out.format.whole_matrix else "be left out"
        raise ValueError(f"amax must {need} for {out.format.name!r}, not {None if amax is None else amax.shape}")
    start = jnp.clip(jnp.asarray(start, jnp.int32), 0, shape[0] - x.shape[0])  # a kernel would write anywhere
    return IntoCall(out=out, x=x, start=start, half=half, amax=None if amax is None else amax.astype(jnp.float32))


def _xla(call: IntoCall) -> tuple[QuantizedArray, QuantizationLoss]:
    """The definition: all at once, so with temporaries of the size of `x` in f32."""
    x, out, fmt = call.x.astype(jnp.float32), call.out, call.out.format
    amax = call.amax
    if amax is not None:
        amax = jnp.broadcast_to(amax.reshape(-1, *(1,) * (x.ndim - 3)), x.shape[:-2])
    q = reference.quantize(x, fmt, amax=amax)
    inner = tuple(range(1, x.ndim))
    loss = QuantizationLoss(
        error=jnp.sum(jnp.square(q.dequantize(jnp.float32) - x), axis=inner),
        norm=jnp.sum(jnp.square(x), axis=inner),
        finite=jnp.all(jnp.isfinite(x), axis=inner),
    )
    return jax.tree.map(call.written, out, q), loss
