"""The functions that turn one unit of source into a part of a finished leaf, compiled once per signature.

They write into preallocated, donated outputs. A kernel takes a whole part at once and needs nothing beside it. Through
XLA experts and chunks of rows are visited one after the other, so what lives in f32 is one chunk.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from pallas_kernels import Format, QuantizedArray, quantize
from pallas_kernels.bits import take, update
from pallas_kernels.devices import target_device
from pallas_kernels.quantize import kernel_for, matrix_amax, quantize_into

CHUNK_ELEMENTS = 2**21  # worked on at once: 8 MiB in f32
COPIES, PLAIN_COPIES = 4, 2  # of a chunk in f32 that a compiled program may hold: quantizing, copying
SMALL_TEMPORARIES = 2**16  # what it takes beside: sums, flags

AxisNames = tuple[tuple[str, ...], tuple[str, ...]]  # of a mesh, that shard N and K


def chunk_rows(shape: tuple[int, ...], fmt: Format | None) -> tuple[int, int]:
    """How much of a leaf `[rows, ..., N, K]` is worked on at once: rows of axis 0, rows of N (whole blocks).

    About `CHUNK_ELEMENTS`; one row of N is the least.
    """
    n, width = _rows_of_n(shape, fmt)
    row = math.prod(shape[1:])
    if fmt is None and row <= CHUNK_ELEMENTS:
        return max(1, min(math.prod(shape[:1]), CHUNK_ELEMENTS // max(row, 1))), n
    block = (fmt and fmt.block[0]) or 1
    return 1, min(n, max(1, CHUNK_ELEMENTS // (width * block)) * block)


def temporary_bytes(shape: tuple[int, ...], fmt: Format | None) -> int:
    """Memory of each device that a step may take beside source and output: at most 64 MiB up to K = 32768."""
    rows, n = chunk_rows(shape, fmt)
    copies = PLAIN_COPIES if fmt is None else COPIES
    return rows * n * _rows_of_n(shape, fmt)[1] * 4 * copies + SMALL_TEMPORARIES


def _rows_of_n(shape: tuple[int, ...], fmt: Format | None) -> tuple[int, int]:
    """N, and how many elements of one row of axis 0 share an index along it; below rank 3 all do, but for a matrix."""
    n = shape[-2] if len(shape) > 2 or fmt is not None else 1
    if fmt is None:
        return n, math.prod(shape[1:]) // max(n, 1)
    block = fmt.block[1] or 1
    return n, -(-shape[-1] // block) * block  # a ragged end is filled up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """What a unit's step finds out."""

    finite: Any  # bool [parts, rows]: whether all elements of a row of axis 0 are
    error: Any  # f32 [rows]: sum of squares of what quantization changed, per row of axis 0
    norm: Any  # f32 [rows]: sum of squares of the source


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartLayout:
    """How a part lies in memory."""

    permutation: tuple[int, ...]  # for each axis of the leaf (less S, for a half) the stored axis
    half: int | None
    child: str = ""  # of codes and scales that are stored: which

    @property
    def is_natural(self) -> bool:
        """Whether a part's axes come in the leaf's order."""
        return self.permutation == tuple(range(len(self.permutation)))

    def take(self, part: Array, starts: Sequence[Array | int], sizes: Sequence[int]) -> Array:
        """A region of a part, in the leaf's order of axes: so many elements from these starts on."""
        stored_starts, stored_sizes = [jnp.int32(0)] * part.ndim, [1] * part.ndim
        for axis, start, size in zip(self.permutation, starts, sizes, strict=True):
            stored_starts[axis], stored_sizes[axis] = jnp.asarray(start, jnp.int32), size
        block = take(part, tuple(stored_starts), tuple(stored_sizes))
        if self.is_natural:
            return block
        # Without the first XLA:GPU transposes a copy of the whole part, without the second XLA:CPU is 10 times slower.
        return row_major(jnp.transpose(row_major(block), self.permutation))


