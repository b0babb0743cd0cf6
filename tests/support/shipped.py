"""The checkpoint that ships with the library, loaded as a user would load it."""

import functools

import numpy as np

from moe_online import models
from moe_online.assets import HELDOUT_TEXT
from moe_online.assets import PYTHON_MOE_7M as SHIPPED


@functools.cache
def heldout() -> np.ndarray:
    """Its held-out text, uint8."""
    return np.frombuffer(HELDOUT_TEXT.read_bytes(), np.uint8)


def load_shipped(scheme):
    """The decoder under a scheme."""
    return models.load(SHIPPED, quantization=scheme, progress=False).model
