"""Runs the search for tiles on an NVIDIA Hopper GPU: cell after cell, each with its share of the time that is left."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.activations import get_activation
from pallas_kernels.bench import gate, timing, tune
from pallas_kernels.bench.layer import LayerCase
from pallas_kernels.bench.layer_problem import LayerProblem, LayerWeights, make_layer_problem
from pallas_kernels.bench.rows import message
from pallas_kernels.bench.tune import Cell, Tiles
from pallas_kernels.fused_moe.experts import ExpertsCall
from pallas_kernels.fused_moe.pipeline import Prepared, first_call
from pallas_kernels.hopper import unsupported_here

RECORDINGS, RECORDINGS_OF_WINNER = 8, 16
CLOSE = 1e-2  # relative L2 between the results of two right configs
LAST_S = 15  # seconds of a cell that are kept for its winner


class Tuner:
    """Writes what it finds to a table after each cell.

    Args:
      out: The table; entries of other matmuls stay.
      limit_s: Seconds for all cells.
      log: Called with a line about what is done.

    Raises:
      ValueError: this is no Hopper GPU, or the file is no table.
    """

    def __init__(self, out: Path, *, limit_s: float, log: Callable[[str], None]) -> None:
        device = jax.devices()[0]
        if device.platform != "gpu" or unsupported_here() is not None:
            raise ValueError(f"tuning needs an NVIDIA Hopper GPU, and this is {device.device_kind}")
        self._out, self._log = out, log
        self._entries = tune.read_entries(out)
        self._end = time.monotonic() + limit_s
        self._facts = {"device": device.device_kind, "jax": jax.__version__}
        self._weights: LayerWeights | None = None

    def run(self, cases: Sequence[LayerCase]) -> int:
        """How many cells were measured: the others have their reason in the log."""
        done = 0
        for i, case in enumerate(cases):
            left = self._end - time.monotonic()
            if left <= 0:
                self._log(f"{case.name}: no time left")
                continue
            try:
                self._cell(case, time.monotonic() + left / (len(cases) - i))
                done += 1
            except Exception as error:  # such as too little memory: the other cells go on
                self._log(f"{case.name}: not tuned: {message(error)}")
        return done

    def _cell(self, case: LayerCase, end: float) -> None:
        trial = Trial(case, self._problem(case))

        def log(line: str) -> None:
            self._log(f"{case.name}: {line}")

        measured = tune.search(trial.cell, trial.measure, left_s=lambda: end - LAST_S - time.monotonic(), log=log)
        winner, new = tune.choose(trial.cell, measured), list[dict[str, Any]]()
        if winner is not None:
            us, default_us, reason = trial.compare(winner)
            log(f"{winner}: {us:.1f} us beside {default_us:.1f} of the default; {reason or 'taken'}")
            if reason is None:
                facts = {"us": round(us, 2), "default_us": round(default_us, 2), **self._facts}
                new = tune.entries_of(trial.cell, winner, **facts)
        else:
            log("nothing is better than the default by enough")
        self._entries = tune.merged(self._entries, new, trial.cell)
        tune.write_entries(self._out, self._entries)

    def _problem(self, case: LayerCase) -> LayerProblem:
        if self._weights is None or not self._weights.fit(case):
            self._weights = None  # the last ones make room first
            self._weights = LayerWeights(case)
        return make_layer_problem(case, self._weights)


class Trial:
    """The experts of a case, their rows sorted once, with any tiles."""

    def __init__(self, case: LayerCase, problem: LayerProblem) -> None:
        (x, topk_weights), ids = problem.inputs.x, problem.inputs.integers
        prepare = functools.partial(
            pallas_kernels.prepare, num_experts=case.model.num_experts, activation_format=case.scheme.activations
        )
        self._prepared: Prepared = jax.block_until_ready(jax.jit(prepare)(x, topk_weights, ids))
        self._weights = problem.inputs.weights
        self._runners: dict[Tiles, timing.Run] = {}
        w13, w2 = self._weights[0]
        first = first_call(self._prepared, w13, None, get_activation("silu"), self._prepared.activation_format)
        self.cell = Cell(ExpertsCall(first=first, w2=w2, bias=None, dtype=self._prepared.dtype))

    def measure(self, tiles: Tiles) -> tuple[float, ...]:
        """Microseconds of the matmuls: the median of their time on the device, the cache cold."""
        samples = [matmul_us(kernels) for kernels in _record([self._runner(tiles)], RECORDINGS)[0]]
        return tuple(statistics.median(us) for us in zip(*samples, strict=True))

    def compare(self, tiles: Tiles) -> tuple[float, float, str | None]:
        """Microseconds of all kernels between sort and combine with these tiles and with the default, taken in turn.

        And why not to take these tiles, if so.
        """
        runs = [self._runner(each) for each in (tiles, self.cell.default)]
        error = gate.errors_of(*(run(0).astype(jnp.float32) for run in runs)).batch
        recorded = _record(runs, RECORDINGS_OF_WINNER)
        us, default_us = (statistics.median(sum(each.durations_us) for each in kernels) for kernels in recorded)
        if not error < CLOSE:
            return us, default_us, f"wrong: relative L2 {error:.1e} between the two"
        if not tune.wins(us, default_us, same_plan=tiles.w13.block_m == self.cell.block_m):
            return us, default_us, "not better by enough side by side"
        return us, default_us, None

    def _runner(self, tiles: Tiles) -> timing.Run:
        """Compiled, and run once."""
        if tiles in self._runners:
            return self._runners[tiles]
        call = functools.partial(pallas_kernels.run_experts, implementation="mosaic_gpu", config=tiles.config)
        compiled = jax.jit(call).lower(self._prepared, *self._weights[0]).compile()

        def run(turn: int) -> jax.Array:
            out: jax.Array = compiled(self._prepared, *self._weights[turn % len(self._weights)])
            return out

        jax.block_until_ready(run(0))
        self._runners[tiles] = run
        return run


def matmul_us(kernels: timing.Kernels) -> tuple[float, ...]:
    """The times of the one launch for both matmuls, or of the two."""
    us = tuple(us for name, us in zip(*kernels, strict=True) if "grouped_matmul" in name)
    if len(us) not in (1, 2):
        raise RuntimeError(f"{len(us)} matmuls among the kernels {', '.join(kernels.names)}")
    return us


def _record(runs: Sequence[timing.Run], recordings: int) -> list[list[timing.Kernels]]:
    """What each launches, as often; the runs take turns."""
    flush, record = timing.l2_flush(), timing.kernel_recorder()
    found: list[list[timing.Kernels]] = [[] for _ in runs]
    for turn in range(recordings):
        for run, taken in zip(runs, found, strict=True):
            flush()
            taken.append(record(functools.partial(run, turn)))
    return found
