"""Settings of every test: our code must pass where JAX converts no dtype and adds no axis by itself."""

import pathlib
import sys

import jax

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # `tests.tolerance`, also where `pytest` is run without `-m`


def pytest_configure():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
