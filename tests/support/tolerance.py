"""How far a result may be from the definition."""

import numpy as np


def assert_close(actual, expected, *, batch: float, worst_row: float) -> None:
    """Relative L2 error of the whole, and of the worst row along the last axis; any NaN or infinity fails.

    A row that is zero in `expected` must be zero in `actual`. An elementwise tolerance would pass small outputs
    whatever they are.
    """
    actual, expected = (np.asarray(v).astype(np.float64) for v in (actual, expected))
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{np.count_nonzero(~np.isfinite(actual))} values are not finite"
    error, norm = (np.sqrt(np.sum(v**2, axis=-1)) for v in (actual - expected, expected))
    empty = norm == 0
    assert not error[empty].any(), "rows that should be zero are not"
    if empty.all():
        return
    whole, rows = np.linalg.norm(error) / np.linalg.norm(norm), error[~empty] / norm[~empty]
    assert whole <= batch, f"relative L2 error {whole:.2e} of the batch exceeds {batch:.2e}"
    assert rows.max() <= worst_row, f"relative L2 error {rows.max():.2e} of the worst row exceeds {worst_row:.2e}"


def assert_same_bits(actual, expected) -> None:
    """The same dtype, shape and bytes: unlike `==`, tells -0 from 0 and takes a NaN for equal to itself."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    bits = np.dtype(f"uint{expected.dtype.itemsize * 8}")
    different = actual.view(bits) != expected.view(bits)
    where = tuple(int(i[0]) for i in np.nonzero(different)) if different.any() else ()
    assert not different.any(), (
        f"{np.count_nonzero(different)} of {different.size} differ, first at {where}: "
        f"{actual[where]!r}, expected {expected[where]!r}"
    )
