"""Waits within one launch of two matmuls, which jax's interpreter of Hopper kernels passes over."""

import collections
import contextlib
import threading
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

TIMEOUT = 60  # seconds
changed = threading.Condition()
arrivals, waits = collections.Counter(), collections.Counter()  # by compiled launch and row tile


@contextlib.contextmanager
def real_waits():
    """Interpreted launches count finished row tiles and wait for them, on the host; fails if there was none.

    A compiled launch may run once inside. Yields how often each row tile was waited for.
    """
    from pallas_kernels.grouped_matmul.mosaic_gpu.progress import Progress
    from pallas_kernels.grouped_matmul.mosaic_gpu.sm90 import grouped_matmuls_sm90

    arrivals.clear()
    waits.clear()
    grouped_matmuls_sm90.clear_cache()  # what was traced outside waits for nothing
    with mock.patch.multiple(Progress, tell=_tell, wait=_wait):
        yield waits
        jax.effects_barrier()
    grouped_matmuls_sm90.clear_cache()
    assert arrivals, "no launch of two matmuls was interpreted"


def _tell(progress, tile):
    def add(number, zero):
        with changed:
            arrivals[id(progress), int(number)] += 1
            changed.notify_all()
        return zero

    _in_order(add, progress.counters_gmem, tile)


def _wait(progress, tile):
    def until(number, zero):
        place = id(progress), int(number)
        with changed:
            waits[place] += 1
            enough = changed.wait_for(lambda: arrivals[place] >= progress.arrivals, TIMEOUT)
        assert enough, f"row tile {place[1]} has {arrivals[place]} arrivals of {progress.arrivals}"
        return zero

    _in_order(until, progress.counters_gmem, tile)


def _in_order(function, counters_gmem, tile):
    """Calls it between what the thread does before and after: the interpreter keeps reads and writes in order."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    counters_gmem[tile] = io_callback(function, scalar, jnp.int32(tile), counters_gmem[tile])
