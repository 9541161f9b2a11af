"""Draft layers that start as copies of target layers (`drafter.init_target_layers`)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.target_tables import describe_target, load_layers
from dspark_jax.drafters.registry import drafter_hf_config, graft_target_layers, new_params
from dspark_jax.errors import UserError
from dspark_jax.sharding import make_mesh
from tests.tiny import write_tiny_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("graft") / "target", num_hidden_layers=4)


def drafter(folder: Path, **changed: int) -> tuple[dict, dict]:
    target = describe_target(folder)
    hf = drafter_hf_config(target.hf_config, num_layers=2, target_layer_ids=(0, 2), mask_token_id=3, **changed)
    return hf, new_params(hf, jax.random.key(0))


def test_draft_layers_are_the_targets_and_the_last_tap_passes_through(folder: Path) -> None:
    target = describe_target(folder)
    layers, norm = load_layers(target, (2, 3), mesh=make_mesh())
    hf, fresh = drafter(folder)
    params = graft_target_layers(hf, fresh, [layers[2], layers[3]], norm)
    whole = jax.tree.leaves(params["backbone"]["layers"])
    for found, expected in zip(whole, jax.tree.leaves([layers[2], layers[3]]), strict=True):
        np.testing.assert_array_equal(found, expected)
    size = target.config.hidden_size
    difference = params["backbone"]["fc"]["weight_io"] - 0.5 * fresh["backbone"]["fc"]["weight_io"]
    np.testing.assert_allclose(difference, np.concatenate([np.zeros((size, size)), np.eye(size)]), atol=1e-6)
    np.testing.assert_array_equal(params["markov_head"]["w1_vr"], fresh["markov_head"]["w1_vr"])


def test_other_shapes_and_layers_are_refused(folder: Path) -> None:
    target = describe_target(folder)
    layers, norm = load_layers(target, (2, 3), mesh=make_mesh())
    hf, narrow = drafter(folder, intermediate_size=8)
    with pytest.raises(UserError, match="differ from the target's in shape"):
        graft_target_layers(hf, narrow, [layers[2], layers[3]], norm)
    with pytest.raises(UserError, match="has layers 0 to 3"):
        load_layers(target, (3, 4), mesh=make_mesh())
