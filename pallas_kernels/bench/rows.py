"""A row of the result, with where it comes from; null stands for what nobody measured."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
MAX_MESSAGE = 400  # characters


@dataclasses.dataclass(kw_only=True)
class Row:
    """One implementation of one operation on one case, with one config.

    Times are microseconds of one call. `us` is device time and there only where the result was right; `wall_us` is the
    host's clock, on machines without an accelerator, and compares with nothing else here.
    """

    case: str
    op: str
    impl: str
    shape: dict[str, Any]
    config: dict[str, Any] | None = None  # None: chosen by shape
    best: bool = False  # of the configs tried
    us: float | None = None  # median over calls of the sum of their kernels, cold L2
    us_p10: float | None = None
    us_p90: float | None = None
    us_kernel: float | None = None  # the longest kernel alone
    us_loop: float | None = None  # per call inside one program, gaps included
    wall_us: float | None = None
    kernel: str | None = None
    num_kernels: int | None = None
    repetitions: int | None = None
    kernels: Sequence[Sequence[Any]] | None = None  # [name, us] of each, in the middle call
    temp_bytes: int | None = None  # of the compiled program
    temp_limit_bytes: int | None = None
    tflops: float | None = None
    tb_per_s: float | None = None  # of the bytes that have to move
    roofline_us: float | None = None
    dense_us: float | None = None  # XLA, the same M, N and K with one expert
    copy_tb_per_s: float | None = None  # measured in this run, as the next
    matmul_tflops: float | None = None
    peers: dict[str, float | None] = dataclasses.field(default_factory=dict)
    peer_notes: dict[str, str] = dataclasses.field(default_factory=dict)  # their configs, or why there is no time
    error: float | None = None  # relative L2
    worst_row_error: float | None = None
    failure: str | None = None  # why there is no time
    clocks: dict[str, Any] | None = None
    device: str | None = None
    driver: str | None = None
    jax: str | None = None
    jaxlib: str | None = None
    cuda_plugin: str | None = None
    xla_flags: str | None = None  # they change how kernels are launched, and so `us_loop`
    commit: str | None = None
    date: str | None = None

    def to_json(self) -> str:
        """One line; raises ValueError rather than writing NaN or infinity."""
        return json.dumps(_rounded(dataclasses.asdict(self)), allow_nan=False)


def speed_key(row: Row) -> float:
    """What configs are compared by: device time where there is any."""
    times = (row.us, row.us_loop, row.wall_us)
    return next((time for time in times if time is not None), float("inf"))


def provenance(commit: str | None = None) -> dict[str, Any]:
    """The fields that are the same for all rows of a run; `commit` where this is no git checkout."""
    plugins = (version for name in CUDA_PLUGINS if (version := _version(name)) is not None)
    gpu = query_gpu("driver_version")
    return {
        "device": jax.devices()[0].device_kind,
        "driver": gpu[0] if gpu else None,
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "cuda_plugin": next(plugins, None),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "commit": commit or _git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def clocks() -> dict[str, Any] | None:
    """Clock of the multiprocessors, temperature and power of the first GPU now; None where nvidia-smi tells none."""
    values = query_gpu("clocks.sm,temperature.gpu,power.draw")
    return None if values is None else dict(zip(("sm_mhz", "celsius", "watts"), map(_number, values), strict=True))


def query_gpu(fields: str) -> list[str] | None:
    """What nvidia-smi says of the first GPU."""
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0")
    return [value.strip() for value in text.splitlines()[0].split(",")] if text else None


def message(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + " ..."


@functools.cache
def _git_commit() -> str | None:
    folder = str(Path(__file__).parent)
    commit = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit or None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _rounded(value: Any) -> Any:
    """Five digits are more than any of these numbers holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value
