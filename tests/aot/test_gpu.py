"""The Hopper kernels pass the real compilers for sm_90a: no spills, no copies of the weights, within shared memory."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import aot_gpu
from by_name import by_name
from codes import PAIRS
from moe_online.loading.quantizer import PartLayout
from moe_online.loading.steps import StepCache
from numpy_quantizer import WEIGHTS
from pallas_kernels import QuantizedArray, UnsupportedError, fused_moe, grouped_matmul, hopper, quantize
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.mosaic_gpu import MosaicGpuConfig
from pallas_kernels.grouped_matmul.mosaic_gpu.config import SMEM_LIMIT
from pallas_kernels.hopper import FIRST_JAX
from quick import few_cases
from scaled_kernel import scaled_matmul

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        jax.__version_info__[:2] < FIRST_JAX, reason=f"Mosaic GPU kernels need jax >= 0.11, this is {jax.__version__}"
    ),
    pytest.mark.skipif(bool(aot_gpu.MISSING), reason=f"{', '.join(aot_gpu.MISSING)} not installed: extra `aot-gpu`"),
]
S, BF16 = jax.ShapeDtypeStruct, jnp.bfloat16
MODELS = {  # E, top_k, H, I, activation, biased
    "qwen3-30b": (128, 8, 2048, 768, "silu", False),
    "mixtral": (8, 2, 4096, 14336, "silu", False),
    "dsv3-tp8": (256, 8, 7168, 256, "silu", False),
    "gpt-oss-20b": (32, 4, 2880, 2880, "swigluoai", True),
}


def arguments(m, e, n, k, biased):
    return [S((m, k), BF16), S((e, n, k), BF16), S((e,), jnp.int32), *([S((e, n), BF16)] if biased else [])]


def call(lhs, rhs, sizes, bias=None, **options):
    return grouped_matmul(lhs, rhs, sizes, bias=bias, implementation="mosaic_gpu", **options)


def check_kernels(reports, count):
    """So many kernels, each for Hopper, in its registers and its shared memory."""
    print(*reports, sep="\n")
    assert [report.target for report in reports] == ["sm_90a"] * count
    for report in reports:
        assert report.spill_bytes == 0
        assert report.smem_bytes <= SMEM_LIMIT


@pytest.mark.parametrize(
    ("model", "tokens"),
    few_cases([(model, t) for model in MODELS for t in (5, 64, 4096)], [("gpt-oss-20b", 64), ("mixtral", 4096)]),
)
def test_real_shapes(model, tokens, tmp_path):
    e, top_k, h, i, activation, biased = MODELS[model]
    m = tokens * top_k
    with aot_gpu.kernel_reports(tmp_path) as reports:
        for n, k, epilogue in ((2 * i, h, activation), (h, i, None)):
            avals = arguments(m, e, n, k, biased)
            compiled = aot_gpu.compile_for(aot_gpu.device_of(), functools.partial(call, epilogue=epilogue), *avals)
            # the plan of tiles and its parts, and where M is no multiple of 8 the padded rows; never the weights
            assert aot_gpu.temporary_bytes(compiled) <= 2**20 + (m % 8 > 0) * (m + 8) * k * 2 + biased * (e + 1) * n * 4
    check_kernels(reports, 2)


FORMATS = {"bf16": None, **dict(PAIRS)}  # of rows, by those of weights
AT_ONCE = ("bf16", "fp8_per_block")  # both matmuls in one launch, where rows are few
LAYERS = [
    *((model, name, tokens) for model in MODELS for name in FORMATS for tokens in (64, 4096) if model != "gpt-oss-20b"),
    ("gpt-oss-20b", "bf16", 64),
]
QUICK_LAYERS = [layer for layer in LAYERS if layer[0] != "gpt-oss-20b" and layer[1] in AT_ONCE and layer[2] == 64]
QUICK_LAYERS += [("qwen3-30b", "fp8_per_block", 4096)]


@pytest.mark.parametrize(("model", "name", "tokens"), few_cases(LAYERS, QUICK_LAYERS))
def test_layers(model, name, tokens, tmp_path):
    """Both matmuls, and the kernels that bring tokens to experts and quantize: no more memory than stated."""
    e, top_k, h, i, activation, biased = MODELS[model]
    shapes = (e, 2, i, h), (e, h, i)
    weights = [S(shape, BF16) for shape in shapes]
    if name != "bf16":
        weights = [jax.eval_shape(functools.partial(quantize, format=name), w) for w in weights]
    of_pairs = [S((tokens, top_k), dtype) for dtype in (jnp.float32, jnp.int32)]
    biases = [S(shape[:-1], BF16) for shape in shapes] if biased else [None, None]
    leaves, tree = jax.tree.flatten((S((tokens, h), BF16), *weights, *of_pairs, *biases))

    def layer(*leaves):
        *arrays, b13, b2 = jax.tree.unflatten(tree, leaves)
        return fused_moe(
            *arrays,
            activation=activation,
            activation_format=FORMATS[name],
            w13_bias=b13,
            w2_bias=b2,
            implementation="mosaic_gpu",
        )

    with aot_gpu.kernel_reports(tmp_path) as reports:
        compiled = aot_gpu.compile_for(aot_gpu.device_of(), layer, *leaves)
    limit = tokens * top_k * max(h + i, i + 2 * h) * (2 if name == "bf16" else 1) + 32e6
    if name not in AT_ONCE:
        limit += tokens * top_k * 2 * i  # what a scale of a whole row waits for
    assert aot_gpu.temporary_bytes(compiled) <= limit
    sorting = 1 if tokens * top_k <= 2048 else 2
    matmuls = (1 if tokens == 64 else 2) if name in AT_ONCE else 3  # with the hidden values quantized in between
    check_kernels(reports, sorting + matmuls + 1)  # and the sum of each token's outputs


@pytest.mark.smoke
def test_it_is_what_runs_on_hopper(tmp_path):
    avals = arguments(512, 8, 512, 256, biased=False)
    with aot_gpu.kernel_reports(tmp_path) as reports:
        aot_gpu.compile_for(aot_gpu.device_of(), grouped_matmul, *avals)
    assert [report.target for report in reports] == ["sm_90a"]


@pytest.mark.smoke
def test_other_gpus_are_served_by_xla(tmp_path):
    avals = arguments(512, 8, 512, 256, biased=False)
    with pytest.raises(UnsupportedError, match=r"for NVIDIA Hopper .* and this is NVIDIA B200"):
        aot_gpu.compile_for(aot_gpu.device_of(aot_gpu.BLACKWELL), call, *avals)
    with aot_gpu.kernel_reports(tmp_path) as reports:
        aot_gpu.compile_for(aot_gpu.device_of(aot_gpu.BLACKWELL), grouped_matmul, *avals)
    assert not reports


def test_a_mesh_of_several_devices_is_served_by_xla():
    """XLA cannot spread a kernel; inside of shard_map there is nothing to spread."""
    mesh = Mesh(np.array(aot_gpu.devices_of(2)), ("expert",))
    lhs, rhs, sizes = arguments(512, 8, 512, 256, biased=False)
    with jax.set_mesh(mesh):
        with pytest.raises(UnsupportedError, match=r"inside jax.shard_map"):
            jax.jit(call).trace(lhs, rhs, sizes)
        assert "grouped_matmul_16bit" not in str(jax.jit(grouped_matmul).trace(lhs, rhs, sizes).jaxpr)
        whole = jax.sharding.PartitionSpec()
        mapped = jax.shard_map(grouped_matmul, in_specs=(whole,) * 3, out_specs=whole, check_vma=False)
        assert "grouped_matmul_16bit" in str(jax.jit(mapped).trace(lhs, rhs, sizes).jaxpr)


@pytest.mark.smoke
def test_ptxas_ran(monkeypatch):
    """Negative control: Blackwell has no wgmma."""
    monkeypatch.setattr(hopper, "HOPPER", ("B200",))
    avals = arguments(512, 8, 512, 256, biased=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Pass pipeline failed"):
        aot_gpu.compile_for(aot_gpu.device_of(aot_gpu.BLACKWELL), call, *avals)


def test_too_much_shared_memory_is_noticed(monkeypatch):
    """Negative control: without our own check the compiler refuses the same config."""
    large = MosaicGpuConfig(block_m=128, block_n=256, stages=5)
    avals = arguments(512, 8, 512, 4096, biased=False)
    monkeypatch.setattr(mosaic_gpu, "SMEM_LIMIT", 2**30)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        aot_gpu.compile_for(aot_gpu.device_of(), functools.partial(call, config=large), *avals)


@pytest.mark.parametrize("name", ["fp8_per_block", "fp8_per_channel"])
def test_quantized_weights_need_no_other_layout(name, tmp_path):
    """Codes `[E, N, K]` and scales `[E, K/bk, N/bn]` go into a kernel as stored; transposed codes do not."""
    e, n, k = 8, 4096, 2048
    q = jax.eval_shape(lambda: quantize(jnp.zeros((e, n, k), BF16), name))
    lhs = S((64, k), jnp.float8_e4m3fn)

    def run(lhs, values, scales):
        return scaled_matmul(lhs, QuantizedArray.from_parts(values, scales, name))

    with aot_gpu.kernel_reports(tmp_path) as reports:
        compiled = aot_gpu.compile_for(aot_gpu.device_of(), run, lhs, q.values, q.scales)
    assert aot_gpu.temporary_bytes(compiled) < 4096
    assert reports[0].spill_bytes == 0
    turned = S((e, k, n), q.values.dtype)
    compiled = aot_gpu.compile_for(
        aot_gpu.device_of(), lambda lhs, v, s: run(lhs, jnp.swapaxes(v, 1, 2), s), lhs, turned, q.scales
    )
    assert aot_gpu.temporary_bytes(compiled) >= e * n * k


def stored(name, shape, devices):
    """A finished leaf on these devices: experts over them."""
    fmt, second = by_name(name), by_name(name).global_shape(shape)
    spread = NamedSharding(Mesh(np.array(devices), ("expert",)), PartitionSpec("expert"))
    return QuantizedArray(
        values=S(fmt.values_shape(shape), fmt.storage, sharding=spread),
        scales=S(fmt.scales_shape(shape), fmt.scale_dtype, sharding=spread),
        global_scale=None if second is None else S(second, jnp.float32, sharding=spread),
        format=fmt,
    )


def loader_step(name, shape, part, devices, order=None):
    """What the loader runs for a unit of a source like `part`."""
    leaf = stored(name, shape, devices)
    half = 0 if len(part) < len(shape) else None
    layout = PartLayout(permutation=order or tuple(range(len(part))), half=half)
    return StepCache().get(leaf, (layout,), [S(part, BF16, sharding=leaf.values.sharding)])


SLOW = ("fp8_per_tensor", "fp8_per_channel", "int4_per_group", "int4_per_group_64", "int4_per_group_32", "mxfp8")
MARKS = {"mxfp4": pytest.mark.smoke, **dict.fromkeys(SLOW, pytest.mark.slow)}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(pytest.param("mixtral", name, marks=MARKS.get(name, ())) for name in WEIGHTS),
        *(("qwen3-30b", name) for name in ("fp8_per_channel", "int4_per_group")),
    ],
)
def test_quantization_in_place(model, name, tmp_path):
    """A unit of gate and up, and one of down: nothing is copied, and nothing of its size lives in between."""
    e, _, h, i, _, _ = MODELS[model]
    with aot_gpu.kernel_reports(tmp_path) as reports:
        for shape in ((e, 2, i, h), (e, h, i)):
            step = loader_step(name, shape, (4, *shape[1:]), [aot_gpu.device_of()])
            assert step.temporary_bytes <= 2**20  # what each program sums
    check_kernels(reports, 2)


@pytest.mark.parametrize("case", ["transposed", "several devices", "ragged", "half"])
def test_what_quantization_leaves_to_xla(case, tmp_path):
    shape, part, order, devices = (8, 2, 256, 384), (4, 2, 256, 384), None, [aot_gpu.device_of()]
    if case == "transposed":
        part, order = (4, 2, 384, 256), (0, 1, 3, 2)
    if case == "several devices":
        devices = aot_gpu.devices_of(2)
    if case == "ragged":
        shape, part = (8, 2, 96, 384), (4, 2, 96, 384)
    if case == "half":  # this one is the kernel's, as is that of several devices, each of which runs it
        part = (4, 256, 384)
    with aot_gpu.kernel_reports(tmp_path) as reports, warnings.catch_warnings(action="ignore"):
        loader_step("mxfp8", shape, part, devices, order)
    assert len(reports) == (case in ("half", "several devices"))


@pytest.mark.parametrize(("rows", "dtype"), few_cases([(64, BF16), (1696, BF16), (64, jnp.float32)], [(1696, BF16)]))
def test_results_to_be_quantized_fit_in_shared_memory(rows, dtype, tmp_path):
    """Where the kernel has no room to turn them, another quantizes them."""

    def matmul(x, w, sizes):
        fmt = by_name("fp8_per_group")
        return grouped_matmul(x, w, sizes, out_format=fmt, out_dtype=dtype, implementation="mosaic_gpu")

    with aot_gpu.kernel_reports(tmp_path) as reports:
        aot_gpu.compile_for(aot_gpu.device_of(), matmul, *arguments(rows, 16, 512, 512, biased=False))
    check_kernels(reports, 2 if dtype == BF16 else 1)
