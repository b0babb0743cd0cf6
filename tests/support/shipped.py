"""The checkpoint that ships with the library, loaded as a user would load it."""

import functools
import json
import pathlib

import numpy as np
from flax import nnx

import moe_online
from moe_online.assets import train
from moe_online.models.decoder import Decoder, DecoderConfig

SHIPPED = pathlib.Path(train.__file__).absolute().parent / "python-moe-7m"
MAPPING = {
    "*.moe.router": "-> *.moe.router.kernel",
    "*.moe.w_gate": "E K N -> *.moe.experts.w13_weight.gate",
    "*.moe.w_up": "E K N -> *.moe.experts.w13_weight.up",
    "*.moe.w_down": "E K N -> *.moe.experts.w2_weight",
}


@functools.cache
def heldout() -> np.ndarray:
    """Its held-out text, uint8."""
    return np.frombuffer((SHIPPED / "heldout.txt").read_bytes(), np.uint8)


def abstract_decoder() -> Decoder:
    config = DecoderConfig.from_json(json.loads((SHIPPED / "config.json").read_text()))
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def load_shipped(scheme, **arguments) -> moe_online.LoadResult:
    arguments = {"prefix": "params", "mapping": MAPPING, "quantization": scheme, "progress": False} | arguments
    return moe_online.load(abstract_decoder(), SHIPPED / "checkpoint", **arguments)
