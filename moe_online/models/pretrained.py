"""Models from folders: `load` reads a decoder that was saved with its config, and quantizes it on the way.

A model folder holds `config.json`, which is `DecoderConfig.to_json`, and `checkpoint/`: an Orbax training state as
`moe_online.assets.train` stores it, parameters below `params`, experts `[E, K, N]` with gate and up apart; or an export
of the model, as `moe-online quantize` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer

from moe_online import loading
from moe_online.errors import CheckpointError, CheckpointNotFound, ConfigError, CorruptCheckpoint
from moe_online.loading import LoadPlan, LoadReport
from moe_online.loading.api import Quantization
from moe_online.loading.manifest import Manifest
from moe_online.models.decoder import Decoder, DecoderConfig
from moe_online.models.generate import generate

CONFIG_FILE, CHECKPOINT_FOLDER = "config.json", "checkpoint"
PREFIX = "params"  # what a training state calls the parameters
MAPPING = {  # from the stored training layout to `Decoder` with `moe_online.flax.MoE`
    "*.moe.router": "-> *.moe.router.kernel",
    "*.moe.w_gate": "E K N -> *.moe.experts.w13_weight.gate",
    "*.moe.w_up": "E K N -> *.moe.experts.w13_weight.up",
    "*.moe.w_down": "E K N -> *.moe.experts.w2_weight",
}

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM:
    """A loaded language model: `lm(tokens) -> logits`."""

    model: Decoder
    report: LoadReport

    def __call__(self, tokens: Integer[Array | np.ndarray, "B S"]) -> Float[Array, "B S V"]:
        """Returns f32 logits of each next token; compiled once per shape.

        Raises:
          ValueError: `tokens` are not `[B, S]`.
        """
        if np.ndim(tokens) != 2:
            raise ValueError(f"tokens of shape {np.shape(tokens)} must be [B, S]: pass tokens[None] for one")
        graph, state = nnx.split(self.model)
        logits: jax.Array = _logits(graph, state, jnp.asarray(tokens, jnp.int32))
        return logits

    def generate(
        self,
        tokens: Integer[Array | np.ndarray, "B S"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: Sequence[int] = (),
        seed: int = 0,
        stream: Callable[[np.ndarray], None] | None = None,
    ) -> Int[Array, "B max_new_tokens"]:
        """Continues `tokens`; see `moe_online.models.generate.generate` for the arguments."""
        return generate(
            self.model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            seed=seed,
            stream=stream,
        )


def load(
    path: PathLike,
    *,
    quantization: Quantization | None = None,
    requantize: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> CausalLM:
    """Loads a model folder.

    Args:
      path: The folder.
      quantization: As `moe_online.load` takes it; None keeps every weight in `dtype`, or as it is stored quantized.
      requantize: As `moe_online.load` takes it.
      dtype: Of activations, and of the weights that are not quantized.
      mesh: Places the weights: experts over its axes `expert` and `tensor`, the rest on every device.
      progress: Shows a progress bar.

    Raises:
      CheckpointNotFound: nothing at the path.
      CheckpointError: no model folder, or one that cannot be read; `moe_online.load` lists its kinds.
      ConfigError: a scheme that cannot be served.

    Example::

        lm = moe_online.models.load(moe_online.assets.PYTHON_MOE_7M, quantization="fp8_per_block")
        lm(np.frombuffer(b"import os", np.uint8)[None])  # logits [1, 9, 256]
    """
    abstract, checkpoint = _declare(path, dtype)
    model, report = loading.load(
        abstract,
        checkpoint,
        quantization=quantization,
        requantize=requantize,
        mesh=mesh,
        progress=progress,
        **_layout(checkpoint),
    )
    return CausalLM(model=model, report=report)


def plan(
    path: PathLike,
    *,
    quantization: Quantization | None = None,
    requantize: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
) -> LoadPlan:
    """What `load` with the same arguments would do; reads metadata only and raises what can be known from it."""
    abstract, checkpoint = _declare(path, dtype)
    return loading.plan(
        abstract, checkpoint, quantization=quantization, requantize=requantize, mesh=mesh, **_layout(checkpoint)
    )


def _layout(checkpoint: epath.Path) -> dict[str, Any]:
    """How `loading.load` is to read the checkpoint of a model folder: a training state's, or an export's."""
    return {"prefix": PREFIX, "mapping": MAPPING} if Manifest.read(checkpoint) is None else {}


@functools.partial(jax.jit, static_argnames=("graph",))
def _logits(graph: Any, state: Any, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
    logits: jax.Array = nnx.merge(graph, state)(tokens)
    return logits


def _declare(path: PathLike, dtype: DTypeLike) -> tuple[Decoder, epath.Path]:
    """The model of a folder, abstract, and where its weights are."""
    folder, config = epath.Path(os.fspath(path)).expanduser(), read_config(path)
    if not (folder / CHECKPOINT_FOLDER).is_dir():
        raise CheckpointError(
            f"{folder} has a {CONFIG_FILE} but no folder {CHECKPOINT_FOLDER}/ with the Orbax checkpoint beside it"
        )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    return model, folder / CHECKPOINT_FOLDER


def read_config(path: PathLike) -> DecoderConfig:
    """The config of a model folder.

    Raises:
      CheckpointNotFound: nothing at the path.
      CheckpointError: no model folder, or one that cannot be read.
    """
    folder = epath.Path(os.fspath(path)).expanduser()
    if not folder.exists():
        raise CheckpointNotFound(f"there is nothing at {folder}; give a folder with {CONFIG_FILE}")
    file = folder / CONFIG_FILE
    if not file.exists():
        raise CheckpointError(
            f"{folder} is no model folder: it has no {CONFIG_FILE}. A bare Orbax checkpoint does not say what model it "
            "belongs to: declare yours and call moe_online.load"
        )
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise CorruptCheckpoint(f"{file} is no JSON: {error}. Copy it again from where it was saved.") from error
    if isinstance(values, dict) and ("model_type" in values or "architectures" in values):
        raise CheckpointError(
            f"{folder} is a Hugging Face model ({values.get('model_type') or values['architectures']}), which cannot "
            "be read yet. Convert its weights to Orbax, declare your model and call moe_online.load"
        )
    try:
        return DecoderConfig.from_json(values)
    except (AttributeError, KeyError, TypeError, ConfigError) as error:  # fields of another kind show in many ways
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{file} is no config of moe_online.models.DecoderConfig: {reason}") from error
