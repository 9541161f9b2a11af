"""Meshes and the one table that says which mesh axis each logical axis is split over.

Layers name the logical axes of their parameters (`param(..., axes=("embed", "mlp"))`) and know nothing of meshes;
`ShardingRules` turns those names into `NamedSharding`s. The same table serves parameters, optimizer state and batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.errors import UserError

MESH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (None: replicated). `batch` may name several mesh axes."""

    batch: tuple[str, ...] | None = ("data", "fsdp")
    embed: str | None = "fsdp"
    heads: str | None = None
    kv_heads: str | None = None
    head_dim: str | None = None
    mlp: str | None = None
    experts: str | None = None
    vocab: str | None = None
    features: str | None = None
    rank: str | None = None

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes; UserError if two of them land on one mesh axis."""
        known = {field.name for field in fields(self)}
        taken: dict[str, str] = {}
        entries: list[Any] = []
        for axis in axes:
            if axis is not None and axis not in known:
                raise UserError(f"ShardingRules has no logical axis {axis!r}; it knows {', '.join(sorted(known))}.")
            entry = None if axis is None else getattr(self, axis)
            for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
                if mesh_axis in taken:
                    raise UserError(
                        f"ShardingRules puts both {taken[mesh_axis]!r} and {axis!r} of one array on mesh axis "
                        f"{mesh_axis!r}; send one of them to another axis or to None."
                    )
                taken[mesh_axis] = str(axis)
            entries.append(entry)
        return PartitionSpec(*entries)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes (data, fsdp); a size of -1 takes the devices left. UserError if they don't divide."""
    devices = list(devices if devices is not None else jax.devices())
    sizes = {"data": data, "fsdp": fsdp}
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError("Only one mesh axis can be -1 (the devices that are left); both data and fsdp are.")
    fixed = 1
    for size in sizes.values():
        fixed *= size if size != -1 else 1
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if sizes["data"] * sizes["fsdp"] != len(devices):
        raise UserError(
            f"A mesh of data={data} x fsdp={fsdp} does not fit {len(devices)} devices; their product must be the "
            "number of devices (one of them may be -1)."
        )
    return jax.make_mesh((sizes["data"], sizes["fsdp"]), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def param(array: jax.Array, *axes: str | None) -> nnx.Param:
    """A parameter that remembers the logical name of each of its dimensions."""
    if len(axes) != array.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {array.shape}")
    return nnx.Param(array, logical_axes=axes)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, params): the static structure and a nested dict of plain arrays, `nnx.merge`'s two arguments."""
    graphdef, state = nnx.split(module, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def parameter_shardings(module: nnx.Module, mesh: Mesh, rules: ShardingRules) -> dict:
    """Nested dict, shaped like `split(module)[1]`, of the NamedSharding of every parameter.

    A dimension that its mesh axis does not divide evenly is replicated: small norms and odd vocabularies need no rule.
    """
    _, state = nnx.split(module, nnx.Param)
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        spec = rules.spec(variable.get_metadata()["logical_axes"])
        flat[path] = NamedSharding(mesh, _divisible(spec, variable.shape, mesh))
    return nnx.to_pure_dict(nnx.from_flat_state(flat.items()))


def _divisible(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    def size(entry: Any) -> int:
        names = (entry,) if isinstance(entry, str) else entry or ()
        total = 1
        for name in names:
            total *= mesh.shape[name]
        return total

    return PartitionSpec(*(e if dim % size(e) == 0 else None for e, dim in zip(spec, shape, strict=True)))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh, rules: ShardingRules) -> dict:
    """NamedSharding of every batch array: the leading dimension over the rules' batch axes, the rest whole."""
    return {key: NamedSharding(mesh, rules.spec(["batch"] + [None] * (value.ndim - 1))) for key, value in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
