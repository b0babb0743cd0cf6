"""What a quantized array is: its `Format` (static) and `QuantizedArray` (the pytree that carries one).

Values are `[..., N, K]` with K, the contraction axis, contiguous: 8-bit wgmma reads K-major operands only. Scales are
`[..., ceil(K / bk), ceil(N / bn)]`, N contiguous, a full extent counted as one block, and always *multiply* codes
into real values. Activations `[T, K]` follow the same rule with T in the place of N.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any  # jax.tree.map may put a ShapeDtypeStruct, a sharding or a spec here

Role = Literal["weight", "activation"]
Arithmetic = Literal["divide", "reciprocal", "inverse_amax"]

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # 2**-126; anything smaller counts as zero on every backend
E4M3_MAX = 448.0
INT8_MAX = 127.0  # -128 is never used, so that codes are symmetric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How the last two axes `[N, K]` of an array are stored, and the arithmetic that defines codes and scales.

    With `amax` the largest magnitude of one block, raised to `amax_floor`:
    `scale = max(amax / code_max, scale_floor)`, and a code is `x` in units of `scale`, clamped to `+-code_max` and
    rounded half to even, where `arithmetic` says how "in units of" is computed:

    * `"divide"`: the IEEE quotient `x / scale`
    * `"reciprocal"`: `x * (1 / scale)`
    * `"inverse_amax"`: `x * (code_max / amax)`
    """

    name: str
    roles: tuple[Role, ...]
    storage: np.dtype[Any]  # dtype of `QuantizedArray.values`
    code_max: float  # largest magnitude that a code stands for
    block: tuple[int | None, int | None]  # (bn, bk) elements that share one scale; None = the full extent
    arithmetic: Arithmetic
    amax_floor: float = 0.0
    scale_floor: float = SMALLEST_NORMAL
    zero_scale: float | None = 1.0  # scale of an all-zero block; None = what the floors give
    bits: int = 8
    scale_dtype: np.dtype[Any] = np.dtype(np.float32)

    def __str__(self) -> str:
        return self.name

    @property
    def codes_per_element(self) -> int:
        """How many codes one element of `values` holds: 2 for the packed 4-bit formats, else 1."""
        return self.storage.itemsize * 8 // self.bits

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """Number of blocks along N and along K; ragged ends count as a block."""
        bn, bk = self.block
        return (1 if bn is None else math.ceil(n / bn)), (1 if bk is None else math.ceil(k / bk))

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape `[..., K blocks, N blocks]` of the scales of an array of logical `shape` `[..., N, K]`."""
        *lead, n, k = shape
        blocks_n, blocks_k = self.grid(n, k)
        return (*lead, blocks_k, blocks_n)

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored values of an array of logical `shape` `[..., N, K]`; ValueError where it cannot be."""
        self.check_shape(shape)
        return (*shape[:-1], shape[-1] // self.codes_per_element)

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of values and scales together for an array of logical `shape`."""
        return (
            math.prod(self.values_shape(shape)) * self.storage.itemsize
            + math.prod(self.scales_shape(shape)) * self.scale_dtype.itemsize
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless an array of this logical shape can be stored in this format."""
        if len(shape) < 2:
            raise ValueError(f"{shape=} has rank {len(shape)}; format {self.name!r} needs the two axes [..., N, K]")

    def spans(self) -> tuple[bool, bool]:
        """Whether one scale spans the whole of N, and the whole of K: what needs a collective when sharded."""
        return self.block[0] is None, self.block[1] is None

    def check_shard(self, n: int, k: int, *, n_sharded: bool, k_sharded: bool) -> None:
        """Raises ValueError where a shard of `[n, k]` would cut through a block of the whole array."""
        for axis, size, sharded, block in (("N", n, n_sharded, self.block[0]), ("K", k, k_sharded, self.block[1])):
            if sharded and block is not None and size % block:
                raise ValueError(
                    f"a shard has {size} elements along {axis}, no multiple of the block {block} of {self.name!r}, "
                    "so its codes would depend on the mesh; shard on block boundaries or use a per-channel format"
                )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """Element `[..., n, k]` is `values[..., n, k] * scales[..., k // bk, n // bn]` (times `global_scale[...]`).

    Nothing about the shape is stored: all properties follow from the children, so they stay true under slicing,
    `scan`, `vmap` and `shard_map`. Every leading axis (experts first) leads every child.
    """

    values: Leaf  # [..., N, K] codes
    scales: Leaf  # [..., ceil(K / bk), ceil(N / bn)]
    global_scale: Leaf | None = None  # [...] f32, for two-level formats
    format: Format = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_parts(
        cls, values: jax.Array, scales: jax.Array, format: Format | str, global_scale: jax.Array | None = None
    ) -> QuantizedArray:
        """Joins codes and scales made elsewhere, after checking dtypes and shapes.

        Args:
          values: Codes `[..., N, K]` in the format's storage dtype.
          scales: `[..., ceil(K / bk), ceil(N / bn)]`, the real value of one code step.
          format: A format or its name.
          global_scale: Second-level scale; only for formats that have one.

        Raises:
          ValueError: a dtype or shape that the format does not have, or a second-level scale it has no use for.
        """
        fmt = get_format(format)
        if values.dtype != fmt.storage:
            raise ValueError(f"{values.dtype=} must be {fmt.storage} for format {fmt.name!r}")
        if scales.dtype != fmt.scale_dtype:
            raise ValueError(f"{scales.dtype=} must be {fmt.scale_dtype} for format {fmt.name!r}")
        shape = (*values.shape[:-1], values.shape[-1] * fmt.codes_per_element)
        fmt.check_shape(shape)
        if scales.shape != fmt.scales_shape(shape):
            raise ValueError(
                f"{scales.shape=} must be {fmt.scales_shape(shape)}, [..., K blocks, N blocks], "
                f"for {values.shape=} and format {fmt.name!r}"
            )
        if global_scale is not None:
            raise ValueError(f"format {fmt.name!r} has no second-level scale; drop {global_scale.shape=}")
        return cls(values=values, scales=scales, format=fmt)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `[..., N, K]`."""
        shape = self.values.shape
        return (*shape[:-1], shape[-1] * self.format.codes_per_element)

    @property
    def ndim(self) -> int:
        """Rank of the logical shape."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored values."""
        return np.dtype(self.values.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all children."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The real values `[..., N, K]`: products in f32, rounded once to `dtype`."""
        *lead, n, k = self.shape
        bn, bk = self.format.block
        blocks_n, blocks_k = self.format.grid(n, k)
        scales = jnp.swapaxes(self.scales, -1, -2).astype(jnp.float32)  # [..., N blocks, K blocks]
        size_n, size_k = (n if bn is None else bn), (k if bk is None else bk)
        scales = jnp.broadcast_to(scales[..., :, None, :, None], (*lead, blocks_n, size_n, blocks_k, size_k))
        scales = scales.reshape(*lead, blocks_n * size_n, blocks_k * size_k)[..., :n, :k]
        return (self.values.astype(jnp.float32) * scales).astype(dtype)

    def shardings(self, sharding: NamedSharding) -> QuantizedArray:
        """The sharding of each child, in this structure, when the array `[..., N, K]` is sharded like `sharding`.

        A scale axis follows its values axis where blocks divide evenly among the devices, and is whole elsewhere.
        """
        spec = (*sharding.spec, *(None,) * (self.ndim - len(sharding.spec)))
        *lead, spec_n, spec_k = spec
        *_, blocks_k, blocks_n = self.scales.shape

        def even(blocks: int, axis: Any) -> Any:
            names = () if axis is None else (axis,) if isinstance(axis, str) else axis
            return axis if blocks % math.prod(sharding.mesh.shape[name] for name in names) == 0 else None

        scales = PartitionSpec(*lead, even(blocks_k, spec_k), even(blocks_n, spec_n))
        return QuantizedArray(
            values=sharding,  # type: ignore[arg-type]
            scales=NamedSharding(sharding.mesh, scales, memory_kind=sharding.memory_kind),  # type: ignore[arg-type]
            format=self.format,
        )


_E4M3 = np.dtype(jnp.float8_e4m3fn)
_INT8 = np.dtype(np.int8)
_E4M3_CHANNEL_FLOOR = 1.0 / (E4M3_MAX * 512.0)

# Exact arithmetic: the DeepSeek-V3 report (arXiv:2412.19437, section 3.3.2) for blocks and groups, and vLLM's online
# fp8 and int8 methods (vllm/model_executor/layers/quantization/online/) for floors; int8 is computed in f32 here.
FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format(
            name="fp8_per_channel",
            roles=("weight",),
            storage=_E4M3,
            code_max=E4M3_MAX,
            block=(1, None),
            arithmetic="divide",
            scale_floor=_E4M3_CHANNEL_FLOOR,
            zero_scale=None,
        ),
        Format(
            name="fp8_per_block",
            roles=("weight",),
            storage=_E4M3,
            code_max=E4M3_MAX,
            block=(128, 128),
            arithmetic="reciprocal",
            amax_floor=1e-4,
            zero_scale=None,
        ),
        Format(
            name="int8_per_channel",
            roles=("weight",),
            storage=_INT8,
            code_max=INT8_MAX,
            block=(1, None),
            arithmetic="divide",
        ),
        Format(
            name="fp8_per_token",
            roles=("activation",),
            storage=_E4M3,
            code_max=E4M3_MAX,
            block=(1, None),
            arithmetic="divide",
            scale_floor=_E4M3_CHANNEL_FLOOR,
            zero_scale=None,
        ),
        Format(
            name="fp8_per_group",
            roles=("activation",),
            storage=_E4M3,
            code_max=E4M3_MAX,
            block=(1, 128),
            arithmetic="divide",
            amax_floor=1e-10,
            zero_scale=None,
        ),
        Format(
            name="int8_per_token",
            roles=("activation",),
            storage=_INT8,
            code_max=INT8_MAX,
            block=(1, None),
            arithmetic="inverse_amax",
            amax_floor=1e-10,
            zero_scale=None,
        ),
    )
}


