"""Whatever Orbax writes: every API, OCDBT or plain files, zarr 2 or 3, items, steps, training states."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore as ts
from flax import linen, nnx
from orbax.checkpoint import v1 as ocp

import moe_online
from moe_online.errors import CheckpointError, ConfigError, CorruptCheckpoint
from moe_online.loading import open_source
from sources import KEN_MAPPING, as_ken, check_quantized, declared, ours, quiet_load
from tolerance import assert_same_bits

TREE = ours(e=2, h=48, i=32)
OTHER = ours(e=2, h=48, i=32, seed=10)
PLAIN_JAX = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Orbax's older writers


def check(path, tree=TREE, prefix=None):
    """What the source lists and reads is this tree, bit for bit."""
    source = open_source(path, prefix=prefix)
    expected = {f"{layer}.{name}": x for layer, tensors in as_ken(tree).items() for name, x in tensors.items()}
    assert set(source.tensors) == set(expected)
    for name, x in expected.items():
        tensor = source.tensors[name]
        assert (tensor.name, tensor.shape, tensor.dtype, tensor.nbytes) == (name, x.shape, x.dtype, x.nbytes)
        assert_same_bits(source.read(name, tuple(slice(0, size) for size in x.shape)), x)
        assert_same_bits(source.read(name, (slice(1, 2), slice(3, 30), slice(0, 5))), x[1:2, 3:30, :5])


def check_load(path, **arguments):
    arguments = {"mapping": KEN_MAPPING, "quantization": "fp8_per_block"} | arguments
    check_quantized(quiet_load(declared(TREE), path, **arguments).params, TREE, "fp8_per_block")


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.smoke
def test_v1(tmp_path, monkeypatch):
    ocp.save(tmp_path / "c", as_ken(TREE))
    check_load(tmp_path / "c")
    check(str(tmp_path / "c"))
    check(tmp_path / "c" / "state")
    monkeypatch.chdir(tmp_path)
    check("c")
    check(os.path.join("..", tmp_path.name, "c"))
    with pytest.raises(AssertionError):
        check(tmp_path / "c", tree=OTHER)


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_v1_formats(tmp_path, zarr3, ocdbt):
    context = ocp.Context()
    context.array.saving.use_zarr3, context.array.saving.use_ocdbt = zarr3, ocdbt
    with context:
        ocp.save(tmp_path / "c", as_ken(TREE))
    check(tmp_path / "c")


def test_the_state_of_an_nnx_module(tmp_path):
    """Saved as it is, each of its names ends in `.value`; a real name `value` stays."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    ocp.save(tmp_path / "c", {"params": nnx.state(model), "attention": {"key": jnp.ones(2), "value": jnp.ones(2)}})
    names = set(open_source(tmp_path / "c").tensors)
    assert names == {"params.kernel", "params.bias", "attention.key", "attention.value"}
    loaded = quiet_load(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(1))), tmp_path / "c", prefix="params")
    assert_same_bits(loaded.params.kernel[...], model.kernel[...])


@PLAIN_JAX
@pytest.mark.parametrize("ocdbt", [True, False])
def test_the_state_of_an_nnx_module_as_v0_saves_it(tmp_path, ocdbt):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=ocdbt) as writer:
        writer.save(tmp_path / "c", nnx.state(model))
    assert set(open_source(tmp_path / "c").tensors) == {"kernel", "bias"}
    loaded = quiet_load(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(1))), tmp_path / "c")
    assert_same_bits(loaded.params.kernel[...], model.kernel[...])


def test_the_variables_of_a_linen_module(tmp_path):
    model, x = linen.Dense(3), jnp.ones((1, 2))
    variables = model.init(jax.random.key(0), x)
    ocp.save(tmp_path / "c", variables)
    assert set(open_source(tmp_path / "c").tensors) == {"params.kernel", "params.bias"}
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)
    loaded = quiet_load(abstract, tmp_path / "c").params
    assert_same_bits(loaded["params"]["kernel"], variables["params"]["kernel"])
    alone = quiet_load(abstract["params"], tmp_path / "c", prefix="params").params
    assert_same_bits(alone["kernel"], variables["params"]["kernel"])


