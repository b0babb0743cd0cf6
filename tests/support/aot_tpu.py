"""Compiles for TPUs on a machine without one: libtpu's own compiler, down to the bundles, but no execution.

Importing this sets what libtpu reads when it starts; the module must be imported before the first compilation.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server where it runs
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-4",  # any: the topology decides what is compiled for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # by several processes at once: there is no chip to share
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}


def tpu_device(generation):
    """A device to compile for, such as that of "v6e"."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


def compile_for(device, fn, *avals):
    """`fn` compiled for arguments of these shapes on one device."""
    sharding = SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in jax.tree.leaves(avals)]
    args = jax.tree.unflatten(jax.tree.structure(avals), args)
    with jax.set_mesh(Mesh(np.array([device]), ("x",))):  # tells the code being traced which device it is for
        return jax.jit(fn).lower(*args).compile()


def temporary_bytes(compiled):
    """HBM that a program takes beside its arguments and results: large copies into another layout would be there."""
    return compiled.memory_analysis().temp_size_in_bytes


def copied_bytes(compiled):
    """What a program copies or transposes by instructions of its own, also into VMEM; without padding."""
    results = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:copy|copy-start|transpose)\(", compiled.as_text())
    sizes = (np.prod([int(axis) for axis in shape.split(",") if axis]) for _, shape in results)
    return sum(int(size) * bits(dtype) // 8 for size, (dtype, _) in zip(sizes, results, strict=True))


def bits(dtype):
    """Of an element of a dtype as HLO names it: "f8e4m3fn", "bf16", "s32", "pred"."""
    return int((re.search(r"\d+", dtype) or ["8"])[0])


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel; bundles count the code once, whatever the trip counts of its loops."""

    bundles: int
    mxu_bundles: int  # of them, those that push to or multiply in a matrix unit
    vmem_bytes: int
    spilled_bytes: int  # of `vmem_bytes`, registers that did not fit


def kernel_report(kernel, dump):
    """The report of the kernel whose name begins with `kernel`, from the only program dumped into a folder."""

    def one(pattern):
        (path,) = sorted(Path(dump).glob(pattern))
        return path.read_text()

    schedule = one(f"*-{kernel}*schedule-analysis_final_bundles.txt")
    bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", schedule)[1])
    head, table = one(f"*-{kernel}*final_hlo-static-per-bundle-utilization.txt").split("== UTILIZATION:")
    units = [unit.strip() for unit in head.splitlines()[1].split(",")]
    use = np.array([line.split() for line in table.strip().splitlines()], int)
    mxu = use[:, [units.index("MATMUL"), units.index("MATPUSH")]].any(axis=1)
    page = one("*-TLP-*vmem_report.html")
    data, _ = json.JSONDecoder().raw_decode(page[re.search(r"const DATA\s*=\s*", page).end() :])
    (memory,) = (value for name, value in data["hlo_breakdowns"].items() if name.startswith(kernel))
    allocations = one(f"*-{kernel}*-[0-9][0-9]-post-ra.txt")
    spills = re.findall(r"space=vmem, size = (0x[0-9a-f]+), scoped, tag = 'spilled", allocations)
    return Report(bundles, int(mxu.sum()), memory["total_size"], sum(int(size, 16) for size in spills))


def dump_in_a_process(script, dump):
    """Runs a script of Python with libtpu's dumps going to a folder: its flags are read once, when it starts."""
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
