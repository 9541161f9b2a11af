"""Written and read contents agree: hashes from the target's weights to drafter, calibration and profile."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.layouts import LAYOUTS
from dspark_jax.checkpoints.serving_tables import StsTable
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.readers import check_seal, sealed
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.temperatures import read_calibration, write_calibration
from dspark_jax.targets.target import Target
from tests.drafters_tiny import write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Drafter]:
    return write_pair(tmp_path_factory.mktemp("pair") / "target")


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_flipped_bit_in_a_drafter_is_silent(pair: tuple[Target, Drafter], tmp_path: Path, layout: str) -> None:
    """In its weights, their header, its config and its manifest."""
    target, drafter = pair
    save_drafter(tmp_path, drafter, target, layout=layout)
    rng = random.Random(layout)
    for name in ("model.safetensors", "config.json", "dspark.json"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(12):
            offset = rng.randrange(len(whole)) if rng.random() < 0.5 else len(whole) - 1 - rng.randrange(900)
            flip(tmp_path / name, offset, rng.randrange(8))
            if not same_json(whole, (tmp_path / name).read_bytes()):
                with pytest.raises(UserError) as refused:
                    load_drafter(tmp_path, target)
                assert "\n" not in str(refused.value)
            (tmp_path / name).write_bytes(whole)
    load_drafter(tmp_path, target)


def same_json(whole: bytes, changed: bytes) -> bool:
    """True of JSON whose white space alone differs, which changes nothing."""
    try:
        return json.loads(changed) == json.loads(whole)
    except ValueError:
        return False


def test_flipped_weights_are_named(pair: tuple[Target, Drafter], tmp_path: Path) -> None:
    target, drafter = pair
    save_drafter(tmp_path, drafter, target)
    flip(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 100, 0)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that was written: its hash is"):
        load_drafter(tmp_path, target)
    load_drafter(tmp_path, target, compare_manifest=False)


def test_a_drafter_is_bound_to_its_targets_weights(pair: tuple[Target, Drafter], tmp_path: Path) -> None:
    """Weights that were replaced under the same path, though config and frozen tables are the same."""
    target, drafter = write_pair(tmp_path / "target")
    save_drafter(tmp_path / "drafter", drafter, target)
    load_drafter(tmp_path / "drafter", load_target(tmp_path / "target", tokenizer=False))
    stored = load_file(tmp_path / "target" / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(stored, tmp_path / "target" / "model.safetensors")
    replaced = load_target(tmp_path / "target", tokenizer=False)
    with pytest.raises(UserError, match=r"was trained for .* with weights \w{12}, and .* has weights \w{12}"):
        load_drafter(tmp_path / "drafter", replaced)
    load_drafter(tmp_path / "drafter", replaced, compare_manifest=False)
    load_drafter(tmp_path / "drafter", replace(replaced, folder=None))  # in memory: there is nothing to compare


def test_a_kill_between_two_files_leaves_no_false_manifest(
    pair: tuple[Target, Drafter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = pair
    save_drafter(tmp_path, drafter, target)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dspark_jax.checkpoints.drafters.write_json", killed)
    changed = replace(drafter, params={**drafter.params})
    with pytest.raises(KeyboardInterrupt):
        save_drafter(tmp_path, changed, target, dtype="float32")
    assert not (tmp_path / "dspark.json").exists() and (tmp_path / "model.safetensors").exists()


def test_a_changed_calibration_or_profile_is_refused(tmp_path: Path) -> None:
    sts, sps, valid = tmp_path / "sts.json", tmp_path / "sps.json", {"target": "a", "target_name": "b"}
    write_calibration(sts, StsTable((1.25, 2.0), "x", 3, (0.1, 0.2), (0.1, 0.2)), valid)
    np.testing.assert_array_equal(read_calibration(sts, valid), [1.25, 2.0])
    sts.write_text(sts.read_text().replace("1.25", "1.75"))
    with pytest.raises(UserError, match=r"sts\.json does not have the content that its own hash says"):
        read_calibration(sts, valid)

    grid, line = ((0.125, 0.2), (0.2, 0.3)), (0.1, 0.2)
    profile = Profile({"device": "cpu"}, (1, 2), (3.0, 4.0), grid, grid, line, line, line, line, 0.1)
    profile.save(sps)
    assert Profile.read(sps) == profile
    sps.write_text(sps.read_text().replace("0.125", "0.225"))
    with pytest.raises(UserError, match="does not have the content that its own hash says"):
        Profile.read(sps)


def test_a_seal_is_of_the_content_and_not_of_its_form() -> None:
    content = sealed({"b": (1, 2.5), "a": {"path": Path("x")}})
    check_seal(json.loads(json.dumps(content, indent=3)), "x.json")
    check_seal({"a": 1}, "x.json")
    with pytest.raises(UserError, match="x.json does not have the content"):
        check_seal(content | {"c": 1}, "x.json")
