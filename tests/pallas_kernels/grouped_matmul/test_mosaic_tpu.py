"""The TPU kernel against the definition, interpreted on a CPU: edges, empty groups, rows of no expert, races."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import definition
from pallas_kernels import UnsupportedError, grouped_matmul, make_group_metadata, quantize
from pallas_kernels.grouped_matmul import mosaic_tpu
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_tpu import MosaicTpuConfig
from pallas_kernels.grouped_matmul.mosaic_tpu.config import heuristic
from pallas_kernels.grouped_matmul.mosaic_tpu.schedule import max_visits, plan
from pallas_kernels.implementations import interpreted
from races import no_races
from tolerance import assert_close

pytestmark = pytest.mark.interpreted

ROUNDING = {"batch": 2.5e-3, "worst_row": 4e-3}  # rounding the output to bf16 costs 1.7e-3 and 2.0e-3
EXACT = {"batch": 2e-6, "worst_row": 4e-6}  # f32 sums
GROUPS = {
    "even": (24,) * 4,
    "one takes all": (0, 96, 0, 0),
    "ragged, short": (1, 0, 47, 23),
    "first and last": (9, 0, 0, 30),
    "none": (0, 0, 0, 0),
}
TILES = MosaicTpuConfig(block_m=32, block_n=128, block_k=256)


def problem(m=96, e=4, n=200, k=384, seed=0):
    """N and K are no multiples of the tiles."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(m, k)), rng.normal(size=(e, n, k)) * np.arange(1, e + 1)[:, None, None]
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)


# Shared: equal shapes compile once. jax keeps what was traced for an interpreter apart from what was not.
compiled = jax.jit(
    functools.partial(grouped_matmul, implementation="mosaic_tpu"), static_argnames=("out_dtype", "config")
)


def run(x, w, sizes, **options):
    with interpreted("mosaic_tpu", detect_races=True), no_races():
        return np.asarray(compiled(x, w, jnp.array(sizes, jnp.int32), **options))


def expected(x, w, sizes, **options):
    return definition.grouped_matmul(definition.real(x), definition.real(w), sizes, **options)


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_matches_definition(sizes):
    x, w = problem()
    actual, used = run(x, w, sizes, out_dtype=jnp.float32, config=TILES), sum(sizes)
    assert_close(actual[:used], expected(x, w, sizes)[:used], **EXACT)
    assert not actual[used:].any()  # rows of no expert are zero, not leftovers


@pytest.mark.smoke
def test_wrong_weights_and_wrong_schedules_are_noticed(monkeypatch):
    x, w = problem()
    sizes = GROUPS["ragged, short"]
    assert_close(run(x, w, sizes, config=TILES), expected(x, w, sizes), **ROUNDING)
    with pytest.raises(AssertionError, match="relative L2"):
        assert_close(run(x, jnp.roll(w, 1, axis=0), sizes, config=TILES), expected(x, w, sizes), **ROUNDING)

    def shifted(*args, **kwargs):
        schedule = plan(*args, **kwargs)
        return schedule._replace(firsts=schedule.firsts + 1, lasts=schedule.lasts + 1)

    monkeypatch.setattr(mosaic_tpu, "plan", shifted)
    x, w = problem(m=95)  # not traced before
    with pytest.raises(AssertionError, match="not finite"):  # row 0 has no owner: memory that nobody wrote is NaN
        assert_close(run(x, w, sizes, config=TILES), expected(x, w, sizes), **ROUNDING)


