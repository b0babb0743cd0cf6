"""How large a declaration is."""

import math

import jax
import numpy as np


def nbytes(tree) -> int:
    """Bytes of the arrays, or `ShapeDtypeStruct`s, of a tree."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
