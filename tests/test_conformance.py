"""`infer.conformance` names each of the four silent off-by-ones, on the embedded drafter broken in each way.

Slot and layer id are broken by what the files say; block position and loss mask by training on for some seconds under
the shifted convention, as a trainer with that bug would have.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.evaluation.conformance import (
    DECLARED,
    Edges,
    Reading,
    Sequences,
    compare,
    edge_anchors,
    edges,
    readings,
)
from dspark_jax.serving.generate import generate
from infer.conformance import main
from tests.broken_drafters import Material, material, retrain
from tests.drafters_tiny import tiny_drafter, write_pair

ASSETS = Path(__file__).parent.parent / "assets"
TARGET, DRAFTER = str(ASSETS / "embedded_target"), str(ASSETS / "embedded_drafter")
SETTINGS = ["--target", TARGET, "--dtype", "float32", "--limit", "40", "--max-new-tokens", "64", "--anchors", "6",
            "--slots", "40", "--batch", "10"]  # fmt: skip


@pytest.fixture(scope="module")
def given() -> Material:
    return material(TARGET, DRAFTER)


@pytest.fixture(scope="module", autouse=True)
def answers_once() -> Iterator[None]:
    """The target's own answers do not depend on the drafter that is read: made in the first run, they serve all."""
    made: dict[Any, Any] = {}

    def once(target: Any, drafter: None, requests: list[Any], *how: Any) -> Any:
        key = target.folder, tuple(requests), how
        if key not in made:
            made[key] = generate(target, drafter, requests, *how)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infer.conformance.generate", once)
        yield


def run(drafter: str | Path, output: Path) -> tuple[int, dict[str, Any]]:
    code = main(["--drafter", str(drafter), *SETTINGS, "--output", str(output)])
    return code, json.loads((output / "metrics.json").read_text())


def test_the_embedded_drafter_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, metrics = run(DRAFTER, tmp_path)
    assert code == 0 and metrics["off"] == [] and metrics["manifest_contradictions"] == []
    declared, *shifted = metrics["readings"]
    assert declared["convention"] == "declared" and declared["acceptance"] > 0.3
    assert {row["convention"] for row in shifted} == {"slot", "layer id", "block position"}
    assert all(row["gain"] < 0.005 for row in shifted) and metrics["edges"]["after"] < 0.5 * declared["acceptance"]
    assert "The conventions fit" in capsys.readouterr().out


def test_a_slot_off_by_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A speculators folder whose config says that the anchor's row predicts nothing, though it was trained to."""
    target = load_target(TARGET, tokenizer=False)
    save_drafter(tmp_path / "d", load_drafter(DRAFTER, target), target, layout="speculators")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"sample_from_anchor": False}))
    code, metrics = run(tmp_path / "d", tmp_path)
    assert code == 1 and metrics["off"] == ["slot"] and metrics["best"] == {"slot": 1, "layer": 0, "position": 0}
    said = capsys.readouterr().out
    assert "The slot convention is off: it was trained with the anchor's row predicts too" in said
    assert "Its manifest contradicts it: anchor is" in said


