"""The bench of `pallas_kernels.grouped_matmul`: each case, each config, each peer; right first, then timed."""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

import pallas_kernels
from pallas_kernels.bench import gate, peers, rows, timing
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.floors import Floors, dense_us, measure_floors
from pallas_kernels.bench.problem import GroupedMatmul, Problem, make_problem
from pallas_kernels.bench.rows import Row, message
from pallas_kernels.bench.torch_peer import TorchPeer
from pallas_kernels.implementations import NATIVE, Implementation

CONFIG_CLASSES: dict[Implementation, str] = {"mosaic_gpu": "MosaicGpuConfig", "mosaic_tpu": "MosaicTpuConfig"}
CPU_BYTES = 1e8  # of the arrays; larger cases are not run without an accelerator

Config = dict[str, Any] | None  # arguments of the implementation's config; None: it chooses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config of ours whose result is right, and the row that its times go to."""

    row: Row
    call: GroupedMatmul  # traceable
    run: timing.Run  # compiled


@dataclasses.dataclass(frozen=True)
class PeerTimes:
    """What the peers took, and their configs or why there is no time; the same in all rows of a case."""

    us: dict[str, float | None] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, name: str, us: float | None, note: str) -> None:
        """One peer."""
        self.us[name] = us
        if note:
            self.notes[name] = note


