"""`load` and `plan`: the one call that users make."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_online.config import OnlineQuantConfig
from moe_online.errors import ConfigError
from moe_online.experts import default_sharding, expert_spec
from moe_online.loading import stream
from moe_online.loading.choose import choose_specs
from moe_online.loading.exported import ExportSource
from moe_online.loading.manifest import Manifest
from moe_online.loading.mapping import Assigned, assign
from moe_online.loading.orbax import OrbaxSource
from moe_online.loading.padding import padded
from moe_online.loading.plan import LoadPlan, make_plan
from moe_online.loading.report import LoadReport
from moe_online.loading.rules import LAYER
from moe_online.loading.safetensors import SafetensorsSource, is_safetensors
from moe_online.loading.sinks import OnDevices
from moe_online.loading.source import CheckpointSource, MemorySource, OnDeviceSource, prefixed
from moe_online.loading.tree import FIELD_AXES, KERNEL, SHARED_AXES, AbstractTree, Leaf, flatten
from moe_online.loading.units import Target
from moe_online.schemes import QuantSpec
from pallas_kernels import Format

UNIT_BYTES = 256 * 2**20

Quantization = str | Mapping[str, Any] | OnlineQuantConfig | QuantSpec
Source = Any  # a path, a pytree of arrays or a CheckpointSource


class LoadResult(NamedTuple):
    """The loaded model or tree, and the report."""

    params: Any
    report: LoadReport


def load(
    abstract: Any,
    source: Source,
    *,
    quantization: Quantization | None = None,
    mapping: Mapping[str, str] | None = None,
    prefix: str | None = None,
    unexpected: str | Sequence[str] = "error",
    requantize: bool = False,
    mesh: Mesh | None = None,
    unit_bytes: int = UNIT_BYTES,
    memory_limit: int | None = None,
    prefetch: int = 1,
    progress: bool = True,
) -> LoadResult:
    """Streams a checkpoint into a declared model and quantizes its experts and dense layers on the way.

    Units (a tensor, or a range of its experts) are read one after the other; while one is quantized the next are read,
    and each source is freed at once. Peak device memory is the finished parameters so far, `1 + prefetch` units, and
    64 MiB at most for one chunk in f32 (stated for one device; with a mesh, bytes are those of all
    devices together). Any error leaves nothing half loaded: there is no result.

    Args:
      abstract: What to load, declared: an nnx module made inside `nnx.eval_shape`, or any pytree of
        `ShapeDtypeStruct`s. Leaves go where their sharding says.
      source: A path or URL of an Orbax checkpoint, of what `save_quantized` wrote, or of safetensors (a file or a
        folder); a pytree of numpy or `jax.Array`s; or a `CheckpointSource`.
      quantization: A shorthand such as `"fp8_per_block"`, an `OnlineQuantConfig`, its dict, or a `QuantSpec` for all
        experts. `linear` reaches each `moe_online.flax.Linear`; most shorthands set it beside `moe`. None loads
        everything as declared. Weights are quantized from the dtype that is stored.
      mapping: Names and axes of stored tensors where they are not those of the model; see
        `moe_online.loading.mapping`. `moe_online.loading.get_mapping("mixtral")` gives those of well-known models.
      prefix: Reads only what is below this name: a subtree such as `"params"`, a step or an item.
      unexpected: What stored tensors that the model does not ask for are: `"error"`, `"ignore"`, or patterns of those
        that may be left.
      requantize: Whether codes of a checkpoint that is quantized already may become those of another format, or real
        numbers. Otherwise they are taken over as they are, and any other wish is an error.
      mesh: Places leaves that have no sharding, or a single device's: the tensors of `ExpertWeights` over its axes
        `expert` and `tensor`, where it has them; the rest, also experts that only a rule says to be some, on every
        device. An intermediate size that does not give each device of `tensor` whole blocks of scales is filled up
        with zeros until it does; `ExpertWeights.intermediate_size_unpadded` tells what it was.
      unit_bytes: Most source bytes per unit; one expert (or row, or kernel that is quantized) is the least. Arrays that
        lie on the devices as they are needed are not cut.
      memory_limit: Bytes that the planned peak may reach, on all devices together; units become smaller where that
        is needed.
      prefetch: Units read ahead.
      progress: Shows a progress bar.

    Returns:
      `params`, shaped like `abstract` (an nnx module for an nnx module), and `report`.

    Raises:
      ConfigError: a scheme, mapping or declaration that cannot be served, or reaches nothing.
      CheckpointNotFound: nothing at the path.
      CheckpointError: no checkpoint there.
      MissingWeights: the source lacks tensors of the model.
      UnexpectedWeights: the source has tensors that the model does not ask for.
      ShapeMismatch: a tensor has another shape.
      DtypeMismatch: a tensor has a dtype that cannot become the model's.
      CorruptCheckpoint: stored bytes cannot be decoded.
      NonFiniteWeight: a weight holds NaN or an infinity.
      MemoryBudgetError: the planned peak is above `memory_limit`, whatever the size of the units.

    >>> import jax, numpy as np
    >>> tree = {"w": np.ones((4, 8), np.float32)}
    >>> params, report = load({"w": jax.ShapeDtypeStruct((4, 8), "bfloat16")}, tree, progress=False)
    >>> params["w"].dtype.name, report.read_bytes
    ('bfloat16', 128)
    """
    tree, opened, made = _prepare(
        abstract,
        source,
        quantization,
        mapping,
        prefix,
        unexpected,
        requantize,
        mesh,
        unit_bytes,
        memory_limit,
        prefetch,
    )
    sink = OnDevices()
    report = stream.run(made, opened, sink, progress=progress)
    formats = {
        target.leaf.layer: target.spec.activation
        for target in made.targets
        if target.spec is not None and target.leaf.layer is not None
    }
    return LoadResult(tree.rebuild(sink.arrays, formats), report)


def plan(
    abstract: Any,
    source: Source,
    *,
    quantization: Quantization | None = None,
    mapping: Mapping[str, str] | None = None,
    prefix: str | None = None,
    unexpected: str | Sequence[str] = "error",
    requantize: bool = False,
    mesh: Mesh | None = None,
    unit_bytes: int = UNIT_BYTES,
    memory_limit: int | None = None,
    prefetch: int = 1,
) -> LoadPlan:
    """What `load` with the same arguments would do; reads metadata only and raises what can be known from it."""
    return _prepare(
        abstract,
        source,
        quantization,
        mapping,
        prefix,
        unexpected,
        requantize,
        mesh,
        unit_bytes,
        memory_limit,
        prefetch,
    )[2]


def open_source(source: Source, *, prefix: str | None = None) -> CheckpointSource:
    """Recognises what `source` is.

    Raises:
      ConfigError: a pytree with leaves that are no arrays, or a prefix that names nothing.
      CheckpointError: a path that is no checkpoint.
    """
    if isinstance(source, str | os.PathLike):
        if not is_safetensors(source):
            checkpoint = OrbaxSource(source, prefix=prefix)
            manifest = Manifest.read(str(checkpoint.item))
            return checkpoint if manifest is None else ExportSource(checkpoint, manifest)
        source = SafetensorsSource(source)
    opened = source if isinstance(source, CheckpointSource) else MemorySource(source)
    return opened if prefix is None else prefixed(opened, prefix)


def _prepare(
    abstract: Any,
    source: Source,
    quantization: Quantization | None,
    mapping: Mapping[str, str] | None,
    prefix: str | None,
    unexpected: str | Sequence[str],
    requantize: bool,
    mesh: Mesh | None,
    unit_bytes: int,
    memory_limit: int | None,
    prefetch: int,
) -> tuple[AbstractTree, CheckpointSource, LoadPlan]:
    check_limits(unit_bytes=unit_bytes, prefetch=prefetch, memory_limit=memory_limit)
    config = _config(quantization)
    tree = flatten(abstract)
    opened = open_source(source, prefix=prefix)
    formats: Mapping[str, Format] = getattr(opened, "stored_formats", {})
    assigned = assign(tree.leaves, opened.tensors, mapping or {}, unexpected, opened.description, formats)
    specs = choose_specs(assigned, config, requantize=requantize, activations=getattr(opened, "activations", None))
    may_stay = isinstance(opened, OnDeviceSource)
    targets = [
        make_target(each, mesh, *specs[each.leaf.name], may_stay=may_stay) for each in padded(assigned, specs, mesh)
    ]
    made = make_plan(opened.description, targets, unit_bytes=unit_bytes, memory_limit=memory_limit, prefetch=prefetch)
    return tree, opened, made


def make_target(assigned: Assigned, mesh: Mesh | None, spec: QuantSpec | None, rule: str, *, may_stay: bool) -> Target:
    """A leaf and its scheme; the kernel of a dense layer is transposed where it is quantized."""
    leaf, parts, source_format = assigned
    if spec is not None and leaf.field == KERNEL:
        parts = tuple(part if part.child else dataclasses.replace(part, axes=part.axes or leaf.axes) for part in parts)
        leaf = leaf.transposed()
    sharding = _sharding(leaf, mesh)
    return Target(
        leaf=leaf,
        parts=parts,
        sharding=sharding,
        spec=spec,
        rule=rule,
        source_format=source_format,
        may_stay=may_stay,
    )


def check_limits(*, unit_bytes: int, prefetch: int, memory_limit: int | None = None) -> None:
    """Raises ConfigError for numbers that mean nothing."""
    least: dict[str, tuple[Any, int]] = {"unit_bytes": (unit_bytes, 1), "prefetch": (prefetch, 0)}
    if memory_limit is not None:
        least["memory_limit"] = (memory_limit, 0)
    for name, (value, lowest) in least.items():
        if not isinstance(value, int) or value < lowest:
            raise ConfigError(f"{name}={value!r} must be a whole number, at least {lowest}")


def _config(quantization: Quantization | None) -> OnlineQuantConfig | None:
    if quantization is None:
        return None
    if isinstance(quantization, QuantSpec):
        return OnlineQuantConfig(moe=quantization)
    return OnlineQuantConfig.parse(quantization)


def _sharding(leaf: Leaf, mesh: Mesh | None) -> Any:
    sharding = default_sharding(leaf.aval)
    if mesh is not None and isinstance(sharding, SingleDeviceSharding):  # what a declaration without a mesh has
        spec = PartitionSpec()
        if leaf.field in (SHARED_AXES if leaf.kind == "linear" else FIELD_AXES):
            spec = expert_spec(str(leaf.field), mesh, shared=leaf.kind == "linear")
            if (leaf.axes or "").startswith(LAYER):
                spec = PartitionSpec(None, *spec)
        sharding = NamedSharding(mesh, spec)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        # XLA, not the types of arrays, follows the shardings here: `jax.make_mesh` would have it the other way.
        auto = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        sharding = NamedSharding(auto, sharding.spec, memory_kind=sharding.memory_kind)
    return sharding