@PLAIN_JAX
def test_standard_checkpointer(tmp_path):
    with orbax.checkpoint.StandardCheckpointer() as writer:
        writer.save(tmp_path / "c", on_device(as_ken(TREE)))
    check(tmp_path / "c")


@PLAIN_JAX
@pytest.mark.parametrize("ocdbt", [True, False])
def test_pytree_checkpointer(tmp_path, ocdbt):
    with orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=ocdbt) as writer:
        writer.save(tmp_path / "c", on_device(as_ken(TREE)))
    check(tmp_path / "c")


@PLAIN_JAX
def test_steps_of_a_checkpoint_manager(tmp_path):
    with orbax.checkpoint.CheckpointManager(tmp_path / "run") as manager:
        for step, tree in ((9, OTHER), (10, TREE)):
            manager.save(step, args=orbax.checkpoint.args.StandardSave(on_device(as_ken(tree))))
        manager.wait_until_finished()
    check(tmp_path / "run")  # the last, by number
    check(tmp_path / "run", prefix="10")
    check(tmp_path / "run" / "9", tree=OTHER)
    check(tmp_path / "run", prefix="9", tree=OTHER)
    check(tmp_path / "run", prefix="9/default", tree=OTHER)


@PLAIN_JAX
def test_steps_with_a_prefix(tmp_path):
    options = orbax.checkpoint.CheckpointManagerOptions(step_prefix="step")
    with orbax.checkpoint.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step, tree in ((9, OTHER), (10, TREE)):
            manager.save(step, args=orbax.checkpoint.args.StandardSave(on_device(as_ken(tree))))
        manager.wait_until_finished()
    check(tmp_path / "run")
    check(tmp_path / "run", prefix="step_9", tree=OTHER)


@PLAIN_JAX
def test_items(tmp_path):
    args = orbax.checkpoint.args
    with orbax.checkpoint.CheckpointManager(tmp_path / "run") as manager:
        state = {"params": on_device(as_ken(TREE)), "opt": {"mu": jnp.ones(3)}}
        items = {"model": args.StandardSave(state), "ema": args.StandardSave(on_device(as_ken(OTHER)))}
        manager.save(1, args=args.Composite(**items, notes=args.JsonSave({"lr": 0.1})))
        manager.wait_until_finished()
    check(tmp_path / "run", prefix="model.params")
    check(tmp_path / "run" / "1", prefix="model/params")
    check(tmp_path / "run" / "1" / "model", prefix="params")
    check(tmp_path / "run", prefix="ema", tree=OTHER)
    with pytest.raises(CheckpointError, match="several items: ema, model; choose one with prefix='ema'"):
        check(tmp_path / "run")


@pytest.mark.smoke
def test_training_state(tmp_path):
    weights = as_ken(TREE)
    moments = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), weights)
    state = {"params": weights, "opt_state": [{"mu": moments, "nu": moments, "count": 3}, None], "step": 7}
    ocp.save(tmp_path / "c", state)
    check(tmp_path / "c", prefix="params")
    plan = moe_online.plan(declared(TREE), tmp_path / "c", mapping=KEN_MAPPING, prefix="params")
    assert plan.read_bytes == sum(x.nbytes for x in jax.tree.leaves(weights))  # nothing of the optimizer
    names = set(open_source(tmp_path / "c").tensors)
    assert {"step", "params.l0.w_up", "opt_state.0.mu.l0.w_up"} <= names
    with pytest.raises(ConfigError, match=r"prefix='weights' names no subtree .* opt_state, params, step"):
        check(tmp_path / "c", prefix="weights")
    below = {f"params.{pattern}".replace("*", "l0"): rule.replace("*", "l0") for pattern, rule in KEN_MAPPING.items()}
    check_load(tmp_path / "c", mapping=below, unexpected=["opt_state.*", "step"])


