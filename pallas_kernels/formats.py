"""What a quantized array is: its `Format` (static) and `QuantizedArray` (the pytree that carries one).

Values are `[..., N, K]` with K, the contraction axis, contiguous: 8-bit wgmma reads K-major operands only. Two 4-bit
codes share a byte, the even index along K in the low half. Scales are `[..., ceil(K / bk), ceil(N / bn)]`, N
contiguous, a full extent counted as one block, and always *multiply* codes into real values. Activations `[T, K]`
follow the same rule with T in the place of N.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import codes
from pallas_kernels.blocks import by_row, in_blocks, joined

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any  # jax.tree.map may put a ShapeDtypeStruct, a sharding or a spec here

Role = Literal["weight", "activation"]
Arithmetic = Literal["divide", "reciprocal", "inverse_amax", "power_of_two", "two_level"]

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # 2**-126; anything smaller counts as zero on every backend
E4M3_MAX = 448.0
INT8_MAX, INT4_MAX = 127.0, 7.0  # -128 and -8 are never used, so that codes are symmetric
E2M1_MAX = 6.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How the last two axes `[N, K]` of an array are stored, and the arithmetic that defines codes and scales.

    With `amax` the largest magnitude of one block, raised to `amax_floor`:
    `scale = max(amax / code_max, scale_floor)`, and a code is `x` in units of `scale`, clamped to `+-code_max` and
    rounded half to even, where `arithmetic` says how "in units of" is computed:

    * `"divide"`: the IEEE quotient `x / scale`
    * `"reciprocal"`: `x * (1 / scale)`
    * `"inverse_amax"`: `x * (code_max / amax)`
    * `"power_of_two"`: `scale` is the smallest power of two with `amax <= amax_limit * scale`, stored as its exponent
      plus 127 (E8M0); a code is `x / scale`
    * `"two_level"`: with A the largest magnitude of all that shares a `global_scale`, raised to `amax_floor`, and
      `G = code_max * 448 / A`: `scale = e4m3(G * (amax * (1 / code_max)))`, `global_scale = 1 / G`, and a code is
      `x * (G / scale)`, or 0 where `scale` is 0
    """

    name: str
    roles: tuple[Role, ...]
    code: np.dtype[Any]  # what one code is
    code_max: float  # largest magnitude that a code stands for
    block: tuple[int | None, int | None]  # (bn, bk) elements that share one scale; None = the full extent
    arithmetic: Arithmetic
    amax_floor: float = 0.0
    amax_limit: float | None = None  # of a power of two
    scale_floor: float = SMALLEST_NORMAL
    zero_scale: float | None = 1.0  # scale of an all-zero block; None = what the floors give
    scale_dtype: np.dtype[Any] = np.dtype(np.float32)
    global_rows: int | None = None  # rows of N that share a second-level scale; None = all
    groups: tuple[int, ...] = ()  # sizes of blocks along K to choose from
    partial_blocks: bool = False  # whether the last block along K may be shorter

    def __str__(self) -> str:
        """The name, and a group that is not the usual one: `int4_per_group_64`."""
        usual = not self.groups or self.group == self.groups[0]
        return self.name if usual else f"{self.name}_{self.group}"

    @property
    def group(self) -> int | None:
        """The chosen one of `groups`."""
        return self.block[1] if self.groups else None

    @property
    def bits(self) -> int:
        """Of one code."""
        kind = jnp.finfo if jnp.issubdtype(self.code, jnp.floating) else jnp.iinfo
        return int(kind(self.code).bits)

    @property
    def storage(self) -> np.dtype[Any]:
        """Dtype of `QuantizedArray.values`: that of a code, or bytes that hold two."""
        return _UINT8 if self.codes_per_element == 2 else self.code

    @property
    def codes_per_element(self) -> int:
        """How many codes one element of `values` holds: 2 for the packed 4-bit formats, else 1."""
        return 8 // self.bits

    @property
    def two_level(self) -> bool:
        """Whether a `global_scale` multiplies the scales of the blocks."""
        return self.arithmetic == "two_level"

    @property
    def exact_in_bf16(self) -> bool:
        """Whether a code times the scale of its block is a bf16 number, as it is with scales of few bits."""
        return self.scale_dtype != _FLOAT32

    @property
    def whole_matrix(self) -> bool:
        """Whether one scale, of whichever level, spans all of a matrix: it is known only after all was seen."""
        return self.global_rows is None if self.two_level else self.block == (None, None)

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """Number of blocks along N and along K; ragged ends count as a block."""
        bn, bk = self.block
        return (1 if bn is None else math.ceil(n / bn)), (1 if bk is None else math.ceil(k / bk))

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape `[..., K blocks, N blocks]` of the scales of an array of logical `shape` `[..., N, K]`."""
        *lead, n, k = shape
        blocks_n, blocks_k = self.grid(n, k)
        return (*lead, blocks_k, blocks_n)

    def global_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the second-level scale of an array of logical `shape`: `[...]`, or `[..., N]` of single rows."""
        if not self.two_level:
            return None
        return shape[:-2] if self.global_rows is None else shape[:-1]

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored values of an array of logical `shape` `[..., N, K]`; ValueError where it cannot be."""
        self.check_shape(shape)
        return (*shape[:-1], shape[-1] // self.codes_per_element)

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of values and scales together for an array of logical `shape`."""
        second = self.global_shape(shape)
        return (
            math.prod(self.values_shape(shape)) * self.storage.itemsize
            + math.prod(self.scales_shape(shape)) * self.scale_dtype.itemsize
            + (0 if second is None else math.prod(second) * _FLOAT32.itemsize)
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless an array of this logical shape can be stored in this format."""
        if len(shape) < 2:
            raise ValueError(f"{shape=} has rank {len(shape)}; format {self.name!r} needs the two axes [..., N, K]")
        block = self.block[1]
        if block is not None and not self.partial_blocks and shape[-1] % block:
            fitting = [f"{self.name}_{group}" for group in self.groups if shape[-1] % group == 0]
            raise ValueError(
                f"K={shape[-1]} of {shape=} must be a multiple of {block}, the block of format {self}"
                + (f"; {' and '.join(fitting)} would fit" if fitting else "")
            )

    def spans(self) -> tuple[bool, bool]:
        """Whether one scale spans the whole of N, and the whole of K: what needs a collective when sharded."""
        if self.two_level:
            return self.global_rows is None, True
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
    """Element `[..., n, k]` is `values[..., n, k] * scales[..., k // bk, n // bn]`, times `global_scale[...]` if any.

    Nothing about the shape is stored: all properties follow from the children, so they stay true under slicing,
    `scan`, `vmap` and `shard_map`. Every leading axis (experts first) leads every child.
    """

    values: Leaf  # [..., N, K] codes, or [..., N, K / 2] bytes of two
    scales: Leaf  # [..., ceil(K / bk), ceil(N / bn)]
    global_scale: Leaf | None = None  # f32, of two-level formats: [...], or [..., N] of one for each row
    format: Format = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_parts(
        cls, values: jax.Array, scales: jax.Array, format: Format | str, global_scale: jax.Array | None = None
    ) -> QuantizedArray:
        """Joins codes and scales made elsewhere, after checking dtypes and shapes.

        Args:
          values: Codes `[..., N, K]` in the format's storage dtype; of 4 bits `[..., N, K / 2]`, the even index low.
          scales: `[..., ceil(K / bk), ceil(N / bn)]`, the real value of one code step.
          format: A format or its name.
          global_scale: Second-level scale `[...]`, of activations `[..., N]`; only for formats that have one.

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
        second = fmt.global_shape(shape)
        if second is None and global_scale is not None:
            raise ValueError(f"format {fmt.name!r} has no second-level scale; drop {global_scale.shape=}")
        if second is not None:
            found = None if global_scale is None else (np.dtype(global_scale.dtype), global_scale.shape)
            if found != (_FLOAT32, second):
                raise ValueError(f"global_scale must be float32 {second} for format {fmt.name!r}, not {found}")
        return cls(values=values, scales=scales, global_scale=global_scale, format=fmt)

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

    def unpacked(self) -> jax.Array:
        """What the codes stand for before scaling, `[..., N, K]`: f32 of e2m1 codes, int8 of int4 codes."""
        if self.format.codes_per_element == 1:
            return self.values
        nibbles = codes.unpack(self.values)
        return codes.e2m1_values(nibbles) if self.format.code == _E2M1 else codes.int4_values(nibbles)

    def block_scales(self) -> jax.Array:
        """`scales` as f32 factors, `[..., ceil(K / bk), ceil(N / bn)]`; `global_scale` is not among them."""
        if self.format.arithmetic == "power_of_two":
            return codes.e8m0_values(self.scales)
        return self.scales.astype(jnp.float32)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The real values `[..., N, K]`: products in f32, rounded once to `dtype`."""
        *lead, n, k = self.shape
        bn, bk = self.format.block
        scales = jnp.swapaxes(self.block_scales(), -1, -2)  # [..., N blocks, K blocks]
        values = self.unpacked()
        values = codes.e4m3_values(values) if values.dtype == _E4M3 else values.astype(jnp.float32)
        real = joined(in_blocks(values, bk) * by_row(scales, n, bn), k)
        if self.global_scale is not None:
            real = real * self.global_scale.reshape(*lead, -1, 1)
        return real.astype(dtype)

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

        def like(spec: PartitionSpec) -> Any:
            return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

        second = (*lead, spec_n) if self.format.global_rows else lead
        return QuantizedArray(
            values=sharding,  # type: ignore[arg-type]
            scales=like(scales),
            global_scale=like(PartitionSpec(*second)) if self.format.two_level else None,
            format=self.format,
        )


_E4M3, _E2M1, _INT8, _INT4 = (np.dtype(dtype) for dtype in (jnp.float8_e4m3fn, jnp.float4_e2m1fn, np.int8, jnp.int4))
_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_CHANNEL_FLOOR = 1.0 / (E4M3_MAX * 512.0)

_fp8: dict[str, Any] = {"code": _E4M3, "code_max": E4M3_MAX}
_fp8_row: dict[str, Any] = {
    **_fp8, "block": (1, None), "arithmetic": "divide", "scale_floor": _CHANNEL_FLOOR, "zero_scale": None
}  # fmt: skip
_fp8_tensor: dict[str, Any] = {**_fp8, "block": (None, None), "arithmetic": "reciprocal"}
_mx: dict[str, Any] = {
    "roles": ("weight", "activation"), "block": (1, 32), "arithmetic": "power_of_two", "scale_dtype": _UINT8,
    "amax_floor": SMALLEST_NORMAL,
}  # fmt: skip
_nvfp4: dict[str, Any] = {
    "code": _E2M1, "code_max": E2M1_MAX, "block": (1, 16), "arithmetic": "two_level", "scale_dtype": _E4M3,
    "amax_floor": 1e-8,
}  # fmt: skip
_WEIGHT: tuple[Role, ...] = ("weight",)
_ACTIVATION: tuple[Role, ...] = ("activation",)

# Exact arithmetic: the DeepSeek-V3 report (arXiv:2412.19437, section 3.3.2) for blocks and groups; vLLM's online
# methods (vllm/model_executor/layers/quantization/online/) for floors and nvfp4; int8 is computed in f32 here. OCP MX
# v1.0 for mxfp8 and mxfp4, with exponents rounded as vLLM does: mxfp4's largest magnitude comes to [3.5, 7) and
# saturates.
FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format(name="fp8_per_tensor", roles=_WEIGHT, **_fp8_tensor),
        Format(name="fp8_per_channel", roles=_WEIGHT, **_fp8_row),
        Format(
            name="fp8_per_block",
            roles=_WEIGHT,
            **_fp8,
            block=(128, 128),
            arithmetic="reciprocal",
            amax_floor=1e-4,
            zero_scale=None,
            partial_blocks=True,
        ),
        Format(
            name="int8_per_channel", roles=_WEIGHT, code=_INT8, code_max=INT8_MAX, block=(1, None), arithmetic="divide"
        ),
        Format(
            name="int4_per_group",
            roles=_WEIGHT,
            code=_INT4,
            code_max=INT4_MAX,
            block=(1, 128),
            arithmetic="divide",
            groups=(128, 64, 32),
        ),
        Format(name="mxfp8", **_mx, **_fp8, amax_limit=E4M3_MAX),
        Format(
            name="mxfp4",
            **_mx,
            code=_E2M1,
            code_max=E2M1_MAX,
            amax_limit=float(np.nextafter(np.float32(7), np.float32(0))),
        ),
        Format(name="nvfp4", roles=_WEIGHT, **_nvfp4),
        Format(name="fp8_per_tensor_dynamic", roles=_ACTIVATION, **_fp8_tensor),
        Format(name="fp8_per_token", roles=_ACTIVATION, **_fp8_row),
        Format(
            name="fp8_per_group",
            roles=_ACTIVATION,
            **_fp8,
            block=(1, 128),
            arithmetic="divide",
            amax_floor=1e-10,
            zero_scale=None,
            partial_blocks=True,
        ),
        Format(
            name="int8_per_token",
            roles=_ACTIVATION,
            code=_INT8,
            code_max=INT8_MAX,
            block=(1, None),
            arithmetic="inverse_amax",
            amax_floor=1e-10,
            zero_scale=None,
        ),
        Format(name="nvfp4_per_token", roles=_ACTIVATION, **_nvfp4, global_rows=1),
    )
}


def get_format(name: Format | str, *, group: int | None = None, role: Role | None = None) -> Format:
    """The format called `name`; a `Format` is returned as it is.

    Args:
      name: One of `FORMATS`.
      group: Elements along K that share a scale, for formats that leave it open: `int4_per_group` (32, 64, 128).
      role: Where given, the format must serve as this.

    Raises:
      TypeError: `name` is neither a string nor a Format.
      ValueError: no such format, or not for this role; the message lists the valid names. A group it does not have.
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
    if group is not None and not fmt.groups:
        raise ValueError(f"{group=}: the block of format {fmt.name!r} is fixed at (N, K) = {fmt.block}; drop `group`")
    if group is not None and group not in fmt.groups:
        raise ValueError(f"{group=} of format {fmt.name!r} must be one of {', '.join(map(str, sorted(fmt.groups)))}")
    if role is not None and role not in fmt.roles:
        valid = sorted(key for key, value in FORMATS.items() if role in value.roles)
        raise ValueError(f"{fmt.name!r} is no {role} format; valid names: {', '.join(valid)}")
    return fmt if group is None else dataclasses.replace(fmt, block=(fmt.block[0], group))
