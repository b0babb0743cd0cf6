"""The bench of `quantize_into`: all experts of a layer's leaf, in each weight format; right first, then timed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers, runner, timing
from pallas_kernels.bench.cases import ITEMSIZE, MODELS
from pallas_kernels.bench.rows import Row
from pallas_kernels.formats import FORMATS, Format, QuantizedArray, get_format
from pallas_kernels.implementations import NATIVE
from pallas_kernels.quantize import kernel_for, matrix_amax, quantize, quantize_into

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
    def array_bytes(self) -> int:
        """Of the leaf in bf16."""
        e, s, n, k = self.shape
        return e * s * n * k * ITEMSIZE

    @property
    def flops(self) -> int:
        """They do not count."""
        return 0

    @property
    def min_bytes(self) -> int:
        """Read once and written once."""
        return self.array_bytes + self.format.stored_bytes(self.shape)


def select(models: Sequence[str], formats: Sequence[str]) -> list[QuantizeCase]:
    """The leaves of these models in these formats, all known."""
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


class QuantizeBench(runner.Runner[QuantizeCase]):
    """Each leaf in each format.

    Args:
      peer_names: Of `PEERS`; those that are not installed say so in the rows.
      log: Called with a line about what is done.
      commit: For the rows, where this is no git checkout.
    """

    def __init__(self, peer_names: Sequence[str], *, log: Callable[[str], None], commit: str | None) -> None:
        super().__init__(log=log, commit=commit)
        self._peer_names = peer_names

    def _rows(self, case: QuantizeCase) -> list[Row]:
        shape = dict(zip(("num_experts", "halves", "n", "k"), case.shape, strict=True))
        return [self._row("quantize_into", case, shape | {"format": str(case.format)})]

    def _case(self, case: QuantizeCase, found: list[Row]) -> None:
        (row,) = found
        x = jax.random.normal(jax.random.key(0), case.shape, jnp.bfloat16) * 0.02
        ours = _InPlace(case, x)
        row.impl = "xla" if kernel_for(ours.leaf, x) is None else NATIVE[self._platform]
        row.error = _share_of_other_bits(ours.leaf, jax.jit(through_xla(case))(x))
        if row.error:
            raise RuntimeError(f"{row.error:.1e} of the bytes are not those of the definition")
        if self._platform == "gpu":
            others = runner.PeerTimes()
            ready = self._ready_peers(case, self._peer_names, functools.partial(_prepare, case=case, x=x), others)
            runner.time_in_turn([(row, ours.run)], ready, others)
            self._compare(case, found, others)
        else:
            row.wall_us = timing.wall_us(ours.run)
        row.best = row.failure is None


def _prepare(name: str, case: QuantizeCase, x: jax.Array) -> peers.Ready:
    if name != "xla" and not peers.installed(name):
        raise RuntimeError(f"{name} is not installed")
    compiled = jax.jit(PEERS[name](case)).lower(x).compile()
    jax.block_until_ready(compiled(x))
    return peers.Ready(functools.partial(_call, compiled, x), "")


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
