"""Inside `shard_map` on two devices: the same codes and scales as on one."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels import quantize
from tolerance import assert_same_bits

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("model",))
x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 256, 512)), jnp.bfloat16)
x = x * jnp.linspace(0.1, 3, 512, dtype=jnp.bfloat16)  # the maximum of a row lies in the second half


def sharded(name, axis, names):
    spec = P(None, "model", None) if axis == "N" else P(None, None, "model")
    scales = P(None, None, "model") if axis == "N" else P(None, "model" if "block" in name else None, None)
    def local(x):
        q = quantize(x, name, axis_names=names)
        return q.values, q.scales
    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(spec, scales), check_vma=False)
    return jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec)))


for name in ("fp8_per_channel", "fp8_per_block", "int8_per_channel"):
    whole = jax.jit(functools.partial(quantize, format=name))(x)
    for axis, names in (("N", (("model",), ())), ("K", ((), ("model",)))):
        values, scales = sharded(name, axis, names)
        assert_same_bits(values, whole.values)
        assert_same_bits(scales, whole.scales)
    if name != "fp8_per_block":  # without the collective each device takes the maximum of its own half
        values, _ = sharded(name, "K", ((), ()))
        assert not np.array_equal(values, whole.values), name
print("compared on", jax.device_count(), "devices")
"""


@pytest.mark.smoke
def test_codes_do_not_depend_on_the_mesh():
    """In a new process: the number of devices cannot change later."""
    root = pathlib.Path(__file__).parents[3]
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests/support')!r}]\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", path + SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compared on 2 devices\n"
