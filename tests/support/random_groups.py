"""Groups of rows as routing makes them, and worse."""

import numpy as np


def random_groups(rng, m):
    """`(experts, sizes, offset)`: skewed sizes, with empty groups and rows of no expert; at times experts elsewhere."""
    groups = int(rng.integers(1, 33))
    offset = int(rng.integers(0, groups)) if rng.random() < 0.3 else None
    experts = groups if offset is None else int(rng.integers(1, groups - offset + 1))
    share = rng.dirichlet(np.full(groups + 1, rng.choice([0.1, 1.0, 10.0])))
    sizes = np.bincount(rng.choice(groups + 1, size=m, p=share), minlength=groups + 1)[:groups].astype(np.int32)
    return experts, sizes, offset
