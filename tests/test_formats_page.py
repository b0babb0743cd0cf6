"""docs/formats.md: its tables are those of the code, each pair of formats does what they say, and its examples run."""

import functools
import importlib.util
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from moe_online import schemes
from pallas_kernels import UnsupportedError, fused_moe, get_format, grouped_matmul, quantize
from quick import few
from sources import BF16, check_quantized
from tolerance import assert_close

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "formats.md"
TOLERANCE = {"batch": 5e-3, "worst_row": 1.2e-2}  # roundings to bf16, and codes that fall to the other side of a tie


def generator():
    spec = importlib.util.spec_from_file_location("formats_page", PAGE.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = generator()


def normal(*shape, seed):
    """bf16 whose sums along the last axis have size 1."""
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) / shape[-1] ** 0.5).astype(BF16)


def test_tables_are_current():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- generated: {name} -->" in text for name in page.TABLES)
    assert page.filled(text) == text, "docs/formats.md is not what the code says: python docs/formats.py"
    assert page.filled(text.replace("exponent + 127", "exponent")) == text


X, W13, W2 = normal(6, 128, seed=0) * BF16.type(8), normal(3, 2, 128, 128, seed=1), normal(3, 128, 128, seed=2)
ROUTING = definition.route(np.random.default_rng(3).standard_normal((6, 3)), 2)


@functools.cache
def packed():
    """The experts in each weight format, in the order of the page's rows: ours, and what numpy makes of them."""

    def all_formats(*experts):
        return [experts if fmt is None else tuple(quantize(w, fmt) for w in experts) for fmt in page.WEIGHTS]

    real = [tuple(definition.real(w, fmt) for w in (W13, W2)) for fmt in page.WEIGHTS]
    return jax.jit(all_formats)(W13, W2), real


@pytest.mark.parametrize("activation", few(page.ACTIVATIONS, (None,)))
def test_pairs(activation):
    """One compilation for each activation format, whatever the weights."""
    refused = [page.refusal("xla", weight, activation) for weight in page.WEIGHTS]
    weights, ids = (jnp.asarray(v, dtype) for v, dtype in zip(ROUTING, (jnp.float32, jnp.int32), strict=True))
    layers, real = packed()

    def layer(w13, w2):
        return fused_moe(X, w13, w2, weights, ids, activation_format=activation, implementation="xla")

    @jax.jit
    def run(layers):
        return [layer(*one) for one, reason in zip(layers, refused, strict=True) if reason is None]

    expected = [definition.fused_moe(X, *experts, *ROUTING, act_format=activation) for experts in real]
    expected = [one for one, reason in zip(expected, refused, strict=True) if reason is None]
    rotated = run(jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), layers))
    for found, wrong, wanted in zip(run(layers), rotated, expected, strict=True):
        assert_close(found, wanted, **TOLERANCE)
        with pytest.raises(AssertionError, match="of the batch"):
            assert_close(wrong, wanted, batch=0.5, worst_row=np.inf)
    for experts, reason in zip(layers, refused, strict=True):
        if reason is not None:
            with pytest.raises(UnsupportedError, match=re.escape(reason)):
                layer(*experts)


@pytest.mark.parametrize("kernel", page.IMPLEMENTATIONS[1:])
def test_kernels_refuse_with_the_reason(kernel):
    """A pair that a kernel serves fails here as well, but by the machine; test_mosaic_*.py run it."""
    run, sizes = functools.partial(grouped_matmul, implementation=kernel), jax.ShapeDtypeStruct((2,), jnp.int32)
    for weight, activation in page.PAIRS:
        reason = page.refusal(kernel, weight, activation)
        says = r"it runs on a |it needs jax >=" if reason is None else re.escape(reason)
        with pytest.raises(UnsupportedError, match=f"{kernel!r} cannot serve this call: ({says})"):
            jax.eval_shape(run, page.abstract((8, 256), activation), page.abstract((2, 256, 256), weight), sizes)


@pytest.mark.slow
def test_examples():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    experts = {"w13_weight": normal(8, 2, 384, 256, seed=4), "w2_weight": normal(8, 256, 384, seed=5)}
    x, logits = normal(16, 256, seed=6) * BF16.type(16), np.random.default_rng(7).standard_normal((16, 8), np.float32)
    names = {"checkpoint": {"experts": experts}, "x": jnp.asarray(x), "router_logits": jnp.asarray(logits)}
    with mock.patch.dict(schemes.SHORTHANDS):  # forgets what they register
        exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    check_quantized({"experts": names["params"]["experts"]}, {"experts": experts}, "int4_per_group_64")
    assert names["params"]["experts"].activation_format == get_format("int8_per_token")

    def expected(w13_format, w2_format):
        w13, w2 = (definition.real(*one) for one in zip(experts.values(), (w13_format, w2_format), strict=True))
        return definition.fused_moe(x, w13, w2, *definition.route(logits, 2), act_format="mxfp8")

    assert_close(names["y"], expected("mxfp4", "mxfp8"), **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(names["y"], expected("mxfp8", "mxfp4"), **TOLERANCE)
