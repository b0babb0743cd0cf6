"""Four devices: the bits of one, placed as declared. In a process of its own, where a CPU counts as four."""

import json
import subprocess
import sys

import pytest

SETUP = """
import json
import jax

jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import moe_online
from moe_online.errors import ConfigError
from sources import KEN_MAPPING, as_ken, check_quantized, declared, ours, quiet_load
from tolerance import assert_same_bits

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "tensor"))
tree = ours(e=4, h=320, i=256)
"""
BITS = """
rows = []
ken, on_device = as_ken(tree), jax.tree.map(jax.numpy.asarray, tree)
for scheme, source, unit_bytes in (
    ("fp8_per_block", tree, 2**28),
    ("fp8_per_block", tree, 1),
    ("fp8_per_block", ken, 2**28),
    ("fp8_per_block", on_device, 2**28),
    ("fp8_per_channel", ken, 2**28),
    ("int8_w8a16", tree, 2**28),
    (None, ken, 2**28),
):
    mapping = KEN_MAPPING if source is ken else None
    arguments = {"quantization": scheme, "mapping": mapping, "unit_bytes": unit_bytes}
    plan = moe_online.plan(declared(tree, mesh=mesh), source, **arguments)
    params, report = quiet_load(declared(tree, mesh=mesh), source, **arguments)
    here, there = params["l0"], declared(tree, mesh=mesh)["l0"]
    for name in ("w13_weight", "w2_weight"):
        weight, sharding = getattr(here, name), getattr(there, name).sharding
        if scheme is None:
            assert_same_bits(weight, tree["l0"][name])
            assert weight.sharding == sharding
        else:
            assert weight.values.sharding == sharding
            children = jax.tree.leaves(weight.shardings(sharding))
            assert [leaf.sharding for leaf in jax.tree.leaves(weight)] == children
            assert len({shard.device for shard in weight.values.addressable_shards}) == 4
            assert weight.values.addressable_shards[0].data.nbytes * 4 == weight.values.nbytes
    if scheme is not None:
        check_quantized(params, tree, here.w2_weight.format.name)
    rows.append([report.resident_bytes, report.peak_bytes, plan.peak_bytes])
# The mesh of jax.make_mesh would put shardings into types; experts that were declared without a mesh follow it too.
made = jax.make_mesh((2, 2), ("expert", "tensor"))
params = quiet_load(declared(tree), ken, mesh=made, mapping=KEN_MAPPING, quantization="fp8_per_block").params
check_quantized(params, tree, "fp8_per_block")
assert len(params["l0"].w13_weight.values.sharding.device_set) == 4
print(json.dumps(rows))
"""
KERNELS = """
from flax import nnx

from by_name import assert_same_parts, by_name
from moe_online.flax import Linear
from moe_online.schemes import QuantSpec
from numpy_quantizer import quantize_numpy
from sources import BF16, random, swapped

k, n = 256, 512
source, checked = {"kernel": random(k, n)}, 0
for weight in ("fp8_per_block", "fp8_per_tensor", "nvfp4", None):
    for spec in (PartitionSpec(None, "tensor"), PartitionSpec("tensor"), PartitionSpec("expert", "tensor"), None):
        abstract = nnx.eval_shape(lambda: Linear(k, n, use_bias=False, rngs=nnx.Rngs(0)))
        if spec is not None:
            sharding = NamedSharding(mesh, spec)
            abstract.kernel.set_value(jax.ShapeDtypeStruct((k, n), BF16, sharding=sharding))
        config = None if weight is None else {"linear": QuantSpec(weight, None)}
        kernel = quiet_load(abstract, source, quantization=config, mesh=mesh).params.kernel.get_value()
        checked += 1
        spec = PartitionSpec(*spec, *[None] * (2 - len(spec))) if spec is not None else PartitionSpec(None, None)
        if weight is None:
            assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
            continue
        transposed = NamedSharding(mesh, PartitionSpec(*reversed(spec)))
        assert kernel.weight.values.sharding.is_equivalent_to(transposed, 2)
        assert_same_parts(kernel.weight, quantize_numpy(swapped(source["kernel"]), weight))
print(json.dumps(checked))
"""
ERRORS = """
found = []


def refused(abstract, **arguments):
    for function in (moe_online.plan, quiet_load):
        try:
            function(abstract, tree, **arguments)
        except ConfigError as error:
            found.append(str(error))
        else:
            found.append("nothing")


tree = ours(e=4, h=320, i=200)  # 100 rows on each device: no whole blocks of 128
refused(declared(tree, mesh=mesh), quantization="fp8_per_block")
quiet_load(declared(tree, mesh=mesh), tree, quantization="fp8_per_channel")
tree = ours(e=3, h=64, i=31)


def place(name, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec("expert")))


refused({"l0": {name: place(name, leaf) for name, leaf in tree["l0"].items()}})
print(json.dumps(found))
"""


def run(code, request):
    support = str(request.config.rootpath / "tests" / "support")
    code = f"import sys; sys.path.insert(0, {support!r})\n{SETUP}{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # tests/loading/test_meshes.py has more of them
def test_bits_and_places(request):
    for resident, peak, planned in run(BITS, request):
        assert resident <= peak <= planned


@pytest.mark.slow
def test_dense_kernels_are_transposed_with_their_shardings(request):
    assert run(KERNELS, request) == 16


def test_shards_that_do_not_fit(request):
    blocks, blocks_loaded, uneven, uneven_loaded = run(ERRORS, request)
    assert blocks == blocks_loaded
    assert all(words in blocks for words in ("l0.w13_weight", "l0.w2_weight", "100", "block"))
    assert uneven == uneven_loaded
    assert all(words in uneven for words in ("l0.w13_weight", "l0.w2_weight", "(3, 64, 31)"))
