"""The routed experts in three steps: prepare (sort and gather once), two grouped matmuls, finalize (one combine).

They are functions of their own so that parallel code can send rows between devices in between, as vLLM's prepare and
finalize do (vllm/model_executor/layers/fused_moe/modular_kernel.py).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.activations import Activation, get_activation
from pallas_kernels.bits import rounded
from pallas_kernels.formats import Format, QuantizedArray, get_format
from pallas_kernels.fused_moe import experts
from pallas_kernels.fused_moe.checks import check_config, check_experts, check_routing
from pallas_kernels.fused_moe.config import FusedMoeConfig
from pallas_kernels.fused_moe.experts import ExpertsCall
from pallas_kernels.fused_moe.prepare_call import sort_and_send
from pallas_kernels.fused_moe.rows import combine, take_tokens
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.product import no_gradient
from pallas_kernels.implementations import Implementation
from pallas_kernels.quantize.tokens import quantize_tokens, send_tokens
from pallas_kernels.routing import ExpertOrder, GroupMetadata, sort_by_expert
from pallas_kernels.routing.groups import ids_here

if TYPE_CHECKING:
    Leaf = jax.Array
    Rows = jax.Array | QuantizedArray
else:
    Leaf = Rows = Any  # jax.tree.map may put a ShapeDtypeStruct, a sharding or a spec here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokens on their way to the experts: the rows of all (token, slot) pairs, sorted by expert."""

    rows: Rows  # [T * top_k, H], quantized or not
    order: ExpertOrder
    weights: Leaf  # f32 [T, top_k], of the outputs
    dtype: np.dtype[Any] = dataclasses.field(metadata={"static": True})  # of the tokens
    # What the rows were quantized to, and the experts' hidden values are.
    activation_format: Format | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(default=None, metadata={"static": True})  # that made them


def prepare(
    x: Float[Array, "T H"],
    topk_weights: Float[Array, "T top_k"],
    topk_ids: Int32[Array, "T top_k"],
    num_experts: int,
    *,
    activation_format: Format | str | None = None,
    expert_map: Int32[Array, " global_E"] | None = None,
    apply_router_weight_on_input: bool = False,
    implementation: Implementation | None = None,
) -> Prepared:
    """Sorts the (token, slot) pairs by expert and gathers their rows, each token quantized once.

    Args:
      x: bf16, f16 or f32 `[T, H]`.
      topk_weights: `[T, top_k]`.
      topk_ids: int32 `[T, top_k]`; an id outside of `[0, num_experts)` has no expert.
      num_experts: E, experts here.
      activation_format: Quantizes the rows, and later the hidden values. The steps have no gradient then; that of
        `fused_moe` passes straight through.
      expert_map: int32 `[global_E]`, the place here of each global id, or -1; `topk_ids` are global ids then.
      apply_router_weight_on_input: Multiplies `x` (rounded to its dtype) here, and nothing at the end; top_k must be 1.
      implementation: `"xla"` for no kernel, here and in `finalize`; of any other choice the rows are the same bits.

    Raises:
      TypeError: a dtype that is none of those above.
      ValueError: shapes that do not fit, an unknown format, router weights on the input with top_k > 1.
    """
    check_routing(x, topk_weights, topk_ids, expert_map, apply_router_weight_on_input)
    fmt = None if activation_format is None else get_format(activation_format, role="activation")
    weights = topk_weights.astype(jnp.float32)
    if apply_router_weight_on_input:
        x = rounded(x.astype(jnp.float32) * weights, x.dtype)
        weights = jnp.ones_like(weights)
    ids = ids_here(topk_ids, expert_map)
    x = _zero_padding(x, ids, num_experts, fmt)
    sent = sort_and_send(x, ids, num_experts, fmt, implementation)
    if sent is None:
        order = sort_by_expert(topk_ids, num_experts, expert_map=expert_map, implementation=implementation)
        sent = _gather(x, order, fmt, implementation), order
    rows, order = sent
    return Prepared(
        rows=rows,
        order=order,
        weights=weights,
        dtype=np.dtype(x.dtype),
        activation_format=fmt,
        implementation=implementation,
    )