class Bench:
    """Runs cases one after the other; floors are measured once.

    Args:
      configs: Tried on each case.
      peer_names: Of `peers.choose`.
      log: Called with a line about what is done.
      commit: For the rows, where this is no git checkout.
    """

    def __init__(
        self, configs: Sequence[Config], peer_names: Sequence[str], *, log: Callable[[str], None], commit: str | None
    ) -> None:
        self._configs, self._peer_names, self._log = configs, peer_names, log
        self._platform: str = jax.devices()[0].platform
        self._implementation: Implementation = NATIVE.get(self._platform, "xla")
        self._provenance = rows.provenance(commit)
        self._torch = TorchPeer()
        self._floors: Floors | None = None

    def run(self, cases: Sequence[Case]) -> Iterator[list[Row]]:
        """The rows of each case, as soon as it is finished."""
        if self._platform == "gpu":
            self._measure_floors()
        try:
            for case in cases:
                start = time.monotonic()
                found = [self._row(case, config) for config in self._configs]
                try:
                    self._case(case, found)
                except Exception as error:  # such as too little memory: the other cases go on
                    for row in found:
                        row.failure = row.failure or message(error)
                self._log(f"{case.name}: {_outcome(found)} ({time.monotonic() - start:.1f} s)")
                yield found
        finally:
            self._torch.close()

    def _measure_floors(self) -> None:
        try:
            self._floors = floors = measure_floors()
        except Exception as error:  # rows then have no roofline
            self._log(f"no floors: {message(error)}")
        else:
            copy, rate = floors.copy_bytes_per_s / 1e12, floors.matmul_flops_per_s / 1e12
            self._log(f"floors: copy {copy:.2f} TB/s, dense bf16 matmul {rate:.0f} TF")

    def _row(self, case: Case, config: Config) -> Row:
        shape: dict[str, Any] = {"m": case.m, "n": case.n, "k": case.k, "num_experts": len(case.group_sizes)}
        shape |= {"experts_hit": case.experts_hit, "routing": case.routing, "seed": case.seed}
        row = Row(case=case.name, op="grouped_matmul", impl=self._implementation, shape=shape, config=config)
        return dataclasses.replace(row, **self._provenance)

    def _case(self, case: Case, found: list[Row]) -> None:
        if self._platform == "cpu" and case.array_bytes > CPU_BYTES:
            limit, needed = CPU_BYTES / 1e6, case.array_bytes / 1e6
            raise RuntimeError(f"no accelerator: a CPU runs cases of up to {limit:.0f} MB, and this has {needed:.0f}")
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
            compiled = jax.jit(call)
            row.error, row.worst_row_error = gate.check(compiled, problem, problem.weights, expected)
        except Exception as error:  # goes to the row
            row.failure = message(error)
            self._log(f"{name}: FAILED: {row.failure}")
            return None
        self._log(f"{name}: right, relative L2 {row.error:.2e} ({time.monotonic() - start:.1f} s)")
        return Candidate(row=row, call=call, run=problem.turns(compiled, problem.weights))

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
        others = PeerTimes()
        ready = self._ready_peers(problem, expected, others)
        runs = {f"candidate {i}": candidate.run for i, candidate in enumerate(candidates)}
        before = rows.clocks()
        times = timing.device_times(runs | {name: peer.run for name, peer in ready.items()})
        after = rows.clocks()
        for candidate, result in zip(candidates, (times[name] for name in runs), strict=True):
            candidate.row.clocks = {"before": before, "after": after}
            _fill(candidate.row, result)
        for name, peer in ready.items():
            result = times[name]
            if isinstance(result, Exception):
                others.add(name, None, message(result))
            else:
                others.add(name, result.us, peer.note)
        self._time_loops(candidates, problem)
        if peers.TORCH in self._peer_names:
            self._time_torch(problem, others)
        self._compare(case, found, others)

    def _ready_peers(self, problem: Problem, expected: jax.Array, others: PeerTimes) -> Mapping[str, peers.Ready]:
        ready = {}
        for name in self._peer_names:
            if name == peers.TORCH:
                continue
            start = time.monotonic()
            try:
                ready[name] = peers.prepare(name, problem, expected)
            except Exception as error:  # goes to the rows
                others.add(name, None, message(error))
            note = others.notes.get(name) or ready[name].note or "ready"
            self._log(f"{problem.case.name} {name}: {note} ({time.monotonic() - start:.1f} s)")
        return ready

    def _time_loops(self, candidates: Sequence[Candidate], problem: Problem) -> None:
        for candidate in candidates:
            row = candidate.row
            try:
                expected_us = row.us or timing.wall_us(candidate.run, timing.FEW)
                row.us_loop = timing.loop_us(candidate.call, problem, expected_us=expected_us)
            except Exception as error:  # the other times stand
                self._log(f"{row.case} {row.config or 'default'}: no loop: {message(error)}")

    def _time_torch(self, problem: Problem, others: PeerTimes) -> None:
        start = time.monotonic()
        try:
            if not peers.installed("torch"):
                raise RuntimeError("torch is not installed")
            others.add(peers.TORCH, *self._torch.time(problem))
        except Exception as error:  # goes to the rows
            others.add(peers.TORCH, None, message(error))
        note = others.notes[peers.TORCH]
        self._log(f"{problem.case.name} {peers.TORCH}: {note} ({time.monotonic() - start:.1f} s)")

    def _compare(self, case: Case, found: Sequence[Row], others: PeerTimes) -> None:
        """Fills in what the times are compared with."""
        try:
            dense = dense_us(case.m, case.n, case.k)
        except Exception as error:  # the rest stands
            dense = None
            self._log(f"{case.name}: no dense matmul: {message(error)}")
        for row in found:
            row.peers, row.peer_notes, row.dense_us = others.us, others.notes, dense
            if row.us is not None:
                row.tflops, row.tb_per_s = case.flops / row.us / 1e6, case.min_bytes / row.us / 1e6
            if self._floors is not None:
                row.roofline_us = self._floors.roofline_us(case)
                row.copy_tb_per_s = self._floors.copy_bytes_per_s / 1e12
                row.matmul_tflops = self._floors.matmul_flops_per_s / 1e12


def _fill(row: Row, result: timing.Times | Exception) -> None:
    if isinstance(result, Exception):
        row.failure = message(result)
        return
    for name, value in result._asdict().items():
        setattr(row, name, value)


def _outcome(found: Sequence[Row]) -> str:
    best = next((row for row in found if row.best), None)
    if best is None:
        return f"no time: {found[0].failure}"
    if best.us is None and best.us_loop is None:
        return f"{best.wall_us:.0f} us by the host's clock, which is no device time"
    others = ", ".join(f"{name} {us:.1f}" for name, us in best.peers.items() if us is not None)
    floor = "" if best.roofline_us is None else f", floor {best.roofline_us:.1f}"
    return f"{best.us or best.us_loop:.1f} us{floor}" + (f"; {others}" if others else "")
