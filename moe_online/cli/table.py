"""The comparison of schemes as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moe_online.cli.comparison import NAME_WIDTH, Row
from moe_online.loading.messages import human_bytes

WORDS = ("weight", "activation")  # columns that are no numbers; where the window is narrow, these wrap
CELLS: dict[str, Callable[[Row, Row], str]] = {  # of a row and the first one, with which it is compared
    "weight": lambda row, first: row.weight or "-",
    "activation": lambda row, first: row.activation or "-",
    "stored": lambda row, first: human_bytes(row.stored_bytes),
    "peak": lambda row, first: human_bytes(row.peak_bytes),
    "bits/byte": lambda row, first: f"{row.bits_per_byte:.4f}",
    "vs {first}": lambda row, first: "" if row is first else f"{row.percent_more_bits(first):+.2f} %",
    "KL": lambda row, first: "" if row is first else f"{row.kl:.4f}",
    "top-1": lambda row, first: "" if row is first else f"{100 * row.top1_agreement:.1f} %",
    "tok/s": lambda row, first: "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
    "load": lambda row, first: f"{row.seconds:.1f} s",
}
NOTES = {
    "KL": "KL to {first} in bits per byte.",
    "top-1": "Top-1: bytes for which it finds the same next byte likeliest as {first}.",
    "peak": "Peak: device memory while loading.",
}


def table(rows: Sequence[Row], columns: Sequence[str], *, text: str) -> Table:
    """The rows for people; the first is what the others are compared with.

    Args:
      rows: What was measured.
      columns: Those of `CELLS` to show, after the scheme's name.
      text: What was predicted: `"16,384 bytes of held-out text"`.
    """
    first = rows[0]
    notes = [note.format(first=first.scheme) for column, note in NOTES.items() if column in columns]
    notes += [_reach(rows), *_aliases(rows)]
    made = Table(
        title="One model, loaded under each scheme",
        caption=" ".join([f"Predicting {text}.", *notes]),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    made.add_column("scheme", max_width=NAME_WIDTH, overflow="fold")
    for column in columns:
        words = column in WORDS
        made.add_column(
            column.format(first=first.scheme), justify="left" if words else "right", no_wrap=not words, overflow="fold"
        )
    for row in rows:
        made.add_row(row.scheme, *(CELLS[column](row, first) for column in columns))
    return made


def _reach(rows: Sequence[Row]) -> str:
    """Which layers were quantized."""
    both, experts = ([row.scheme for row in rows if row.weight and row.linear == linear] for linear in (True, False))
    if not both:
        return "Quantized: the experts." if experts else "Nothing is quantized."
    but = f"; by {' and '.join(experts)} only the experts" if experts else ""
    return f"Quantized, as these names say to models.load: experts and attention's projections{but}."


def _aliases(rows: Sequence[Row]) -> list[str]:
    same = [f"{' and '.join(row.aliases)} for {row.scheme}" for row in rows if row.aliases]
    return [f"Other names: {', '.join(same)}."] if same else []
