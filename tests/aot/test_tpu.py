"""Kernels compiled for TPU v5e, v6e and v7x by libtpu, on any machine: layouts, VMEM, bundles. Nothing runs."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: it comes with the extra aot-tpu", allow_module_level=True)

from aot_tpu import TOPOLOGIES, compile_for, copied_bytes, dump_in_a_process, kernel_report, temporary_bytes, tpu_device
from pallas_kernels import UnsupportedError, get_format, grouped_matmul, make_group_metadata
from pallas_kernels.grouped_matmul import mosaic_tpu
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.mosaic_tpu import MosaicTpuConfig
from pallas_kernels.grouped_matmul.mosaic_tpu.config import SPILLED_BYTES, heuristic
from pallas_kernels.grouped_matmul.mosaic_tpu.kernel import grouped_matmul_bf16
from pallas_kernels.grouped_matmul.mosaic_tpu.schedule import plan

pytestmark = pytest.mark.aot

SHAPES = {  # rows of 4096 tokens, experts, N, K
    "mixtral_w13": (8192, 8, 28672, 4096),
    "mixtral_w2": (8192, 8, 4096, 14336),
    "qwen3_moe_w13": (32768, 128, 1536, 2048),
    "qwen3_moe_w2": (32768, 128, 2048, 768),
}
MIB = 2**20


def arguments(m, e, n, k, dtype=jnp.bfloat16):
    shape = jax.ShapeDtypeStruct
    return shape((m, k), dtype), shape((e, n, k), dtype), shape((e,), jnp.int32)


@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("case", SHAPES)
def test_compiles_without_copies_of_the_weights(case, generation):
    lhs, rhs, sizes = arguments(*SHAPES[case])
    compiled = compile_for(tpu_device(generation), grouped_matmul, lhs, rhs, sizes)  # None takes the TPU's kernel
    assert "tpu_custom_call" in compiled.as_text()
    assert temporary_bytes(compiled) < MIB  # the schedule; one expert's weights are 3 MiB or more


def test_gate_and_up_apart_are_a_free_reshape():
    """`[E, 2, I, K]` is served as `[E, 2 * I, K]`; I is a multiple of 16, the rows of a tile of the layout."""
    m, e, n, k = SHAPES["qwen3_moe_w13"]
    lhs, rhs, sizes = arguments(m, e, n, k)
    apart = jax.ShapeDtypeStruct((e, 2, n // 2, k), rhs.dtype)

    def call(lhs, rhs, sizes):
        metadata = make_group_metadata(sizes)
        return mosaic_tpu.run(Call(lhs=lhs, rhs=rhs, group_sizes=sizes, metadata=metadata, out_dtype=lhs.dtype))

    assert temporary_bytes(compile_for(tpu_device("v6e"), call, lhs, apart, sizes)) < MIB


@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize(
    ("shape", "tiles", "out_dtype"),
    [
        ((7, 3, 200, 384), (16, 256, 256), jnp.bfloat16),  # edges everywhere
        ((4096, 8, 1536, 4096), (512, 1024, 1024), jnp.bfloat16),
        ((4096, 8, 1536, 4096), (128, 512, 4096), jnp.float32),
    ],
)
def test_takes_no_more_vmem_than_the_config_says(shape, tiles, out_dtype, generation):
    config = MosaicTpuConfig(**dict(zip(("block_m", "block_n", "block_k"), tiles, strict=True)))
    bound = config.vmem_bytes(shape[-1], out_itemsize=jnp.dtype(out_dtype).itemsize)
    compile_bypassing_our_check(generation, shape, config, out_dtype, vmem_limit=bound)
    too_little = (bound - SPILLED_BYTES) // 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="exceeded scoped vmem limit"):
        compile_bypassing_our_check(generation, shape, config, out_dtype, vmem_limit=too_little)


def compile_bypassing_our_check(generation, shape, config, out_dtype, *, vmem_limit):
    m, e, _, _ = shape

    def call(lhs, rhs, sizes):
        starts = make_group_metadata(sizes).group_starts
        schedule = plan(starts, sizes, num_rows=m, num_experts=e, group_offset=None, block_m=config.block_m)
        return grouped_matmul_bf16(lhs, rhs, schedule, out_dtype=out_dtype, config=config, vmem_limit=vmem_limit)

    return compile_for(tpu_device(generation), call, *arguments(*shape))


@pytest.mark.parametrize(("generation", "capacity"), [("v5e", 128 * MIB), ("v6e", 128 * MIB), ("v7x", 64 * MIB)])
def test_more_vmem_than_there_is_fails(generation, capacity):
    """Here the compiler itself is on trial: were it not run, everything above would pass."""
    k, shape = 2048, (64, 2, 28672, 2048)
    config = MosaicTpuConfig(block_m=16, block_n=capacity // (2 * k * 2), block_k=k)  # two buffers of weights: all
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_bypassing_our_check(generation, shape, config, jnp.bfloat16, vmem_limit=capacity)
    reason = f"takes {config.vmem_bytes(k)} bytes of VMEM of {capacity // 8 * 7}; use smaller blocks"
    call = functools.partial(grouped_matmul, implementation="mosaic_tpu", config=config)
    with pytest.raises(UnsupportedError, match=reason):
        compile_for(tpu_device(generation), call, *arguments(*shape))


def test_an_operation_that_this_generation_lacks_fails():
    """bf16 times f4 multiplies on v7x, and the compiler for v6e says no."""
    shape = jax.ShapeDtypeStruct
    operands = shape((256, 256), jnp.bfloat16), shape((256, 256), jnp.float4_e2m1fn)
    compile_for(tpu_device("v7x"), product_with_f4, *operands)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)mosaic"):
        compile_for(tpu_device("v6e"), product_with_f4, *operands)


def product_with_f4(x, w):
    def kernel(x_vmem, w_vmem, out_vmem):
        out_vmem[...] = jnp.dot(x_vmem[...], w_vmem[...], preferred_element_type=jnp.float32)

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32))(x, w)


def test_bundle_report(tmp_path):
    """The static schedule keeps the matrix units busy: this is what a change of the kernel is judged by here."""
    m, e, n, k = SHAPES["qwen3_moe_w13"]
    dump_in_a_process(
        f"""
