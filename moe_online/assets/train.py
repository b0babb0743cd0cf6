"""Trains the checkpoint that ships with the library: a byte-level MoE language model of Python source code.

    python -m moe_online.assets.train --out DIR                  # 4000 steps: less than 2 minutes on one H200
    python -m moe_online.assets.train --out DIR --seconds 30     # as many as fit: a look at the speed

The text is the Python standard library itself. The result is what a training run would store: an Orbax checkpoint of a
training state whose expert matrices are `[E, K, N]`, gate and up apart. Nothing of `moe_online.flax` is used.

The same command gives a model of the same quality, not the same bits: a GPU adds gradients in no fixed order.

Sources: load-balancing loss of Switch Transformers (arXiv:2101.03961), eq. 4, for top-k as in Mixtral; AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from orbax.checkpoint import v1 as ocp

from moe_online.assets import corpus
from moe_online.config import MoEConfig
from moe_online.evaluate import evaluate
from moe_online.models.decoder import Decoder, DecoderConfig
from moe_online.models.generate import generate

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    moe=MoEConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=256),
)
Curve = list[tuple[int, float, float]]  # step, and bits per byte of training windows and held-out files
BALANCE_WEIGHT = 0.01  # of the load-balancing loss
BETAS = (0.9, 0.95)  # of AdamW
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
PROMPTS = ("def read", "class Pa", "import s", "    for ")  # of one length: one batch


class EinsumMoE(nnx.Module):
    """The routed layer as a training run would write it: every expert sees every token, unchosen ones weigh 0.

    Args:
      config: Sizes.
      record: Sow the load-balancing loss of each call as `nnx.Intermediate` (needs `nnx.capture`).
      rngs: Initialises the parameters.
      dtype: Of the expert matmuls; the router works in f32.
      param_dtype: Of the parameters.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        record: bool = False,
        rngs: nnx.Rngs,
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.bfloat16,
    ):
        e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.router = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (h, e), param_dtype))
        self.w_gate = nnx.Param(init(rngs.params(), (e, h, i), param_dtype))
        self.w_up = nnx.Param(init(rngs.params(), (e, h, i), param_dtype))
        self.w_down = nnx.Param(init(rngs.params(), (e, i, h), param_dtype))
        self.config, self.record, self.dtype = config, record, jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Returns the weighted sum of the chosen experts' outputs, in `dtype`."""
        scores = jax.nn.softmax(jnp.dot(x.astype(jnp.float32), self.router[...].astype(jnp.float32)), axis=-1)
        weights, ids = jax.lax.top_k(scores, self.config.top_k)
        chosen = jax.nn.one_hot(ids, self.config.num_experts, dtype=jnp.float32)  # [*batch, top_k, E]
        if self.record:
            self.sow(nnx.Intermediate, "balance", _balance_loss(scores, chosen))
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        combine = jnp.sum(chosen * weights[..., None], axis=-2).astype(self.dtype)  # [*batch, E]
        w_gate, w_up, w_down = (w[...].astype(self.dtype) for w in (self.w_gate, self.w_up, self.w_down))
        hidden = jax.nn.silu(jnp.einsum("...h,ehi->...ei", x, w_gate)) * jnp.einsum("...h,ehi->...ei", x, w_up)
        return jnp.einsum("...ei,eih->...h", hidden * combine[..., None], w_down)


def _balance_loss(scores: Float[Array, "*batch E"], chosen: Float[Array, "*batch top_k E"]) -> Float[Array, ""]:
    """E times the dot product of each expert's share of tokens and mean score: 1 when all are used alike."""
    num_experts = scores.shape[-1]
    share = jnp.mean(chosen.reshape(-1, num_experts), axis=0)
    return num_experts * jnp.vdot(share, jnp.mean(scores.reshape(-1, num_experts), axis=0))


