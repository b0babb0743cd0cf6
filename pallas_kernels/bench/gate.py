"""Correctness before speed: nothing is timed whose result is not right.

The reference shares no code with the package: f32 products at the highest precision, tile by tile, planned in numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.bench.problem import Problem

TILE = 128  # rows of one expert that are multiplied together


class Limits(NamedTuple):
    """Relative L2 errors that a right result stays below."""

    batch: float
    worst_row: float


OF_A_MATMUL = Limits(2.5e-3, 4e-3)  # rounding the output to bf16 costs 1.7e-3 and 2.0e-3


class WrongResult(Exception):
    """The result is not the reference, or the check could not have told."""


class Errors(NamedTuple):
    """Relative L2 errors; NaN where the result has any."""

    batch: float
    worst_row: float

    def complaint(self, limits: Limits = OF_A_MATMUL) -> str | None:
        """What is wrong, or None."""
        if self.batch <= limits.batch and self.worst_row <= limits.worst_row:
            return None
        return (
            f"relative L2 error {self.batch:.2e} of the batch and {self.worst_row:.2e} of the worst row; "
            f"at most {limits.batch:.1e} and {limits.worst_row:.1e} are right"
        )


def check(run: Callable[[int], jax.Array], expected: jax.Array, limits: Limits = OF_A_MATMUL) -> Errors:
    """Compares the first turn with `expected`, and makes sure that the experts of the second, rotated, are noticed.

    Raises:
      WrongResult: it is wrong, or the negative control passed.
    """
    errors = errors_of(run(0), expected)
    if (complaint := errors.complaint(limits)) is not None:
        raise WrongResult(complaint)
    if errors_of(run(1), expected).complaint(limits) is None:
        raise WrongResult("experts rotated by one give the same result, so the check proves nothing")
    return errors


def errors_of(out: Float[Array, "M N"], expected: Float[Array, "M N"]) -> Errors:
    """Of the whole and of the worst row; a row that should be zero and is not is infinitely wrong."""
    if out.shape != expected.shape:
        raise WrongResult(f"shape {out.shape}, expected {expected.shape}")
    return from_squares(*(np.asarray(part) for part in _squares(out, expected)))


def from_squares(error: np.ndarray[Any, Any], norm: np.ndarray[Any, Any]) -> Errors:
    """From the sums of squares of each row: of the difference, and of what is expected."""
    error, norm = error.astype(np.float64), norm.astype(np.float64)
    rows = np.divide(error, norm, out=np.where(error == 0, 0.0, np.inf), where=norm > 0)
    whole = float(error.sum() / norm.sum()) if norm.any() else float(rows.max(initial=0))
    return Errors(float(np.sqrt(whole)), float(np.sqrt(rows.max(initial=0))))


def reference(problem: Problem) -> Float[Array, "M N"]:
    """The result in f32; rows of no expert are zero."""
    experts, starts = plan(problem.case.group_sizes)
    used = np.int32(problem.case.m)
    out: jax.Array = _reference()(problem.x, problem.weights[0], experts, starts, used)
    return out


def jit_once(call: Callable[..., jax.Array]) -> Any:
    """`jax.jit` of what runs once: without autotuning on a GPU."""
    on_gpu = jax.default_backend() == "gpu"
    return jax.jit(call, compiler_options={"xla_gpu_autotune_level": 0} if on_gpu else None)


def plan(group_sizes: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Expert and first row of each tile, in order of rows. What a tile has past its group's end is overwritten."""
    ends = np.cumsum(group_sizes)
    tiles = [
        (expert, start)
        for expert, (size, end) in enumerate(zip(group_sizes, ends.tolist(), strict=True))
        for start in range(end - size, end, TILE)
    ]
    experts, starts = np.array(tiles, np.int32).reshape(-1, 2).T
    return experts, starts


@functools.cache
def _reference() -> Any:
    return jit_once(_multiply_tiles)


def _multiply_tiles(
    x: jax.Array, weights: jax.Array, experts: jax.Array, starts: jax.Array, used: jax.Array
) -> Float[Array, "M N"]:
    m, n = x.shape[0], weights.shape[1]
    padded = jnp.pad(x, ((0, TILE), (0, 0)))

    def tile(out: jax.Array, work: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        expert, start = work
        rows = lax.dynamic_slice_in_dim(padded, start, TILE).astype(jnp.float32)
        columns = lax.dynamic_index_in_dim(weights, expert, keepdims=False).astype(jnp.float32)
        product = jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(out, product, start, 0), None

    out, _ = lax.scan(tile, jnp.zeros((m + TILE, n), jnp.float32), (experts, starts))
    mine = lax.iota(jnp.int32, m)[:, None] < used
    return jnp.where(mine, out[:m], jnp.float32(0))


@jax.jit
def _squares(out: jax.Array, expected: jax.Array) -> tuple[jax.Array, jax.Array]:
    difference = out.astype(jnp.float32) - expected
    return jnp.sum(difference**2, axis=1), jnp.sum(expected**2, axis=1)
