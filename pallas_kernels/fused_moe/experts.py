"""Both matmuls of the experts: by one kernel where there is one, or else each by the best there is for it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import QuantizedArray
from pallas_kernels.grouped_matmul.call import Call, dispatch, served_on_gpu
from pallas_kernels.grouped_matmul.product import no_gradient
from pallas_kernels.implementations import Implementation, Kernel, choose
from pallas_kernels.quantize import reference

if TYPE_CHECKING:
    Leaf = jax.Array
    Rows = jax.Array | QuantizedArray
else:
    Leaf = Rows = Any  # jax.tree.map may put something else here

KERNELS: dict[Implementation, str] = {"mosaic_gpu": "pallas_kernels.grouped_matmul.mosaic_gpu.both"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """What a kernel gets."""

    first: Call  # the matmul of w13, with its activation
    w2: Rows  # [E, H, I]
    bias: Leaf | None  # [E, H]
    dtype: np.dtype[Any] = dataclasses.field(metadata={"static": True})  # of tokens
    config: Any = dataclasses.field(default=None, metadata={"static": True})  # of the second matmul

    def second(self, hidden: Rows, implementation: Implementation | None = None) -> Call:
        """The matmul of w2, over the first one's results.

        Its outputs are in f32, or by Hopper's kernel, which is bound by these bytes, in the dtype of tokens.
        """
        call = Call(
            lhs=hidden,
            rhs=self.w2,
            group_sizes=self.first.group_sizes,
            metadata=self.first.metadata,
            bias=self.bias,
            out_dtype=np.dtype(np.float32),
            config=self.config,
        )
        return dataclasses.replace(call, out_dtype=self.dtype) if served_on_gpu(call, implementation) else call

    @property
    def hidden(self) -> Any:
        """The shapes of the first matmul's results."""
        first, fmt = self.first, self.first.out_format
        shape = first.lhs.shape[0], math.prod(first.rhs.shape[1:-1]) // (2 if first.gated else 1)
        if fmt is None:
            return jax.ShapeDtypeStruct(shape, first.out_dtype)
        return jax.eval_shape(lambda: reference.quantize(jnp.zeros(shape, jnp.float32), fmt))


def run(call: ExpertsCall, implementation: Implementation | None) -> jax.Array:
    """The outputs of all rows, `[M, H]`; differentiable by all that is real."""
    kernel = None
    if implementation in (None, *KERNELS):
        kernel = choose("experts", None, KERNELS, call, warn=False)
    if kernel is None:
        return in_turn(call, implementation)
    if isinstance(call.first.lhs, QuantizedArray):
        call = jax.tree.map(no_gradient, call)
    return _differentiable((kernel, implementation), call)


def in_turn(call: ExpertsCall, implementation: Implementation | None) -> jax.Array:
    """One matmul after the other."""
    out = dispatch(call.second(dispatch(call.first, implementation), implementation), implementation)
    assert isinstance(out, jax.Array)  # the second one has no out_format
    return out


Served = tuple[Kernel, Implementation | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(served: Served, call: ExpertsCall) -> jax.Array:
    out: jax.Array = served[0].run(call)
    return out


def _forward(served: Served, call: ExpertsCall) -> tuple[jax.Array, ExpertsCall]:
    return _differentiable(served, call), call


def _backward(served: Served, call: ExpertsCall, by_out: jax.Array) -> tuple[ExpertsCall]:
    """That of one matmul after the other, computed again."""
    leaves, structure = jax.tree.flatten(call)
    real = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def again(values: list[jax.Array]) -> jax.Array:
        known = dict(zip(real, values, strict=True))
        return in_turn(jax.tree.unflatten(structure, [known.get(i, leaf) for i, leaf in enumerate(leaves)]), served[1])

    (gradients,) = jax.vjp(again, [leaves[i] for i in real])[1](by_out)
    found = dict(zip(real, gradients, strict=True))
    return (jax.tree.unflatten(structure, [found.get(i) for i in range(len(leaves))]),)


_differentiable.defvjp(_forward, _backward)