def row_major(x: Array) -> Array:
    """`x`, the last axis contiguous in memory."""
    constrained: Array = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return constrained


def quantize_step(
    fmt: Format, layouts: Sequence[PartLayout], *, axis_names: AxisNames = ((), ())
) -> Callable[..., tuple[QuantizedArray, Stats]]:
    """The step `(out, parts, start) -> (out, stats)` of a leaf `[E, (2,) N, K]` that is quantized as `fmt`.

    Inside `shard_map` all are those of one device; `axis_names` are the mesh axes that shard N and K.
    """
    spans_shards = any(spans and names for spans, names in zip(fmt.spans(), axis_names, strict=True))
    use_kernels = fmt.whole_matrix or not spans_shards  # which take a maximum over their own part only

    def visits(out: QuantizedArray, part: Array, layout: PartLayout, start: Array) -> Sequence[_Whole | _Half]:
        if use_kernels and layout.is_natural and kernel_for(out, part, layout.half) is not None:
            return [_Whole(part, layout.half, start)]
        halves = (layout.half,) if layout.half is not None or out.ndim == 3 else range(out.shape[1])
        return [_Half(part, layout, half, out.shape, fmt, start, axis_names) for half in halves]

    def step(out: QuantizedArray, parts: Sequence[Array], start: Array) -> tuple[QuantizedArray, Stats]:
        zeros = jnp.zeros((_rows(parts, layouts),), jnp.float32)
        by_part = [visits(out, part, layout, start) for part, layout in zip(parts, layouts, strict=True)]
        amax = None
        if fmt.whole_matrix:  # one scale for both halves: it has to be known before the first is quantized
            amax = zeros
            for each in itertools.chain(*by_part):
                amax = each.amax(amax)
            everywhere = tuple(name for names in axis_names for name in names)
            amax = lax.pmax(amax, everywhere) if everywhere else amax
        carry: Any = out, zeros, zeros
        finite = []
        for visited in by_part:
            is_finite = jnp.ones(zeros.shape, jnp.bool_)
            for each in visited:
                carry, found = each.quantize(carry, amax)
                is_finite &= found
            finite.append(is_finite)
        out, error, norm = carry
        return out, Stats(finite=jnp.stack(finite), error=error, norm=norm)

    return step


