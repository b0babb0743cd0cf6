"""What users would call instead: in JAX, in jax's examples, in tokamax and in torch.

Each gets the layout of weights that it is made for and, where it has tiles to choose, a small search.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.bench import gate
from pallas_kernels.bench.cases import ITEMSIZE, Case
from pallas_kernels.bench.problem import Call, GroupedMatmul, Inputs, Problem, free_bytes
from pallas_kernels.bench.rows import message
from pallas_kernels.bench.timing import Times, device_times

TORCH = "torch_grouped_mm"  # runs in a process of its own: torch_peer.py
SEARCH_SECONDS = 5.0  # no further config is tried after this long
SEARCH_REPETITIONS = 5
FREE_SHARE = 0.8  # of the free memory that a peer's temporaries may take


class Variant(NamedTuple):
    """One way to call a peer."""

    note: str  # its config
    call: Call


class Ready(NamedTuple):
    """A peer whose result is right, to be timed."""

    run: Callable[[int], jax.Array]
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """Something that computes a grouped matmul in this process."""

    variants: Callable[[Case], Iterator[Variant]]
    layout: str = "nk"  # of the weights of an expert, or "kn"
    package: str | None = None  # that has to be installed
    why_not: Callable[[Case], str | None] = lambda _: None  # why it is left out of a case

    def inputs(self, problem: Problem) -> Inputs:
        """With weights in its layout."""
        return problem.inputs if self.layout == "nk" else problem.inputs_kn

    def refuse(self, *cases: Case) -> None:
        """Raises RuntimeError where it is not there, or would not fit."""
        if self.package is not None and not installed(self.package):
            raise RuntimeError(f"{self.package} is not installed")
        for case in cases:
            if (reason := self.why_not(case)) is not None:
                raise RuntimeError(reason)


def choose(names: str, known: Iterable[str]) -> list[str]:
    """What `all`, `none` or a list with commas stands for."""
    if names in ("all", "none"):
        return list(known) if names == "all" else []
    return names.split(",")


def installed(package: str) -> bool:
    """Whether it could be imported; nothing is."""
    return importlib.util.find_spec(package) is not None


def prepare(name: str, problem: Problem, expected: jax.Array) -> Ready:
    """The fastest right variant of a peer.

    Raises:
      RuntimeError: it is not there, would not fit, or no variant works; the message has the reason of each.
    """
    peer = PEERS[name]
    peer.refuse(problem.case)
    return fastest(peer.variants(problem.case), peer.inputs(problem), expected)


def fastest(
    variants: Iterable[Variant], inputs: Inputs, expected: jax.Array, limits: gate.Limits = gate.OF_A_MATMUL
) -> Ready:
    """The fastest right one; RuntimeError with the reason of each where there is none."""
    start, found, failed = time.monotonic(), list[tuple[float, Ready]](), list[str]()
    for variant in variants:
        if found and time.monotonic() - start > SEARCH_SECONDS:
            break
        run = inputs.turns(jax.jit(variant.call))
        try:
            gate.check(run, expected, limits)
            times = device_times({"": run}, SEARCH_REPETITIONS)[""]
        except Exception as error:  # one config of a search
            failed.append(f"{variant.note} {message(error)}".strip())
            continue
        if isinstance(times, Times):
            found.append((times.us, Ready(run, variant.note)))
        else:
            failed.append(f"{variant.note} {message(times)}".strip())
    if not found:
        raise RuntimeError("; ".join(failed) or "it has no config for this shape")
    return min(found, key=lambda item: item[0])[1]


def _xla(_: Case) -> Iterator[Variant]:
    def call(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        out = pallas_kernels.grouped_matmul(x, w, sizes, implementation="xla")
        assert isinstance(out, jax.Array)
        return out

    yield Variant("", call)


def _ragged_dot(_: Case) -> Iterator[Variant]:
    yield Variant("", functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.bfloat16))


def _ragged_dot_too_large(case: Case) -> str | None:
    """Without a kernel of cuDNN's it multiplies all rows with all experts, zeros included."""
    expanded = ITEMSIZE * len(case.group_sizes) * case.m * (case.n + case.k)
    free = free_bytes()
    if free is None or expanded < FREE_SHARE * free:
        return None
    return f"not tried: its dense form may take {expanded / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"


def _ragged_dot_mgpu(case: Case) -> Iterator[Variant]:
    """jax's example: its tiles, widest first where experts have many rows."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    few = case.m <= 64 * case.experts_hit
    for block_m, block_n, grid_block_n in (
        [(64, 128, 1), (64, 64, 1), (64, 128, 4)] if few else [(128, 128, 4), (64, 128, 4), (128, 128, 1), (128, 64, 1)]
    ):
        if case.n % (grid_block_n * block_n):
            continue
        tiles = {"block_m": block_m, "block_n": block_n, "block_k": 64, "grid_block_n": grid_block_n}

        def call(x: jax.Array, w: jax.Array, sizes: jax.Array, tiles: dict[str, int] = tiles) -> jax.Array:
            options = {"max_concurrent_steps": 4, "transpose_rhs": True}
            out: jax.Array = ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, **tiles, **options)
            return out

        yield Variant(_note(tiles), call)


def _tokamax(case: Case) -> Iterator[Variant]:
    """Its Mosaic kernel: the config that it chooses itself, and a few of those that its autotuning tries."""
    kernel: Any = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_gpu")
    common: Any = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_common")
    few = case.m <= 64 * case.experts_hit
    tiles = [(64, 64, 128, 1), (64, 128, 128, 1), (64, 128, 64, 1)] if few else [(128, 128, 64, 8), (128, 64, 128, 8)]
    yield Variant("default", _tokamax_call(kernel.PallasMosaicGpuRaggedDot()))
    for sizes in tiles:
        options = dict(zip(("block_m", "block_n", "block_k", "grid_tile_width"), sizes, strict=True))
        minor = common.MatmulDimension.M
        config = common.Config(**options, num_stages=4, split_k=1, grid_minor_dim=minor)
        yield Variant(_note(options), _tokamax_call(kernel.PallasMosaicGpuRaggedDot(config=config)))


def _tokamax_call(op: Any) -> GroupedMatmul:
    def call(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        out: jax.Array = op(x, w, group_sizes=sizes)
        return out

    return call


def _note(tiles: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in tiles.items())


PEERS = {
    "ragged_dot_mgpu": Peer(variants=_ragged_dot_mgpu),
    "tokamax": Peer(variants=_tokamax, layout="kn", package="tokamax"),
    "ragged_dot": Peer(variants=_ragged_dot, layout="kn", why_not=_ragged_dot_too_large),
    "xla": Peer(variants=_xla),
}
EVERYTHING = (*PEERS, TORCH)
