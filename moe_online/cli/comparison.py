"""One model under several schemes: what each costs and what each loses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moe_online import models
from moe_online.evaluate import Evaluation, evaluate, log_probabilities
from moe_online.loading.messages import human_bytes
from moe_online.schemes import SHORTHANDS

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
    tokens_per_second: float  # generated, one sequence
    seconds: float  # to load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A row, and how the model continues the prompt."""

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


class Comparison:
    """Measures a byte-level model, scheme after scheme; each is freed before the next is loaded.

    The scheme that is measured first is what the others are compared with.

    Args:
      path: The model folder.
      text: Bytes that it predicts.
      prompt: What it continues.
      announce: Called with a scheme and what is done with it now.
    """

    def __init__(self, path: Path, text: bytes, prompt: str, *, announce: Callable[[str, str], None]):
        self._path, self._announce = path, announce
        self._text = np.frombuffer(text, np.uint8)
        self._prompt = np.frombuffer(prompt.encode(), np.uint8)[None]
        self._reference: list[np.ndarray] = []  # on the host, so that no model is measured beside it

    def measure(self, scheme: str) -> Measured:
        """Loads, evaluates and runs the model under one scheme."""
        self._announce(scheme, "loading")
        spec = None if scheme == UNQUANTIZED else SHORTHANDS[scheme].moe
        lm = models.load(self._path, quantization=spec, progress=False)
        self._announce(scheme, "predicting held-out text")
        found = self._evaluate(lm)
        assert found.kl_per_byte is not None and found.top1_agreement is not None  # there is a reference
        self._announce(scheme, "generating")
        completion, tokens_per_second = self._generate(lm)
        weight, activation = (None, None) if spec is None else (spec.weight, spec.activation)
        row = Row(
            scheme=scheme,
            weight=None if weight is None else weight.name,
            activation=None if activation is None else activation.name,
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

    def _generate(self, lm: models.CausalLM) -> tuple[str, float]:
        """A continuation, and tokens per second by the median step: the first waits for compilation."""
        times: list[float] = []
        tokens = lm.generate(
            self._prompt,
            max_new_tokens=NEW_TOKENS,
            temperature=TEMPERATURE,
            seed=SEED,
            stream=lambda _: times.append(time.perf_counter()),
        )
        text = np.asarray(tokens[0]).astype(np.uint8).tobytes().decode(errors="replace")
        return text, float(1 / np.median(np.diff(times)))


def table(rows: Sequence[Row], *, num_bytes: int) -> Table:
    """The rows for people; the first is what the others are compared with."""
    made = Table(
        title="One model, loaded under each scheme",
        caption=f"Predicting {num_bytes:,} bytes of held-out text; KL to {rows[0].scheme} in bits per byte. "
        "Peak: device memory while loading.",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column("scheme", no_wrap=True)
    for column in ("stored", "peak", "bits/byte", "vs bf16", "KL", "tok/s", "load"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(
            row.scheme,
            human_bytes(row.stored_bytes),
            human_bytes(row.peak_bytes),
            f"{row.bits_per_byte:.4f}",
            "" if row is rows[0] else f"{100 * (row.bits_per_byte / rows[0].bits_per_byte - 1):+.2f} %",
            "" if row is rows[0] else f"{row.kl:.4f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.seconds:.1f} s",
        )
    return made
