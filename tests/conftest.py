"""Settings of every test: our code must pass where JAX converts no dtype and adds no axis by itself."""

import importlib.metadata
import os

if importlib.metadata.version("jax").split(".")[:2] >= ["0", "11"]:  # has an interpreter of GPU kernels
    os.environ.setdefault("NPROC", "32")  # XLA's threads on a CPU: on few that interpreter waits for ever

import jax


def pytest_configure():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