def build(config: DecoderConfig, *, seed: int = 0, record: bool = False, param_dtype: Any = jnp.bfloat16) -> Decoder:
    """Makes the model that is trained: our decoder around `EinsumMoE`, bf16 activations."""
    moe = functools.partial(EinsumMoE, record=record, param_dtype=param_dtype)
    return Decoder(config, moe=moe, rngs=nnx.Rngs(seed), param_dtype=param_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step changes."""

    step: Any  # int32 scalar
    params: Any  # nnx.State, f32
    opt_state: Any
    key: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """The training step, compiled once for any number of steps."""

    config: DecoderConfig
    batch: int  # windows per step
    window: int  # tokens per window
    peak_lr: float
    warmup: int  # steps

    @functools.cached_property
    def graph(self) -> Any:
        """The trained module without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: build(self.config, record=True, param_dtype=jnp.float32)))[0]

    @functools.cached_property
    def optimizer(self) -> Any:
        """AdamW without its learning rate, which `schedule` gives; norms are not decayed."""
        matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
        return optax.chain(
            optax.clip_by_global_norm(CLIP_NORM),
            optax.scale_by_adam(*BETAS),
            optax.add_decayed_weights(WEIGHT_DECAY, mask=matrices),
        )

    def init(self, seed: int) -> TrainState:
        """Returns the state before the first step."""

        @jax.jit
        def start() -> TrainState:
            params = nnx.state(build(self.config, seed=seed, param_dtype=jnp.float32), nnx.Param)
            opt_state = self.optimizer.init(params)
            return TrainState(
                step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, key=jax.random.key(seed + 1)
            )

        state: TrainState = start()
        return state

    def schedule(self, step: Int[Array, ""], total: Int[Array, ""]) -> Float[Array, ""]:
        """Linear warmup, then half a cosine down to 2 % of the peak at step `total`."""
        now, end = step.astype(jnp.float32), total.astype(jnp.float32)
        warmup = jnp.minimum(self.warmup, end / 10)
        progress = jnp.clip((now - warmup) / (end - warmup), 0, 1)
        return self.peak_lr * jnp.minimum((now + 1) / (warmup + 1), 0.02 + 0.49 * (1 + jnp.cos(jnp.pi * progress)))

    def loss(self, params: Any, windows: Int[Array, "B S_plus_1"]) -> tuple[Float[Array, ""], Float[Array, "2"]]:
        """Returns what is minimised, and mean bits per byte and the load-balancing loss (1 is best)."""
        forward: Any = nnx.capture(nnx.merge(self.graph, params), nnx.Intermediate)
        logits, sown = forward(windows[:, :-1])
        nats = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]))
        balance = jnp.mean(jnp.stack(jax.tree.leaves(sown)))
        return nats + BALANCE_WEIGHT * balance, jnp.stack([nats / np.log(2), balance])

    def step(self, state: TrainState, text: UInt8[Array, " N"], total: Int[Array, ""]) -> tuple[TrainState, Array]:
        """Takes one optimizer step on `batch` random windows of `text`."""
        starts = jax.random.randint(
            jax.random.fold_in(state.key, state.step), (self.batch,), 0, text.size - self.window
        )
        windows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(text, start, self.window + 1))(starts)
        grads, metrics = jax.grad(self.loss, has_aux=True)(state.params, windows.astype(jnp.int32))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        lr = self.schedule(state.step, total)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key), metrics

    @functools.partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def run(
        self, state: TrainState, text: UInt8[Array, " N"], num_steps: Int[Array, ""], total: Int[Array, ""]
    ) -> tuple[TrainState, Array]:
        """Takes `num_steps` of `total` steps in one dispatch; returns the mean metrics `[bits per byte, balance]`."""

        def body(_: Any, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
            state, sums = carry
            state, metrics = self.step(state, text, total)
            return state, sums + metrics

        state, sums = jax.lax.fori_loop(0, num_steps, body, (state, jnp.zeros((2,), jnp.float32)))
        return state, sums / num_steps.astype(jnp.float32)


def steps_that_fit(trainer: Trainer, text: UInt8[Array, " N"], *, begin: float, seconds: float) -> int:
    """Compiles and measures the step; returns how many fit into `seconds` after `begin`, a tenth kept for the rest."""
    state = trainer.init(0)
    state, metrics = trainer.run(state, text, jnp.int32(1), jnp.int32(1000))
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    state, metrics = trainer.run(state, text, jnp.int32(20), jnp.int32(1000))
    jax.block_until_ready(metrics)
    step_seconds = (time.perf_counter() - start) / 20
    left = begin + 0.9 * seconds - time.perf_counter()
    steps = max(1, int(left / step_seconds))
    print(f"{step_seconds * 1e3:.1f} ms per step: {steps} steps fit into {left:.0f} s", flush=True)
    return steps


def train(
    trainer: Trainer,
    text: UInt8[Array, " N"],
    heldout: UInt8[np.ndarray, " M"],
    *,
    steps: int,
    chunk: int,
    seed: int,
) -> tuple[Decoder, Curve]:
    """Trains on `text` for `steps` and returns the bf16 model and its loss curve.

    Returns:
      The model, and rows `(step, train, heldout)` in bits per byte; `train` is the mean since the row before.
    """
    state, curve = trainer.init(seed), []
    begin = time.perf_counter()
    done = 0
    while done < steps:
        count = min(chunk, steps - done)
        state, metrics = trainer.run(state, text, jnp.int32(count), jnp.int32(steps))
        done += count
        train_bpb, balance = (float(m) for m in metrics)
        bpb = evaluate(as_bf16(trainer.config, state.params), heldout, window=trainer.window, batch=32).bits_per_byte
        curve.append((done, round(train_bpb, 4), round(bpb, 4)))
        rate = done * trainer.batch * trainer.window / (time.perf_counter() - begin)
        print(
            f"step {done:6d}/{steps}  train {train_bpb:.4f}  held-out {bpb:.4f} bits/byte  balance {balance:.3f}  "
            f"{rate / 1e6:.3f} M tokens/s",
            flush=True,
        )
    return as_bf16(trainer.config, state.params), curve


def as_bf16(config: DecoderConfig, params: Any) -> Decoder:
    """Returns the model that is stored: parameters rounded to bf16."""
    graph = nnx.split(nnx.eval_shape(lambda: build(config)))[0]
    model: Decoder = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    return model


def save(model: Decoder, out: Path, *, steps: int) -> None:
    """Stores the config, and with Orbax the training state: step, count of the optimizer, parameters.

    The two moments of AdamW are left out: in f32 they are four times as large as the bf16 parameters, and only
    a continued training needs them.
    """
    count = jnp.asarray(steps, jnp.int32)
    params = _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    state = {"step": count, "opt_state": {"count": count}, "params": params}
    ocp.save((out / "checkpoint").absolute(), state, overwrite=True)
    (out / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")


def _string_keys(tree: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def provenance(
    args: argparse.Namespace, trainer: Trainer, data: corpus.Corpus, model: Decoder, curve: Curve
) -> dict[str, Any]:
    """Everything that is needed to judge the checkpoint and to train it again."""

    def bits_per_byte(text: np.ndarray) -> float:
        return round(evaluate(model, text[: args.heldout_bytes], window=trainer.window, batch=32).bits_per_byte, 4)

    return {
        "data": {
            "source": args.source,
            "licence": corpus.LICENCE,
            "split": corpus.RULE,
            "train_files": data.num_files[0],
            "heldout_files": data.num_files[1],
            "train_bytes": data.train.size,
            "heldout_bytes": data.heldout.size,
            "sha256": data.sha256,
            "sample": "heldout.txt: whole held-out files, joined; no tests, none that shares more than "
            f"{corpus.COPIED_SHARE:.0%} of its four-line passages with training files",
            "sample_bytes": len(data.sample),
            "sample_files": data.sample_files,
        },
        "seed": args.seed,
        "steps": curve[-1][0],
        "batch": trainer.batch,
        "window": trainer.window,
        "peak_lr": trainer.peak_lr,
        "warmup": trainer.warmup,
        "schedule": "linear warmup, cosine to 2 % of the peak",
        "optimizer": f"AdamW, betas {BETAS}, weight decay {WEIGHT_DECAY} on matrices, gradient norm <= {CLIP_NORM}",
        "balance_weight": BALANCE_WEIGHT,
        "precision": "bf16 activations, f32 parameters while training, stored as bf16",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "train_bits_per_byte": curve[-1][1],
        "sample_bits_per_byte": bits_per_byte(data.sample_tokens),
        "heldout_bits_per_byte": bits_per_byte(data.heldout),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "curve": {"columns": ["step", "train_bits_per_byte", "sample_bits_per_byte"], "rows": curve},
    }


def plot(curve: Curve, path: Path) -> None:
    """Draws the loss curve, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no matplotlib: no loss_curve.png")
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps, train_bpb, heldout_bpb = zip(*curve, strict=True)
    axes.plot(steps, train_bpb, label="training windows")
    axes.plot(steps, heldout_bpb, label="held-out files")
    axes.set(xlabel="step", ylabel="bits per byte", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def show_samples(model: Decoder, num_bytes: int) -> None:
    """Prints a continuation of each prompt, sampled at temperature 0.6."""
    tokens = np.stack([np.frombuffer(prompt.encode(), np.uint8) for prompt in PROMPTS])
    rows = np.asarray(generate(model, tokens, max_new_tokens=num_bytes, temperature=0.6, top_p=0.95), np.uint8)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        print(f"--- {prompt!r}\n{prompt}{row.tobytes().decode(errors='replace')}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Trains the checkpoint that ships with moe-online.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--stdlib", type=Path, help="folder of *.py files; default: this Python's standard library")
    parser.add_argument(
        "--source",
        default=f"Python {platform.python_version()} standard library",
        help="what --stdlib is, for provenance.json",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=4000, help="optimizer steps; four times as many overfit")
    length.add_argument("--seconds", type=float, help="as many steps as fit into this, compilation included")
    parser.add_argument("--batch", type=int, default=128, help="windows per step")
    parser.add_argument("--window", type=int, default=512, help="bytes per window")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=300, help="steps; at most a tenth of all")
    parser.add_argument("--chunk", type=int, default=250, help="steps between two lines of progress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-bytes", type=int, default=400, help="length of the texts that are printed at the end")
    parser.add_argument("--heldout-bytes", type=int, help="evaluate on at most so much; default: all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, evaluates, stores."""
    begin = time.perf_counter()
    args = parse(argv)
    data = corpus.read(args.stdlib or Path(sysconfig.get_paths()["stdlib"]))
    print(
        f"{data.num_files[0]} files, {data.train.size / 1e6:.1f} MB for training; "
        f"{data.num_files[1]} files, {data.heldout.size / 1e6:.2f} MB held out; {jax.devices()[0].device_kind}",
        flush=True,
    )
    trainer = Trainer(config=CONFIG, batch=args.batch, window=args.window, peak_lr=args.lr, warmup=args.warmup)
    text, sample = jnp.asarray(data.train), data.sample_tokens[: args.heldout_bytes]
    steps = steps_that_fit(trainer, text, begin=begin, seconds=args.seconds) if args.seconds else args.steps
    model, curve = train(trainer, text, sample, steps=steps, chunk=args.chunk, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out, steps=steps)
    (args.out / "heldout.txt").write_bytes(data.sample)
    facts = provenance(args, trainer, data, model, curve) | {"seconds": round(time.perf_counter() - begin, 1)}
    (args.out / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
    plot(curve, args.out / "loss_curve.png")
    show_samples(model, args.sample_bytes)
    print(
        f"{facts['parameters'] / 1e6:.2f} M parameters, {steps} steps in {facts['seconds']} s; bits per byte: "
        f"{facts['sample_bits_per_byte']} on heldout.txt, {facts['heldout_bits_per_byte']} on all held-out files"
    )


if __name__ == "__main__":
    main()
