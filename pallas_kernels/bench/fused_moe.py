"""The bench of `pallas_kernels.fused_moe`: a whole routed FFN, right first, then timed beside peers and its floor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.bench import gate, layer_peers, runner, timing
from pallas_kernels.bench.layer import LayerCase
from pallas_kernels.bench.layer_problem import LayerProblem, LayerWeights, layer_call, make_layer_problem, reference
from pallas_kernels.bench.rows import Row


class LayerBench(runner.Runner[LayerCase]):
    """One row for each case.

    Args:
      peer_names: Of `layer_peers.EVERYTHING`.
      xla_seconds: What a call of the peer `"xla"` may take; where it takes longer, it is not timed.
      log: Called with a line about what is done.
      commit: For the rows, where this is no git checkout.
    """

    def __init__(
        self,
        peer_names: Sequence[str],
        *,
        xla_seconds: float,
        log: Callable[[str], None],
        commit: str | None,
    ) -> None:
        super().__init__(log=log, commit=commit)
        self._peer_names, self._xla_seconds = peer_names, xla_seconds
        self._weights: LayerWeights | None = None

    def _rows(self, case: LayerCase) -> list[Row]:
        shape = {"model": case.model_name, "scheme": case.scheme_name, "tokens": case.tokens, **case.model._asdict()}
        shape |= {"experts_hit": case.experts_hit, "routing": case.routing, "seed": case.seed}
        return [self._row("fused_moe", case, shape)]

    def _case(self, case: LayerCase, found: list[Row]) -> None:
        (row,) = found
        problem = self._problem(case)
        inputs, call = problem.inputs, layer_call(case, self._implementation)
        compiled = jax.jit(call).lower(inputs.x, inputs.weights[0], inputs.integers).compile()
        row.temp_bytes, row.temp_limit_bytes = temp_bytes(compiled), case.temp_limit_bytes
        run = inputs.turns(compiled)
        expected, xla_seconds = reference(problem)
        row.error, row.worst_row_error = gate.check(run, expected, case.scheme.limits)
        self._log(f"{case.name}: right, relative L2 {row.error:.2e}")
        if self._platform == "gpu":
            others = runner.PeerTimes()
            prepare = functools.partial(
                layer_peers.prepare,
                problem=problem,
                expected=expected,
                xla_seconds=xla_seconds,
                limit_seconds=self._xla_seconds,
            )
            ready = self._ready_peers(case, self._peer_names, prepare, others)
            runner.time_in_turn([(row, run)], ready, others)
            self._compare(case, found, others, speed=case.scheme.matmul_speed)
        else:
            row.wall_us = timing.wall_us(run)
        if self._platform != "cpu":
            self._time_loop(row, call, run, inputs)
        row.best = row.failure is None

    def _problem(self, case: LayerCase) -> LayerProblem:
        if self._weights is None or not self._weights.fit(case):
            self._weights = None  # the last ones make room first
            self._weights = LayerWeights(case)
        return make_layer_problem(case, self._weights)


def temp_bytes(compiled: Any) -> int | None:
    """What a program takes beside arguments and results; None where the compiler does not say."""
    analysis = compiled.memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", None)
