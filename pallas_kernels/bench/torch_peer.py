"""torch's grouped matmul, in a process of its own: each framework has its own memory and its own CUDA libraries.

The parent writes one request per line and reads one answer per line, both JSON. The child draws its own data, checks
the result and times replays of a CUDA graph of several calls over rotating weights: gaps between kernels count, the
launch of a graph hardly does.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.bench import gate
from pallas_kernels.bench.problem import Problem
from pallas_kernels.bench.rows import message

ANSWER_SECONDS = 120  # the start of torch included
MIN_CALLS, WARMUPS, REPLAYS = 8, 3, 30


class TorchPeer:
    """The parent's side; the child starts with the first request and ends with `close`."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def time(self, problem: Problem) -> tuple[float, str]:
        """Microseconds per call, and how they were measured.

        Raises:
          RuntimeError: why there is no time.
        """
        case = problem.case
        request = {"sizes": case.group_sizes, "n": case.n, "k": case.k, "copies": len(problem.weights)}
        try:
            answer = json.loads(self._ask(json.dumps(request).encode() + b"\n"))
        except (OSError, ValueError) as error:
            self.close()  # the next request starts another
            raise RuntimeError(f"torch's process gave no answer within {ANSWER_SECONDS} s: {message(error)}") from error
        if "failure" in answer:
            raise RuntimeError(answer["failure"])
        return answer["us"], answer["note"]

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ask(self, request: bytes) -> bytes:
        if self._child is None:
            command = [sys.executable, "-m", "pallas_kernels.bench.torch_peer"]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # jax is imported there, and stays off the GPU
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=environment)
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(request)
        answered, _, _ = select.select([stdout], [], [], ANSWER_SECONDS)
        return stdout.readline() if answered else b""


def serve() -> None:
    """The child: answers requests until there are none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        try:
            us, note = _time(**json.loads(line))
            answer: dict[str, Any] = {"us": us, "note": note}
        except Exception as error:  # goes to the row
            answer = {"failure": message(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _time(sizes: list[int], n: int, k: int, copies: int) -> tuple[float, str]:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), k, device="cuda", dtype=torch.bfloat16)
    first = torch.randn(len(sizes), n, k, device="cuda", dtype=torch.bfloat16) * (1 / math.sqrt(k))
    weights = [first, *(torch.roll(first, shift, 0) for shift in range(1, copies))]
    offsets = torch.tensor(list(itertools.accumulate(sizes)), device="cuda", dtype=torch.int32)
    name, grouped_mm = _grouped_mm(torch)

    def call(w: Any) -> Any:
        return grouped_mm(x, w.transpose(-2, -1), offs=offsets)

    _check(torch, call, x, weights, sizes)
    num_calls = MIN_CALLS + -MIN_CALLS % len(weights)

    def calls() -> None:
        for i in range(num_calls):
            call(weights[i % len(weights)])

    times = _event_times_us(torch, *_captured(torch, calls))
    return float(np.median(times)) / num_calls, f"{name}, CUDA graph of {num_calls} calls"


def _grouped_mm(torch: Any) -> tuple[str, Callable[..., Any]]:
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return ("torch._grouped_mm", torch._grouped_mm) if public is None else ("F.grouped_mm", public)


def _check(torch: Any, call: Callable[[Any], Any], x: Any, weights: list[Any], sizes: list[int]) -> None:
    """Against f32 products, one group after the other; and with rotated experts, which must be noticed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    groups = zip(x.split(sizes), weights[0], strict=True)
    expected = torch.cat([rows.float() @ w.float().T for rows, w in groups])

    def complaint(w: Any) -> str | None:
        squares = ((call(w).float() - expected) ** 2).sum(1), (expected**2).sum(1)
        return gate.from_squares(*(part.cpu().numpy() for part in squares)).complaint()

    if (wrong := complaint(weights[0])) is not None:
        raise gate.WrongResult(wrong)
    if complaint(weights[1]) is None:
        raise gate.WrongResult("experts rotated by one give the same result, so the check proves nothing")


def _captured(torch: Any, calls: Callable[[], None]) -> tuple[Callable[[], None], Any]:
    """The replay of a graph, and the graph, which has to live as long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay, graph


def _event_times_us(torch: Any, replay: Callable[[], None], _graph: Any) -> list[float]:
    for _ in range(WARMUPS):
        replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times


if __name__ == "__main__":
    serve()
