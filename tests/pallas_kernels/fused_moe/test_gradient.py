"""Gradients of the routed experts: against differences of the definition, and against a dense layer's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import definition
from by_name import by_name
from pallas_kernels import Activation, UnsupportedError, fused_ffn, fused_moe, quantize, route
from tolerance import assert_close

T, E, H, INNER = 23, 5, 64, 96
EXACT = {"batch": 3e-6, "worst_row": 5e-5}
NAMES = ("x", "w13", "w2", "b13", "b2", "weights")
ALL_ACTIVATIONS = {
    "silu": {},
    "gelu": {},
    "gelu_tanh": {},
    "relu2": {},
    "swigluoai": {"alpha": 1.702, "beta": 1.0, "limit": 7.0},
    "swiglustep": {"limit": 7.0},
    "situ": {"beta": 1.5, "linear_beta": 3.0},
    "silu_no_mul": {},
    "gelu_no_mul": {},
    "gelu_tanh_no_mul": {},
    "relu2_no_mul": {},
}


def problem(k=2, shards=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(T, H)),
        "w13": rng.normal(size=(E, shards, INNER, H)) / H**0.5,
        "w2": rng.normal(size=(E, H, INNER)) / INNER**0.5,
        "b13": rng.normal(size=(E, shards, INNER)),
        "b2": rng.normal(size=(E, H)),
        "weights": rng.uniform(0.1, 1.0, (T, k)),
    }
    arrays = {name: jnp.asarray(a, jnp.float32).astype(dtype) for name, a in arrays.items()}
    ids = jnp.asarray(np.stack([rng.permutation(E)[:k] for _ in range(T)]), jnp.int32)
    return arrays, ids, jnp.asarray(rng.normal(size=(T, H)), jnp.float32)


def ours(arrays, ids, cotangent, **options):
    y = fused_moe(
        *(arrays[name] for name in ("x", "w13", "w2", "weights")),
        ids,
        w13_bias=arrays["b13"],
        w2_bias=arrays["b2"],
        out_dtype=jnp.float32,
        **options,
    )
    return jnp.sum(y * cotangent)


def check_directions(gradients, arrays, value, tolerance=2e-5):
    rng = np.random.default_rng(1)
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        ahead, behind = (value({**arrays, name: arrays[name] + step * direction}) for step in (1e-6, -1e-6))
        slope = np.sum(np.asarray(gradient, np.float64) * direction)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert size > 0
        assert abs(slope - (ahead - behind) / 2e-6) <= tolerance * size, name


MARKS = {"silu": pytest.mark.smoke, "swigluoai": (), "relu2_no_mul": ()}


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, pytest.mark.slow)) for n in ALL_ACTIVATIONS])
def test_of_everything_for_each_activation(name, monkeypatch):
    arrays, ids, cotangent = problem(shards=1 if name.endswith("no_mul") else 2)
    activation = Activation(name, **ALL_ACTIVATIONS[name])
    run = jax.jit(jax.grad(functools.partial(ours, activation=activation), 0))
    ids = ids.at[3].set(-1).at[4, 0].set(E + 7)  # some pairs have no expert
    monkeypatch.setattr(definition, "rounded", lambda x, dtype: np.asarray(x, np.float64))
    act = functools.partial(definition.activation, name, **ALL_ACTIVATIONS[name])

    def value(a):
        y = definition.fused_moe(
            a["x"], a["w13"], a["w2"], a["weights"], np.asarray(ids), act=act, b13=a["b13"], b2=a["b2"]
        )
        return np.sum(y * definition.real(cotangent))

    gradients = run(arrays, ids, cotangent)
    check_directions(gradients, {name: definition.real(a) for name, a in arrays.items()}, value)
    assert not np.asarray(gradients["x"][3]).any()
    assert not np.asarray(gradients["weights"][3]).any()
    wrong = {**gradients, "x": jnp.roll(gradients["x"], 1, axis=0)}
    with pytest.raises(AssertionError):
        check_directions(wrong, {name: definition.real(a) for name, a in arrays.items()}, value)


def test_of_weights_on_the_input(monkeypatch):
    arrays, ids, cotangent = problem(k=1)
    monkeypatch.setattr(definition, "rounded", lambda x, dtype: np.asarray(x, np.float64))
    expert_map = jnp.array([2, -1, 0, 1, -1], jnp.int32)
    arrays = {name: a[:3] if name in ("w13", "w2", "b13", "b2") else a for name, a in arrays.items()}
    run = functools.partial(ours, apply_router_weight_on_input=True, expert_map=expert_map)

    def value(a):
        y = definition.fused_moe(
            *(a[name] for name in ("x", "w13", "w2", "weights")),
            np.asarray(ids),
            b13=a["b13"],
            b2=a["b2"],
            expert_map=np.asarray(expert_map),
            on_input=True,
        )
        return np.sum(y * definition.real(cotangent))

    gradients = jax.jit(jax.grad(run))(arrays, ids, cotangent)
    check_directions(gradients, {name: definition.real(a) for name, a in arrays.items()}, value)


einsum = functools.partial(jnp.einsum, precision="highest")  # GPUs would round f32


def dense(x, w13, w2, logits, *, rounding=lambda x: x, top_k=2):
    """A layer that sends every token to every expert, differentiated by jax alone; `rounding` is straight-through."""
    weights, ids = route(logits, top_k=top_k)
    share = jnp.sum(jax.nn.one_hot(ids, E, dtype=jnp.float32) * weights[..., None], axis=1)
    x = rounding(x)
    gate, up = (einsum("th,eih->tei", x, w13[:, s]) for s in (0, 1))
    hidden = rounding((jax.nn.silu(gate) * up).reshape(-1, INNER)).reshape(T, E, INNER)
    return einsum("tei,ehi,te->th", hidden, w2, share)


def straight(fmt):
    return lambda x: x + jax.lax.stop_gradient(quantize(x, fmt).dequantize(jnp.float32) - x)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (None, None),
        pytest.param("fp8_per_block", "fp8_per_group", marks=pytest.mark.slow),
        pytest.param(None, "mxfp4", marks=pytest.mark.slow),
        pytest.param("int8_per_channel", "int8_per_token", marks=pytest.mark.slow),
        pytest.param("fp8_per_block", None, marks=pytest.mark.slow),
        pytest.param("nvfp4", "nvfp4_per_token", marks=pytest.mark.slow),
        pytest.param("fp8_per_tensor", "fp8_per_tensor_dynamic", marks=pytest.mark.slow),
    ],
)
def test_through_quantized_weights_and_activations(weight, activation):
    """By the inputs and the router: what adapters and router tuning need."""
    arrays, _, cotangent = problem()
    x, w13, w2 = (arrays[name] for name in ("x", "w13", "w2"))
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(T, E)), jnp.float32)
    q13, q2 = ((quantize(w, by_name(weight)) if weight else w) for w in (w13, w2))
    r13, r2 = ((w.dequantize(jnp.float32) if weight else w) for w in (q13, q2))

    def total(x, logits):
        weights, ids = route(logits, top_k=2)
        return jnp.sum(fused_moe(x, q13, q2, weights, ids, activation_format=activation) * cotangent)

    def expected(x, logits, rounding):
        return jnp.sum(dense(x, r13, r2, logits, rounding=rounding) * cotangent)

    found = jax.jit(jax.grad(total, (0, 1)))(x, logits)
    rounding = straight(activation) if activation else lambda x: x
    wanted = jax.jit(jax.grad(functools.partial(expected, rounding=rounding), (0, 1)))(x, logits)
    for actual, right in zip(found, wanted, strict=True):
        # hidden values on the edge of two codes fall to either side
        assert_close(actual, right, **({"batch": 5e-3, "worst_row": 3e-2} if activation else EXACT))
    if activation or weight:
        plain = jax.jit(jax.grad(lambda x: jnp.sum(dense(x, w13, w2, logits) * cotangent)))(x)
        with pytest.raises(AssertionError):
            assert_close(found[0], plain, batch=5e-3, worst_row=3e-2)


@pytest.mark.slow
def test_in_bf16():
    arrays, ids, cotangent = problem(dtype=jnp.bfloat16)
    wanted = jax.jit(jax.grad(ours))({name: a.astype(jnp.float32) for name, a in arrays.items()}, ids, cotangent)
    found = jax.jit(jax.grad(ours))(arrays, ids, cotangent)
    for name in NAMES:
        assert found[name].dtype == jnp.bfloat16
        assert_close(
            found[name].reshape(-1, found[name].shape[-1]),
            wanted[name].reshape(-1, found[name].shape[-1]),
            batch=8e-3,
            worst_row=3e-2,
        )


def test_the_same_bits_from_run_to_run():
    arrays, ids, cotangent = problem(dtype=jnp.bfloat16)
    run = jax.jit(jax.grad(ours))
    first = run(arrays, ids, cotangent)
    for _ in range(3):
        assert all(np.array_equal(first[name], found) for name, found in run(arrays, ids, cotangent).items())


@pytest.mark.parametrize("activation", [None, "int8_per_token"])
def test_of_the_dense_layer(activation):
    arrays, _, cotangent = problem()
    x, w13, w2 = arrays["x"], arrays["w13"][:1], arrays["w2"][:1]
    rounding = straight(activation) if activation else lambda x: x

    def total(x, w13, w2):
        return jnp.sum(fused_ffn(x, w13, w2, activation_format=activation) * cotangent)

    def expected(x, w13, w2):
        x = rounding(x)
        gate, up = (einsum("th,ih->ti", x, w13[0, s]) for s in (0, 1))
        return jnp.sum(einsum("ti,hi->th", rounding(jax.nn.silu(gate) * up), w2[0]) * cotangent)

    found, wanted = (jax.jit(jax.grad(f, (0, 1, 2)))(x, w13, w2) for f in (total, expected))
    for actual, right in zip(found, wanted, strict=True):
        assert_close(actual, right, **({"batch": 5e-3, "worst_row": 3e-2} if activation else EXACT))


@pytest.mark.slow
def test_under_scan_and_remat():
    arrays, ids, cotangent = problem()

    def layer(x, _):
        return jax.checkpoint(lambda x: x + fused_moe(x, arrays["w13"], arrays["w2"], arrays["weights"], ids))(x), None

    found = jax.jit(jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, length=2)[0] * cotangent)))(arrays["x"])
    wanted = jax.jit(jax.grad(lambda x: jnp.sum(layer(layer(x, None)[0], None)[0] * cotangent)))(arrays["x"])
    assert_close(found, wanted, **EXACT)


def test_no_tokens():
    arrays, ids, cotangent = problem()
    none = {name: a[:0] if name in ("x", "weights") else a for name, a in arrays.items()}
    for found in jax.grad(ours)(none, ids[:0], cotangent[:0]).values():
        assert not np.asarray(found).any()


@pytest.mark.parametrize("activation", [None, pytest.param("int8_per_token", marks=pytest.mark.slow)])
def test_a_second_derivative_is_an_error_not_zero(activation):
    arrays, ids, cotangent = problem()

    def gradient(x):
        return jax.grad(lambda x: ours({**arrays, "x": x}, ids, cotangent, activation_format=activation))(x)

    with pytest.raises(UnsupportedError, match="no second derivative"):
        jax.grad(lambda x: jnp.sum(gradient(x)))(arrays["x"])


@pytest.mark.slow
def test_padding_has_no_say_in_gradients():
    """Neither in a scale of all tokens nor, where it is no number, in those of weights."""
    arrays, ids, cotangent = problem()
    ids = ids.at[18:].set(-1)
    formats = {"activation_format": "fp8_per_tensor_dynamic"}

    def gradients(padding):
        given = {**arrays, "x": arrays["x"].at[18:].set(padding)}
        return jax.jit(jax.grad(functools.partial(ours, **formats)))(given, ids, cotangent)

    clean = gradients(0.0)
    for padding in (1e4, np.nan):
        for name, found in gradients(padding).items():
            assert np.array_equal(found, clean[name]), name
