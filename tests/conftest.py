"""Settings of every test: our code must pass where JAX converts no dtype and adds no axis by itself."""

import os

os.environ.setdefault("NPROC", "32")  # XLA's threads on a CPU: on few the interpreter of GPU kernels waits for ever

import jax


def pytest_configure():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