@pytest.mark.parametrize(
    ("config", "m"),
    [
        (None, 96),
        (MosaicTpuConfig(block_m=16, block_n=256, block_k=128), 96),
        (MosaicTpuConfig(block_m=64, block_n=128, block_k=384), 96),  # M is no multiple
        (MosaicTpuConfig(block_m=128, block_n=128, block_k=512), 50),  # M and K are smaller than a tile
        (None, 7),
    ],
)
def test_configurations(config, m):
    x, w = problem(m=m)
    sizes = (m // 3, 0, m // 5, m // 4)
    assert_close(run(x, w, sizes, config=config), expected(x, w, sizes), **ROUNDING)


@pytest.mark.smoke
def test_every_pattern_of_empty_groups():
    """Sizes are traced: 64 runs of one compiled kernel, with rows past the last group in most."""
    x, w = problem(m=60, e=6, n=128, k=128)
    config = MosaicTpuConfig(block_m=16, block_n=128, block_k=128)
    before = compiled._cache_size()
    for used in itertools.product((0, 1), repeat=6):
        sizes = np.array((5, 16, 1, 11, 19, 8), np.int32) * np.array(used, np.int32)
        assert_close(run(x, w, sizes, config=config), expected(x, w, sizes), **ROUNDING)
    assert compiled._cache_size() == before + 1


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_group_offset(offset):
    x, w = problem(e=2)
    sizes = (30, 17, 0, 40)
    traced = run(x, w, sizes, config=TILES, group_offset=jnp.int32(offset))
    assert_close(traced, expected(x, w, sizes, offset=offset), **ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(traced, expected(x, w, sizes, offset=(offset + 1) % 3), **ROUNDING)
    with interpreted("mosaic_tpu"):
        arguments = {"implementation": "mosaic_tpu", "config": TILES, "group_offset": offset}
        assert np.array_equal(grouped_matmul(x, w, jnp.array(sizes, jnp.int32), **arguments), traced)


def test_gate_and_up_apart():
    x, w = problem(n=256)
    apart, sizes = w.reshape(4, 2, 128, 384), jnp.array(GROUPS["even"], jnp.int32)
    call = Call(
        lhs=x, rhs=apart, group_sizes=sizes, metadata=make_group_metadata(sizes), out_dtype=np.dtype(jnp.bfloat16)
    )
    assert mosaic_tpu.unsupported(call) is None
    with interpreted("mosaic_tpu"):
        assert_close(mosaic_tpu.run(call), expected(x, w, GROUPS["even"]), **ROUNDING)


def test_a_bad_row_spoils_no_other():
    x, w = problem()
    sizes = (37, 3, 0, 41)
    clean = run(x, w, sizes, config=TILES)
    for row in (36, 38, 90):  # the last one belongs to no expert
        spoiled = run(x.at[row].set(jnp.nan), w, sizes, config=TILES)
        assert np.isnan(spoiled[row]).all() == (row < sum(sizes))
        others = np.arange(len(x)) != row
        assert np.array_equal(spoiled[others], clean[others])


def test_no_rows():
    x, w = problem(m=0)
    with interpreted("mosaic_tpu"):
        out = grouped_matmul(x, w, jnp.zeros(4, jnp.int32), implementation="mosaic_tpu")
    assert out.shape == (0, 200)
    assert out.dtype == jnp.bfloat16


def test_every_row_has_one_owner_and_blocks_stay_together():
    rng, planned = np.random.default_rng(0), jax.jit(plan, static_argnames=("num_rows", "num_experts", "block_m"))
    for m, groups, experts, block_m in [(1, 1, 1, 16), (90, 8, 8, 16), (64, 5, 2, 32), (40, 9, 4, 64), (3, 8, 7, 16)]:
        for _ in range(20):
            cuts = np.sort(rng.integers(0, m + 1, groups))
            sizes, offset = jnp.asarray(np.diff(cuts, prepend=0), jnp.int32), int(rng.integers(0, groups - experts + 1))
            starts = make_group_metadata(sizes).group_starts
            schedule = planned(starts, sizes, num_rows=m, num_experts=experts, group_offset=offset, block_m=block_m)
            owners = np.repeat(np.arange(groups), sizes) - offset
            owners = np.where((owners >= 0) & (owners < experts), owners, -1)
            check_schedule(schedule, np.concatenate([owners, np.full(m - len(owners), -1)]), experts, block_m)


def check_schedule(schedule, owners, num_experts, block_m):
    """`owners`: the expert of each row, or -1."""
    schedule = [np.asarray(x) for x in schedule]
    num_visits = int(schedule.pop())
    assert 1 <= num_visits <= max_visits(len(owners), num_experts, block_m) == len(schedule[0])
    rows, before = [], None
    for expert, lhs_block, multiplies, block, first, last in zip(*(x[:num_visits] for x in schedule), strict=True):
        assert block * block_m <= first < last <= (block + 1) * block_m
        assert set(owners[first:last]) == {expert if multiplies else -1}
        if multiplies:
            assert lhs_block == block
        elif before is not None:
            assert (expert, lhs_block) == before  # nothing is loaded
        rows.extend(range(first, last))
        before = (expert, lhs_block)
    assert rows == list(range(len(owners)))  # in order, so visits of one block follow each other


@pytest.mark.parametrize(
    ("shape", "v6e", "v7x"),
    [  # m, experts, n, k
        ((8192, 8, 28672, 4096), (256, 1024, 4096), (256, 1024, 4096)),
        ((65536, 8, 4096, 14336), (512, 1024, 14336), (512, 1024, 7168)),
        ((32768, 128, 1536, 2048), (256, 768, 2048), (256, 768, 2048)),
        ((24, 128, 1536, 2048), (32, 768, 2048), (32, 768, 2048)),
    ],
)
def test_heuristic(shape, v6e, v7x):
    for tiles, vmem_limit in ((v6e, 112 * 2**20), (v7x, 56 * 2**20)):
        sizes = dict(zip(("m", "num_experts", "n", "k"), shape, strict=True))
        config = heuristic(**sizes, vmem_limit=vmem_limit)
        assert (config.block_m, config.block_n, config.block_k) == tiles
        with pytest.raises(ValueError, match="hold not even the smallest"):
            heuristic(**sizes, vmem_limit=2**20)


@pytest.mark.parametrize("bad", [{"block_m": 24}, {"block_n": 64}, {"block_k": 0}])
def test_a_config_is_checked_at_birth(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.* must be a multiple"):
        MosaicTpuConfig(**({"block_m": 32, "block_n": 128, "block_k": 128} | bad))


@pytest.mark.parametrize("name", ["silu", "relu2_no_mul"])
def test_an_epilogue_follows_the_kernel(name):
    x, w = problem()
    with interpreted("mosaic_tpu"):
        found = grouped_matmul(x, w, jnp.array((24,) * 4, jnp.int32), epilogue=name, implementation="mosaic_tpu")
    sums = definition.rounded(expected(x, w, (24,) * 4), jnp.bfloat16)
    halves = (sums,) if name == "relu2_no_mul" else np.split(sums, 2, axis=1)
    assert_close(found, definition.activation(name, *halves), batch=4.5e-3, worst_row=7e-3)


def test_what_it_cannot_serve_it_names():
    x, w = problem(m=4, n=34, k=256)
    reasons = {
        "quantized operands": {"rhs": quantize(w, "fp8_per_channel")},
        "does not take bias": {"bias": jnp.zeros((4, 34))},
        "does not take activation_format": {"activation_format": "fp8_per_token"},
        "does not take out_format": {"out_format": "fp8_per_token"},
        "bfloat16 with bfloat16, not bfloat16 with float32": {"rhs": w.astype(jnp.float32)},
        "out_dtype=float16": {"out_dtype": jnp.float16},
        "k=130 must be a multiple of 128": {"lhs": x[:, :130], "rhs": w[..., :130]},
        "must be a MosaicTpuConfig, not 3": {"config": 3},
        "takes [0-9]+ bytes of VMEM of 58720256": {"config": MosaicTpuConfig(block_m=512, block_n=8192, block_k=4096)},
    }
    for reason, options in reasons.items():
        arguments = {"lhs": x, "rhs": w, "group_sizes": jnp.ones(4, jnp.int32)} | options
        with interpreted("mosaic_tpu"), pytest.raises(UnsupportedError, match=reason):
            grouped_matmul(**arguments, implementation="mosaic_tpu")


@pytest.mark.smoke
@pytest.mark.parametrize("racy", [False, True])
def test_a_race_is_noticed(racy):
    """Reads a buffer before, or after, waiting for the copy that fills it."""

    def kernel(x_hbm, out_vmem, x_vmem, semaphore):
        copy = pltpu.make_async_copy(x_hbm, x_vmem, semaphore)
        copy.start()
        if racy:
            out_vmem[...] = x_vmem[...]
        copy.wait()
        if not racy:
            out_vmem[...] = x_vmem[...]

    @jax.jit
    def run_kernel(x):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        )(x)

    def interpret(**parameters):
        with interpreted("mosaic_tpu", **parameters), no_races():
            run_kernel(jnp.ones((8, 128)))

    if not racy:
        interpret(detect_races=True)
        with pytest.raises(AssertionError, match="no kernel was interpreted with detect_races"):
            interpret()
        return
    noticed = AssertionError, jax.errors.JaxRuntimeError  # from jax 0.12 on the interpreter raises by itself
    with pytest.raises(noticed, match=r"1 of 1 kernels have a race|(?i:race detected)"):
        interpret(detect_races=True, dma_execution_mode="eager")
    pltpu.reset_tpu_interpret_mode_state()