import jax
import jax.numpy as jnp
from aot_tpu import compile_for, tpu_device
from pallas_kernels import grouped_matmul
shapes = (({m}, {k}), jnp.bfloat16), (({e}, {n}, {k}), jnp.bfloat16), (({e},), jnp.int32)
compile_for(tpu_device("v6e"), grouped_matmul, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
""",
        tmp_path,
    )
    report = kernel_report("grouped_matmul_", tmp_path)
    config = heuristic(m=m, num_experts=e, n=n, k=k, vmem_limit=112 * MIB)
    least = config.block_m * config.block_n * k // (4 * 256 * 256)  # bundles, both units of 256 x 256 at work in each
    assert least <= report.mxu_bundles <= 1.1 * least  # 1.03
    assert report.bundles - report.mxu_bundles < 800  # 614: pipeline, filling the units, the masked store
    assert 0.8 * config.vmem_bytes(k) < report.vmem_bytes <= config.vmem_bytes(k)
    assert 0 < report.spilled_bytes < report.vmem_bytes / 4


@pytest.mark.parametrize(
    ("case", "name", "copied"),
    [
        ("mixtral_w13", "fp8_per_block", 0),
        ("mixtral_w13", "fp8_per_channel", 0),
        ("qwen3_moe_w2", "fp8_per_channel", 0),
        # The device's own layout of a grid as small as [6, 16] puts the 128 experts on the lanes, which pads nothing;
        # a kernel gets a copy with N on the lanes. It goes to VMEM, where no count of temporaries shows it.
        ("qwen3_moe_w2", "fp8_per_block", 128 * 6 * 16 * 4),
    ],
)
def test_quantized_weights_as_they_are_stored(case, name, copied):
    """A kernel takes values `[E, N, K]` and scales `[E, K/bk, N/bn]` without a copy into another layout."""
    _, e, n, k = SHAPES[case]
    block_n, block_k = get_format(name).block
    values = jax.ShapeDtypeStruct((e, n, k), jnp.float8_e4m3fn)
    scales = jax.ShapeDtypeStruct((e, -(-k // (block_k or k)), -(-n // block_n)), jnp.float32)
    compiled = compile_for(tpu_device("v6e"), first_block_scaled, values, scales)
    assert copied_bytes(compiled) == copied
    assert temporary_bytes(compiled) < 64 * 1024


def test_transposed_weights_would_be_copied():
    """The control of the tests above, for both ways to see a copy."""
    _, e, n, k = SHAPES["mixtral_w13"]
    values = jax.ShapeDtypeStruct((e, k, n), jnp.float8_e4m3fn)
    scales = jax.ShapeDtypeStruct((e, -(-k // 128), -(-n // 128)), jnp.float32)
    compiled = compile_for(tpu_device("v6e"), lambda v, s: first_block_scaled(v.swapaxes(1, 2), s), values, scales)
    assert copied_bytes(compiled) == values.size
    assert temporary_bytes(compiled) >= values.size


def first_block_scaled(values, scales):
    """Of each expert, 128 rows and columns times the scales of its first block of K: any use of both will do."""

    def kernel(values_vmem, scales_vmem, out_vmem):
        per_channel = scales_vmem.shape[1] >= values.shape[1]
        scale = scales_vmem[0:1, :128] if per_channel else scales_vmem[0:1, 0:1]
        out_vmem[...] = values_vmem[...].astype(jnp.float32) * scale

    e, blocks, columns = scales.shape
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((e, 128, 128), jnp.float32),
        grid=(e,),
        in_specs=[
            pl.BlockSpec((None, 128, 128), lambda i: (i, 0, 0)),
            pl.BlockSpec((None, blocks, columns), lambda i: (i, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, 128, 128), lambda i: (i, 0, 0)),
    )(values, scales)
