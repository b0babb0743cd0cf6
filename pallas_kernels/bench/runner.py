"""What the benches have in common: case after case, floors once, a row that says what failed, ours beside peers."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax

from pallas_kernels.bench import rows, timing
from pallas_kernels.bench.floors import Floors, Work, measure_floors
from pallas_kernels.bench.peers import Ready
from pallas_kernels.bench.problem import Call, Inputs
from pallas_kernels.bench.rows import Row, message
from pallas_kernels.implementations import NATIVE, Implementation

CPU_BYTES = 1e8  # of the arrays; larger cases are not run without an accelerator


class AnyCase(Work, Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """Of the rows."""
        ...

    @property
    def array_bytes(self) -> int:
        """Of the arrays that it needs."""
        ...


C = TypeVar("C", bound=AnyCase)


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


class Runner(abc.ABC, Generic[C]):
    """Runs cases one after the other; floors are measured once.

    Args:
      log: Called with a line about what is done.
      commit: For the rows, where this is no git checkout.
    """

    def __init__(self, *, log: Callable[[str], None], commit: str | None) -> None:
        self._log = log
        self._platform: str = jax.devices()[0].platform
        self._implementation: Implementation = NATIVE.get(self._platform, "xla")
        self._provenance = rows.provenance(commit)
        self._floors: Floors | None = None

    def run(self, cases: Sequence[C]) -> Iterator[list[Row]]:
        """The rows of each case, as soon as it is finished."""
        if self._platform == "gpu":
            self._measure_floors()
        for case in cases:
            start = time.monotonic()
            found = self._rows(case)
            try:
                if self._platform == "cpu" and case.array_bytes > CPU_BYTES:
                    raise RuntimeError(
                        f"no accelerator: a CPU runs cases of up to {CPU_BYTES / 1e6:.0f} MB, and this has "
                        f"{case.array_bytes / 1e6:.0f}"
                    )
                self._case(case, found)
            except Exception as error:  # such as too little memory: the other cases go on
                for row in found:
                    row.failure = row.failure or message(error)
            self._log(f"{case.name}: {_outcome(found)} ({time.monotonic() - start:.1f} s)")
            yield found

    @abc.abstractmethod
    def _rows(self, case: C) -> list[Row]:
        """The rows of a case, without results."""

    @abc.abstractmethod
    def _case(self, case: C, found: list[Row]) -> None:
        """Fills them in; what it raises is their failure."""

    def _row(self, op: str, case: C, shape: dict[str, Any], **fields: Any) -> Row:
        return Row(case=case.name, op=op, impl=self._implementation, shape=shape, **fields, **self._provenance)

    def _measure_floors(self) -> None:
        try:
            self._floors = floors = measure_floors()
        except Exception as error:  # rows then have no roofline
            self._log(f"no floors: {message(error)}")
        else:
            copy, rate = floors.copy_bytes_per_s / 1e12, floors.matmul_flops_per_s / 1e12
            self._log(f"floors: copy {copy:.2f} TB/s, dense bf16 matmul {rate:.0f} TF")

    def _ready_peers(
        self, case: C, names: Sequence[str], prepare: Callable[[str], Ready], others: PeerTimes
    ) -> dict[str, Ready]:
        """Those that can be timed; `others` has the reasons of the rest."""
        ready = {}
        for name in names:
            start = time.monotonic()
            try:
                ready[name] = prepare(name)
            except Exception as error:  # goes to the rows
                others.add(name, None, message(error))
            note = others.notes.get(name) or ready[name].note or "ready"
            self._log(f"{case.name} {name}: {note} ({time.monotonic() - start:.1f} s)")
        return ready

    def _time_loop(self, row: Row, call: Call, run: timing.Run, inputs: Inputs) -> None:
        """The time of a call inside a program of many; `run` is the compiled one."""
        try:
            expected_us = row.us or timing.wall_us(run, timing.FEW)
            row.us_loop = timing.loop_us(call, inputs, expected_us=expected_us)
        except Exception as error:  # the other times stand
            self._log(f"{row.case} {row.config or 'default'}: no loop: {message(error)}")

    def _compare(self, case: C, found: Sequence[Row], others: PeerTimes, *, speed: float = 1.0) -> None:
        """Fills in what the times are compared with; operations run at `speed` times the rate of dense bf16."""
        for row in found:
            row.peers, row.peer_notes = others.us, others.notes
            if row.us is not None:
                row.tflops, row.tb_per_s = case.flops / row.us / 1e6 or None, case.min_bytes / row.us / 1e6
            if self._floors is not None:
                row.roofline_us = self._floors.roofline_us(case, speed=speed)
                row.copy_tb_per_s = self._floors.copy_bytes_per_s / 1e12
                row.matmul_tflops = self._floors.matmul_flops_per_s / 1e12


def time_in_turn(ours: Sequence[tuple[Row, timing.Run]], ready: Mapping[str, Ready], others: PeerTimes) -> None:
    """Device times of our rows and of the peers, one call of each in turn."""
    runs = {f"ours {i}": run for i, (_, run) in enumerate(ours)}
    before = rows.clocks()
    times = timing.device_times(runs | {name: peer.run for name, peer in ready.items()})
    after = rows.clocks()
    for (row, _), result in zip(ours, (times[name] for name in runs), strict=True):
        row.clocks = {"before": before, "after": after}
        if isinstance(result, Exception):
            row.failure = message(result)
            continue
        for name, value in result._asdict().items():
            setattr(row, name, value)
    for name, peer in ready.items():
        result = times[name]
        if isinstance(result, Exception):
            others.add(name, None, message(result))
        else:
            others.add(name, result.us, peer.note)


def _outcome(found: Sequence[Row]) -> str:
    best = next((row for row in found if row.best), None)
    if best is None:
        return f"no time: {found[0].failure}"
    if best.us is None and best.us_loop is None:
        return f"{best.wall_us:.0f} us by the host's clock, which is no device time"
    others = ", ".join(f"{name} {us:.1f}" for name, us in best.peers.items() if us is not None)
    floor = "" if best.roofline_us is None else f", floor {best.roofline_us:.1f}"
    return f"{best.us or best.us_loop:.1f} us{floor}" + (f"; {others}" if others else "")
