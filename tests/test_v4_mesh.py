"""Mixtures of experts over a mesh with an expert axis, in a process of 8 simulated devices."""

import pytest

from dspark_jax.config.cli import mesh_settings
from dspark_jax.config.schema import MeshSettings
from dspark_jax.errors import UserError
from dspark_jax.sharding import abstract_mesh, traced_mesh, traced_over
from tests.decoding_tiny import run_python


@pytest.mark.subprocesses
def test_eight_devices_give_what_one_gives() -> None:
    """Layers, training steps and the decode loop; one process, whose start costs as much as a check."""
    run_python("-m", "tests.sharded_experts")


def test_meshes_of_several_devices_are_made_known() -> None:
    for mesh in (None, abstract_mesh(1)):
        with traced_over(mesh):
            assert traced_mesh() is None
    for mesh in (abstract_mesh(8, fsdp=4), abstract_mesh(8, expert=4)):
        with traced_over(mesh):
            assert (traced_mesh() or {}).shape == mesh.shape  # type: ignore[union-attr]
    assert traced_mesh() is None


def test_the_expert_axis_has_an_option() -> None:
    assert mesh_settings("expert=16", MeshSettings()) == MeshSettings(data=1, expert=16)
    with pytest.raises(UserError, match=r"mesh\.expert is 0; a positive number or -1"):
        MeshSettings(expert=0)
