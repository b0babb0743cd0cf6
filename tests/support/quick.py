"""Parameters of which `.ci/run` takes a few, and `.ci/run --full` all."""

import pytest

FORMATS = ("fp8_per_block", "int8_per_channel", "nvfp4", "mxfp8")  # one of each way to scale


def few(values, quick=FORMATS):
    """The same values; all but the quick ones are marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def few_cases(values, quick):
    """The same for values of several parameters at once."""
    return [value if value in quick else pytest.param(*value, marks=pytest.mark.slow) for value in values]
