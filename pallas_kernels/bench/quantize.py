"""The bench of `quantize_into`: all experts of a layer's leaf, in each weight format; right first, then timed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench import rows, timing
from pallas_kernels.bench.cases import ITEMSIZE, MODELS
from pallas_kernels.bench.floors import Floors, measure_floors
from pallas_kernels.bench.rows import Row, message
from pallas_kernels.formats import FORMATS, Format, QuantizedArray, get_format
from pallas_kernels.implementations import NATIVE
from pallas_kernels.quantize import kernel_for, matrix_amax, quantize, quantize_into

CPU_BYTES = 1e8  # of the source; larger cases are not run without an accelerator
WEIGHT_FORMATS = tuple(name for name, fmt in FORMATS.items() if "weight" in fmt.roles)


class QuantizeCase(NamedTuple):
    """A leaf of a model's experts, and what it is quantized as."""

    leaf: str
    shape: tuple[int, ...]  # [E, S, N, K]
    format: Format

    @property
    def name(self) -> str:
        """Leaf and format."""
        return f"{self.leaf}_{self.format}"

    @property
    def source_bytes(self) -> int:
        """Of the leaf in bf16."""
        e, s, n, k = self.shape
        return e * s * n * k * ITEMSIZE

    @property
    def min_bytes(self) -> int:
        """Read once and written once."""
        return self.source_bytes + self.format.stored_bytes(self.shape)


def select(models: Sequence[str], formats: Sequence[str]) -> list[QuantizeCase]:
    """The leaves of these models in these formats; ValueError for names that do not exist."""
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise ValueError(f"unknown models {', '.join(unknown)}; there are {', '.join(MODELS)}")
    chosen = [get_format(name, role="weight") for name in formats]
    leaves = {}
    for name in models:
        experts, _, hidden, intermediate = MODELS[name]
        leaves[f"{name}_w13"] = (experts, 2, intermediate, hidden)
        leaves[f"{name}_w2"] = (experts, 1, hidden, intermediate)
    return [QuantizeCase(leaf, shape, fmt) for leaf, shape in leaves.items() for fmt in chosen]


Call = Callable[[jax.Array], Any]


def through_xla(case: QuantizeCase) -> Call:
    """`quantize` alone, compiled by XLA: no statistics, the result anywhere."""
    return lambda x: quantize(x, case.format, shared_axes=(1,), implementation="xla")


def through_qwix(case: QuantizeCase) -> Call:
    """Google's library. Its 4-bit codes and scales are laid out as XLA likes; second-level scales it does not have."""
    qwix: Any = importlib.import_module("qwix")
    fmt = case.format
    bn, bk = fmt.block
    kind = {"power_of_two": fmt.name, "two_level": fmt.name}.get(fmt.arithmetic, fmt.code)
    tiles = {axis: block for axis, block in ((2, bn), (3, bk)) if block not in (1, None)}
    alone = (0, 1, 2) if bn == 1 else (0, 1)
    return lambda x: qwix.quantize(x, kind, channelwise_axes=alone, tiled_axes=tiles)


PEERS: dict[str, Callable[[QuantizeCase], Call]] = {"xla": through_xla, "qwix": through_qwix}


