"""Loads experts of 1.2 GB in a process of its own, where the allocator's peak is that of this load alone."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import moe_online
from moe_online.experts import abstract_experts


def experts(layers=6, num_experts=8, hidden=2048, intermediate=2048):
    """Declared experts, and their source in memory: about 200 MB per layer."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, 1, intermediate, hidden)).astype(ml_dtypes.bfloat16)
    abstract = {f"l{i}": abstract_experts(num_experts, hidden, intermediate, jnp.bfloat16) for i in range(layers)}
    w13 = np.ascontiguousarray(np.broadcast_to(row, (num_experts, 2, intermediate, hidden)))
    w2 = np.ascontiguousarray(np.broadcast_to(np.swapaxes(row[0], 1, 2), (num_experts, hidden, intermediate)))
    return abstract, {f"l{i}": {"w13_weight": w13, "w2_weight": w2} for i in range(layers)}


def main(scheme, unit_bytes, prefetch, keep_sources):
    kept = []
    if keep_sources:
        type(jnp.zeros(())).delete = lambda array: kept.append(array)
    abstract, source = experts()
    arguments = {"quantization": scheme, "unit_bytes": unit_bytes, "prefetch": prefetch}
    plan = moe_online.plan(abstract, source, **arguments)
    report = moe_online.load(abstract, source, **arguments, progress=False).report
    bound = plan.resident_bytes + (1 + prefetch) * plan.largest_unit_bytes + 64 * 2**20
    seconds = sum(tensor.seconds for tensor in report.tensors)
    print(json.dumps({"bound": bound, "step_seconds": seconds} | dataclasses.asdict(report) | {"tensors": None}))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
