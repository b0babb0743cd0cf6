"""Tiles that the table of measured ones and the heuristic choose: they serve the matmuls that they are for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import get_activation, make_group_metadata, quantize
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig, tuned
from pallas_kernels.grouped_matmul.mosaic_gpu.config import SMEM_LIMIT, heuristic
from pallas_kernels.hopper import HOPPER

FORMATS = {  # of weights, of rows
    "fp8_matrix": ("fp8_per_tensor", "fp8_per_tensor_dynamic"),
    "fp8_row": ("fp8_per_channel", "fp8_per_token"),
    "fp8_block": ("fp8_per_block", "fp8_per_group"),
    "int8_row": ("int8_per_channel", "int8_per_token"),
}
REAL = {"bf16": jnp.bfloat16, "f16": jnp.float16}
LOW = MosaicGpuConfig(block_m=64, block_n=256, stages=4, band=2)
FLAT = MosaicGpuConfig(block_m=48, block_n=256, stages=4, band=2, weights_on_m=True)


def call_of(shape, m):
    """The matmul of an entry, as shapes."""
    weights, rows = FORMATS.get(shape.operands, (None, None))
    dtype = REAL.get(shape.operands, jnp.bfloat16)
    sizes = (shape.experts, 2, shape.n // 2, shape.k) if shape.gated else (shape.experts, shape.n, shape.k)

    def make():
        lhs, rhs = jnp.zeros((m, shape.k), dtype), jnp.zeros(sizes, dtype)
        group_sizes = jnp.zeros(shape.experts, jnp.int32)
        return Call(
            lhs=lhs if rows is None else quantize(lhs, rows),
            rhs=rhs if weights is None else quantize(rhs, weights),
            group_sizes=group_sizes,
            metadata=make_group_metadata(group_sizes),
            out_dtype=np.dtype(dtype),
            epilogue=get_activation("silu") if shape.gated else None,
        )

    return jax.eval_shape(make)


def complaints(entries):
    """What is wrong, for each entry of which something is."""
    found, seen = {}, set()
    for i, entry in enumerate(entries):
        try:
            shape, m, config = tuned.read(entry)
            assert shape.operands in {**FORMATS, **REAL}, shape.operands
            call = call_of(shape, m)
            assert tuned.shape_of(call) == shape
            assert any(chip in entry["device"] for chip in HOPPER), entry["device"]
            assert entry["jax"]
            assert 0 < entry["us"] < entry["default_us"]
            assert (shape, m) not in seen, "twice"
            reason = mosaic_gpu.unsupported_anywhere(dataclasses.replace(call, config=config))
            assert reason is None, reason
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            found[i] = f"{type(error).__name__}: {error}"
        else:
            seen.add((shape, m))
    return found


def test_every_entry_serves_its_matmul():
    entries = json.loads(tuned.FILE.read_text())
    assert complaints(entries) == {}
    assert sum(map(len, tuned.table().values())) == len(entries)
    assert entries == sorted(entries, key=lambda entry: tuned.read(entry)[:2])


FACTS = {"us": 1.0, "default_us": 2.0, "device": "NVIDIA H200", "jax": "0.11.2"}
GOOD, GOOD_FLAT = (
    tuned.write(tuned.Shape(128, 1536, 2048, True, "fp8_block"), 512, config, **FACTS) for config in (LOW, FLAT)
)


@pytest.mark.parametrize("good", [GOOD, GOOD_FLAT], ids=["tokens on M", "weights on M"])
@pytest.mark.parametrize("operands", [*FORMATS, *REAL])
def test_kinds_of_operands(operands, good):
    assert complaints([{**good, "operands": operands}, {**good, "operands": operands, "gated": False}]) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_m": 96}, "block_m=96 must be 64 or 128"),
        ({"block_m": 72, "weights_on_m": True}, "block_m=72 must be a multiple of 16"),
        ({"block_m": 96, "stages": 3, "weights_on_m": True}, "more registers than there are"),
        ({"stages": 5}, "bytes of shared memory"),
        ({"block_n": 128}, "gated it needs 128"),
        ({"n": 192, "gated": False}, "N=192 must be a multiple of 128"),
        ({"operands": "fp4"}, "fp4"),
        ({"us": 2.0}, "AssertionError"),
        ({"device": "NVIDIA A100"}, "A100"),
    ],
)
def test_a_bad_entry_is_noticed(changes, says):
    assert says in complaints([{**GOOD, **changes}])[0]


def test_entries_that_lack_something_or_stand_there_twice_are_noticed():
    assert "twice" in complaints([GOOD, GOOD])[1]
    for missing in ("stages", "weights_on_m"):
        assert missing in complaints([{name: value for name, value in GOOD.items() if name != missing}])[0]


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [128, 192, 256, 4096])
@pytest.mark.parametrize("experts", [1, 8, 16, 17, 256])
def test_what_the_heuristic_takes_serves(experts, n, gated, in_blocks):
    """With weights on M there are as many stages as fit, up to 6."""
    call = call_of(tuned.Shape(experts, n, 512, gated, "fp8_block" if in_blocks else "int8_row"), 8)
    seen = {}
    for mean in (*range(600), 1 << 17):
        for m in (mean * experts, mean * experts + 1):
            config = heuristic(m=m, num_experts=experts, n=n, gated=gated, in_blocks=in_blocks)
            seen[config] = seen.get(config, m)
    served = n % ((128 if gated else 64) * (2 if in_blocks else 1)) == 0
    assert served == (mosaic_gpu.unsupported_anywhere(call) is None)
    for config, m in seen.items():
        assert config.smem_bytes(in_blocks=in_blocks) <= SMEM_LIMIT, (m, config)
        if config.weights_on_m and config.stages < 6:
            one_more = dataclasses.replace(config, stages=config.stages + 1)
            assert one_more.smem_bytes(in_blocks=in_blocks) > SMEM_LIMIT, (m, config)
        if served:
            assert mosaic_gpu.unsupported_anywhere(dataclasses.replace(call, config=config)) is None, (m, config)
    assert any(config.weights_on_m for config in seen) == (not gated or n >= 256)
