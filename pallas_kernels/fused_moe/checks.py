"""What the layer asks of its arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.formats import QuantizedArray
from pallas_kernels.fused_moe.config import FusedMoeConfig
from pallas_kernels.grouped_matmul.operands import check_float, check_operand


def check_tokens(x: jax.Array) -> None:
    """Raises TypeError or ValueError unless `x` is real and `[T, H]`."""
    check_operand("x", x, "[T, H]", role="activation")
    if isinstance(x, QuantizedArray):
        raise TypeError("x must be a real array [T, H]; give activation_format to have it quantized")


def check_routing(
    x: jax.Array, weights: jax.Array, ids: jax.Array, expert_map: jax.Array | None, on_input: bool
) -> None:
    """Raises TypeError or ValueError unless tokens, their experts and the weights of these fit together."""
    check_tokens(x)
    check_float("topk_weights", weights)
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype != jnp.int32:
        raise ValueError(f"topk_ids must be int32 [T, top_k] with T={x.shape[0]}, not {ids.dtype} {ids.shape}")
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights.shape={weights.shape} must be topk_ids.shape={ids.shape}")
    if expert_map is not None and (expert_map.ndim != 1 or expert_map.dtype != jnp.int32):
        raise ValueError(f"expert_map must be int32 [global_E], not {expert_map.dtype} {expert_map.shape}")
    if on_input and ids.shape[1] != 1:
        raise ValueError(f"apply_router_weight_on_input needs top_k 1, not {ids.shape[1]}: topk_ids.shape={ids.shape}")


def check_experts(
    hidden: int,
    w13: jax.Array | QuantizedArray,
    w2: jax.Array | QuantizedArray,
    activation: Activation,
    w13_bias: jax.Array | None,
    w2_bias: jax.Array | None,
) -> None:
    """Raises TypeError or ValueError unless weights and biases fit together, and the activation and inputs them."""
    check_operand("w2", w2, "[E, H, I]", role="weight")
    check_operand("w13", w13, "[E, S, I, H]" if w13.ndim == 4 else "[E, S*I, H]", role="weight")
    e, _, i = w2.shape
    shards = 2 if activation.gated else 1
    wanted = (e, shards, i, hidden), (e, shards * i, hidden)
    if w13.shape not in wanted:
        axes = "[E, 2, I, H] or [E, 2I, H]" if activation.gated else "[E, 1, I, H] or [E, I, H]"
        raise ValueError(
            f"{w13.shape=} must be {wanted[0]} or {wanted[1]}, {axes}, for {w2.shape=}, inputs of {hidden} and "
            f"{activation.name!r}"
        )
    _check_bias("w13_bias", w13_bias, (w13.shape[:-1], wanted[0][:-1], wanted[1][:-1]))
    _check_bias("w2_bias", w2_bias, (w2.shape[:2],))


def _check_bias(name: str, bias: jax.Array | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if bias is None:
        return
    check_float(name, bias)
    if bias.shape not in shapes:
        raise ValueError(
            f"{name}.shape={bias.shape} must be {' or '.join(str(shape) for shape in dict.fromkeys(shapes))}"
        )


def check_config(config: FusedMoeConfig | None) -> None:
    """Raises TypeError for anything but a config: whether its tiles serve is for the kernels to say."""
    if config is not None and not isinstance(config, FusedMoeConfig):
        raise TypeError(f"{config=} must be a FusedMoeConfig, with w13= and w2= for the tiles of each matmul")
