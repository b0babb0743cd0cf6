"""Meshes of eight devices: the bits of one, read shard by shard, with no whole tensor anywhere.

In a process of its own, where a CPU counts as eight devices: a test calls the function of its name there.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import tempfile

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from by_name import assert_same_parts, by_name
from eight_devices import in_eight_devices
from moe_online.experts import abstract_experts
from moe_online.flax import Linear
from moe_online.loading import open_source
from moe_online.loading.steps import StepCache
from moe_online.schemes import QuantSpec
from numpy_quantizer import WEIGHTS, quantize_numpy
from quick import FORMATS
from sources import BF16, WatchedSource, quiet_load, random, swapped
from tolerance import assert_same_bits

MESHES = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (2, 4), (4, 2), (8, 1))  # expert, tensor
E, H, INNER = 8, 128, 512  # four shards of I are whole blocks of every format
KEN = {
    "gate": "E K N -> w13_weight.gate",
    "up": "E K N -> w13_weight.up",
    "down": "E K N -> w2_weight",
}
SINGLE = {
    "e{E}.gate": "N K -> w13_weight.gate",
    "e{E}.up": "N K -> w13_weight.up",
    "e{E}.down": "N K -> w2_weight",
}
BIASES = {"w13_bias": "E S N -> w13_bias", "w2_bias": "E N -> w2_bias"}
LAYOUTS = ("ours", "ken", "per expert", "orbax: a chunk per expert", "orbax: one chunk")
AXES = {"w13_weight": "ESIH", "w2_weight": "EHI", "gate": "EHI", "up": "EHI", "down": "EIH", "w2_bias": "EH"}
AXES |= {"w13_bias": "ESI"}  # where E and I are in each stored tensor


def mesh_of(shape):
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), ("expert", "tensor"))


@functools.cache
def weights():
    biases = {"w13_bias": random(E, 2, INNER, seed=2), "w2_bias": random(E, H, seed=3)}
    return {"w13_weight": random(E, 2, INNER, H), "w2_weight": random(E, H, INNER, seed=1)} | biases


def source_of(layout, folder):
    """A source of `weights` and the mapping that reads it."""
    tree = dict(weights())
    w13, w2 = tree.pop("w13_weight"), tree.pop("w2_weight")
    if layout == "ours":
        return open_source(tree | {"w13_weight": w13, "w2_weight": w2}), {}
    if layout == "per expert":
        for e in range(E):
            tree |= {f"e{e}.gate": w13[e, 0], f"e{e}.up": w13[e, 1], f"e{e}.down": w2[e]}
        return open_source(tree), SINGLE | BIASES
    tree |= {"gate": swapped(w13[:, 0]), "up": swapped(w13[:, 1]), "down": swapped(w2)}
    if layout == "ken":
        return open_source(tree), KEN | BIASES
    context = ocp.Context()
    if layout == "orbax: a chunk per expert":
        context.array.saving.storage_options.chunk_byte_size = 2 * H * INNER
        context.array.saving.storage_options.shard_axes = (0,)
    path = f"{folder}/{layout}"
    with context:
        ocp.save(path, tree, overwrite=True)
    opened = open_source(path)
    assert opened.tensors["gate"].chunk[0] == (1 if "expert" in layout else E)
    return opened, KEN | BIASES


def declared(mesh):
    return abstract_experts(E, H, INNER, BF16, has_bias=True, mesh=mesh)


def check(loaded, weight, shardings):
    """Each field has the bits of one device and numpy, and lies where it was declared."""
    for name, x in weights().items():
        found, sharding = getattr(loaded, name), getattr(shardings, name).sharding
        if weight is None or name.endswith("bias"):
            assert_same_bits(found, x)
            assert found.sharding == sharding
            continue
        assert_same_parts(found, expected(name, weight))
        children = jax.tree.leaves(found.shardings(sharding))
        assert [leaf.sharding for leaf in jax.tree.leaves(found)] == children
        assert found.values.addressable_shards[0].data.nbytes * sharding.mesh.size == found.values.nbytes


@functools.cache
def expected(name, weight):
    x = weights()[name]
    return quantize_numpy(x, weight, shared_axes=tuple(range(1, x.ndim - 2)))


def check_collectives(text):
    """A compiled step may send maxima and statistics, at most one number for each row of a matrix; no weights."""
    moved = re.findall(r"(?:all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)[-(]", text)
    assert not moved, f"it has {set(moved)}"
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size)
        for reduced in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
        for shape in re.findall(r"\[([0-9,]*)\]", reduced)
    ]
    assert max(sizes, default=0) <= E * INNER, f"it reduces {max(sizes)} elements"
    return len(sizes)


def bits(pairs):
    """Loads formats onto meshes, the layouts of the source in turn, and looks at what was compiled."""
    done, texts = [], []
    watch_steps(after=lambda compiled: texts.append(compiled.call.as_text()))
    with tempfile.TemporaryDirectory() as folder:
        sources = {layout: source_of(layout, folder) for layout in LAYOUTS}
        for i, (weight, shape) in enumerate(pairs):
            source, mapping = sources[LAYOUTS[i % len(LAYOUTS)]]
            abstract = declared(mesh_of(shape))
            config = None if weight is None else QuantSpec(by_name(weight), None)
            arguments = {"mapping": mapping, "quantization": config, "unit_bytes": 2**18 if i % 2 else 2**28}
            params, report = quiet_load(abstract, source, **arguments)
            check(params, weight, abstract)
            assert report.resident_bytes <= report.peak_bytes <= report.planned_peak_bytes
            reductions = sum(check_collectives(text) for text in texts)
            texts.clear()
            done.append(reductions)
            last = params, weight, abstract
    print(json.dumps([done, refused(*last)]))


def refused(params, weight, abstract):
    """How many of the checks find a fault: places, bits, weights that move."""
    mesh = abstract.w2_weight.sharding.mesh
    sharded = NamedSharding(mesh, PartitionSpec("expert", "tensor"))
    whole = jax.jit(lambda x: 2 * x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    gathered = whole.lower(jax.ShapeDtypeStruct((E * INNER, H), np.float32, sharding=sharded)).compile().as_text()
    other = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1), params.w2_bias)
    faults = [
        lambda: check(params, weight, declared(mesh_of((1, 1)))),
        lambda: check(dataclasses.replace(params, w2_bias=other), weight, abstract),
        lambda: check_collectives(gathered),
    ]
    return sum(fails(fault) for fault in faults)


def fails(check):
    try:
        check()
    except AssertionError:
        return True
    return False


PAIRS = list(zip(itertools.cycle(["fp8_per_tensor", *FORMATS[:3], None, *FORMATS[4:]]), MESHES, strict=False))


@pytest.mark.parametrize(
    "pairs",
    [
        PAIRS,
        *(
            pytest.param([(weight, shape) for shape in MESHES if (weight, shape) not in PAIRS], marks=pytest.mark.slow)
            for weight in (*WEIGHTS, None)
        ),
    ],
    ids=["some", *map(str, (*WEIGHTS, None))],
)
def test_bits(request, pairs):
    """And no weights go from device to device: only maxima and statistics do."""
    reductions, found = in_eight_devices(request, "test_meshes", "bits", pairs=pairs)
    assert len(reductions) == len(pairs)
    for (_, shape), count in zip(pairs, reductions, strict=True):
        assert (count > 0) == (shape != (1, 1))  # what is looked for in the text is there
    assert found == 3


def kernels(pairs):
    """Kernels `[K, N]` of dense layers, sharded along either axis."""
    k, n = 512, 512
    source, checked = {"kernel": random(k, n), "bias": random(n)}, 0
    for weight, shape in pairs:
        mesh = mesh_of(shape)
        by_n, by_k = PartitionSpec(None, "tensor"), PartitionSpec("tensor", None)
        for spec in (by_n, by_k) if shape[0] > 2 else (by_n, by_k, PartitionSpec("expert", "tensor")):
            abstract = nnx.eval_shape(lambda: Linear(k, n, rngs=nnx.Rngs(0)))
            abstract.kernel.set_value(jax.ShapeDtypeStruct((k, n), BF16, sharding=NamedSharding(mesh, spec)))
            bias = NamedSharding(mesh, PartitionSpec(spec[1]))
            abstract.bias.set_value(jax.ShapeDtypeStruct((n,), BF16, sharding=bias))
            config = None if weight is None else {"linear": QuantSpec(by_name(weight), None)}
            params = quiet_load(abstract, source, quantization=config, mesh=mesh).params
            assert_same_bits(params.bias.get_value(), source["bias"])
            assert params.bias.get_value().sharding.is_equivalent_to(bias, 1)
            kernel = params.kernel.get_value()
            if weight is None:
                assert_same_bits(kernel, source["kernel"])
                assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
            else:
                turned = NamedSharding(mesh, PartitionSpec(*reversed(spec)))
                assert kernel.weight.values.sharding.is_equivalent_to(turned, 2)
                assert_same_parts(kernel.weight, quantize_numpy(swapped(source["kernel"]), weight))
            checked += 1
    print(json.dumps(checked))


@pytest.mark.parametrize(
    "pairs",
    [
        [("fp8_per_channel", (2, 4))],
        *(pytest.param([(weight, s) for s in MESHES], marks=pytest.mark.slow) for weight in (*WEIGHTS, None)),
    ],
    ids=["some", *map(str, (*WEIGHTS, None))],
)
def test_kernels(request, pairs):
    assert in_eight_devices(request, "test_meshes", "kernels", pairs=pairs) >= 2 * len(pairs)


class Shards(WatchedSource):
    """Notes the regions asked for, and the largest array that any device holds meanwhile."""

    def __init__(self, source, chunks=None):
        super().__init__(source, chunks=chunks)
        self.regions, self.most = [], 0

    def read(self, name, index):
        self.note(name, index)
        return super().read(name, index)

    def note(self, name, index):
        self.regions.append((name, index))
        self.sample()

    def sample(self, _=None):
        """On this machine's devices; numpy's arrays are as large as the regions."""
        sizes = [math.prod(array.sharding.shard_shape(array.shape)) for array in jax.live_arrays()]
        self.most = max(self.most, *sizes, 0)


class ShardsInPlace(Shards):
    """The same of a source that several threads may read."""

    def read_into(self, name, index, out):
        self.note(name, index)
        self.read_counts[name][index] += 1
        self.source.read_into(name, index, out)


def watch_steps(before=None, after=None):
    """Calls these with each step: `before` when it has run, `after` when it was compiled."""
    get = StepCache.get

    def watched(self, *args, **kwargs):
        compiled = get(self, *args, **kwargs)
        if after is not None:
            after(compiled)
        if before is None:
            return compiled

        def call(*args):
            before()
            out = jax.block_until_ready(compiled.call(*args))
            before()
            return out

        return dataclasses.replace(compiled, call=call)

    StepCache.get = watched


def axes_of(name):
    """`E` and `I` among the letters of a stored tensor's axes."""
    last = name.rpartition(".")[2]
    if name.startswith("e"):
        return {"gate": "IH", "up": "IH", "down": "HI"}[last]
    return AXES[last]


