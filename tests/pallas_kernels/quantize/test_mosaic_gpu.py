"""The Hopper quantizer, interpreted on a CPU with race detection: numpy's bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from by_name import assert_same_parts, by_name
from leaves import amax_of, check_loss, leaf, weights
from numpy_quantizer import E4M3, WEIGHTS, quantize_numpy
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from pallas_kernels.quantize import quantize_into
from pallas_kernels.quantize.into import IntoCall
from pallas_kernels.quantize.mosaic_gpu import unsupported, unsupported_anywhere
from pallas_kernels.quantize.mosaic_gpu.rounding import divided
from pallas_kernels.quantize.quotient import divisor
from quick import few_cases
from races import no_races
from special_numbers import SPECIAL, cast, special_experts

FOUR = ("fp8_per_block", "int8_per_channel", "mxfp4", "nvfp4")  # of each way through the kernels one


def needs_interpreter(test):
    lacking = jax.__version_info__[:2] < FIRST_JAX or jax.default_backend() != "cpu"
    reason = f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels on {jax.default_backend()}"
    return pytest.mark.interpreted(pytest.mark.skipif(lacking, reason=reason)(test))


def run(out, x, start=0, *, half=None, amax=None):
    with no_races(), interpreted("mosaic_gpu", detect_races=True):
        return jax.block_until_ready(
            quantize_into(out, jnp.asarray(x), jnp.int32(start), half=half, amax=amax, implementation="mosaic_gpu")
        )


@needs_interpreter
@pytest.mark.parametrize("name", WEIGHTS)
def test_bits_and_places(name):
    x, out = weights(), leaf(name)
    if name in ("mxfp4", "fp8_per_channel", "nvfp4", "fp8_per_tensor"):  # a half at a time
        amax, losses = amax_of(out, x[1:3]), []
        for half in (1, 0):
            out, loss = run(out, x[1:3, half], 1, half=half, amax=amax)
            losses.append(loss)
        check_loss(jax.tree.map(jnp.add, *losses), x[1:3], name)
    else:
        out, loss = run(out, x[1:3], 1, amax=amax_of(out, x[1:3]))
        check_loss(loss, x[1:3], name)
    expected = quantize_numpy(x, name, shared_axes=(1,))
    for part, before, wanted in zip(*map(jax.tree.leaves, (out, leaf(name), expected)), strict=True):
        assert_same_parts(part[1:3], [wanted[1:3]])
        assert_same_parts(jnp.delete(part, jnp.array([1, 2]), axis=0), [np.delete(before, [1, 2], axis=0)])


@needs_interpreter
@pytest.mark.parametrize(
    "name", [*FOUR, *(pytest.param(name, marks=pytest.mark.slow) for name in WEIGHTS if name not in FOUR)]
)
def test_special_numbers(name):
    x = cast(special_experts(alone=by_name(name).whole_matrix), ml_dtypes.bfloat16)
    out, loss = run(leaf(name, x.shape), x, amax=amax_of(leaf(name, x.shape), x))
    assert_same_parts(out, quantize_numpy(x, name))
    assert np.asarray(loss.finite).all()


@needs_interpreter
@pytest.mark.parametrize("name", ["mxfp8", "int4_per_group", "fp8_per_block", "int8_per_channel"])
def test_many_tiles(name):
    """More tiles along K than a program keeps at once, and more rows than one has."""
    x = weights((1, 2, 256, 1280))[:, :1]
    out, _ = run(leaf(name, x.shape), x)
    assert_same_parts(out, quantize_numpy(x, name))


@needs_interpreter
def test_blocks_with_a_scale_of_zero_are_lost():
    x = cast(special_experts(alone=True), ml_dtypes.bfloat16)[list(SPECIAL).index("tiny")][None]
    x = (x.astype(np.float32) * 1e20).astype(ml_dtypes.bfloat16)  # far below the format's floor
    out, loss = run(leaf("nvfp4", x.shape), x, amax=amax_of(leaf("nvfp4", x.shape), x))
    assert not np.asarray(out.scales).astype(np.float32).any()
    assert np.asarray(loss.norm).min() > 0
    np.testing.assert_allclose(loss.error, loss.norm, rtol=1e-5)


def hard_quotients():
    """8-bit numbers and 24-bit scales whose quotient is next to half an odd number: by how much they miss is small."""
    odd, numbers, shift = np.arange(1, 256, 2), np.arange(128, 256), np.arange(10, 34)
    miss = np.arange(-255, 256)
    b, m, s, i = np.meshgrid(odd, numbers, shift, miss, indexing="ij", sparse=True)
    product = (m.astype(np.int64) << s) - i
    scale, rest = product // b, product % b
    found = np.nonzero((rest == 0) & (scale >= 2**23) & (scale < 2**24) & (np.abs(i) <= b))
    return numbers[found[1]].astype(np.float32), scale[found].astype(np.float32)


@pytest.mark.parametrize(
    ("name", "largest"),
    few_cases([("int8_per_channel", 127), ("int4_per_group", 7), ("fp8_per_channel", 448)], [("fp8_per_channel", 448)]),
)
def test_rounding_of_hard_quotients(name, largest):
    numbers, scales = hard_quotients()
    assert len(numbers) > 30_000
    fmt, wrong_without = by_name(name), 0
    by, run_divided = divisor(jnp.asarray(scales)), jax.jit(lambda x, by: divided(x, by, fmt).code)
    for exponent in range(2, 27):
        x = numbers * np.float32(2.0**exponent)
        keep = (x / scales <= largest) & (x / scales >= 2.0**-12)
        for signed in (x, -x):
            found = np.asarray(run_divided(jnp.asarray(signed), by))[keep]
            found = found.view(np.uint8) if fmt.code == E4M3 else found & 2**fmt.bits - 1
            expected = codes_of((signed / scales)[keep], fmt)
            np.testing.assert_array_equal(found, expected)
            # a product with the reciprocal is not enough
            wrong_without += np.count_nonzero(codes_of((signed * (1 / scales))[keep], fmt) != expected)
    assert wrong_without > 100


def codes_of(units, fmt):
    return units.astype(E4M3).view(np.uint8) if fmt.code == E4M3 else np.round(units).astype(np.int32) & 2**fmt.bits - 1


def test_reasons():
    def reason(x, name="mxfp8"):
        return unsupported(IntoCall(out=leaf(name), x=x, start=0, half=None, amax=None))

    shape = jax.ShapeDtypeStruct
    assert reason(shape((1, 2, 128, 256), jnp.float32)) == "it reads bfloat16, not float32"
    assert "N=96 and K=256 must be multiples of 128" in reason(shape((1, 2, 96, 256), jnp.bfloat16))
    assert "N=128 and K=64 must be multiples of 128" in reason(shape((1, 2, 128, 64), jnp.bfloat16))
    assert reason(shape((0, 2, 128, 128), jnp.bfloat16)) == "there is nothing to quantize"
    good = IntoCall(out=leaf("mxfp8"), x=shape((1, 2, 128, 256), jnp.bfloat16), start=0, half=None, amax=None)
    assert unsupported_anywhere(good) is None
