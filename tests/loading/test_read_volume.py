"""No byte is read twice: what the system handed over while a checkpoint was loaded, against what its files hold.

In a process of its own, where a CPU counts as eight devices: a test calls the function of its name there.
"""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from eight_devices import in_eight_devices
from moe_online.experts import abstract_experts
from moe_online.loading import reader
from process_memory import needs_linux
from sources import BF16, quiet_load, swapped
from tolerance import assert_same_bits

pytestmark = needs_linux
LAYERS, E, H, INNER = 2, 8, 160, 256  # 3.9 MB of random bits, which do not compress
LIMIT = 1.02  # times the size of all files
ACROSS = {3: (3, 100, 256), 4: (2, 3, 160, 100)}  # chunks, by rank, that end where neither experts nor shards do
APART = {
    "l{L}.gate": "E K N -> l{L}.w13_weight.gate",
    "l{L}.up": "E N K -> l{L}.w13_weight.up",
    "l{L}.down": "E K N -> l{L}.w2_weight",
}
SCANNED = {
    "wi_0": "L E K N -> l{L}.w13_weight.gate",
    "wi_1": "E L N K -> l{L}.w13_weight.up",
    "wo": "L E K N -> l{L}.w2_weight",
}
SINGLE = {
    "l{L}.{E}.gate": "K N -> l{L}.w13_weight.gate",
    "l{L}.{E}.up": "N K -> l{L}.w13_weight.up",
    "l{L}.{E}.down": "N K -> l{L}.w2_weight",
}
RULES = {"apart": APART, "scanned": SCANNED, "per expert": SINGLE}
KINDS = (
    *(("orbax", layout, chunks) for layout in ("apart", "scanned") for chunks in ("one chunk", "experts", "across")),
    *(("safetensors", layout, "files") for layout in RULES),
)


def weights():
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return (rng.integers(0, 2**16, shape, np.uint16) & 0xBFFF).view(BF16)  # magnitudes below 2

    return [(tensor(E, 2, INNER, H), tensor(E, H, INNER)) for _ in range(LAYERS)]


def stored(layout, layers):
    if layout == "scanned":
        w13, w2 = (np.stack(each) for each in zip(*layers, strict=True))
        up = np.ascontiguousarray(np.swapaxes(w13[:, :, 1], 0, 1))
        return {"wi_0": swapped(w13[:, :, 0]), "wi_1": up, "wo": swapped(w2)}
    found = {}
    for layer, (w13, w2) in enumerate(layers):
        if layout == "apart":
            found |= {f"l{layer}.gate": swapped(w13[:, 0]), f"l{layer}.up": w13[:, 1].copy()}
            found |= {f"l{layer}.down": swapped(w2)}
            continue
        for e in range(E):
            name = f"l{layer}.{e}"
            found |= {f"{name}.gate": swapped(w13[e, 0]), f"{name}.up": w13[e, 1].copy(), f"{name}.down": w2[e]}
    return found


def saved(kind, layers, folder):
    """Writes a checkpoint; returns the bytes of its files."""
    library, layout, chunks = kind
    tensors = stored(layout, layers)
    if library == "safetensors":
        folder.mkdir()
        for i in range(2):
            save_file(dict(list(tensors.items())[i::2]), folder / f"{i}.safetensors")
    else:
        context = ocp.Context()
        context.array.saving.use_ocdbt = chunks != "across"
        if chunks == "experts":
            context.array.saving.storage_options.chunk_byte_size = 2 * H * INNER
            context.array.saving.storage_options.shard_axes = (0, 1) if layout == "scanned" else (0,)
        with context:
            ocp.save(folder, tensors)
        if chunks == "across":
            for name, x in tensors.items():
                spec = {"driver": "zarr3", "kvstore": f"file://{folder}/state/{name}/"}
                layout_of_chunks = ts.ChunkLayout(chunk_shape=ACROSS[x.ndim])
                made = ts.open(
                    spec,
                    create=True,
                    delete_existing=True,
                    dtype="bfloat16",
                    shape=x.shape,
                    chunk_layout=layout_of_chunks,
                )
                made.result()[...] = x
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bytes_read():
    """By this process, from files of any kind."""
    [line] = [line for line in pathlib.Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def volumes(folder, kinds, shapes, unit_bytes):
    """Loads each kind of checkpoint onto each mesh; prints what was read, by what there is."""
    layers, found = weights(), []
    for i, kind in enumerate(kinds):
        path = pathlib.Path(folder) / str(i)
        size = saved(kind, layers, path)
        for shape in shapes:
            mesh = None
            if shape is not None:
                mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), ("expert", "tensor"))
            abstract = {f"l{layer}": abstract_experts(E, H, INNER, BF16, mesh=mesh) for layer in range(LAYERS)}
            arguments = {"mapping": RULES[kind[1]], "unit_bytes": unit_bytes}
            if not found:
                quiet_load(abstract, path, **arguments)  # Python reads modules too, when they are first needed
            before = bytes_read()
            params = quiet_load(abstract, path, **arguments).params
            found.append([(bytes_read() - before) / size, kind, shape])
            for layer, (w13, w2) in enumerate(layers):
                assert_same_bits(params[f"l{layer}"].w13_weight, w13)
                assert_same_bits(params[f"l{layer}"].w2_weight, w2)
    print(json.dumps(found))


def forgetful(**arguments):
    """The same by a reader that keeps nothing for the units that follow."""
    reader.Shared.find = lambda self, read: None
    volumes(**arguments)


@pytest.mark.parametrize(
    ("shapes", "unit_bytes"),
    [
        ([(4, 2)], 2**17),
        *(pytest.param(s, u, marks=pytest.mark.slow) for s in ([None], [(2, 4)], [(8, 1)]) for u in (1, 2**17, 2**28)),
    ],
)
def test_every_byte_is_read_once(request, tmp_path, shapes, unit_bytes):
    arguments = {"folder": str(tmp_path), "kinds": KINDS, "shapes": shapes, "unit_bytes": unit_bytes}
    found = in_eight_devices(request, "test_read_volume", "volumes", **arguments)
    assert len(found) == len(KINDS) * len(shapes)
    assert all(0.98 < ratio <= LIMIT for ratio, *_ in found), found


@pytest.mark.slow
def test_a_reader_that_forgets_is_noticed(request, tmp_path):
    kinds = [kind for kind in KINDS if kind[2] in ("one chunk", "across")]
    arguments = {"folder": str(tmp_path), "kinds": kinds, "shapes": [(4, 2)], "unit_bytes": 2**17}
    found = in_eight_devices(request, "test_read_volume", "forgetful", **arguments)
    assert all(ratio > LIMIT for ratio, *_ in found), found
