"""Draft layers that start as copies of target layers (`drafter.init_target_layers`)."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import save_drafter
from dspark_jax.checkpoints.target_tables import describe_target, load_layers
from dspark_jax.config.cli import load_config
from dspark_jax.drafters.registry import (
    Drafter,
    drafter_hf_config,
    graft_target_layers,
    new_params,
    read_config,
    skeleton,
)
from dspark_jax.errors import UserError
from dspark_jax.sharding import make_mesh, split
from dspark_jax.targets.joined import apart
from dspark_jax.training.run import Run
from dspark_jax.training.start import grafted_params, initial_state, last_tap_rows
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
    whole = jax.tree.leaves(apart(params, read_config(hf).backbone)["backbone"]["layers"])
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


def small_run(tmp_path: Path, run: str = "run", **drafter: Any) -> Run:
    """A run over a Llama target, whose layers have no head norms."""
    target = tmp_path / "llama"
    if not target.exists():
        write_tiny_target(target, num_hidden_layers=4, model_type="llama")
    debug = load_config("debug")
    settings = {"num_layers": 2, "target_layer_ids": (0, 2), "intermediate_size": None, "mask_token_id": 3} | drafter
    data = replace(debug.data, global_batch=2, accumulation_steps=1, max_length=24)
    config = replace(debug, target=str(target), run_dir=str(tmp_path / run), data=data)
    return Run.of(replace(config, drafter=replace(debug.drafter, **settings)))


def test_layers_without_head_norms_keep_the_scale_of_queries_and_keys(tmp_path: Path) -> None:
    run = small_run(tmp_path, init_target_layers=(2, 3))
    layers, _ = load_layers(run.target, (2, 3), mesh=run.step.mesh)
    made = apart(grafted_params(run), run.step.drafter.backbone)["backbone"]["layers"]
    rows = np.asarray(last_tap_rows(run))
    for number, layer in enumerate((layers[2], layers[3])):
        unit = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + run.step.drafter.backbone.rms_norm_eps)
        for name, weight in (("q_norm", "q_weight_dp"), ("k_norm", "k_weight_dc")):
            np.testing.assert_array_equal(made[number]["attention"][weight], layer["attention"][weight])
            heads = (unit * layer["input_norm"]["weight"]) @ np.asarray(layer["attention"][weight])
            heads = heads.reshape(len(unit), -1, run.step.drafter.backbone.layers[0].head_dim)
            expected = np.mean(np.sqrt(np.mean(heads**2, axis=-1)))
            np.testing.assert_allclose(made[number]["attention"][name]["weight"], expected, rtol=1e-4)


def test_head_norms_need_stored_states(tmp_path: Path) -> None:
    run = small_run(tmp_path, init_target_layers=(2, 3))
    with pytest.raises(UserError, match="fitted on stored states"):
        last_tap_rows(run, {"lengths": np.asarray([3])})


def test_a_run_continues_an_earlier_drafter(tmp_path: Path) -> None:
    run = small_run(tmp_path, draft_vocabulary=vocabulary_file(tmp_path, range(0, 300, 3)))
    first = jax.device_get(initial_state(run).params)
    head = run.tables().params["embed_weight_vd"]
    np.testing.assert_array_equal(first["draft_head_pd"], np.asarray(head)[::3])
    spec = run.step
    drafter = Drafter("made", spec.drafter, split(skeleton(spec.drafter_hf))[0], first, spec.drafter_hf)
    save_drafter(tmp_path / "made", drafter, run.tables())
    again = small_run(tmp_path, "again", draft_vocabulary=str(tmp_path / "v.json"), init_drafter=str(tmp_path / "made"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(initial_state(again).params), first)

    other = small_run(tmp_path, "other", markov_rank=4, draft_vocabulary=str(tmp_path / "v.json"))
    with pytest.raises(UserError, match="has not the layers, heads, block or draft vocabulary of this run"):
        initial_state(replace(other, init_drafter=str(tmp_path / "made")))


def vocabulary_file(folder: Path, ids: Iterable[int]) -> str:
    (folder / "v.json").write_text(json.dumps({"ids": list(ids)}))
    return str(folder / "v.json")
