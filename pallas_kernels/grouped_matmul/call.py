"""One validated call of `grouped_matmul`: what every implementation gets, and what it decides by."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import Activation
from pallas_kernels.devices import target_device
from pallas_kernels.formats import Format, QuantizedArray
from pallas_kernels.grouped_matmul import gradient, reference
from pallas_kernels.grouped_matmul.product import no_gradient, no_second_gradient
from pallas_kernels.implementations import Implementation, Kernel, choose
from pallas_kernels.routing import GroupMetadata

KERNELS: dict[Implementation, str] = {
    "mosaic_gpu": "pallas_kernels.grouped_matmul.mosaic_gpu",
    "mosaic_tpu": "pallas_kernels.grouped_matmul.mosaic_tpu",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of `pallas_kernels.grouped_matmul`, names resolved and defaults filled in."""

    lhs: jax.Array | QuantizedArray  # [M, K]
    rhs: jax.Array | QuantizedArray  # [E, N, K], or [E, 2, I, K] with gate and up apart
    group_sizes: jax.Array  # [groups] int32
    metadata: GroupMetadata
    out_dtype: np.dtype[Any] = dataclasses.field(metadata={"static": True})
    activation_format: Format | None = dataclasses.field(default=None, metadata={"static": True})
    out_format: Format | None = dataclasses.field(default=None, metadata={"static": True})
    bias: jax.Array | None = None  # [E, N], or as `rhs` less K
    epilogue: Activation | None = dataclasses.field(default=None, metadata={"static": True})
    group_offset: jax.Array | int | None = None
    config: Any = dataclasses.field(default=None, metadata={"static": True})  # of the kernel's own type

    @property
    def gated(self) -> bool:
        """Whether the rows of an expert are gate rows and then up rows, of which the epilogue makes half as many."""
        return self.epilogue is not None and self.epilogue.gated

    @property
    def arguments(self) -> dict[str, Any]:
        """All fields, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def dispatch(call: Call, implementation: Implementation | None) -> jax.Array | QuantizedArray:
    """Serves a call by the kernel that `implementation` names, or the best one, or XLA.

    It is differentiable by real `lhs`, `rhs` and `bias` where the result is real; else differentiating is an error.
    """
    kernel = choose("grouped_matmul", implementation, KERNELS, call)
    if kernel is None and call.config is not None:
        raise ValueError(
            f"config={call.config} is for a kernel, and XLA serves this call; leave it out or name implementation="
        )
    call = jax.tree.map(jnp.asarray, call)
    if call.out_format is not None or isinstance(call.lhs, QuantizedArray):
        return _serve(kernel, jax.tree.map(no_gradient, call))
    if isinstance(call.rhs, QuantizedArray):
        call = dataclasses.replace(call, rhs=jax.tree.map(no_gradient, call.rhs))
    return _differentiable((kernel, "xla" if implementation == "xla" else None), call)


def served_on_gpu(call: Call, implementation: Implementation | None) -> bool:
    """Whether `dispatch` would take the kernel for GPUs."""
    kernel = choose("grouped_matmul", implementation, KERNELS, call, warn=False)
    return kernel is not None and target_device().platform == "gpu"


def _serve(kernel: Kernel | None, call: Call) -> jax.Array | QuantizedArray:
    if kernel is not None:
        out: jax.Array | QuantizedArray = kernel.run(call)
        return out
    arguments = call.arguments
    del arguments["config"]
    return reference.grouped_matmul(**arguments)


Served = tuple[Kernel | None, Implementation | None]  # by which kernel, and what to name for the gradient's matmuls


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(served: Served, call: Call) -> jax.Array:
    out = _serve(served[0], call)
    assert isinstance(out, jax.Array)  # the call has no out_format
    return out


def _forward(served: Served, call: Call) -> tuple[jax.Array, Call]:
    return _differentiable(served, call), call


def _backward(served: Served, call: Call, by_out: jax.Array) -> tuple[Call]:
    _, implementation = served
    call, by_out = jax.tree.map(no_second_gradient, (call, by_out))
    lhs, rhs, bias = call.lhs, call.rhs, call.bias
    assert isinstance(lhs, jax.Array)
    groups: dict[str, Any] = {"metadata": call.metadata, "group_offset": call.group_offset}
    sums = by_out
    if call.epilogue is not None:  # computed again rather than kept
        before = dispatch(dataclasses.replace(call, epilogue=None, config=None), implementation)
        assert isinstance(before, jax.Array)
        sums = before
    by_sums = gradient.before_epilogue(call.epilogue, sums, by_out)
    by_rows = by_sums.astype(lhs.dtype)
    by_rhs: Any = None  # no gradient
    by_bias: Any = None
    if not isinstance(rhs, QuantizedArray):
        seen = lhs
        if call.activation_format is not None:
            seen = reference.quantize_rows(lhs, call.activation_format, call.group_sizes).dequantize(lhs.dtype)
        by_rhs = gradient.by_weights(
            seen, by_rows, call.group_sizes, num_experts=rhs.shape[0], out_dtype=rhs.dtype, **groups
        ).reshape(rhs.shape)
    if bias is not None:
        by_bias = gradient.by_bias(by_sums, bias, group_sizes=call.group_sizes, **groups)
    by_lhs = _times_transposed(call, by_rows, implementation)
    return (dataclasses.replace(call, lhs=by_lhs, rhs=by_rhs, bias=by_bias, **_INTEGERS),)


_INTEGERS: dict[str, Any] = {"group_sizes": None, "metadata": None, "group_offset": None}  # they have no gradient
_differentiable.defvjp(_forward, _backward)


def _times_transposed(call: Call, rows: jax.Array, implementation: Implementation | None) -> jax.Array:
    """`rows [M, N]` times the expert of each, `[N, K]`: by a kernel on transposed weights where one can serve."""
    rhs = call.rhs
    if isinstance(rhs, jax.Array):

        def transposed(rhs: jax.Array) -> jax.Array:
            return jnp.swapaxes(rhs.reshape(rhs.shape[0], -1, rhs.shape[-1]), 1, 2)

        again = dataclasses.replace(
            call,
            lhs=rows,
            rhs=jax.eval_shape(transposed, rhs),
            out_dtype=np.dtype(rows.dtype),
            activation_format=None,
            bias=None,
            epilogue=None,
            config=None,
        )
        kernel = choose("grouped_matmul", implementation, KERNELS, again)
        if kernel is not None:
            out: jax.Array = kernel.run(dataclasses.replace(again, rhs=transposed(rhs)))
            return out
    return gradient.times_transposed(
        rows, rhs, call.group_sizes, metadata=call.metadata, group_offset=call.group_offset
    )