def test_every_dtype(tmp_path):
    tree = {
        name: np.arange(6).astype(name).reshape(2, 3)
        for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "int32", "uint8", "bool")
    }
    ocp.save(tmp_path / "c", {**tree, "scalar": np.asarray(2.5, np.float32), "step": np.asarray(7, np.int32)})
    abstract = {name: jax.ShapeDtypeStruct((2, 3), name) for name in tree}
    abstract |= {"scalar": jax.ShapeDtypeStruct((), np.float32), "step": jax.ShapeDtypeStruct((), np.int32)}
    params, _ = quiet_load(abstract, tmp_path / "c")
    for name, x in tree.items():
        assert params[name].dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(params[name]), x)
    assert (float(params["scalar"]), int(params["step"])) == (2.5, 7)


def test_zeros_that_were_not_stored(tmp_path):
    """Chunks of zeros may be left out by a writer that says so; they are zeros, not losses."""
    tree = {name: {key: np.zeros_like(x) for key, x in layer.items()} for name, layer in TREE.items()}
    ocp.save(tmp_path / "c", as_ken(tree))
    check(tmp_path / "c", tree=tree)


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_chunks_are_those_that_can_be_read_alone(tmp_path, zarr3, ocdbt):
    """A part of a tensor is a read of these bytes, not of all."""
    context = ocp.Context()
    context.array.saving.use_zarr3, context.array.saving.use_ocdbt = zarr3, ocdbt
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=8192)
    x = np.random.default_rng(0).integers(0, 256, (4, 64, 128), np.uint8)  # not compressible
    with context:
        ocp.save(tmp_path / "c", {"x": x})
    source = open_source(tmp_path / "c")
    chunk = source.tensors["x"].chunk
    assert np.prod(chunk) == 8192
    part = tuple(slice(0, size) for size in chunk)
    before = bytes_read()
    assert_same_bits(source.read("x", part), x[part])
    assert bytes_read() - before < 3 * 8192 < x.nbytes


def test_chunks_of_a_shard_can_be_read_alone(tmp_path):
    """zarr 3 may pack them into larger files, which are what a writer sees."""
    x = np.random.default_rng(0).integers(0, 256, (4, 64, 128), np.uint8)
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "c", {"x": x})
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/c/state/x/"}
    layout = ts.ChunkLayout(read_chunk_shape=(1, 64, 128), write_chunk_shape=(4, 64, 128))
    ts.open(spec, create=True, delete_existing=True, dtype="uint8", shape=x.shape, chunk_layout=layout).result()[
        ...
    ] = x
    source = open_source(tmp_path / "c")
    assert source.tensors["x"].chunk == (1, 64, 128)
    part = (slice(2, 3), slice(0, 64), slice(0, 128))
    before = bytes_read()
    assert_same_bits(source.read("x", part), x[part])
    assert 64 * 128 <= bytes_read() - before < 2 * 64 * 128


def bytes_read():
    """What tensorstore has read from files so far."""
    [metric] = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_what_lies_beside_a_subtree_is_not_opened(tmp_path):
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "c", {"params": as_ken(TREE), "opt": {"mu": np.ones(3)}})
    headers = list((tmp_path / "c" / "state" / "opt.mu").glob("zarr.json"))
    assert headers
    headers[0].write_text("{")
    check(tmp_path / "c", prefix="params")
    with pytest.raises(CorruptCheckpoint, match=r"1 array \(opt\.mu\) cannot be opened") as caught:
        check(tmp_path / "c")
    assert caught.value.names == ("opt.mu",)


def test_leaves_that_are_no_arrays(tmp_path):
    ocp.save(tmp_path / "c", {"w": np.ones(3), "run": "first", "none": None, "empty": {}, "list": [], "count": 3})
    assert set(open_source(tmp_path / "c").tensors) == {"w", "count"}
