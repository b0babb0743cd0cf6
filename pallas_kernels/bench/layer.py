"""Named cases of a whole routed FFN: a model's layer, a scheme of quantization, a batch of tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.bench.cases import ITEMSIZE, MODELS, Case, Model, Routing, route_ids
from pallas_kernels.bench.floors import EIGHT_BIT_SPEED
from pallas_kernels.bench.gate import Limits
from pallas_kernels.formats import Format, get_format

TEMP_LIMIT_BYTES = 32 << 20  # of what does not grow with the tokens


class Scheme(NamedTuple):
    """Formats of weights and of activations, and how far a right result may be from the definition."""

    weights: str | None
    activations: str | None
    limits: Limits

    @property
    def format(self) -> Format | None:
        """Of the weights."""
        return None if self.weights is None else get_format(self.weights, role="weight")

    @property
    def code_bytes(self) -> int:
        """Of one activation on its way into a matmul."""
        return ITEMSIZE if self.activations is None else get_format(self.activations).bits // 8

    @property
    def matmul_speed(self) -> float:
        """Of its operations, in units of dense bf16."""
        return 1.0 if self.activations is None else EIGHT_BIT_SPEED


# Rounding sums, hidden values and outputs to bf16 costs 1.7e-3 each, and a kernel may round fewer of them. Sums that
# differ by so much put one code in thirty of the hidden values on the other side of a midpoint, a step of 9 %: 1.6e-2,
# and of the worst of 4096 rows 4.01e-2 (fp8 per channel).
# Peers that round the gate's activation and its product apart are 4.2e-3 off in bf16.
_BF16, _CODES = Limits(5e-3, 7e-3), Limits(2e-2, 5e-2)
# One scale of all hidden values hangs on the rounding of the largest of them: 2**-8 more moves one code in twenty
# (2.8e-2, and 6.8e-2 of the worst of 4096 rows).
_ONE_SCALE = Limits(4e-2, 1e-1)

SCHEMES = {
    "bf16": Scheme(None, None, _BF16),
    "fp8_tensor": Scheme("fp8_per_tensor", "fp8_per_tensor_dynamic", _ONE_SCALE),
    "fp8_channel": Scheme("fp8_per_channel", "fp8_per_token", _CODES),
    "fp8_block128": Scheme("fp8_per_block", "fp8_per_group", _CODES),
    "int8_w8a8": Scheme("int8_per_channel", "int8_per_token", _CODES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCase:
    """From tokens `[T, H]` in bf16, their experts and the weights of these, to `[T, H]`."""

    model_name: str
    scheme_name: str
    tokens: int
    routing: Routing
    seed: int

    @property
    def name(self) -> str:
        """Model, scheme and T."""
        return f"{self.model_name}_{self.scheme_name}_T{self.tokens}{self._suffix}"

    @property
    def model(self) -> Model:
        """The layer's sizes."""
        return MODELS[self.model_name]

    @property
    def scheme(self) -> Scheme:
        """What is quantized, and as what."""
        return SCHEMES[self.scheme_name]

    @functools.cached_property
    def ids(self) -> np.ndarray[Any, Any]:
        """The experts of each token, int32 `[T, top_k]`."""
        return route_ids(self.model, self.tokens, self.routing, self.seed)

    @functools.cached_property
    def matmuls(self) -> tuple[Case, Case]:
        """The two grouped matmuls, as if in bf16."""
        sizes = tuple(np.bincount(self.ids.ravel(), minlength=self.model.num_experts).tolist())
        hidden, width = self.model.hidden, self.model.intermediate
        w13, w2 = (
            Case(name=f"{self.name}_{which}", group_sizes=sizes, n=n, k=k, routing=self.routing, seed=self.seed)
            for which, n, k in (("w13", 2 * width, hidden), ("w2", hidden, width))
        )
        return w13, w2

    @property
    def experts_hit(self) -> int:
        """Experts that have tokens: only their weights have to be read."""
        return self.matmuls[0].experts_hit

    @property
    def flops(self) -> int:
        """Of the two matmuls."""
        return sum(case.flops for case in self.matmuls)

    @property
    def hit_weight_bytes(self) -> int:
        """Codes and scales that have to be read."""
        return self._weight_bytes(self.experts_hit)

    @property
    def min_bytes(self) -> int:
        """What has to go through device memory: the weights that take part, tokens in and tokens out."""
        return self.hit_weight_bytes + 2 * ITEMSIZE * self.tokens * self.model.hidden

    @property
    def array_bytes(self) -> int:
        """Of the weights in bf16, from which all else is made."""
        return ITEMSIZE * self.model.num_experts * 3 * self.model.intermediate * self.model.hidden

    @property
    def temp_limit_bytes(self) -> int:
        """Rows in and out of the one matmul or of the other, whichever are more; the outputs of the second in bf16."""
        hidden, width, code = self.model.hidden, self.model.intermediate, self.scheme.code_bytes
        of_a_row = max(code * (hidden + width), code * width + ITEMSIZE * hidden)
        return self.tokens * self.model.top_k * of_a_row + TEMP_LIMIT_BYTES

    @property
    def _suffix(self) -> str:
        return "" if self.routing == "uniform" else f"_{self.routing}"

    def _weight_bytes(self, num_experts: int) -> int:
        hidden, width = self.model.hidden, self.model.intermediate
        shapes = (num_experts, 2, width, hidden), (num_experts, hidden, width)
        fmt = self.scheme.format
        if fmt is None:
            return ITEMSIZE * sum(int(np.prod(shape)) for shape in shapes)
        return sum(fmt.stored_bytes(shape) for shape in shapes)


def select(
    models: Sequence[str],
    schemes: Sequence[str],
    tokens: Sequence[int],
    *,
    routing: Routing = "uniform",
    seed: int = 0,
) -> list[LayerCase]:
    """All combinations of known names, those that share weights one after the other."""
    return [
        LayerCase(model_name=model, scheme_name=scheme, tokens=num, routing=routing, seed=seed)
        for model in models
        for scheme in schemes
        for num in tokens
    ]
