"""Runs of every kind of drafter beside DSpark: they stop and continue, and share a cache."""

import json
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.drafters.registry import DRAFTERS, kind_name
from dspark_jax.errors import UserError
from dspark_jax.training.run import open_records
from dspark_jax.training.synthetic_cache import write_synthetic_cache
from tests.decoding_tiny import taps_of
from tests.test_fit import drafter_bytes, stop_after_saving
from tests.tiny import write_tiny_target
from train.fit import main

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target") / "tiny", num_hidden_layers=4)


def fit_command(target: Path, run: Path, kind: str) -> list[str]:
    taps = " ".join(map(str, taps_of(kind, 4)))
    small = f"--drafter.kind {kind} --drafter.target-layer-ids {taps} --drafter.block-size 3 --drafter.num-anchors 4"
    recipe = "--data.global-batch 4 --data.accumulation-steps 2 --data.max-length 24 --max-steps 4"
    if kind == "dflash":  # with the parts that a DFlash may have
        recipe += " --drafter.no-sample-from-anchor --drafter.conv-kernel-size 2 --drafter.conv-group-size 4"
    return ["--config", "debug", "--target", str(target), "--run-dir", str(run), *small.split(), *recipe.split()]


@pytest.mark.parametrize("kind", [kind for kind in DRAFTERS if kind != "dspark"])
def test_fit_trains_stops_and_continues(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(fit_command(folder, tmp_path / "straight", kind))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after_saving(patch, 2)
        main(fit_command(folder, tmp_path / "stopped", kind))
    main(fit_command(folder, tmp_path / "stopped", kind))
    assert drafter_bytes(tmp_path / "stopped") == drafter_bytes(tmp_path / "straight")
    config = json.loads((tmp_path / "straight" / "drafter" / "config.json").read_text())
    assert kind_name(config) == kind


def test_one_cache_serves_drafters_of_other_layers(folder: Path, tmp_path: Path) -> None:
    cache, target = tmp_path / "cache", describe_target(folder)
    write_synthetic_cache(cache, target, (0, 1, 3), records=4, length=8, seed=0)
    whole = open_records(cache, (0, 1, 3), target)
    selected = open_records(cache, (3,), target)
    size = target.config.hidden_size
    assert selected.spec.layer_ids == (3,) and len(selected) == 4 and list(selected.lengths) == [8] * 4
    np.testing.assert_array_equal(selected[1].features, whole[1].features[:, 2 * size :])
    with pytest.raises(UserError, match="layer_ids is"):
        open_records(cache, (2,), target)
