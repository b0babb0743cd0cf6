"""What the machine can do, measured in the same run: no call is faster than its bytes or its operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16

from pallas_kernels.bench.timing import device_times

COPY_BYTES = 1 << 30  # read, and as many written
SQUARE = 8192  # M, N and K of the matmul that gives the rate

# Rate of fp8 (and int8) over bf16 MMA, where XLA has no dense fp8 matmul to measure: torch's `_scaled_mm` and matmul of
# 8192^3 on one cool H200, in TF; the machine of docs/bench/opponents_h200.json.
EIGHT_BIT_SPEED = 1457 / 792


class Work(Protocol):
    """What a call has to do."""

    @property
    def min_bytes(self) -> int:
        """What has to go through device memory."""
        ...

    @property
    def flops(self) -> int:
        """Floating-point operations that the result needs; 0 where they do not count."""
        ...


class Floors(NamedTuple):
    """Rates of the device."""

    copy_bytes_per_s: float  # read plus written
    matmul_flops_per_s: float  # dense bf16, XLA

    def roofline_us(self, work: Work, *, speed: float = 1.0) -> float:
        """The longer of the time for its bytes and the time for its operations, `speed` times as fast as dense bf16."""
        return 1e6 * max(work.min_bytes / self.copy_bytes_per_s, work.flops / (speed * self.matmul_flops_per_s))


def measure_floors() -> Floors:
    """Measures them; raises what the device's profiler raises."""
    x = jax.random.normal(jax.random.key(0), (COPY_BYTES // 4,), jnp.float32)
    copy_us = _median_us(jax.jit(jnp.negative), x)
    del x
    return Floors(2 * COPY_BYTES / (1e-6 * copy_us), 2 * SQUARE**3 / (1e-6 * dense_us(SQUARE, SQUARE, SQUARE)))


@functools.cache
def dense_us(m: int, n: int, k: int) -> float:
    """XLA's time for one dense bf16 matmul `[M, K] x [N, K]`: the rows of a case, if they had one expert."""
    keys = jax.random.split(jax.random.key(1))
    x, w = (jax.random.normal(key, (rows, k), jnp.bfloat16) for key, rows in zip(keys, (m, n), strict=True))
    return _median_us(jax.jit(_dense), x, w)


def _dense(x: BFloat16[Array, "M K"], w: BFloat16[Array, "N K"]) -> BFloat16[Array, "M N"]:
    return jnp.matmul(x, w.T, preferred_element_type=jnp.bfloat16)


def _median_us(call: Callable[..., Any], *arguments: jax.Array) -> float:
    jax.block_until_ready(call(*arguments))
    times = device_times({"": lambda _: call(*arguments)})[""]
    if isinstance(times, Exception):
        raise times
    return times.us
