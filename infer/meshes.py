"""The mesh that a program decodes on."""

from jax.sharding import Mesh

from dspark_jax.config.cli import mesh_settings
from dspark_jax.config.schema import MeshSettings
from dspark_jax.sharding import make_mesh


def mesh_named(text: str) -> Mesh | None:
    """The mesh of a text such as `tensor=8`, over all devices; None, one device, for an empty one.

    Raises:
        UserError: the text names no mesh, or its sizes don't fit the devices.
    """
    return make_mesh(*mesh_settings(text, MeshSettings()).sizes) if text else None