def chunks_of(source, shape):
    """Chunks as Orbax makes them of arrays on a mesh: the shards."""
    each = {"E": E // shape[0], "I": INNER // shape[1]}
    return {
        name: tuple(each.get(letter, size) for letter, size in zip(axes_of(name), tensor.shape, strict=True))
        for name, tensor in source.tensors.items()
    }


def check_regions(watched, shape):
    """Each region lies in the shard of one device (or of its replicas), and each element is read once."""
    each = {"E": E // shape[0], "I": INNER // shape[1]}
    for name, index in watched.regions:
        for letter, part in zip(axes_of(name), index, strict=True):
            size = each.get(letter, part.stop)
            assert part.start // size == (part.stop - 1) // size, f"{name} {index} is in several shards"
    assert all((count == 1).all() for count in watched.read_counts.values())


def check_sizes(watched, shape):
    largest = 2 * E * H * INNER // math.prod(shape)
    assert watched.most <= largest < E * H * INNER, f"a device held {watched.most} elements, a shard has {largest}"
    assert watched.most == largest


def shards(shapes):
    """Loads from sources whose chunks are the shards, watched by the sources and by each step."""
    watching = []
    watch_steps(before=lambda: watching[-1].sample())
    checked = []
    with tempfile.TemporaryDirectory() as folder:
        for shape, layout in itertools.product(shapes, ("ours", "ken", "per expert", "orbax: a chunk per shard")):
            mesh = mesh_of(shape)
            if layout.startswith("orbax"):
                source, mapping = saved_from(mesh, f"{folder}/{shape}"), KEN | BIASES
                wanted = chunks_of(source, shape)
                assert all(source.tensors[name].chunk == wanted[name] for name in ("gate", "up", "down"))
                watched = ShardsInPlace(source)
            else:
                source, mapping = source_of(layout, folder)
                watched = Shards(source, chunks_of(source, shape))
            watching.append(watched)
            unit_bytes = 2**28 if layout in ("ours", "per expert") else 2**18
            arguments = {"mapping": mapping, "quantization": "fp8_per_channel", "unit_bytes": unit_bytes}
            check(quiet_load(declared(mesh), watched, **arguments).params, "fp8_per_channel", declared(mesh))
            check_regions(watched, shape)
            check_sizes(watched, shape)
            checked.append([shape, layout, len(watched.regions)])
        mesh = mesh_of(shape)
        whole = Shards(source_of("ken", folder)[0], dict.fromkeys(("gate", "up", "down"), (E, INNER, INNER)))
        watching.append(whole)
        quiet_load(declared(mesh), whole, mapping=KEN | BIASES)
        here = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
            declared(mesh),
        )
        watching.append(Shards(source_of("ken", folder)[0]))
        quiet_load(here, watching[-1], mapping=KEN | BIASES)
    print(
        json.dumps(
            [checked, fails(lambda: check_regions(whole, shape)), fails(lambda: check_sizes(watching[-1], shape))]
        )
    )


def saved_from(mesh, path):
    """The checkpoint of a training run on this mesh."""
    tree = dict(weights())
    w13, w2 = tree.pop("w13_weight"), tree.pop("w2_weight")
    tree |= {"gate": swapped(w13[:, 0]), "up": swapped(w13[:, 1]), "down": swapped(w2)}
    names = {"E": "expert", "I": "tensor"}
    specs = {name: PartitionSpec(*(names.get(letter) for letter in axes_of(name))) for name in tree}
    ocp.save(path, {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()})
    return open_source(path)


@pytest.mark.parametrize("shapes", [[(2, 4)], pytest.param([(2, 2), (4, 2), (8, 1), (1, 4)], marks=pytest.mark.slow)])
@pytest.mark.slow
def test_each_device_reads_its_own_shard(request, shapes):
    checked, *found = in_eight_devices(request, "test_meshes", "shards", shapes=shapes)
    assert len(checked) == 4 * len(shapes)
    assert found == [True, True]