class QuantizeBench:
    """Runs cases one after the other; floors are measured once.

    Args:
      peer_names: Of `PEERS`; those that are not installed say so in the rows.
      log: Called with a line about what is done.
      commit: For the rows, where this is no git checkout.
    """

    def __init__(self, peer_names: Sequence[str], *, log: Callable[[str], None], commit: str | None) -> None:
        self._peer_names, self._log = peer_names, log
        self._platform: str = jax.devices()[0].platform
        self._provenance = rows.provenance(commit)
        self._floors: Floors | None = None

    def run(self, cases: Sequence[QuantizeCase]) -> Iterator[list[Row]]:
        """The row of each case, as soon as it is finished."""
        if self._platform == "gpu":
            self._floors = measure_floors()
        for case in cases:
            start = time.monotonic()
            shape = dict(zip(("num_experts", "halves", "n", "k"), case.shape, strict=True))
            row = Row(
                case=case.name,
                op="quantize_into",
                impl="xla",
                shape=shape | {"format": str(case.format)},
            )
            row = dataclasses.replace(row, **self._provenance)
            try:
                self._case(case, row)
            except Exception as error:  # such as too little memory: the other cases go on
                row.failure = message(error)
            time_us = row.failure or f"{row.us or row.wall_us:.0f} us{'' if row.us else ' by the host clock'}"
            self._log(f"{case.name}: {time_us} ({time.monotonic() - start:.1f} s)")
            yield [row]

    def _case(self, case: QuantizeCase, row: Row) -> None:
        if self._platform == "cpu" and case.source_bytes > CPU_BYTES:
            raise RuntimeError(
                f"no accelerator: a CPU runs cases of up to {CPU_BYTES / 1e6:.0f} MB, and this has "
                f"{case.source_bytes / 1e6:.0f}"
            )
        x = jax.random.normal(jax.random.key(0), case.shape, jnp.bfloat16) * 0.02
        ours = _InPlace(case, x)
        if kernel_for(ours.leaf, x) is not None:
            row.impl = NATIVE[self._platform]
        row.error = _share_of_other_bits(ours.leaf, jax.jit(through_xla(case))(x))
        if row.error:
            raise RuntimeError(f"{row.error:.1e} of the bytes are not those of the definition")
        if self._platform != "gpu":
            row.wall_us, row.best = timing.wall_us(ours.run), True
            return
        peers = self._peers(case, x, row)
        before = rows.clocks()
        times = timing.device_times({"": ours.run, **peers})
        row.clocks = {"before": before, "after": rows.clocks()}
        for name in peers:
            found = times[name]
            if isinstance(found, Exception):
                row.peer_notes[name] = message(found)
            row.peers[name] = None if isinstance(found, Exception) else found.us
        own = times[""]
        if isinstance(own, Exception):
            raise own
        for name, value in own._asdict().items():
            setattr(row, name, value)
        row.best, row.tb_per_s = True, case.min_bytes / own.us / 1e6
        if self._floors is not None:
            row.copy_tb_per_s = self._floors.copy_bytes_per_s / 1e12
            row.matmul_tflops = self._floors.matmul_flops_per_s / 1e12
            row.roofline_us = 1e6 * case.min_bytes / self._floors.copy_bytes_per_s

    def _peers(self, case: QuantizeCase, x: jax.Array, row: Row) -> Mapping[str, timing.Run]:
        ready: dict[str, timing.Run] = {}
        for name in self._peer_names:
            try:
                if name != "xla" and importlib.util.find_spec(name) is None:
                    raise RuntimeError(f"{name} is not installed")
                compiled = jax.jit(PEERS[name](case)).lower(x).compile()
                jax.block_until_ready(compiled(x))
                ready[name] = functools.partial(_call, compiled, x)
            except Exception as error:  # goes to the row
                row.peers[name], row.peer_notes[name] = None, message(error)
        return ready


def _call(compiled: Call, x: jax.Array, _: int) -> Any:
    return compiled(x)


class _InPlace:
    """`quantize_into` on a leaf that is donated again and again, with the pass for the scales of whole matrices."""

    def __init__(self, case: QuantizeCase, x: jax.Array) -> None:
        fmt, self._x = case.format, x
        second = fmt.global_shape(case.shape)
        self.leaf = QuantizedArray(
            values=jnp.zeros(fmt.values_shape(case.shape), fmt.storage),
            scales=jnp.zeros(fmt.scales_shape(case.shape), fmt.scale_dtype),
            global_scale=None if second is None else jnp.zeros(second, jnp.float32),
            format=fmt,
        )

        def step(leaf: QuantizedArray, x: jax.Array) -> Any:
            return quantize_into(leaf, x, amax=jnp.max(matrix_amax(x), axis=1) if fmt.whole_matrix else None)

        self._step = jax.jit(step, donate_argnums=0).lower(self.leaf, x).compile()
        self.run(0)

    def run(self, _: int) -> Any:
        self.leaf, loss = self._step(self.leaf, self._x)
        return loss


def _share_of_other_bits(found: QuantizedArray, expected: QuantizedArray) -> float:
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    other = sum(int(jnp.sum(_bits(a) != _bits(b))) * a.dtype.itemsize for a, b in pairs)
    return float(other / sum(a.nbytes for a, _ in pairs))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
