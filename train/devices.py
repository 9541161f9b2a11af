"""The devices that a data program spreads its target over."""

import jax
from jax.sharding import Mesh

from dspark_jax.config.schema import MeshSettings
from dspark_jax.errors import UserError
from dspark_jax.sharding import ShardingRules, make_mesh


def mesh_of_several(settings: MeshSettings) -> Mesh | None:
    """The mesh of the settings; None on a single device, where nothing is placed. UserError if sizes don't fit."""
    if jax.device_count() == 1:
        return None
    return make_mesh(settings.data, settings.fsdp, settings.tensor)


def require_rows(option: str, rows: int, mesh: Mesh | None) -> None:
    """UserError unless the devices of a mesh can share so many rows evenly."""
    groups = 1 if mesh is None else ShardingRules().row_groups(mesh)
    if rows % groups:
        raise UserError(f"{option} is {rows}, which {groups} devices cannot share evenly; expected a multiple of them.")
