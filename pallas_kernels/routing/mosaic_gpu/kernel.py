"""(token, slot) pairs sorted by expert, and the tiles of both matmuls planned, in one launch or two.

Nothing is moved: a pair's place is the number of pairs that come before it, which squares of comparisons count. Of few
pairs each block looks at all; of many a first launch counts those of each expert in each chunk, and a second adds up
the counts of the chunks before its own. No block waits for another: some plan tiles, each of the others finds the
places of a few tokens, and may go on to send to them what the tokens carry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.devices import num_cores
from pallas_kernels.grouped_matmul.mosaic_gpu.work import Plan, max_tiles
from pallas_kernels.routing.call import Order
from pallas_kernels.routing.mosaic_gpu.keys import PAD, Keys
from pallas_kernels.routing.mosaic_gpu.squares import SIDE, WARPGROUPS, share_of, whole_sides
from pallas_kernels.routing.mosaic_gpu.table import Table, table_shape

AT_ONCE = 2048  # pairs that each block looks at, in one launch
CHUNK, MOST_CHUNKS = WARPGROUPS * SIDE, 256  # pairs that are counted together; twice as many where they are too many
SLOTS = 8  # of what stands for a token where only pairs are known
# Of each thread, as the kernels here state every layout. Nobody reads what he wrote himself before all have met.
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True)


class Cargo(Protocol):
    """What tokens carry to their places, and how a warpgroup takes it there."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        ...

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arrays."""
        ...

    @property
    def out_types(self) -> tuple[Any, ...]:
        """What comes to be."""
        ...

    @property
    def scratch_types(self) -> tuple[Any, ...]:
        """Shared memory."""
        ...

    def begin(self, scratch: Sequence[Any], warpgroup: Any) -> None:
        """Before the warpgroups meet for the first time."""
        ...

    def load(self, inputs: Sequence[Any], token: Any) -> Any:
        """What a token has, on its way into registers."""
        ...

    def send(self, loaded: Any, places: list[Any], refs: tuple[Sequence[Any], ...], warpgroup: Any) -> None:
        """Takes it to the token's places; `refs` are those of inputs, of what comes to be, and of scratch."""
        ...


