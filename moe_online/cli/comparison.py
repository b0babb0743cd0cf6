"""One model under several schemes: what each costs and what each loses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from moe_online import models
from moe_online.cli import output
from moe_online.errors import ConfigError
from moe_online.evaluate import Evaluation, log_probabilities, score
from moe_online.models.pretrained import PathLike
from moe_online.schemes import SHORTHANDS, Shorthand, shorthand_names

UNQUANTIZED = "bf16"
NAME_WIDTH = 16  # characters of a scheme that are shown in one line
WINDOW, BATCH = 512, 8  # tokens read together, windows per call: one compilation serves the text
NEW_TOKENS, TEMPERATURE, SEED = 224, 0.5, 2  # of the completion; the likeliest text soon repeats itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme, measured."""

    scheme: str
    aliases: tuple[str, ...]  # other names for the same
    weight: str | None  # formats of the experts; None: not quantized
    activation: str | None
    linear: bool  # whether dense layers are quantized too
    stored_bytes: int  # of the whole model
    peak_bytes: int  # on the device, measured while loading
    planned_peak_bytes: int
    bits_per_byte: float
    kl: float  # KL(first scheme || this one), in bits per byte
    top1_agreement: float  # fraction of bytes for which both find the same one likeliest
    tokens_per_second: float | None  # generated, one sequence; None without a prompt
    seconds: float  # to load

    def percent_more_bits(self, first: Row) -> float:
        """How many more bits per byte than that scheme needs, in percent."""
        return 100 * (self.bits_per_byte / first.bits_per_byte - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A row, and how the model continues the prompt; without a prompt that is empty."""

    row: Row
    completion: str


def schemes(*, everything: bool) -> list[str]:
    """What is compared: the usual ones, or every shorthand, but one name only for those that stand for the same."""
    usual = [UNQUANTIZED, "fp8_per_channel", "fp8_per_block", "int8_w8a16"]
    if not everything:
        return usual
    distinct: dict[Shorthand, str] = {}
    for name, shorthand in SHORTHANDS.items():
        if shorthand.moe is not None:
            distinct.setdefault(shorthand, name)
    return [*usual, *(name for name in distinct.values() if name not in usual)]


def _names(shorthand: Shorthand) -> list[str]:
    """All that stand for the same formats."""
    return [name for name, other in SHORTHANDS.items() if other == shorthand]


def quantization(scheme: str, *, dense: bool) -> str | dict[str, str] | None:
    """How `models.load` is told a scheme that `check_names` accepts: its experts' half, or all that it stands for."""
    if scheme == UNQUANTIZED:
        return None
    return scheme if dense else {"moe": scheme}


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError unless each is `bf16` or a shorthand."""
    valid = [UNQUANTIZED, *shorthand_names("moe")]
    unknown = [repr(name) for name in names if name not in valid]
    if unknown:
        raise ConfigError(
            f"unknown scheme{'s' * (len(unknown) != 1)} {', '.join(unknown)}; valid names: {', '.join(valid)}"
        )


def compare(
    path: PathLike, text: bytes, names: Sequence[str], *, dense: bool = False, prompt: str | None = None
) -> list[Measured]:
    """Measures a byte-level model under each scheme, behind a progress bar.

    The first scheme is what the others are compared with. A model is freed before the next is loaded; what the first
    one predicted stays on the host (4 bytes for each of 256 next bytes, so 1 kB per byte of text).

    Args:
      path: The model folder.
      text: Bytes that it predicts, all but the first.
      names: Of the schemes, as `check_names` accepts them.
      dense: Whether dense layers are quantized as well, where the scheme does so; else only the experts.
      prompt: What it continues; None leaves generation out.
    """
    with output.progress(len(names) * (2 if prompt is None else 3)) as announce:
        comparison = _Comparison(path, text, prompt, dense=dense, announce=announce)
        return [comparison.measure(name) for name in names]


class _Comparison:
    """`compare`, scheme after scheme."""

    def __init__(
        self, path: PathLike, text: bytes, prompt: str | None, *, dense: bool, announce: Callable[[str], None]
    ):
        self._path, self._dense, self._announce = path, dense, announce
        self._text = np.frombuffer(text, np.uint8)
        self._prompt = None if prompt is None else np.frombuffer(prompt.encode(), np.uint8)[None]
        self._reference: list[np.ndarray] = []  # on the host, so that no model is measured beside it

    def measure(self, scheme: str) -> Measured:
        """Loads, evaluates and runs the model under one scheme."""
        self._announce(f"{scheme}: loading")
        lm = models.load(self._path, quantization=quantization(scheme, dense=self._dense), progress=False)
        self._announce(f"{scheme}: predicting text")
        found = self._evaluate(lm)
        assert found.kl_per_byte is not None and found.top1_agreement is not None  # there is a reference
        completion, tokens_per_second = "", None
        if self._prompt is not None:
            self._announce(f"{scheme}: generating")
            completion, tokens_per_second = _generate(lm, self._prompt)
        shorthand = SHORTHANDS.get(scheme, Shorthand())
        weight, activation = (shorthand.moe.weight, shorthand.moe.activation) if shorthand.moe else (None, None)
        row = Row(
            scheme=scheme,
            aliases=tuple(name for name in _names(shorthand) if name != scheme),
            weight=None if weight is None else str(weight),
            activation=None if activation is None else str(activation),
            linear=any(tensor.rule == "linear" for tensor in lm.report.tensors),
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
        blocks: Iterable[jax.Array | np.ndarray] = log_probabilities(lm.model, self._text, **sizes)
        if not self._reference:
            blocks = self._reference = [jax.device_get(block) for block in blocks]  # its own reference, read once
        return score(blocks, self._text, **sizes, reference=self._reference)


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