def test_a_layer_off_by_one_is_named(tmp_path: Path) -> None:
    """speculators' ids in a DeepSpec config, not counted back by one; the deepest even is the forbidden layer."""
    shutil.copytree(DRAFTER, tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    config["target_layer_ids"] = [i + 1 for i in config["target_layer_ids"]]
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    code, metrics = run(tmp_path / "d", tmp_path)
    assert code == 1 and metrics["off"] == ["layer id"]
    assert metrics["best"] == {"slot": 0, "layer": -1, "position": 0}


def test_a_block_position_off_by_one_is_named(given: Material, tmp_path: Path) -> None:
    """Late; early is the same number in the same program, with another sign."""
    save_drafter(tmp_path / "d", retrain(given, steps=60, position=1), given.target, dtype="float32")
    code, metrics = run(tmp_path / "d", tmp_path)
    assert code == 1 and metrics["off"] == ["block position"]
    assert metrics["best"] == {"slot": 0, "layer": 0, "position": 1}


def test_a_loss_mask_off_by_one_is_named(given: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_drafter(tmp_path / "d", retrain(given, steps=60, mask_read=-1), given.target, dtype="float32")
    code, metrics = run(tmp_path / "d", tmp_path)
    assert code == 1 and metrics["off"] == ["loss mask"]
    assert "The loss mask is off: it was read one position early" in capsys.readouterr().out


# The parts.


def test_readings_depend_on_what_the_files_declare() -> None:
    drafter = tiny_drafter()  # taps -1, 1, 2 of 4 layers
    assert readings(drafter) == [
        DECLARED, Reading(slot=-1), Reading(layer=1), Reading(position=-1), Reading(position=1),
    ]  # fmt: skip
    assert Reading(slot=-1) not in readings(tiny_drafter(block_size=1))


def test_a_gain_counts_beyond_chance_only() -> None:
    rng = np.random.default_rng(0)
    declared = rng.random((12, 3, 4)).astype(np.float32)
    noise = rng.normal(0, 0.05, declared.shape).astype(np.float32)
    found = compare({DECLARED: declared, Reading(layer=1): declared + noise, Reading(position=1): declared + 0.1})
    assert [c.better() for c in found] == [False, False, True]
    assert found[2].gain == pytest.approx(0.1, abs=1e-6) and found[0].acceptance == pytest.approx(declared.mean())
    missing = declared.copy()
    missing[..., -1] = np.nan
    assert compare({DECLARED: declared, Reading(slot=-1): missing})[1].gain == pytest.approx(0)


def test_edges_pick_the_labels_around_the_end() -> None:
    sequences = Sequences(np.zeros((2, 20), np.int32), np.asarray([3, 5]), np.asarray([12, 9]), np.asarray([13, 10]))
    anchors = edge_anchors(sequences, 4)
    assert anchors.tolist() == [[11, 10, 9], [8, 7, 6]]
    labels = anchors[..., None] + 1 + np.arange(4)
    at_last = labels == np.asarray(sequences.last)[:, None, None]
    after = labels == np.asarray(sequences.last)[:, None, None] + 1
    found = edges(sequences, anchors, np.where(at_last, 0.7, np.where(after, 0.2, 0.5)))
    assert (found.before, found.last, found.after) == pytest.approx((0.5, 0.7, 0.2))
    assert Edges(0.8, 0.9, 0.4).early(0.6) and not Edges(0.8, 0.9, 0.2).early(0.6)
    assert Edges(0.8, 0.1, 0.0).late() and not Edges(0.8, 0.7, 0.0).late()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "3"], "Expected a limit of 8"),
        (["--prompts", "{few}"], "There are 2 prompts; a verdict needs 8"),
        (["--drafter", "{none}"], "is not a folder"),
    ],
)
def test_bad_input_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "few.jsonl").write_text('{"turns": ["a"]}\n{"turns": ["b"]}\n')
    argv = [word.format(few=tmp_path / "few.jsonl", none=tmp_path / "none") for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["--drafter", DRAFTER, "--target", TARGET, "--output", str(tmp_path / "out"), *argv])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and message in said.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_untrained_drafter_gets_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = load_target(TARGET)
    config = load_drafter(DRAFTER, target).hf_config
    import jax

    from dspark_jax.drafters.registry import new_drafter

    save_drafter(tmp_path / "d", new_drafter("new", config, jax.random.key(0)), target)
    with pytest.raises(SystemExit) as stop:
        main(["--drafter", str(tmp_path / "d"), *SETTINGS, "--output", str(tmp_path)])
    assert stop.value.code == 2 and "none can be told from another" in capsys.readouterr().err


def test_any_drafter_can_be_read_by_the_protocol(tmp_path: Path) -> None:
    """Eagle3 drafts step by step: its slots are shifted by the tokens it is fed, no block convention is assumed."""
    from dspark_jax.checkpoints.drafters import shared_tables
    from dspark_jax.evaluation.conformance import Probe

    target, drafter = write_pair(tmp_path / "t", kind="eagle3", num_layers=1, target_layer_ids=(0, 1, 2))
    assert Reading(slot=1) in readings(drafter) and Reading(slot=-1) in readings(drafter)
    tokens = np.random.default_rng(0).integers(0, 60, (3, 24)).astype(np.int32)
    anchors = np.asarray([[4, 9], [5, 6], [7, 12]], np.int32)
    probe = Probe(target, drafter, shared_tables(target), batch=2)
    found = probe.acceptance(
        Sequences(tokens, anchors[:, 0], anchors[:, 1], anchors[:, 1] + 1), anchors, readings(drafter)
    )
    block = drafter.config.block_size
    assert all(values.shape == (3, 2, block) for values in found.values())
    assert np.isnan(found[Reading(slot=1)][..., 0]).all() and np.isnan(found[Reading(slot=-1)][..., -1]).all()
    assert np.isfinite(found[DECLARED]).all() and (found[DECLARED] <= 1 + 1e-5).all()