def get_format(name: Format | str, *, group: int | None = None, role: Role | None = None) -> Format:
    """The format called `name`; a `Format` is returned as it is.

    Args:
      name: One of `FORMATS`.
      group: Elements along K that share a scale, for formats that leave it open; none of the present ones does.
      role: Where given, the format must serve as this.

    Raises:
      TypeError: `name` is neither a string nor a Format.
      ValueError: no such format, or not for this role; the message lists the valid names.
    """
    if isinstance(name, Format):
        fmt = name
    elif isinstance(name, str):
        valid = sorted(key for key, value in FORMATS.items() if role is None or role in value.roles)
        if name not in FORMATS:
            raise ValueError(f"unknown {role or 'quantization'} format {name!r}; valid names: {', '.join(valid)}")
        fmt = FORMATS[name]
    else:
        raise TypeError(f"a format is named by a string, not {type(name).__name__} ({name!r})")
    if group is not None:
        raise ValueError(f"{group=}: the block of format {fmt.name!r} is fixed at (N, K) = {fmt.block}; drop `group`")
    if role is not None and role not in fmt.roles:
        valid = sorted(key for key, value in FORMATS.items() if role in value.roles)
        raise ValueError(f"{fmt.name!r} is no {role} format; valid names: {', '.join(valid)}")
    return fmt
