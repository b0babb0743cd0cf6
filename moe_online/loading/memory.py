"""How much memory a load really takes."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterable
from typing import Any

import jax
import psutil

BYTES_IN_USE, PEAK_BYTES_IN_USE = "bytes_in_use", "peak_bytes_in_use"  # of Device.memory_stats


class PeakMeter:
    """Peak memory since its creation, beyond what was there then.

    On devices that have an allocator's statistics these are taken; elsewhere (CPU) the bytes of all live arrays, to
    which `sample` adds what the compiled program running meanwhile takes.

    Args:
      devices: All devices that hold a part.
      collect: Whether to collect garbage first, in about a tenth of a second: what is freed later would hide as much of
        what is measured.
    """

    def __init__(self, devices: Iterable[jax.Device], *, collect: bool = True):
        self._devices = tuple(devices)
        self._has_stats = all(device.memory_stats() is not None for device in self._devices)
        self._process = psutil.Process()
        self._lock = threading.Lock()
        if collect:
            gc.collect()
        self._start = self._in_use()
        self._start_peak = self._allocator_peak()
        self._start_rss = self._process.memory_info().rss
        self._highest = self._start
        self._highest_rss = self._start_rss

    def sample(self, temporary_bytes: int = 0) -> None:
        """Notes how much is in use now, between programs; on a CPU the argument adds to that."""
        self._highest = max(self._highest, self._in_use() + temporary_bytes)
        self.sample_host()

    def sample_host(self) -> None:
        """Notes the process's memory alone; from any thread.

        Arrays on a CPU would count twice meanwhile: as arguments of the program that runs, and as its results.
        """
        rss = self._process.memory_info().rss
        with self._lock:
            self._highest_rss = max(self._highest_rss, rss)

    @property
    def device_bytes(self) -> int:
        """The peak on the devices."""
        peak = self._allocator_peak()
        # The allocator's peak is that of the whole process: it tells only where this load raised it.
        highest = peak if peak > self._start_peak else self._highest
        return highest - self._start

    @property
    def host_bytes(self) -> int:
        """The peak of the process's resident memory, as far as samples saw it."""
        growth: int = self._highest_rss - self._start_rss
        return growth

    def _in_use(self) -> int:
        if self._has_stats:
            return sum(self._stat(device, BYTES_IN_USE) for device in self._devices)
        return sum(bytes_on_devices(array) for array in jax.live_arrays(self._devices[0].platform))

    def _allocator_peak(self) -> int:
        return sum(self._stat(device, PEAK_BYTES_IN_USE) for device in self._devices)

    @staticmethod
    def _stat(device: jax.Device, key: str) -> int:
        return int((device.memory_stats() or {}).get(key, 0))


def bytes_on_devices(array: Any) -> int:
    """Bytes of an array, or of a `ShapeDtypeStruct` with a sharding, on all devices together: replicas count."""
    shard: int = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return shard * len(array.sharding.device_set)
