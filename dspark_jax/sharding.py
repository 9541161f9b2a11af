"""Meshes and the one table that says which mesh axis each logical axis is split over.

Layers name the logical axes of their parameters (`param(..., axes=("embed", "mlp"))`) and know nothing of meshes;
`ShardingRules` turns those names into `NamedSharding`s. The same table serves parameters, optimizer state and batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.config.schema import MeshSettings
from dspark_jax.errors import UserError

AnyMesh = Mesh | AbstractMesh
MESH_AXES = ("data", "fsdp", "expert", "tensor")


@dataclass(frozen=True)
class Units:
    """A logical axis of `count` units of several entries each, heads of H channels, which sharding keeps whole.

    A unit has `parts` smaller ones, and is cut between them where a mesh axis does not divide the units: the devices
    then exchange rows, but no weight is held twice.
    """

    axis: str
    count: int
    parts: int = 1


Axis = str | Units | None


@dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (None: replicated). `batch` may name several mesh axes.

    `fsdp` splits storage between uses, `tensor` the computation: heads, MLPs and the vocabulary rows of embedding and
    head; `expert` gives each device experts of its own (targets/expert_mesh.py). The Markov
    head's tables that rows are looked up in, [V, R], are whole by default, so that no drafted token waits for a
    collective; `sharded_markov` splits them like the rest.
    """

    batch: tuple[str, ...] | None = ("data", "fsdp")
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"
    experts: str | None = "expert"
    vocab: str | None = "tensor"
    features: str | None = None
    markov_vocab: str | None = None
    rank: str | None = None

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Raises:
            UserError: an unknown logical axis, or two of one array on the same mesh axis.
        """
        known = {field.name for field in fields(self)}
        taken: dict[str, str] = {}
        entries: list[Any] = []

        for axis in axes:
            if axis is not None and axis not in known:
                raise UserError(f"ShardingRules has no logical axis {axis!r}; it knows {', '.join(sorted(known))}.")

            entry = None if axis is None else getattr(self, axis)

            # A mesh axis can split one dimension of an array only.
            for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
                if mesh_axis in taken:
                    raise UserError(
                        f"ShardingRules puts both {taken[mesh_axis]!r} and {axis!r} of one array on mesh axis "
                        f"{mesh_axis!r}; send one of them to another axis or to None."
                    )
                taken[mesh_axis] = str(axis)

            entries.append(entry)

        return PartitionSpec(*entries)

    def rows(self, mesh: AnyMesh, ndim: int, leading: int = 0) -> NamedSharding:
        """Sharding of an array whose batch dimension comes after `leading` others."""
        # A micro-batched array has its rows behind the axis of micro-batches.
        return NamedSharding(mesh, self.spec([None] * leading + ["batch"] + [None] * (ndim - leading - 1)))

    def row_groups(self, mesh: AnyMesh) -> int:
        """The number of devices, or of groups of devices, that the rows of a batch are split over."""
        return math.prod(mesh.shape[axis] for axis in self.batch or ())

    def local_rows(self, mesh: Mesh, rows: int) -> tuple[int, ...]:
        """The rows of a batch that this process's devices hold, ascending; all of them in a single process.

        Several processes hold the same rows if a mesh axis that splits no rows extends over processes.
        """
        # jax maps every local device to the slice of rows that it holds; copies repeat slices.
        spans = self.rows(mesh, 1).addressable_devices_indices_map((rows,)).values()
        return tuple(sorted({row for index in spans if index for row in range(*index[0].indices(rows))}))

    def sharded_markov(self) -> "ShardingRules":
        """These rules with Markov tables split as embedding and head are."""
        return replace(self, markov_vocab=self.vocab, rank=self.embed)


def mesh_shape(
    devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1, expert: int = 1
) -> tuple[int, int, int, int]:
    """The sizes of `MESH_AXES` on `devices` devices; a size of -1 takes those left.

    Raises:
        UserError: the sizes don't multiply to the number of devices, or more than one is -1.
    """
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(
            f"Only one mesh axis can be -1 (the devices that are left); here {' and '.join(open_axes)} are."
        )

    # What is left for the open axis, if the fixed sizes divide the devices.
    fixed = math.prod(size for size in sizes.values() if size != -1)
    # Otherwise the -1 stays, and the check below refuses the sizes.
    if open_axes and fixed > 0 and devices % fixed == 0:
        sizes[open_axes[0]] = devices // fixed

    if math.prod(sizes.values()) != devices or min(sizes.values()) < 1:
        raise UserError(
            f"A mesh of data={data} x fsdp={fsdp} x expert={expert} x tensor={tensor} does not fit {devices} devices; "
            "their product must be the number of devices (one of them may be -1)."
        )

    return sizes["data"], sizes["fsdp"], sizes["expert"], sizes["tensor"]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, expert: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `MESH_AXES` over `devices` (None: all), its sizes as `mesh_shape` resolves them."""
    devices = list(devices if devices is not None else jax.devices())
    shape = mesh_shape(len(devices), data, fsdp, tensor, expert)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def abstract_mesh(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1, expert: int = 1) -> AbstractMesh:
    """The mesh of devices that are not here: for shapes, estimates and lowering."""
    shape = mesh_shape(devices, data, fsdp, tensor, expert)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def mesh_of_several(settings: MeshSettings) -> Mesh | None:
    """The mesh of the settings, None on a single device; UserError if the sizes don't fit."""
    if jax.device_count() == 1:
        return None
    return make_mesh(*settings.sizes)


