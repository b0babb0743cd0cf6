"""Fills the tables of formats.md: `python docs/formats.py` writes what stands between its markers anew.

No cell is typed. Dtypes and sizes are those of what `quantize` returns, the order of packed codes is that of some that
were packed, and a pair of formats works where tracing a layer with it raises no UnsupportedError.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from moe_online.schemes import DEFAULT_ACTIVATIONS, FORMAT_ALIASES, SHORTHANDS
from pallas_kernels import (
    Format,
    QuantizedArray,
    UnsupportedError,
    fused_moe,
    get_format,
    make_group_metadata,
    quantize,
)
from pallas_kernels.formats import FORMATS
from pallas_kernels.grouped_matmul.call import KERNELS, Call

PAGE = pathlib.Path(__file__).with_suffix(".md")
SIDE = 4096  # of the square matrix whose bits are counted
WEIGHTS, ACTIVATIONS = (
    (None, *(name for name, fmt in FORMATS.items() if role in fmt.roles)) for role in ("weight", "activation")
)
PAIRS = tuple(itertools.product(WEIGHTS, ACTIVATIONS))
IMPLEMENTATIONS = ("xla", *KERNELS)


def weight_formats() -> str:
    """Every weight format, and each size of its groups."""
    header = ("format", *COLUMNS, "bits per weight", "activations, unless said")
    return _table(
        header, [(*_facts(fmt), _name(DEFAULT_ACTIVATIONS[name])) for name in WEIGHTS[1:] for fmt in _sizes(name)]
    )


def activation_formats() -> str:
    """Every activation format."""
    header = ("format", *COLUMNS, "bits per number")
    return _table(header, [_facts(fmt) for name in ACTIVATIONS[1:] for fmt in _sizes(name)])


def shorthands() -> str:
    """Every shorthand, and the others that say the same of experts."""
    rows = []
    for name, shorthand in SHORTHANDS.items():
        same = [other for other, value in SHORTHANDS.items() if value.moe == shorthand.moe and other != name]
        dense = {None: "no", shorthand.moe: "yes"}[shorthand.linear]
        formats = (fmt and fmt.name for fmt in (shorthand.moe.weight, shorthand.moe.activation))
        rows.append((_name(name), *map(_name, formats), dense, ", ".join(map(_name, same))))
    return _table(("shorthand", "weights", "activations", "dense layers too", "same experts as"), rows)


def aliases() -> str:
    """vLLM's names of formats."""
    return _table(("vLLM's name", "format"), [map(_name, pair) for pair in FORMAT_ALIASES.items()])


def pairs() -> str:
    """The implementations that serve each pair of formats."""
    rows = []
    for weight in WEIGHTS:
        served = ([name for name in IMPLEMENTATIONS if refusal(name, weight, a) is None] for a in ACTIVATIONS)
        rows.append((_name(weight), *(", ".join(names) or "none" for names in served)))
    return _table(("weights \\ activations", *map(_name, ACTIVATIONS)), rows)


def reasons() -> str:
    """Why an implementation does not serve the others."""
    lines = []
    for name in IMPLEMENTATIONS:
        found = [refusal(name, *pair) for pair in PAIRS]
        found = [reason and reason.split("; not ")[0] for reason in found]  # without the names of a pair
        refused = [f"; {found.count(reason)} not: {reason}" for reason in dict.fromkeys(found) if reason is not None]
        lines.append(f"- `{name}`: {found.count(None)} of {len(PAIRS)} pairs{''.join(refused)}")
    return "\n".join(lines)


@functools.cache
def refusal(implementation: str, weight: str | None, activation: str | None) -> str | None:
    """Why an implementation refuses a pair of formats wherever it runs, or None."""
    if implementation == "xla":
        return _refusal_by_xla(weight, activation)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    call = Call(
        lhs=abstract((8, 256), activation),
        rhs=abstract((2, 256, 256), weight),
        group_sizes=sizes,
        metadata=jax.eval_shape(make_group_metadata, sizes),
        out_dtype=np.dtype(jnp.bfloat16),
    )
    return importlib.import_module(KERNELS[implementation]).unsupported_anywhere(call)


def _refusal_by_xla(weight: str | None, activation: str | None) -> str | None:
    layer = functools.partial(fused_moe, activation_format=activation, implementation="xla")
    routing = (jax.ShapeDtypeStruct((8, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    weights = (abstract(shape, weight) for shape in ((2, 2, 256, 256), (2, 256, 256)))
    try:
        jax.eval_shape(layer, abstract((8, 256), None), *weights, *routing)
    except UnsupportedError as error:
        return str(error)
    return None


@functools.cache
def abstract(shape: tuple[int, ...], fmt: Format | str | None) -> jax.ShapeDtypeStruct | QuantizedArray:
    """An array of this shape, quantized or bf16, of which nothing is computed."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return x if fmt is None else jax.eval_shape(functools.partial(quantize, format=fmt), x)


def _sizes(name: str) -> list[Format]:
    return [get_format(name, group=group) for group in FORMATS[name].groups] or [FORMATS[name]]


COLUMNS = ("codes", "largest", "stored as", "rows x K of a scale", "scales", "second scale", "K")


def _facts(fmt: Format) -> tuple[str, ...]:
    """The format and its COLUMNS, then bits."""
    q = abstract((SIDE, SIDE), fmt)
    assert isinstance(q, QuantizedArray)
    block = " x ".join("all" if size is None else str(size) for size in fmt.block)
    exponents = ", exponent + 127" if fmt.arithmetic == "power_of_two" else ""
    second = "" if q.global_scale is None else f"{q.global_scale.dtype}, {'each row' if q.global_scale.ndim else 'one'}"
    whole = "any" if fmt.block[1] is None or fmt.partial_blocks else f"multiple of {fmt.block[1]}"
    bits = 8 * q.nbytes / SIDE**2
    return (
        *(_name(str(fmt)), fmt.code.name, f"{fmt.code_max:g}", f"{q.dtype}{_packing(fmt)}", block),
        *(f"{q.scales.dtype}{exponents}", second, whole, f"{bits:.3f}"),
    )


def _packing(fmt: Format) -> str:
    """Which half of a byte holds an even index along K, found by packing a 1 at index 0."""
    if fmt.codes_per_element == 1:
        return ""
    one = np.eye(1, 128, dtype=np.float32)
    first = int(jax.jit(quantize, static_argnums=1)(one, fmt).values[0, 0])
    return f", {fmt.codes_per_element} codes, even K in the {'low' if first & 15 else 'high'} half"


def _name(name: str | None) -> str:
    return "not quantized" if name is None else f"`{name}`"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (weight_formats, activation_formats, shorthands, aliases, pairs, reasons)
}


def filled(page: str) -> str:
    """The page with its tables as they are now."""
    marked = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
