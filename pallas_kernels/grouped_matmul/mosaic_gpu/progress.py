"""Row tiles that a first matmul has finished: what the second one in the same launch waits for.

Atomics on a counter of each row tile, in memory. Blocks wait for each other, so all of a launch must be on the device
at once: there is one for each multiprocessor. jax's interpreter passes the waits over; there a barrier between the
matmuls of the one program takes their place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


def _let_proxies_meet() -> None:
    """Orders loads and stores by threads with those by TMA."""
    mgpu.utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)  # type: ignore[attr-defined]  # jax 0.10


class Progress(NamedTuple):
    """Counters of the row tiles."""

    counters_gmem: Any  # int32 [row tiles], zero at first
    arrivals: int  # of a row tile that is finished

    def tell(self, tile: Any) -> None:
        """What this warpgroup has of a row tile is in memory, by copies that it has waited for."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def signal(_: Any, counter: Any) -> None:
            _let_proxies_meet()
            mgpu.utils.warpgroup_barrier()
            mgpu.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

        signal(self.counters_gmem.at[tile])

    def wait(self, tile: Any) -> None:
        """Until a row tile is finished."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def wait(_: Any, counter: Any) -> None:
            semaphore = mgpu.SemaphoreRef(mgpu.utils.memref_ptr(counter))
            semaphore.wait(self.arrivals, decrement=False, memory_scope="gpu")
            _let_proxies_meet()

        wait(self.counters_gmem.at[tile])
