"""Tokens on their way to the rows of their experts, quantized or as they are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.bits import storage_bits
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.implementations import Implementation, choose
from pallas_kernels.quantize import reference

if TYPE_CHECKING:
    from pallas_kernels.routing import ExpertOrder

KERNELS: dict[Implementation, str] = {"mosaic_gpu": "pallas_kernels.quantize.mosaic_gpu.tokens"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensCall:
    """What a kernel gets."""

    x: Any  # [T, K]
    format: Format | None
    places: Any  # int32 [T, top_k], the rows of each token; None: token t has row t
    by_reciprocal: bool = False  # a product where the definition divides: faster, and a few codes differ by one


def send_tokens(
    x: Float[Array, "T K"], order: ExpertOrder, fmt: Format | None, implementation: Implementation | None
) -> Float[Array, "M K"] | QuantizedArray:
    """The rows of all (token, slot) pairs, each token quantized once however many experts it has."""
    call = TokensCall(x=x, format=fmt, places=order.rows)
    kernel = _kernel(call, implementation)
    if kernel is not None:
        rows: jax.Array | QuantizedArray = kernel.run(call)
        return rows
    if fmt is None:
        return take_rows(x, order.tokens)
    q = reference.quantize(x, fmt)
    scales = q.scales if fmt.block[0] is None else take_rows(q.scales.T, order.tokens).T
    second = None if q.global_scale is None else q.global_scale[order.tokens]
    return QuantizedArray(values=take_rows(q.values, order.tokens), scales=scales, global_scale=second, format=fmt)


def quantize_tokens(
    x: Float[Array, "T K"], fmt: Format, implementation: Implementation | None, *, by_reciprocal: bool = False
) -> QuantizedArray:
    """`quantize` for activations, by a kernel where there is one: the same bits, unless `by_reciprocal` is set.

    Then a kernel with one scale for each row multiplies where the definition divides: faster, and a few codes differ by
    one.
    """
    call = TokensCall(x=x, format=fmt, places=None, by_reciprocal=by_reciprocal)
    kernel = _kernel(call, implementation)
    found: QuantizedArray = reference.quantize(x, fmt) if kernel is None else kernel.run(call)
    return found


def take_rows(x: jax.Array, rows: Int32[Array, " M"]) -> jax.Array:
    """`x[rows]`, moved as bits: XLA:CPU would gather small floats as f32."""
    bits = lax.bitcast_convert_type(x, storage_bits(x.dtype))
    return lax.bitcast_convert_type(bits[rows], x.dtype)


def _kernel(call: TokensCall, implementation: Implementation | None) -> Any:
    """The device's own, unless another implementation was asked for; XLA serves whatever it cannot."""
    if implementation not in (None, *KERNELS):
        return None
    return choose("tokens", None, KERNELS, call, warn=False)
