"""One model under several schemes: what each costs and what each loses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_online import models
from moe_online.cli import output
from moe_online.errors import ConfigError
from moe_online.evaluate import Evaluation, evaluate, log_probabilities
from moe_online.models.pretrained import PathLike
from moe_online.schemes import SHORTHANDS, QuantSpec

UNQUANTIZED = "bf16"
WINDOW, BATCH = 512, 8  # tokens read together, windows per call: one compilation serves the text
NEW_TOKENS, TEMPERATURE, SEED = 224, 0.5, 2  # of the completion; the likeliest text soon repeats itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme, measured."""

    scheme: str
    weight: str | None  # formats; None: not quantized
    activation: str | None
    stored_bytes: int  # of the whole model
    peak_bytes: int  # on the device, measured while loading
    planned_peak_bytes: int
    bits_per_byte: float
    kl: float  # KL(first scheme || this one), in bits per byte
    top1_agreement: float  # fraction of bytes for which both find the same one likeliest
    tokens_per_second: float | None  # generated, one sequence; None without a prompt
    seconds: float  # to load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A row, and how the model continues the prompt; without a prompt that is empty."""

    row: Row
    completion: str


def schemes(*, everything: bool) -> list[str]:
    """What is compared: the usual ones, or one name for each pair of formats that has a shorthand."""
    usual = [UNQUANTIZED, "fp8_per_channel", "fp8_per_block", "int8_w8a16"]
    if not everything:
        return usual
    seen = {SHORTHANDS[name].moe for name in usual[1:]}
    for name, shorthand in SHORTHANDS.items():
        if shorthand.moe is not None and shorthand.moe not in seen:
            seen.add(shorthand.moe)
            usual.append(name)
    return usual


def spec_of(scheme: str) -> QuantSpec | None:
    """What a name that `check_names` accepts does to experts."""
    return None if scheme == UNQUANTIZED else SHORTHANDS[scheme].moe


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError unless each is `bf16` or a shorthand that quantizes experts."""
    valid = [UNQUANTIZED, *sorted(name for name, shorthand in SHORTHANDS.items() if shorthand.moe is not None)]
    unknown = [repr(name) for name in names if name not in valid]
    if unknown:
        raise ConfigError(
            f"unknown scheme{'s' * (len(unknown) != 1)} {', '.join(unknown)}; valid names: {', '.join(valid)}"
        )


def compare(path: PathLike, text: bytes, names: Sequence[str], *, prompt: str | None = None) -> list[Measured]:
    """Measures a byte-level model under each scheme, behind a progress bar; only its experts are quantized.

    The first scheme is what the others are compared with. A model is freed before the next is loaded; what the first
    one predicted stays on the host (4 bytes for each of 256 next bytes, so 1 kB per byte of text).

    Args:
      path: The model folder.
      text: Bytes that it predicts, all but the first.
      names: Of the schemes, as `check_names` accepts them.
      prompt: What it continues; None leaves generation out.
    """
    with output.progress(len(names) * (2 if prompt is None else 3)) as announce:
        comparison = _Comparison(path, text, prompt, announce=announce)
        return [comparison.measure(name) for name in names]


class _Comparison:
    """`compare`, scheme after scheme."""

    def __init__(self, path: PathLike, text: bytes, prompt: str | None, *, announce: Callable[[str], None]):
        self._path, self._announce = path, announce
        self._text = np.frombuffer(text, np.uint8)
        self._prompt = None if prompt is None else np.frombuffer(prompt.encode(), np.uint8)[None]
        self._reference: list[np.ndarray] = []  # on the host, so that no model is measured beside it

    def measure(self, scheme: str) -> Measured:
        """Loads, evaluates and runs the model under one scheme."""
        self._announce(f"{scheme}: loading")
        spec = spec_of(scheme)
        lm = models.load(self._path, quantization=spec, progress=False)
        self._announce(f"{scheme}: predicting text")
        found = self._evaluate(lm)
        assert found.kl_per_byte is not None and found.top1_agreement is not None  # there is a reference
        completion, tokens_per_second = "", None
        if self._prompt is not None:
            self._announce(f"{scheme}: generating")
            completion, tokens_per_second = _generate(lm, self._prompt)
        weight, activation = (None, None) if spec is None else (spec.weight, spec.activation)
        row = Row(
            scheme=scheme,
            weight=None if weight is None else str(weight),
            activation=None if activation is None else str(activation),
            stored_bytes=lm.report.resident_bytes,
            peak_bytes=lm.report.peak_bytes,
            planned_peak_bytes=lm.report.planned_peak_bytes,
            bits_per_byte=found.bits_per_byte,
            kl=found.kl_per_byte,
            top1_agreement=found.top1_agreement,
            tokens_per_second=tokens_per_second,
            seconds=lm.report.seconds,
        )
        return Measured(row=row, completion=completion)

    def _evaluate(self, lm: models.CausalLM) -> Evaluation:
        sizes = {"window": WINDOW, "batch": BATCH}
        if not self._reference:
            self._reference = [jax.device_get(block) for block in log_probabilities(lm.model, self._text, **sizes)]
        return evaluate(lm.model, self._text, **sizes, reference=map(jnp.asarray, self._reference))


def _generate(lm: models.CausalLM, prompt: np.ndarray) -> tuple[str, float]:
    """A continuation, and tokens per second by the median step: the first waits for compilation."""
    times: list[float] = []
    tokens = lm.generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        temperature=TEMPERATURE,
        seed=SEED,
        stream=lambda _: times.append(time.perf_counter()),
    )
    text = np.asarray(tokens[0]).astype(np.uint8).tobytes().decode(errors="replace")
    return text, float(1 / np.median(np.diff(times)))