def matrix_step(
    fmt: Format, layouts: Sequence[PartLayout], *, axis_names: AxisNames = ((), ())
) -> Callable[..., tuple[QuantizedArray, Stats]]:
    """The step of a leaf `[N, K]`: that of one expert."""
    step = quantize_step(
        fmt,
        [PartLayout(permutation=(0, *(axis + 1 for axis in each.permutation)), half=None) for each in layouts],
        axis_names=axis_names,
    )

    def one(out: QuantizedArray, parts: Sequence[Array], start: Array) -> tuple[QuantizedArray, Stats]:
        found, stats = step(jax.tree.map(lambda x: x[None], out), [part[None] for part in parts], start)
        return jax.tree.map(lambda x: x.reshape(x.shape[1:]), found), stats

    return one


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A part that lies like the leaf, given to a kernel."""

    part: Array
    half: int | None
    start: Array

    def amax(self, so_far: Array) -> Array:
        """The largest magnitude of each expert, here or so far."""
        found = matrix_amax(self.part)
        return jnp.maximum(so_far, found if found.ndim == 1 else jnp.max(found, axis=1))

    def quantize(self, carry: Any, amax: Array | None) -> tuple[Any, Array]:
        """As `_Half.quantize`."""
        out, error, norm = carry
        out, loss = quantize_into(out, self.part, self.start, half=self.half, amax=amax)
        return (out, error + loss.error, norm + loss.norm), loss.finite


@dataclasses.dataclass(frozen=True)
class _Half:
    """The matrices `[N, K]` of all experts of a part, or of one half of it, visited chunk after chunk."""

    part: Array
    layout: PartLayout
    half: int | None
    shape: tuple[int, ...]  # of the finished leaf
    fmt: Format
    start: Array
    axis_names: AxisNames

    @property
    def lead(self) -> tuple[int, ...]:
        """Where the half lies in the leaf, between expert and N."""
        return () if self.half is None else (self.half,)

    def amax(self, so_far: Array) -> Array:
        """The largest magnitude of each expert, here or so far."""

        def chunk(amax: Array, x: Array, expert: Array, row: Array) -> Array:
            return amax.at[expert].max(matrix_amax(x))

        found: Array = self._for_chunks(chunk, so_far)
        return found

    def quantize(self, carry: Any, amax: Array | None) -> tuple[Any, Array]:
        """Writes codes and scales into `carry`: the leaf, squares of the error and of the source, by expert.

        Returns:
          The carry, and for each expert whether all of it was finite.
        """
        n, fmt = self.shape[-2], self.fmt

        def chunk(carry: Any, x: Array, expert: Array, row: Array) -> Any:
            (out, error, norm), finite = carry
            # The maximum of a whole matrix is known, that of a row only as far as this device has it.
            axis_names = ((), ()) if amax is not None else ((), self.axis_names[1])
            q = quantize(x, fmt, amax=None if amax is None else amax[expert], axis_names=axis_names)
            at: tuple[Array | int, ...] = (self.start + expert, *self.lead)
            values = update(out.values, q.values, (*at, row, 0))
            scales = update(out.scales, q.scales, (*at, 0, row // (fmt.block[0] or n)))
            second = None if q.global_scale is None else update(out.global_scale, q.global_scale, at)
            error = error.at[expert].add(jnp.sum(jnp.square(q.dequantize(jnp.float32) - x)))
            squares = jnp.sum(jnp.square(x))
            out = QuantizedArray(values=values, scales=scales, global_scale=second, format=fmt)
            # Each element is looked at only where the sum, which is needed anyway, tells that it may be worth it.
            is_finite = lax.cond(jnp.isfinite(squares), lambda: jnp.bool_(True), lambda: _is_finite(x))
            return (out, error, norm.at[expert].add(squares)), finite.at[expert].min(is_finite)

        result: tuple[Any, Array] = self._for_chunks(chunk, (carry, jnp.ones(carry[1].shape, jnp.bool_)))
        return result

    def _for_chunks(self, body: Callable[[Any, Array, Array, Array], Any], carry: Any) -> Any:
        """`carry = body(carry, x, expert, row)` with `x` `[rows, K]` in f32, the rows from `row` on of an expert."""
        n, k = self.shape[-2:]
        in_part = self.lead if self.layout.half is None else ()

        def chunk(expert: Array, row: Array, rows: int, carry: Any) -> Any:
            sizes = (1, *(1 for _ in in_part), rows, k)
            # XLA would do what does not depend on the loop before it, for all loops at once: where a part is one chunk.
            part, first = lax.optimization_barrier((self.part, expert))
            x = self.layout.take(part, (first, *in_part, row, 0), sizes)
            return body(carry, x.reshape(rows, k).astype(jnp.float32), expert, row)

        def one_expert(expert: Array, _: int, carry: Any) -> Any:
            rows = chunk_rows(self.shape, self.fmt)[1]
            return _for_chunks(n, rows, self.start, lambda *args: chunk(expert, *args), carry)

        return _for_chunks(self.part.shape[self.layout.permutation[0]], 1, self.start, one_expert, carry)


def copy_step(stored: jax.ShapeDtypeStruct, layouts: Sequence[PartLayout]) -> Callable[..., tuple[Array, Stats]]:
    """The step `(out, parts, start) -> (out, stats)` of a leaf that is stored as it is declared."""
    per_chunk, n_per_chunk = chunk_rows(stored.shape, None)
    # XLA:CPU would take a copy of the leaf, and copies small floats as such slowly (`bits.update`).
    in_place = target_device().platform != "cpu"

    def copy_part(out: Array, part: Array, layout: PartLayout, start: Array) -> tuple[Array, Array]:
        lead = () if layout.half is None else (layout.half,)
        size, *rest = (part.shape[axis] for axis in layout.permutation)
        *inner, n = rest[:-1] or (1,)
        if in_place and layout.is_natural and part.dtype == out.dtype:
            starts = [jnp.asarray(x, jnp.int32) for x in (start, *lead, *(0 for _ in rest))]
            written = lax.dynamic_update_slice(out, part[:, None] if lead else part, starts)
            return written, _is_finite(part, axes=range(1, part.ndim))

        def chunk(first: Array, rows: int, row: Array, n_rows: int, carry: Any) -> Any:
            out, finite = carry
            at: tuple[Array | int, ...] = (*(0 for _ in inner), row, 0)
            sizes = (*inner, n_rows, *rest[-1:])
            at, sizes = at[len(at) - len(rest) :], sizes[len(sizes) - len(rest) :]  # below rank 3 there is no N
            x = layout.take(part, (first, *at), (rows, *sizes)).astype(out.dtype)
            out = update(out, x[:, None] if lead else x, (start + first, *lead, *at))
            found = lax.dynamic_slice(finite, (first,), (rows,)) & _is_finite(x, axes=range(1, x.ndim))
            return out, lax.dynamic_update_slice(finite, found, (first,))

        def some_rows(first: Array, rows: int, carry: Any) -> Any:
            return _for_chunks(n, n_per_chunk, start, lambda *args: chunk(first, rows, *args), carry)

        result: tuple[Array, Array] = _for_chunks(
            size, min(per_chunk, size), start, some_rows, (out, jnp.ones((size,), jnp.bool_))
        )
        return result

    def step(out: Array, parts: Sequence[Array], start: Array) -> tuple[Array, Stats]:
        zeros = jnp.zeros((_rows(parts, layouts),), jnp.float32)
        finite = []
        for part, layout in zip(parts, layouts, strict=True):
            if part.size == 0:
                finite.append(jnp.ones(zeros.shape, jnp.bool_))
            elif part.ndim == 0:
                out = part.astype(out.dtype)
                finite.append(_is_finite(out).reshape(1))
            else:
                out, is_finite = copy_part(out, part, layout, start)
                finite.append(is_finite)
        return out, Stats(finite=jnp.stack(finite), error=zeros, norm=zeros)

    return step


def _for_chunks(total: int, size: int, start: Array, body: Callable[[Array, int, Any], Any], carry: Any) -> Any:
    """`carry = body(first, size, carry)` for chunk after chunk of `[0, total)`; the last may be smaller.

    XLA inlines a loop that it knows to take one step, and would then work on several chunks at once. So it must not
    know: `start`, an argument of the compiled step, is never negative.
    """
    whole, rest = divmod(total, size)

    def loop(first: int, count: int, size: int, carry: Any) -> Any:
        steps = count + jnp.minimum(start, 0) if count == 1 else count
        return lax.fori_loop(0, steps, lambda i, carry: body(first + i * size, size, carry), carry)

    carry = loop(0, whole, size, carry) if whole else carry
    return loop(whole * size, 1, rest, carry) if rest else carry


def _is_finite(x: Array, axes: Sequence[int] | None = None) -> Array:
    """Whether no element along these axes (all) is NaN or infinite. A maximum would not do: XLA:CPU's drops NaN."""
    axes = range(x.ndim) if axes is None else axes
    return jnp.all(jnp.isfinite(x), axis=tuple(axes))


def _rows(parts: Sequence[Array], layouts: Sequence[PartLayout]) -> int:
    return parts[0].shape[layouts[0].permutation[0]] if parts[0].ndim else 1