def prepare_all(
    x: Float[Array, "T H"], activation_format: Format | None, implementation: Implementation | None
) -> Prepared:
    """All tokens on their way to one expert, in the order in which they are."""
    index = jnp.arange(x.shape[0], dtype=jnp.int32)
    sizes = jnp.full((1,), x.shape[0], jnp.int32)
    order = ExpertOrder(
        tokens=index,
        rows=index[:, None],
        routed=jnp.ones((x.shape[0], 1), jnp.bool_),
        group_sizes=sizes,
        metadata=GroupMetadata(group_starts=jnp.zeros_like(sizes)),
    )
    rows: Rows = x
    if activation_format is not None:
        rows = quantize_tokens(no_gradient(x), activation_format, implementation)
    weights = jnp.ones((x.shape[0], 1), jnp.float32)
    dtype = np.dtype(x.dtype)
    return Prepared(
        rows=rows,
        order=order,
        weights=weights,
        dtype=dtype,
        activation_format=activation_format,
        implementation=implementation,
    )


def run_experts(
    prepared: Prepared,
    w13: Float[Array, "E S I H"] | Float[Array, "E N H"] | QuantizedArray,
    w2: Float[Array, "E H I"] | QuantizedArray,
    *,
    activation: Activation | str = "silu",
    w13_bias: jax.Array | None = None,
    w2_bias: jax.Array | None = None,
    implementation: Implementation | None = None,
    config: FusedMoeConfig | None = None,
) -> Float[Array, "M H"]:
    """The output of each row's expert, `[T * top_k, H]`; zero in rows of none. Arguments as of `fused_moe`.

    In f32, but by Hopper's kernels in the dtype of the tokens.

    Raises:
      TypeError: a dtype that does not serve, a config that is no `FusedMoeConfig`.
      ValueError: shapes that do not fit, other experts than the rows were sorted for, an unknown activation,
        a config of a matmul that XLA serves.
      UnsupportedError: the named implementation cannot serve, or not with this config.
    """
    activation = get_activation(activation)
    check_config(config)
    check_experts(prepared.rows.shape[1], w13, w2, activation, w13_bias, w2_bias)
    num_experts = prepared.order.group_sizes.shape[0]
    if w2.shape[0] != num_experts:
        raise ValueError(f"{w2.shape=} has {w2.shape[0]} experts, and the rows were prepared for {num_experts}")
    config = config or FusedMoeConfig()
    first = first_call(prepared, w13, w13_bias, activation, prepared.activation_format)
    first = dataclasses.replace(first, config=config.w13)
    call = ExpertsCall(first=first, w2=w2, bias=w2_bias, dtype=prepared.dtype, config=config.w2)
    return experts.run(call, implementation)


def finalize(
    outputs: Float[Array, "M H"], prepared: Prepared, *, dtype: DTypeLike | None = None
) -> Float[Array, "T H"]:
    """The weighted sum of each token's outputs, in f32 and in the order of the slots; rounded once.

    By a kernel on Hopper, unless `prepare` was told otherwise.

    Args:
      outputs: `[T * top_k, H]`, in the order of `prepared.rows`.
      prepared: Says which row is whose.
      dtype: Of the result. Default: that of the tokens.

    Raises:
      ValueError: outputs of more or fewer rows.
    """
    if outputs.ndim != 2 or outputs.shape[0] != prepared.rows.shape[0]:
        raise ValueError(f"{outputs.shape=} must be [T * top_k, H] with the {prepared.rows.shape[0]} rows prepared")
    dtype = prepared.dtype if dtype is None else np.dtype(dtype)
    return combine(outputs, prepared.weights, prepared.order, dtype, prepared.implementation)


def _gather(x: jax.Array, order: ExpertOrder, fmt: Format | None, implementation: Implementation | None) -> Rows:
    """The rows of all pairs, each token quantized once however many experts it has."""
    if fmt is None:
        return take_tokens(x, order, implementation)
    return send_tokens(no_gradient(x), order, fmt, implementation)


def _zero_padding(x: jax.Array, ids: jax.Array, num_experts: int, fmt: Format | None) -> jax.Array:
    """`x`; zero in tokens of no expert where a scale spans them all: their magnitude has no say."""
    if fmt is None or not fmt.whole_matrix:
        return x
    routed = (ids >= 0) & (ids < num_experts)
    return jnp.where(jnp.any(routed, axis=1, keepdims=True), x, jnp.zeros_like(x))


def first_call(
    prepared: Prepared, w13: Rows, bias: jax.Array | None, activation: Activation, out_format: Format | None
) -> Call:
    """The first matmul, its activation included."""
    return Call(
        lhs=prepared.rows,
        rhs=w13,
        group_sizes=prepared.order.group_sizes,
        metadata=prepared.order.metadata,
        bias=bias,
        epilogue=activation,
        out_dtype=prepared.dtype,
        out_format=out_format,
    )
