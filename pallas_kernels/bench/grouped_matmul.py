"""The bench of `pallas_kernels.grouped_matmul`: each case, each config, each peer; right first, then timed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

import pallas_kernels
from pallas_kernels.bench import gate, peers, rows, runner, timing
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.floors import dense_us
from pallas_kernels.bench.problem import GroupedMatmul, Problem, make_problem
from pallas_kernels.bench.rows import Row, message
from pallas_kernels.bench.torch_peer import TorchPeer
from pallas_kernels.implementations import Implementation

CONFIG_CLASSES: dict[Implementation, str] = {"mosaic_gpu": "MosaicGpuConfig", "mosaic_tpu": "MosaicTpuConfig"}

Config = dict[str, Any] | None  # arguments of the implementation's config; None: it chooses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config of ours whose result is right, and the row that its times go to."""

    row: Row
    call: GroupedMatmul  # traceable
    run: timing.Run  # compiled


class Bench(runner.Runner[Case]):
    """Each case with each config.

    Args:
      configs: Tried on each case.
      peer_names: Of `peers.EVERYTHING`.
      log: Called with a line about what is done.
      commit: For the rows, where this is no git checkout.
    """

    def __init__(
        self, configs: Sequence[Config], peer_names: Sequence[str], *, log: Callable[[str], None], commit: str | None
    ) -> None:
        super().__init__(log=log, commit=commit)
        self._configs, self._peer_names = configs, peer_names
        self._torch = TorchPeer()

    def run(self, cases: Sequence[Case]) -> Iterator[list[Row]]:
        """The rows of each case, as soon as it is finished."""
        try:
            yield from super().run(cases)
        finally:
            self._torch.close()

    def _rows(self, case: Case) -> list[Row]:
        shape: dict[str, Any] = {"m": case.m, "n": case.n, "k": case.k, "num_experts": len(case.group_sizes)}
        shape |= {"experts_hit": case.experts_hit, "routing": case.routing, "seed": case.seed}
        return [self._row("grouped_matmul", case, shape, config=config) for config in self._configs]

    def _case(self, case: Case, found: list[Row]) -> None:
        problem = make_problem(case)
        expected = jax.block_until_ready(gate.reference(problem))
        candidates = [right for row in found if (right := self._checked(row, problem, expected)) is not None]
        if self._platform == "gpu":
            self._time_on_gpu(case, found, candidates, problem, expected)
        else:
            for candidate in candidates:
                candidate.row.wall_us = timing.wall_us(candidate.run)
        if self._platform == "tpu":
            self._time_loops(candidates, problem)
        fastest = min(found, key=rows.speed_key)
        fastest.best = math.isfinite(rows.speed_key(fastest))

    def _checked(self, row: Row, problem: Problem, expected: jax.Array) -> Candidate | None:
        """Compiles and checks a config; None, with the reason in its row, where that fails."""
        start, name = time.monotonic(), f"{row.case} {row.config or 'default'}"
        try:
            call = self._call(row.config)
            run = problem.inputs.turns(jax.jit(call))
            row.error, row.worst_row_error = gate.check(run, expected)
        except Exception as error:  # goes to the row
            row.failure = message(error)
            self._log(f"{name}: FAILED: {row.failure}")
            return None
        self._log(f"{name}: right, relative L2 {row.error:.2e} ({time.monotonic() - start:.1f} s)")
        return Candidate(row=row, call=call, run=run)

    def _call(self, config: Config) -> GroupedMatmul:
        chosen = None
        if config is not None:
            if self._implementation not in CONFIG_CLASSES:
                raise ValueError(f"{self._implementation!r} takes no config")
            module = importlib.import_module(f"pallas_kernels.grouped_matmul.{self._implementation}")
            chosen = getattr(module, CONFIG_CLASSES[self._implementation])(**config)

        def call(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
            out = pallas_kernels.grouped_matmul(x, w, sizes, implementation=self._implementation, config=chosen)
            assert isinstance(out, jax.Array)
            return out

        return call

    def _time_on_gpu(
        self,
        case: Case,
        found: Sequence[Row],
        candidates: Sequence[Candidate],
        problem: Problem,
        expected: jax.Array,
    ) -> None:
        """Candidates and peers in turn; then loops; then torch, which has the device for itself meanwhile."""
        others = runner.PeerTimes()
        here = [name for name in self._peer_names if name != peers.TORCH]
        prepare = functools.partial(peers.prepare, problem=problem, expected=expected)
        ready = self._ready_peers(case, here, prepare, others)
        runner.time_in_turn([(candidate.row, candidate.run) for candidate in candidates], ready, others)
        self._time_loops(candidates, problem)
        if peers.TORCH in self._peer_names:
            self._time_torch(problem, others)
        self._compare(case, found, others)
        try:
            dense = dense_us(case.m, case.n, case.k)
        except Exception as error:  # the rest stands
            self._log(f"{case.name}: no dense matmul: {message(error)}")
        else:
            for row in found:
                row.dense_us = dense

    def _time_loops(self, candidates: Sequence[Candidate], problem: Problem) -> None:
        for candidate in candidates:
            self._time_loop(candidate.row, candidate.call, candidate.run, problem.inputs)

    def _time_torch(self, problem: Problem, others: runner.PeerTimes) -> None:
        start = time.monotonic()
        try:
            if not peers.installed("torch"):
                raise RuntimeError("torch is not installed")
            others.add(peers.TORCH, *self._torch.time(problem))
        except Exception as error:  # goes to the rows
            others.add(peers.TORCH, None, message(error))
        note = others.notes[peers.TORCH]
        self._log(f"{problem.case.name} {peers.TORCH}: {note} ({time.monotonic() - start:.1f} s)")
