"""`ExpertWeights`: everything learned of one layer's experts, abstract or concrete, quantized or not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from pallas_kernels import Format, QuantizedArray

if TYPE_CHECKING:
    Weight = jax.Array | QuantizedArray
    Leaf = jax.Array
else:
    Weight = Leaf = Any  # jax.tree.map may put a ShapeDtypeStruct, a sharding or a spec here


SIZES = {  # of each tensor: E experts here, S gate and up, I intermediate, H hidden, G experts anywhere
    "w13_weight": "ESIH",
    "w2_weight": "EHI",
    "w13_bias": "ESI",
    "w2_bias": "EH",
    "e_score_correction_bias": "G",
}
SHARED_SIZES = {"w13_weight": "1SIH", "w2_weight": "1HI", "gate_weight": "H"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpertWeights:
    """The shared experts of one layer, which every token visits: one expert as wide as all of them together.

    Its formats are its own; axis 0 has size 1, so that kernels and loader take it for one expert.
    """

    w13_weight: Weight  # [1, S, I, H]: gate, up
    w2_weight: Weight  # [1, H, I]
    gate_weight: Leaf | None = None  # [H]; the sigmoid of its product with the input multiplies the output
    activation_format: Format | None = dataclasses.field(default=None, metadata={"static": True})
    # I before the loader filled it up with zeros, so that each device has whole blocks; None: it is not padded.
    intermediate_size_unpadded: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The experts of one layer. Axis 0 of weights and biases is the expert, so moving experts is one gather over them.

    K, the contraction axis, comes last, as the kernels want it: H in `w13_weight`, I in `w2_weight`. Gate and up have
    an axis of their own, so sharding I gives each device matching halves, and no block of scales straddles them.
    """

    w13_weight: Weight  # [E, S, I, H]: gate, up; S is 1 where the activation is not gated
    w2_weight: Weight  # [E, H, I]
    w13_bias: Leaf | None = None  # [E, S, I]; never quantized
    w2_bias: Leaf | None = None  # [E, H]; never quantized
    w13_input_scale: None = None  # activations are quantized as they come, so there is nothing to store
    w2_input_scale: None = None
    e_score_correction_bias: Leaf | None = None  # f32 [global E]; experts are chosen by score plus this
    expert_map: Leaf | None = None  # int32 [global E]: place here, or -1
    shared: SharedExpertWeights | None = None
    orig_dtype: np.dtype[Any] = dataclasses.field(metadata={"static": True})  # before quantization
    # Of the matmuls' inputs. It travels with the weights, so a layer that was swapped in needs no second setting.
    activation_format: Format | None = dataclasses.field(default=None, metadata={"static": True})
    # I before the loader filled it up with zeros, so that each device has whole blocks; None: it is not padded.
    intermediate_size_unpadded: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def num_experts(self) -> int:
        """E, the experts held here."""
        return self.w2_weight.shape[0]

    @property
    def weight_block_size(self) -> tuple[int, int] | None:
        """`(N, K)` elements that share a scale, or None where a scale spans a whole axis or nothing is quantized."""
        block = self.w2_weight.format.block if isinstance(self.w2_weight, QuantizedArray) else (None, None)
        return None if block[0] is None or block[1] is None else (block[0], block[1])

    def named_tensors(self) -> dict[str, jax.Array]:
        """All tensors by the names that vLLM gives them after loading; layouts stay ours.

        Source: `replace_parameter` calls in vllm/model_executor/layers/quantization/online/.
        """
        tensors = {**_named("w13", self.w13_weight), **_named("w2", self.w2_weight)}
        if self.shared is not None:
            named = {**_named("w13", self.shared.w13_weight), **_named("w2", self.shared.w2_weight)}
            if self.shared.gate_weight is not None:
                named["gate_weight"] = self.shared.gate_weight
            tensors |= {f"shared_experts.{name}": value for name, value in named.items()}
        for name in ("w13_bias", "w2_bias", "e_score_correction_bias", "expert_map"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        return tensors


def _named(name: str, weight: jax.Array | QuantizedArray) -> dict[str, jax.Array]:
    if not isinstance(weight, QuantizedArray):
        return {f"{name}_weight": weight}
    tensors = {f"{name}_weight": weight.values, scale_name(name, weight.format): weight.scales}
    if weight.global_scale is not None:
        tensors[f"{name}_weight_scale_2"] = weight.global_scale
        tensors[f"{name}_input_scale"] = jnp.ones(weight.shape[:1], jnp.float32)
    return tensors


def scale_name(weight: str, fmt: Format) -> str:
    """vLLM's name for the scales of `w13` or `w2`; its "inv" notwithstanding, they multiply."""
    if fmt.storage == np.int8:
        return f"{weight}_scale"
    return f"{weight}_weight_scale_inv" if fmt.block == (128, 128) else f"{weight}_weight_scale"


def abstract_experts(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: DTypeLike,
    *,
    has_bias: bool = False,
    gated: bool = True,
    num_correction_biases: int = 0,
    shared_intermediate_size: int = 0,
    shared_gate: bool = False,
    mesh: Mesh | None = None,
    expert_axis: str = "expert",
    tensor_axis: str = "tensor",
) -> ExpertWeights:
    """Declares the experts of one layer as `ShapeDtypeStruct`s; allocates nothing.

    Args:
      num_experts: E.
      hidden_size: H.
      intermediate_size: I.
      dtype: Of weights and biases.
      has_bias: Whether the experts have biases.
      gated: Whether w13 holds gate and up, or one matrix.
      num_correction_biases: Experts anywhere, if their scores are corrected by a bias, in f32.
      shared_intermediate_size: I of all shared experts together, if there are some.
      shared_gate: Whether a gate weighs the shared experts' output.
      mesh: Shards E over its axis `expert_axis` and I over `tensor_axis`, each where the mesh has it. None places
        everything on the default device.
      expert_axis: Name of a mesh axis.
      tensor_axis: Name of a mesh axis.

    Raises:
      ValueError: an axis does not divide among its devices.
    """
    sizes = {"E": num_experts, "S": 2 if gated else 1, "I": intermediate_size, "H": hidden_size, "1": 1}
    sizes["G"] = num_correction_biases

    def declare(field: str, *, dtype: DTypeLike = dtype, shared: bool = False) -> Any:
        letters = SHARED_SIZES[field] if shared else SIZES[field]
        width = {"I": shared_intermediate_size} if shared else {}
        shape = tuple((sizes | width)[letter] for letter in letters)
        if mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(default_device()))
        spec = expert_spec(field, mesh, shared=shared, expert_axis=expert_axis, tensor_axis=tensor_axis)
        for size, name in zip(shape, spec, strict=True):
            if name is not None and size % mesh.shape[name]:
                raise ValueError(
                    f"{size} of {'shared.' * shared}{field} {shape} does not divide among the {mesh.shape[name]} "
                    f"devices of mesh axis {name!r}"
                    + "; moe_online.load(mesh=...) pads what is declared without a mesh"
                    * (name == tensor_axis)
                )
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shared = None
    if shared_intermediate_size:
        shared = SharedExpertWeights(
            w13_weight=declare("w13_weight", shared=True),
            w2_weight=declare("w2_weight", shared=True),
            gate_weight=declare("gate_weight", shared=True) if shared_gate else None,
        )
    return ExpertWeights(
        w13_weight=declare("w13_weight"),
        w2_weight=declare("w2_weight"),
        w13_bias=declare("w13_bias") if has_bias else None,
        w2_bias=declare("w2_bias") if has_bias else None,
        e_score_correction_bias=(
            declare("e_score_correction_bias", dtype=jnp.float32) if num_correction_biases else None
        ),
        shared=shared,
        orig_dtype=jnp.dtype(dtype),
    )


def expert_spec(
    field: str, mesh: Mesh, *, shared: bool = False, expert_axis: str = "expert", tensor_axis: str = "tensor"
) -> PartitionSpec:
    """How a tensor of `ExpertWeights`, or of its `shared`, lies on a mesh: E and I along these axes, if it has them."""
    names = {"E": expert_axis, "I": tensor_axis}
    axes = (names.get(letter) for letter in (SHARED_SIZES if shared else SIZES)[field])
    return PartitionSpec(*(name if name in mesh.axis_names else None for name in axes))


def default_device() -> jax.Device:
    """Where an array without a sharding would go."""
    device = getattr(jax.config, "jax_default_device", None)  # a device, a platform's name or None
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def default_sharding(leaf: Any) -> Sharding:
    """The sharding of an abstract leaf, or the default device's."""
    sharding: Sharding | None = getattr(leaf, "sharding", None)
    return SingleDeviceSharding(default_device()) if sharding is None else sharding
