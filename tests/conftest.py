"""Settings of every test: our code must pass where JAX converts no dtype and adds no axis by itself.

The interpreter of GPU kernels waits for ever where XLA has few threads, and on many threads times mean nothing: so
tests that measure time run in a session of their own, `pytest -m timing`, where jax has that interpreter.
"""

import os

import jax
import pytest

HAS_GPU_INTERPRETER = jax.__version_info__[:2] >= (0, 11)


def _times(config):
    expression = config.option.markexpr
    return not HAS_GPU_INTERPRETER or ("timing" in expression and "not timing" not in expression)


def pytest_configure(config):
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if not _times(config):
        os.environ.setdefault("NPROC", "32")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_go_with_their_tests():
    """A process may have 65,530 maps of memory on Linux: programs of a thousand tests take all of them."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(config, items):
    if not _times(config):
        skip = pytest.mark.skip(reason="measures time, and XLA has 32 threads here: pytest -m timing")
        for item in items:
            if "timing" in item.keywords:
                item.add_marker(skip)