@contextmanager
def traced_over(mesh: AnyMesh | None) -> Iterator[None]:
    """While tracing: what asks for `traced_mesh` may split its work over this mesh by a plan of its own.

    Experts and attention kernels ask; the partitioner alone plans for everything else.
    """
    if mesh is None or math.prod(mesh.shape.values()) == 1:
        yield
        return

    # jax's own context, because its caches of traced functions know of it.
    with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
        yield


def traced_mesh() -> AbstractMesh | None:
    """The mesh of the innermost `traced_over`, None outside of one, on a single device, and in what each device runs
    on its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or "expert" not in mesh.shape or mesh.are_all_axes_manual else mesh


def traced_platform() -> str:
    """The platform of the devices that are traced for, "cpu", "gpu" or "tpu": of the mesh that the context names, so
    that plans for devices that are not here get their programs, else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def parameter_mesh(params: dict) -> Mesh | None:
    """The mesh that parameters were loaded over, None when one device holds them."""
    # One leaf speaks for all: loading lays every parameter over the same mesh.
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh) or sharding.mesh.size == 1:
        return None
    return sharding.mesh


def platform_of(params: dict) -> str:
    """The platform of the devices that hold parameters, or would hold those that are shapes alone: "cpu", "gpu" or
    "tpu"."""
    sharding = jax.tree.leaves(params)[0].sharding
    return jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform


def require_rows(option: str, rows: int, mesh: Mesh | None) -> None:
    """UserError, naming the option, unless `rows` divide evenly over the row groups of a mesh."""
    groups = 1 if mesh is None else ShardingRules().row_groups(mesh)
    if rows % groups:
        raise UserError(f"{option} is {rows}, which {groups} devices cannot share evenly; expected a multiple of them.")


def param(array: jax.Array, *axes: Axis) -> nnx.Param:
    """A parameter with a logical axis for each of its dimensions; ValueError if their numbers differ."""
    if len(axes) != array.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {array.shape}")
    return nnx.Param(array, logical_axes=axes)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, params): the static structure and a nested dict of plain arrays, `nnx.merge`'s two arguments."""
    # Pure dicts: Orbax, optax and jax.tree see arrays and no Flax types.
    graphdef, state = nnx.split(module, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def parameter_shardings(module: nnx.Module, mesh: AnyMesh, rules: ShardingRules) -> dict:
    """The `array_sharding` of every parameter, in a nested dict of the structure of `split(module)[1]`."""
    # The axis names are metadata of the variables, which the plain dict of `split` no longer has.
    _, state = nnx.split(module, nnx.Param)
    flat = {}

    for path, variable in nnx.to_flat_state(state):
        flat[path] = array_sharding(variable.shape, variable.get_metadata()["logical_axes"], mesh, rules)

    return nnx.to_pure_dict(nnx.from_flat_state(flat.items()))


def abstract_params(
    module: nnx.Module,
    mesh: AnyMesh | None,
    dtype_of: Callable[[tuple[Any, ...]], Any],
    rules: ShardingRules | None = None,
) -> dict:
    """ShapeDtypeStructs of a module's parameters, in the structure of `split(module)[1]`.

    Args:
        module: with arrays or shapes.
        mesh: the shapes have shardings over it; None: none.
        dtype_of: the dtype of the parameter at a path.
        rules: how they are placed; None: the default ones.
    """
    leaves = flatten_dict(split(module)[1])
    over = {} if mesh is None else flatten_dict(parameter_shardings(module, mesh, rules or ShardingRules()))

    return unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, dtype_of(path), sharding=over.get(path)) for path, x in leaves.items()}
    )


def array_sharding(shape: Sequence[int], axes: Sequence[Axis], mesh: AnyMesh, rules: ShardingRules) -> NamedSharding:
    """The sharding of an array with these logical axes.

    A dimension whose entries, or units, its mesh axis does not divide evenly is replicated, so small norms and odd
    vocabularies need no rule of their own.
    """

    def size(entry: Any) -> int:
        return math.prod(mesh.shape[name] for name in _names(entry))

    # What counts of a dimension is the finest cut of it: whole units are a multiple of their parts.
    counts = [axis.count * axis.parts if isinstance(axis, Units) else n for axis, n in zip(axes, shape, strict=True)]
    entries = rules.spec([axis.axis if isinstance(axis, Units) else axis for axis in axes])
    return NamedSharding(mesh, PartitionSpec(*(e if n % size(e) == 0 else None for e, n in zip(entries, counts))))


def gathered(sharding: NamedSharding, rules: ShardingRules) -> NamedSharding:
    """The sharding of a stored array while a step uses it.

    Splits over the batch's axes save storage alone and are gathered; splits over other axes divide work and stay.
    """
    # Devices along a batch axis compute on different rows, so each needs whole parameters while it does.
    stored = set(rules.batch or ())
    entries = (None if stored & set(_names(entry)) else entry for entry in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def is_gathered(shape: Sequence[int], sharding: NamedSharding, rules: ShardingRules) -> bool:
    """Whether devices store less of an array than they use."""
    # By sizes: an axis of one device may stand in a spec, and splits nothing.
    return sharding.shard_shape(tuple(shape)) != gathered(sharding, rules).shard_shape(tuple(shape))


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def batch_shardings(batch: Mapping[str, Any], mesh: AnyMesh, rules: ShardingRules) -> dict:
    """The sharding of every array of a batch: its leading dimension over the rules' batch axes, the others whole."""
    return {key: rules.rows(mesh, value.ndim) for key, value in batch.items()}


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
