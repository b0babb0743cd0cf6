"""Device time of one call, with a cold L2 cache.

Two measures. `device_times`: the time of each kernel that a call launches, from CUPTI, without the gaps between them;
before each call a read of 256 MB evicts what was there (a read, since a write would leave lines that the timed call has
to write back). `loop_us`: many calls inside one program over weights that rotate, gaps between kernels included.
What jax's own `profiler.measure` times is warm, since it runs the same call just before.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.bench.problem import Call, Inputs

FLUSH_BYTES = 256 << 20
REPETITIONS = 30
FEW, FEW_US = 5, 2e6  # a slow call is repeated less: this often, or until it has taken this long
LOOP_US, MAX_ITERATIONS, LOOP_RUNS = 40e3, 2000, 3
MAX_LISTED = 64  # kernels of a call; one that launches more is not described by listing them

Run = Callable[[int], Any]  # runs a call, on the weights of this turn, and returns its result


class Times(NamedTuple):
    """Microseconds of one call: all its kernels, and the longest of them."""

    us: float  # median
    us_p10: float
    us_p90: float
    us_kernel: float
    kernel: str
    num_kernels: int
    repetitions: int
    kernels: tuple[tuple[str, float], ...]  # of the middle call, in order: name and time


class Kernels(NamedTuple):
    """What one call launched."""

    names: tuple[str, ...]
    durations_us: tuple[float, ...]


def device_times(runs: Mapping[str, Run], repetitions: int = REPETITIONS) -> dict[str, Times | Exception]:
    """Times several calls in turn, so that heat and clocks are the same for all; of each, its times or what it raised.

    Everything in `runs` has run once before.
    """
    samples: dict[str, list[Kernels]] = {name: [] for name in runs}
    failures: dict[str, Exception] = {}
    try:
        flush, record = l2_flush(), kernel_recorder()
    except Exception as error:  # there is no CUPTI, or no memory for the flush
        return dict.fromkeys(runs, error)
    for turn in range(repetitions):
        for name, run in runs.items():
            taken = samples[name]
            if name in failures or (len(taken) >= FEW and _total_us(taken) > FEW_US):
                continue
            try:
                flush()
                taken.append(record(functools.partial(run, turn)))
            except Exception as error:  # of one kernel or peer: the others go on
                failures[name] = error
    return {name: failures.get(name) or summary(samples[name]) for name in runs}


def summary(samples: Sequence[Kernels]) -> Times:
    """Percentiles over calls; the longest kernel is the one that takes most in the middle call."""
    totals = [sum(sample.durations_us) for sample in samples]
    p10, median, p90 = np.percentile(totals, [10, 50, 90]).tolist()
    middle = samples[int(np.argsort(totals)[len(totals) // 2])]
    kernel = middle.names[int(np.argmax(middle.durations_us))]
    own = [sum(us for name, us in zip(*sample, strict=True) if name == kernel) for sample in samples]
    listed = tuple(zip(*middle, strict=True))[:MAX_LISTED]
    return Times(median, p10, p90, statistics.median(own), kernel, len(middle.names), len(samples), listed)


def kernel_recorder() -> Callable[[Callable[[], Any]], Kernels]:
    """A function that runs a call and tells what it launched.

    It uses the functions below jax's `profiler.Cupti`, which keep CUPTI attached from call to call.
    """
    cupti: Any = importlib.import_module("jax._src.lib.mosaic_gpu")._mosaic_gpu_ext

    def record(run: Callable[[], Any]) -> Kernels:
        cupti._cupti_init()
        try:
            jax.block_until_ready(run())
        finally:
            timings = cupti._cupti_get_timings(False)
        if not timings:
            raise RuntimeError("CUPTI saw no kernel")
        names, durations_ms = zip(*timings, strict=True)
        return Kernels(names, tuple(1e3 * ms for ms in durations_ms))

    return record


@functools.cache
def l2_flush() -> Callable[[], None]:
    """A function that reads enough to evict everything from the L2 cache."""
    buffer = jnp.ones(FLUSH_BYTES // 4, jnp.float32)
    read = jax.jit(jnp.sum).lower(buffer).compile()

    def flush() -> None:
        read(buffer).block_until_ready()

    return flush


def loop_us(call: Call, inputs: Inputs, *, expected_us: float) -> float:
    """Time per call inside one program that does nothing else, by the host's clock.

    Args:
      call: Traceable.
      inputs: Its weights are used in turn.
      expected_us: About what a call takes, to choose how many there are.
    """
    num_weights = len(inputs.weights)
    iterations = int(np.clip(LOOP_US / expected_us / num_weights, 2, MAX_ITERATIONS))
    arguments = (inputs.x, inputs.weights, inputs.integers, jnp.zeros(num_weights + 1, jnp.int32))
    compiled = jax.jit(loop_program(call, iterations)).lower(*arguments).compile()
    return wall_us(lambda _: compiled(*arguments), repetitions=LOOP_RUNS) / (iterations * num_weights)


def loop_program(call: Call, iterations: int) -> Callable[..., Sequence[jax.Array]]:
    """`iterations` times the call on each of the weights; the last argument is zeros that XLA does not know to be zero.

    They keep it from hoisting a call out of the loop, and, with each call waiting for the one before it, from sharing
    between two what depends on the integers alone, or, behind a barrier, on `x` alone.
    """

    def loop(x: Any, weights: Sequence[Any], integers: jax.Array, zeros: jax.Array) -> Sequence[jax.Array]:
        def body(_: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            zero, outs = carry[0], list[jax.Array]()
            for i, w in enumerate(weights):
                shift = zero + zeros[i]
                if outs:
                    shift = shift * (outs[-1][0, 0] > 0).astype(jnp.int32)
                same_x, shift = lax.optimization_barrier((x, shift))
                outs.append(call(same_x, w, integers + shift))
            return zero + zeros[-1], tuple(outs)

        out = jax.eval_shape(call, x, weights[0], integers)
        start = zeros[0], tuple(jnp.zeros(out.shape, out.dtype) for _ in weights)
        outs: Sequence[jax.Array] = lax.fori_loop(0, iterations, body, start)[1]
        return outs

    return loop


def wall_us(run: Run, repetitions: int = REPETITIONS) -> float:
    """Median time by the host's clock, until the result is there. Not device time."""
    jax.block_until_ready(run(0))
    taken = []
    for turn in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run(turn))
        taken.append(1e6 * (time.perf_counter() - start))
    return statistics.median(taken)


def _total_us(samples: Sequence[Kernels]) -> float:
    return sum(sum(sample.durations_us) for sample in samples)
