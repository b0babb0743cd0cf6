"""8-bit codes that the Hopper kernels multiply."""

import numpy as np

PAIRS = (  # weights, rows
    ("fp8_per_block", "fp8_per_group"),
    ("fp8_per_channel", "fp8_per_token"),
    ("fp8_per_channel", "fp8_per_tensor_dynamic"),
    ("fp8_per_tensor", "fp8_per_token"),
    ("fp8_per_tensor", "fp8_per_tensor_dynamic"),
    ("int8_per_channel", "int8_per_token"),
)


def real(q):
    """What codes and scales stand for, multiplied out in float64."""
    n, k = q.values.shape[-2:]
    bn, bk = q.format.block
    scales = np.swapaxes(np.asarray(q.scales, np.float64), -1, -2)
    scales = scales.repeat(bn or n, axis=-2)[..., :n, :].repeat(bk or k, axis=-1)[..., :k]
    return np.asarray(q.values).astype(np.float64) * scales
