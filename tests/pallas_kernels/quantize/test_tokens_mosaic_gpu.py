"""Tokens sent to the rows of their experts, interpreted on a CPU: the bits of `quantize`, in every place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from by_name import by_name
from pallas_kernels import quantize
from pallas_kernels.hopper import FIRST_JAX
from pallas_kernels.implementations import interpreted
from pallas_kernels.quantize.mosaic_gpu import tokens as kernels
from pallas_kernels.quantize.tokens import TokensCall, quantize_tokens, send_tokens
from pallas_kernels.routing import sort_by_expert
from quick import few, few_cases
from races import no_races
from tolerance import assert_same_bits

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__[:2] < FIRST_JAX, reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels"
)
FORMATS = (None, "fp8_per_group", "fp8_per_token", "int8_per_token", "fp8_per_tensor_dynamic")
SHAPES = {None: (136, 512), "fp8_per_group": (512, 1024)}  # K: pieces that overlap, each layout


def tokens_of(t, k):
    """Magnitudes differ from token to token and group to group; one token is zero, one has a NaN."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((t, k)) * np.exp2(rng.integers(-9, 9, (t, -(-k // 128)))).repeat(128, axis=1)[:, :k]
    x[1] = 0
    return jnp.asarray(x, jnp.float32).astype(jnp.bfloat16)


CASES = [(name, k) for name in FORMATS for k in SHAPES.get(name, (128, 384))]
QUICK = [(None, 136), ("fp8_per_group", 512), ("int8_per_token", 384)]


@pytest.mark.interpreted
@needs_interpreter
@pytest.mark.parametrize(("name", "k"), few_cases(CASES, QUICK), ids=str)
def test_each_place_has_the_token(name, k):
    x, fmt = tokens_of(3, k), None if name is None else by_name(name)
    ids = jnp.array([[1, 0], [2, -1], [0, 1]], jnp.int32)
    order = sort_by_expert(ids, 3)
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads="uninitialized"):
        found = send_tokens(x, order, fmt, "mosaic_gpu")
    whole = x if fmt is None else quantize(x, fmt)
    rows = np.asarray(order.tokens)
    if fmt is None:
        assert_same_bits(found, np.asarray(whole)[rows])
        return
    assert_same_bits(found.values, np.asarray(whole.values)[rows])
    assert_same_bits(found.scales, whole.scales if fmt.whole_matrix else np.asarray(whole.scales)[:, rows])
    assert not np.array_equal(np.asarray(found.values)[::-1], np.asarray(found.values))


@pytest.mark.interpreted
@needs_interpreter
@pytest.mark.parametrize("name", few(FORMATS[1:], ["int8_per_token"]))
def test_tokens_that_stay_in_place(name):
    x, fmt = tokens_of(5, 512), by_name(name)
    with no_races(), interpreted("mosaic_gpu", detect_races=True, out_of_bounds_reads="uninitialized"):
        found = quantize_tokens(x, fmt, None)
    expected = quantize(x, fmt)
    assert_same_bits(found.values, expected.values)
    assert_same_bits(found.scales, expected.scales)


@pytest.mark.interpreted
@needs_interpreter
def test_reciprocals_move_few_codes_by_one():
    x, fmt = tokens_of(6, 256), by_name("fp8_per_token")
    x = (
        x.at[5].set(jnp.zeros((), x.dtype)).at[5, :2].set(jnp.array([7 * 448, 7 * 29], x.dtype))
    )  # 29 is a midpoint; times 1/7 it is a little more
    with interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = quantize_tokens(x, fmt, None, by_reciprocal=True)
    expected = quantize(x, fmt)
    assert_same_bits(found.scales, expected.scales)
    codes, right = (np.asarray(q.values).view(np.uint8).astype(int) for q in (found, expected))
    assert np.abs(codes - right).max() <= 1
    assert np.mean(codes != right) < 1e-2
    assert [float(q.values[5, 1]) for q in (found, expected)] == [30, 28]


@pytest.mark.interpreted
@needs_interpreter
def test_a_nan_spoils_its_own_token():
    x = tokens_of(3, 128).at[2, 5].set(jnp.nan)
    with interpreted("mosaic_gpu", out_of_bounds_reads="uninitialized"):
        found = quantize_tokens(x, by_name("fp8_per_token"), None)
    assert np.isnan(found.scales[0, 2])
    assert np.isfinite(found.scales[0, :2]).all()


@pytest.mark.parametrize(
    ("says", "k", "dtype", "name"),
    [
        ("K=", 96, jnp.bfloat16, "fp8_per_token"),
        ("multiple of 512", 768, jnp.bfloat16, "fp8_per_group"),
        ("quantizes bfloat16, not float32", 512, jnp.float32, "fp8_per_group"),
        ("copies rows of 16 bits", 512, jnp.float32, None),
        ("codes of 8 bits", 512, jnp.bfloat16, "mxfp4"),
    ],
)
def test_what_it_cannot_serve(says, k, dtype, name):
    call = TokensCall(x=jnp.zeros((2, k), dtype), format=None if name is None else by_name(name), places=None)
    assert says in kernels.unsupported_anywhere(call)
