"""Compiles for NVIDIA GPUs on a machine that has none: XLA, Mosaic GPU and ptxas are the real ones.

Needs the extra `aot-gpu`. Nothing compiled here can run.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding


def _installed(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a package around it
        return False


MISSING = [package for package in ("jax_cuda13_plugin", "nvidia.cu13") if not _installed(package)]
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: %d minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "%s"
"""
HOPPER, BLACKWELL = (9, "NVIDIA H100 80GB HBM3"), (10, "NVIDIA B200")


@functools.cache
def devices_of(count, generation=HOPPER):
    """Devices to compile for; a generation is its compute capability (major) and a name."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET % generation, topology=f"1x1x{count}"
    )
    return topology.devices


def device_of(generation=HOPPER):
    """One device to compile for."""
    return devices_of(1, generation)[0]


def compile_for(device, function, *avals):
    """The compiled program. The mesh tells kernels, and the choice of them, what they are compiled for."""
    sharding = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in avals]
    with jax.set_mesh(Mesh(np.array([device]), ("x",))):
        return jax.jit(function).lower(*arguments).compile()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """What ptxas and Mosaic say of one kernel."""

    target: str  # such as sm_90a
    registers: int
    spill_bytes: int  # stores and loads
    smem_bytes: int


@contextlib.contextmanager
def kernel_reports(folder: Path):
    """A list that has, after the block, the report of each Mosaic GPU kernel that was compiled in it."""
    reports = []
    with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=str(folder)):
        yield reports
    for path in sorted(folder.glob("*.ptxas")):
        text = path.read_text()
        resources = path.with_name(path.name.replace(".ptxas", ".resources.txt")).read_text()
        reports.append(
            KernelReport(
                target=re.search(r"for '(\w+)'", text)[1],
                registers=int(re.search(r"Used (\d+) registers", text)[1]),
                spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", text))),
                smem_bytes=int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
            )
        )


def temporary_bytes(compiled) -> int:
    """What the compiled program allocates beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
