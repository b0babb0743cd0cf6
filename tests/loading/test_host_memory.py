"""Memory of the process while a chunked checkpoint streams in, measured from outside the loader."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from process_memory import needs_linux
from sources import BF16

pytestmark = needs_linux
E, H, INNER, LAYERS = 8, 1024, 1024, 8  # 403 MB in 24 tensors of random bits, which do not compress
COMPILING = 64 * 2**20  # what XLA takes meanwhile; 40 measured, whatever is read
LOAD = """
import gc, json, sys
import jax, numpy as np
import moe_online
from moe_online.experts import abstract_experts
from moe_online.loading import open_source
from process_memory import peak, reset_peak
from sources import KEN_MAPPING, WatchedSource

path, keep = sys.argv[1], sys.argv[2] == "keep"
e, h, i, layers = map(int, sys.argv[3:])
arguments = {"mapping": KEN_MAPPING, "quantization": "fp8_per_block", "unit_bytes": 8 * 2**20}


def declared(layers):
    return {f"l{layer}": abstract_experts(e, h, i, "bfloat16") for layer in layers}


class Kept(WatchedSource):
    def read(self, name, index):
        part = super().read(name, index)
        self.kept.append(part.copy())
        return part


source = Kept(open_source(path), keep=True) if keep else path
warm_up = moe_online.load(declared([0]), path, unexpected="ignore", progress=False, **arguments)  # XLA, readers
del warm_up
gc.collect()
before = reset_peak()
plan = moe_online.plan(declared(range(layers)), source, **arguments)
params, report = moe_online.load(declared(range(layers)), source, progress=False, **arguments)
print(json.dumps({"growth": peak() - before, "plan": plan.to_json(), "report": report.to_json()}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    rng = np.random.default_rng(0)
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 2 * H * INNER
    context.array.saving.storage_options.shard_axes = (0,)

    def tensor(*shape):
        return (rng.integers(0, 2**16, shape, np.uint16) & 0xBFFF).view(BF16)  # magnitudes below 2

    tree = {
        f"l{layer}": {"w_gate": tensor(E, H, INNER), "w_up": tensor(E, H, INNER), "w_down": tensor(E, INNER, H)}
        for layer in range(LAYERS)
    }
    with context:
        ocp.save(path, tree)
    return path


def measured(path, keep, support):
    sizes = [str(size) for size in (E, H, INNER, LAYERS)]
    code = f"import sys; sys.path.insert(0, {str(support)!r})\n{LOAD}"
    command = [sys.executable, "-c", code, str(path), "keep" if keep else "free", *sizes]
    # Large blocks go back to the system when they are freed: what glibc keeps varied by 120 MB from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_growth(found):
    plan, report = found["plan"], found["report"]
    # On a CPU the device's bytes are the process's too.
    bound = plan["peak_bytes"] + plan["host_peak_bytes"] + COMPILING
    assert bound < plan["read_bytes"], "holding the whole checkpoint would pass"
    print({"growth": found["growth"], "bound": bound, "read": plan["read_bytes"], "seen": report["host_peak_bytes"]})
    assert found["growth"] <= bound, f"grew by {found['growth']}, planned {bound}"
    assert report["peak_bytes"] <= plan["peak_bytes"]


@pytest.mark.slow
def test_process_stays_within_the_plan(checkpoint, request):
    found = measured(checkpoint, False, request.config.rootpath / "tests" / "support")
    check_growth(found)


@pytest.mark.slow
def test_a_host_copy_that_stays_is_noticed(checkpoint, request):
    found = measured(checkpoint, True, request.config.rootpath / "tests" / "support")
    with pytest.raises(AssertionError, match="grew by"):
        check_growth(found)
