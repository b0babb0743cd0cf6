"""Declaring a model of 600 billion parameters takes no time and no memory."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from moe_online.config import MoEConfig
from moe_online.loading.tree import flatten
from moe_online.method import get_method
from moe_online.models.decoder import Decoder, DecoderConfig
from process_memory import needs_linux
from sizes import nbytes

LAYERS = 61
MOE = MoEConfig(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
CONFIG = DecoderConfig(
    vocab_size=129280, hidden_size=7168, num_layers=LAYERS, num_heads=128, num_kv_heads=8, head_dim=128, moe=MOE
)
MESH = AbstractMesh((32, 4), ("expert", "tensor"))


def declare_experts():
    method = get_method("fp8_per_block", MOE)
    return [method.create_weights(256, 7168, 2048, jnp.bfloat16, mesh=MESH) for _ in range(LAYERS)]


def declare_model():
    return nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.mark.smoke
def test_experts():
    before = len(jax.live_arrays())
    experts = declare_experts()
    assert len(jax.live_arrays()) == before
    assert sum(nbytes(layer) for layer in experts) == LAYERS * 256 * 3 * 7168 * 2048 * 2  # 1.4 TB
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(experts))
    assert experts[0].w13_weight.sharding == NamedSharding(MESH, PartitionSpec("expert", None, "tensor", None))
    assert experts[0].w2_weight.sharding == NamedSharding(MESH, PartitionSpec("expert", None, "tensor"))
    assert experts[0].w13_weight.sharding.shard_shape((256, 2, 2048, 7168)) == (8, 2, 512, 7168)


@pytest.mark.timing
def test_experts_take_less_than_a_second():
    begin = time.perf_counter()
    declare_experts()
    assert time.perf_counter() - begin < 1


@pytest.mark.timing
def test_a_whole_model_takes_less_than_five_seconds():
    before, begin = len(jax.live_arrays()), time.perf_counter()
    model = declare_model()
    seconds = time.perf_counter() - begin
    print(f"declared in {seconds:.2f} s")
    assert seconds < 5
    assert len(jax.live_arrays()) == before
    leaves = flatten(model).leaves
    assert sum(nbytes(leaf.aval) for leaf in leaves) / 2 > 6e11
    assert all(isinstance(leaf.aval, jax.ShapeDtypeStruct) for leaf in leaves)


DECLARE = """
import jax, test_abstract
from process_memory import peak, reset_peak
(jax.numpy.ones(8, "bfloat16") + 1).block_until_ready()
before = reset_peak()
kept = {what}
print(peak() - before)
"""


@needs_linux
@pytest.mark.parametrize(
    ("what", "within"),
    [
        ("test_abstract.declare_experts()", True),
        ("[jax.numpy.ones(7168 * 2048 * 8, 'bfloat16') + 1 for _ in range(2)]", False),  # the control: 0.4 GB
    ],
    ids=["experts", "control"],
)
def test_no_memory(what, within, request):
    folders = [str(request.path.parent), str(request.config.rootpath / "tests" / "support")]
    code = f"import sys; sys.path[:0] = {folders}" + DECLARE.format(what=what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    megabytes = int(done.stdout) / 2**20
    assert (megabytes < 50) == within, f"{megabytes:.0f} MB"