class Shape(NamedTuple):
    """What a launch knows of its blocks."""

    tokens: int
    top_k: int
    num_experts: int
    padded: bool
    chunk: int | None  # pairs that were counted together; None: each block looks at all
    block_tokens: int  # tokens of a block
    plan_blocks: int
    block_m: int

    @property
    def held(self) -> int:
        """Sides of the pairs that a block compares."""
        if self.chunk is None:
            return whole_sides(self.tokens * self.top_k) // SIDE
        pairs = self.block_tokens * self.top_k
        return -(-(self.chunk - math.gcd(self.chunk, pairs) + pairs) // SIDE)


@functools.partial(jax.jit, static_argnames=("num_experts", "block_m"))  # traced, and lowered, once for calls alike
def sort(ids: Int32[Array, " n"], *, num_experts: int, block_m: int) -> Order:
    """The stable order by expert of all pairs, those of no expert last, and the tiles of `block_m` rows."""
    num_pairs = ids.shape[0]
    slots = math.gcd(num_pairs, SLOTS)
    return place(ids.reshape(-1, slots), None, num_experts=num_experts, block_m=block_m)[0]


def place(
    ids: Int32[Array, "T top_k"], cargo: Cargo | None, *, num_experts: int, block_m: int
) -> tuple[Order, tuple[jax.Array, ...]]:
    """The order of all pairs, with the rows `[T, top_k]`, and what became of the tokens' cargo.

    Args:
      ids: Of at most `SIDE` slots.
      cargo: What goes with the tokens.
      num_experts: E.
      block_m: Rows of a tile.
    """
    tokens, top_k = ids.shape
    num_pairs = ids.size
    flat = ids.reshape(-1)
    padded = num_pairs % SIDE > 0
    if padded:
        flat = jnp.pad(jnp.maximum(flat, -1), (0, -num_pairs % SIDE), constant_values=PAD)
    plan_blocks = pl.cdiv(max_tiles(num_pairs, num_experts, block_m), SIDE)
    chunk = None
    if num_pairs > AT_ONCE:
        chunk = CHUNK
        while num_pairs > MOST_CHUNKS * chunk:
            chunk *= 2
    shape = Shape(
        tokens=tokens,
        top_k=top_k,
        num_experts=num_experts,
        padded=padded,
        chunk=chunk,
        block_tokens=_block_tokens(tokens, top_k, max(1, num_cores() - plan_blocks), shared=chunk is None),
        plan_blocks=plan_blocks,
        block_m=block_m,
    )
    counts = None if chunk is None else _counted(flat, shape, chunk)
    rows, groups, tiles, counters, sent = _block(
        functools.partial(_place, shape=shape, cargo=cargo),
        name="sort_by_expert" if cargo is None else f"sort_by_expert_{cargo.name}",
        out_type=[
            jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((2, whole_sides(num_experts + 1)), jnp.int32),
            jax.ShapeDtypeStruct((6, plan_blocks * SIDE), jnp.int32),
            jax.ShapeDtypeStruct((plan_blocks * SIDE,), jnp.int32),
            () if cargo is None else cargo.out_types,
        ],
        grid=(plan_blocks + pl.cdiv(tokens, shape.block_tokens),),
        scratch_types=[*_scratch(shape, shape.held), () if cargo is None else cargo.scratch_types],
    )(flat, counts, () if cargo is None else cargo.inputs)
    plan = Plan(tiles=tiles, counters=counters, num_rows=num_pairs, block_m=block_m)
    return Order(rows.reshape(-1), groups[0, :num_experts], groups[1, :num_experts], plan, groups), sent


def _block_tokens(tokens: int, top_k: int, blocks: int, *, shared: bool) -> int:
    """Tokens of a block, for about so many blocks; its warpgroups share one side of pairs, or have one each."""
    wanted: int = pl.cdiv(tokens, blocks)
    if shared:  # as few as can be: a warpgroup alone quantizes its token in less time than four side by side
        return min(wanted, SIDE // top_k)
    return min(-(-wanted // WARPGROUPS), SIDE // top_k) * WARPGROUPS


def _counted(flat: jax.Array, shape: Shape, chunk: int) -> jax.Array:
    """Of each chunk, how many pairs there are up to and with each expert; none past the last chunk."""
    chunks = whole_sides(pl.cdiv(flat.shape[0], chunk))
    counts: jax.Array = _block(
        functools.partial(_count, shape=shape, chunk=chunk),
        name="count_by_expert",
        out_type=jax.ShapeDtypeStruct((whole_sides(shape.num_experts), chunks), jnp.int32),
        grid=(chunks,),
        scratch_types=_scratch(shape, chunk // SIDE),
    )(flat)
    return counts


def _scratch(shape: Shape, held: int) -> list[Any]:
    return [
        plgpu.SMEM(((held + 1) * SIDE,), jnp.int32),
        plgpu.SMEM(table_shape(shape.num_experts), jnp.int32),
        plgpu.SMEM((WARPGROUPS, SIDE), jnp.int32),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]


def _block(body: Any, *, name: str, **options: Any) -> Any:
    return plgpu.kernel(
        body,
        grid_names=("program",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=COMPILER_PARAMS,
        **options,
    )


def _count(ids_gmem: Any, counts_gmem: Any, keys_smem: Any, *of_table: Any, shape: Shape, chunk: int) -> None:
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    keys = Keys(ids_gmem, keys_smem, program * chunk, shape.num_experts, shape.padded, warpgroup)
    table = _table(of_table, warpgroup, shape)
    keys.put(keys.fetch())
    table.meet()
    table.count_all(keys)
    table.meet()
    table.store_ends(counts_gmem, program)


def _place(
    ids_gmem: Any,  # [n], whole sides
    counts_gmem: Any,  # [experts, chunks], or None
    inputs: Any,  # of the cargo
    rows_gmem: Any,  # [T, top_k]
    groups_gmem: Any,  # [2, experts], starts and sizes
    tiles_gmem: Any,  # [6, tiles]
    counters_gmem: Any,  # [tiles]
    sent: Any,  # of the cargo
    keys_smem: Any,
    table_smem: Any,
    found_smem: Any,
    ready: Any,
    scratch: Any,  # of the cargo
    *,
    shape: Shape,
    cargo: Cargo | None,
) -> None:
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    table = _table((table_smem, found_smem, ready), warpgroup, shape)

    def keys_from(base: Any) -> Keys:
        return Keys(ids_gmem, keys_smem, base, shape.num_experts, shape.padded, warpgroup)

    @pl.when(program < shape.plan_blocks)
    def _plan() -> None:
        if shape.chunk is None:
            keys = keys_from(0)
            keys.put(keys.fetch())
            table.meet()
            table.count_all(keys)
        else:
            table.add_up(counts_gmem, 0)
        table.meet()

        def store(expert: Any, start: jax.Array, size: jax.Array) -> None:
            @pl.when(program == 0)
            def _store() -> None:
                for row, each in enumerate((start, size)):
                    groups_gmem[row, pl.ds(expert, SIDE)] = each

        table.find_groups(store, shape.block_m)
        table.meet()
        table.sum_tiles()
        table.meet()
        table.store_tiles(tiles_gmem, counters_gmem, program * SIDE, shape.block_m)

    @pl.when(program >= shape.plan_blocks)
    def _rows() -> None:
        first_token = (program - shape.plan_blocks) * shape.block_tokens
        first = first_token * shape.top_k
        left = jnp.minimum(shape.tokens - first_token, shape.block_tokens)
        if shape.chunk is None:  # each fourth token
            keys, token, step, count = keys_from(0), first_token + warpgroup, WARPGROUPS, share_of(left, warpgroup)
        else:
            each = shape.block_tokens // WARPGROUPS
            keys = keys_from(first // shape.chunk * shape.chunk)
            token, step = first_token + warpgroup * each, 1
            count = jnp.clip(left - warpgroup * each, 0, each)

        def load(i: Any) -> Any:
            return () if cargo is None else cargo.load(inputs, jnp.minimum(token + i * step, shape.tokens - 1))

        fetched, loaded = keys.fetch(), load(0)  # all is on its way before anything is waited for
        if cargo is not None:
            cargo.begin(scratch, warpgroup)
        keys.put(fetched)
        if shape.chunk is None:
            table.meet()
            found_smem[warpgroup, pl.ds(0, SIDE)] = keys.places(first)
        else:
            table.add_up(counts_gmem, keys.base // shape.chunk)
            table.meet()
            table.find_firsts(keys.base)
            found_smem[warpgroup, pl.ds(0, SIDE)] = keys.ranks(token * shape.top_k)
        table.meet()

        def place_of(at: Any, slot: int) -> Any:
            if shape.chunk is None:
                number = (at - first_token) * shape.top_k + slot
                return sum(found_smem[i, number] for i in range(WARPGROUPS))
            number = (at - token) * shape.top_k + slot
            return found_smem[warpgroup, number] + table.first_of(keys.own_of(at * shape.top_k, slot))

        def send(i: Any, loaded: Any) -> Any:
            at = token + i * step
            following = load(i + 1) if shape.block_tokens > WARPGROUPS else loaded
            places = [place_of(at, slot) for slot in range(shape.top_k)]
            for slot, each in enumerate(places):
                rows_gmem[at, slot] = each
            if cargo is not None:
                cargo.send(loaded, places, (inputs, sent, scratch), warpgroup)
            return following

        lax.fori_loop(0, count, send, loaded)


def _table(of_table: Sequence[Any], warpgroup: Any, shape: Shape) -> Table:
    table_smem, found_smem, ready = of_table
    return Table(table_smem, found_smem, ready, warpgroup, shape.num_experts, shape.tokens * shape.top_k)
