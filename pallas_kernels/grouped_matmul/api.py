"""`grouped_matmul`: rows sorted by expert, each times its expert's weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation, get_activation
from pallas_kernels.formats import Format, QuantizedArray, get_format
from pallas_kernels.grouped_matmul.call import Call, dispatch
from pallas_kernels.grouped_matmul.operands import activation_format_for, check_float, check_operand, result_dtype
from pallas_kernels.implementations import Implementation
from pallas_kernels.routing import GroupMetadata, make_group_metadata


def grouped_matmul(
    lhs: Float[Array, "M K"] | QuantizedArray,
    rhs: Float[Array, "E N K"] | QuantizedArray,
    group_sizes: Int32[Array, " groups"],
    *,
    metadata: GroupMetadata | None = None,
    activation_format: Format | str | None = None,
    out_format: Format | str | None = None,
    bias: Float[Array, "E N"] | None = None,
    epilogue: Activation | str | None = None,
    group_offset: Int32[Array, ""] | int | None = None,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
    config: Any = None,
) -> Float[Array, "M N_out"] | QuantizedArray:
    """Multiplies each group of rows of `lhs` with its expert of `rhs`; sums in f32.

    Args:
      lhs: bf16, f16 or f32 `[M, K]`, or quantized; rows sorted by expert, the first group first.
      rhs: Weights `[E, N, K]`, quantized or not.
      group_sizes: int32 `[groups]`, rows of each group, at most M together; as many groups as experts, or more with a
        `group_offset`.
      metadata: `make_group_metadata(group_sizes)`, where several matmuls share it.
      activation_format: Quantizes `lhs` to this first.
      out_format: Quantizes the result to this, after it was rounded to `out_dtype`.
      bias: `[E, N]`, added in f32 before any rounding.
      epilogue: An activation. The sums are rounded to `out_dtype`, and their activation, computed in f32, once more.
        For a gated one `rhs` holds gate rows and then up rows, N/2 each.
      group_offset: int32 scalar; `rhs` holds the experts `[offset, offset + E)`. A traced one is clamped to the range.
      out_dtype: bf16, f16 or f32. Default: that of `lhs`, bf16 where it is quantized.
      implementation: `None` for the best one here, `"xla"`, `"mosaic_gpu"` or `"mosaic_tpu"`.
      config: Tiles of the kernel: its `MosaicGpuConfig` or `MosaicTpuConfig`. Default: chosen by shape.

    Returns:
      `[M, N]`, or `[M, N/2]` with a gated epilogue. Rows past `sum(group_sizes)` and rows of experts that are not in
      `rhs` are zero. A QuantizedArray with `out_format`. It is differentiable (in reverse) by real operands where the
      result is real: the codes of a quantized `rhs` count as given, and the gradient passes straight through the
      rounding of `activation_format`.

    Raises:
      TypeError: a dtype that is none of those above.
      ValueError: shapes that do not fit, an unknown format or activation, a quantized `lhs` with `activation_format`.
      UnsupportedError: the named implementation cannot serve; differentiation by or of what is quantized.

    Source: MegaBlocks (arXiv:2211.15841) for the idea of one matmul per group.

    >>> import jax.numpy as jnp
    >>> w = jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])
    >>> grouped_matmul(jnp.ones((4, 2)), w, jnp.array([1, 2], jnp.int32)).tolist()
    [[1.0, 1.0], [3.0, 3.0], [3.0, 3.0], [0.0, 0.0]]
    """
    check_operand("lhs", lhs, "[M, K]", role="activation")
    check_operand("rhs", rhs, "[E, N, K]", role="weight")
    num_experts, n, k = rhs.shape
    if lhs.shape[1] != k:
        raise ValueError(f"{lhs.shape=} and {rhs.shape=} must have the same K as their last axis")
    _check_groups(group_sizes, metadata, num_experts, group_offset)
    if bias is not None:
        check_float("bias", bias)
        if bias.shape != (num_experts, n):
            raise ValueError(f"{bias.shape=} must be [E, N] = {(num_experts, n)}")
    activation = None if epilogue is None else get_activation(epilogue)
    if activation is not None and activation.gated and n % 2:
        raise ValueError(f"N={n} of {rhs.shape=} must be even with a gated epilogue: gate rows, then up rows")
    call = Call(
        lhs=lhs,
        rhs=rhs,
        group_sizes=group_sizes,
        metadata=metadata or make_group_metadata(group_sizes),
        out_dtype=result_dtype(lhs, out_dtype),
        activation_format=activation_format_for(lhs, activation_format),
        out_format=None if out_format is None else get_format(out_format, role="activation"),
        bias=bias,
        epilogue=activation,
        group_offset=group_offset,
        config=config,
    )
    return dispatch(call, implementation)


def _check_groups(
    group_sizes: jax.Array, metadata: GroupMetadata | None, num_experts: int, group_offset: jax.Array | int | None
) -> None:
    if group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32 [groups], not {group_sizes.dtype} {group_sizes.shape}")
    num_groups = group_sizes.shape[0]
    if group_offset is None and num_groups != num_experts:
        raise ValueError(f"{num_groups} group_sizes for {num_experts} experts in rhs; give group_offset for a part")
    if num_groups < num_experts:
        raise ValueError(f"{num_groups} group_sizes for {num_experts} experts in rhs; every expert needs its group")
    if isinstance(group_offset, int | np.integer) and not 0 <= group_offset <= num_groups - num_experts:
        raise ValueError(f"{group_offset=} with {num_experts} experts in rhs leaves the {num_groups} groups")
    if metadata is not None and metadata.group_starts.shape != group_sizes.shape:
        raise ValueError(f"{metadata.group_starts.shape=} must be {group_sizes.shape=}: it belongs to other groups")
