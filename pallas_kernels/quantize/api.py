"""`quantize`: real arrays in, `QuantizedArray` out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.formats import Format, QuantizedArray, get_format
from pallas_kernels.implementations import IMPLEMENTATIONS, Implementation, UnsupportedError
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import AxisNames


def quantize(
    x: Float[Array, "*batch N K"],
    format: Format | str,
    *,
    shared_axes: tuple[int, ...] = (),
    axis_names: tuple[AxisNames, AxisNames] = ((), ()),
    amax: Float[Array, "*batch"] | None = None,
    implementation: Implementation | None = None,
) -> QuantizedArray:
    """Quantizes the last two axes of `x`; every leading index gets its own scales.

    A weight's codes and scales are the same bits on every backend, jitted or not, and for every mesh. Magnitudes
    below 2**-126 count as zero. Where a format allows that blocks reach past the end, they are filled with zeros for
    their scale and cropped.

    Args:
      x: bf16, f16 or f32, `[..., N, K]`; for activations `[T, K]`. K is the contraction axis. Must be finite for
        weights (the loader checks it); a NaN among activations spoils its own token only.
      format: A format or its name; `pallas_kernels.formats` holds the table.
      shared_axes: Leading axes over which per-tensor and second-level scales are shared (the gate/up axis of w13);
        without effect on formats that have neither.
      axis_names: Mesh axes that shard N and K, inside `shard_map`. A scale that spans one takes its maximum over it.
      amax: Where `x` is a part of the matrices that share a per-tensor or second-level scale: `matrix_amax` of the
        whole of each, so that all parts get the scale of the whole.
      implementation: `None` or `"xla"`; kernels write into arrays that are there: `quantize_into`.

    Returns:
      Codes `[..., N, K]` (two 4-bit codes to a byte, the even index along K low) and scales
      `[..., ceil(K / bk), ceil(N / bn)]`, the real value of one code step.

    Raises:
      TypeError: `x` is not a floating-point array of 16 or 32 bits.
      ValueError: rank below 2, K that is no multiple of a block that must be whole, an unknown format, `shared_axes`
        that are no leading axes, a shard that cuts through a block, or `amax` for a format without such a scale.
      UnsupportedError: the named implementation cannot serve.

    Source: formats as in `pallas_kernels.formats`.

    >>> import jax.numpy as jnp
    >>> q = quantize(jnp.ones((2, 256, 512), jnp.bfloat16), "fp8_per_block")
    >>> q.values.shape, q.scales.shape
    ((2, 256, 512), (2, 4, 2))
    """
    fmt = get_format(format)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if implementation in ("mosaic_gpu", "mosaic_tpu"):
        raise UnsupportedError(
            f"quantize: {implementation!r} has no kernel that returns new arrays; use 'xla', or quantize_into"
        )
    check_dtype(x)
    fmt.check_shape(x.shape)
    if not all(-x.ndim <= axis < x.ndim and axis % x.ndim < x.ndim - 2 for axis in shared_axes):
        raise ValueError(f"{shared_axes=} must be leading axes of {x.shape=}, before [N, K]")
    n_axes, k_axes = axis_names
    fmt.check_shard(x.shape[-2], x.shape[-1], n_sharded=bool(n_axes), k_sharded=bool(k_axes))
    if amax is not None and (not fmt.whole_matrix or amax.shape != x.shape[:-2]):
        raise ValueError(f"{amax.shape=} must be {x.shape[:-2]}, and {fmt.name!r} a format with a scale of the whole")
    return reference.quantize(x, fmt, shared_axes=shared_axes, axis_names=axis_names, amax=amax)


def matrix_amax(x: Float[Array, "*batch N K"]) -> Float[Array, "*batch"]:
    """Largest magnitude of each matrix, in f32; 0 below 2**-126, NaN where there is one."""
    return reference.matrix_amax(x)


def check_dtype(x: Float[Array, "*shape"]) -> None:
    """Raises TypeError unless `x` is of a dtype that is quantized."""
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"{x.dtype=} must be bfloat16, float16 or float32; cast the source, or load it as stored")
