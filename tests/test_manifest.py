"""The manifest beside a drafter: written with every save, and compared; the program that converts layouts keeps it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.layouts import LAYOUTS
from dspark_jax.checkpoints.manifest import MANIFEST_FILE, Provenance
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash, lock_folder, weights_hash
from dspark_jax.targets.target import Target
from infer.export import main as export
from tests.drafters_tiny import edit, write_pair

FILES = ("config.json", "model.safetensors", MANIFEST_FILE)
Pair = tuple[Target, Drafter]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"), dtype="bfloat16")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_save_writes_a_manifest(pair: Pair, tmp_path: Path, layout: str) -> None:
    target, drafter = pair
    sampling, sources = {"temperature": 0.7, "top_p": 0.95}, {"sources_sha256": "abc"}
    save_drafter(tmp_path, drafter, target, layout=layout, provenance=Provenance(sampling, sources))
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    base = 1 if layout == "speculators" else 0
    assert manifest["layout"] == layout and manifest["kind"] == "dspark"
    assert manifest["conventions"] == {
        "anchor": "row k, at position anchor + k, predicts token anchor + k + 1", "sample_from_anchor": True,
        "target_layer_ids": [-1, 1, 2], "layer_id_base": base, "stored_layer_ids": [i + base for i in (-1, 1, 2)],
        "predictions": 4, "rows": 4, "mask_token_id": 5,
        "block_position": "the block starts at the anchor's position; context keys are before it",
        "loss_mask": "read at the label's position, up to the first gap",
    }  # fmt: skip
    assert manifest["target"] == {
        "name": target.name,
        "config_sha256": target.config_sha256,
        "weights_xxh3": weights_hash(Path(target.name)),
    }
    assert manifest["files"] == {name: file_hash(tmp_path / name) for name in FILES[:2]}
    assert manifest["sampling"] == sampling and manifest["sources"] == sources


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("deepspec", {"target_layer_ids": [0, 1, 2]}, r"is \[-1, 1, 2\] in dspark.json and \[0, 1, 2\] by"),
        ("speculators", {"aux_hidden_state_layer_ids": [1, 2, 3]}, r"stored_layer_ids is \[0, 2, 3\] in dspark.json"),
        ("speculators", {"sample_from_anchor": False}, "anchor is 'row k, at position anchor"),
        ("deepspec", {"mask_token_id": 6}, "mask_token_id is 5 in dspark.json and 6 by config.json"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_manifest_is_refused(
    pair: Pair, tmp_path: Path, layout: str, fields: dict[str, Any], message: str
) -> None:
    target, drafter = pair
    save_drafter(tmp_path, drafter, target, layout=layout)
    load_drafter(tmp_path, target)
    edit(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        load_drafter(tmp_path, target)
    load_drafter(tmp_path, target, compare_manifest=False)
    (tmp_path / MANIFEST_FILE).unlink()
    load_drafter(tmp_path, target)


def test_a_target_with_another_config_is_refused(pair: Pair, tmp_path: Path) -> None:
    target, drafter = pair
    save_drafter(tmp_path, drafter, target)
    with pytest.raises(UserError, match="was trained for .* with config sha256"):
        load_drafter(tmp_path, replace(target, config_sha256="0" * 64))
    (tmp_path / MANIFEST_FILE).write_text('{"format": "another", "version": 1}')
    with pytest.raises(UserError, match="has format 'another' version 1"):
        load_drafter(tmp_path, target)


# The program


def test_export_converts_and_keeps_the_provenance(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target, drafter = pair
    save_drafter(tmp_path / "a", drafter, target, provenance=Provenance({"temperature": 0.7}, {}))
    common = ["--target", target.name]
    export(["--drafter", str(tmp_path / "a"), *common, "--layout", "speculators", "--output", str(tmp_path / "b")])
    assert "deepspec -> speculators" in capsys.readouterr().out
    export(["--drafter", str(tmp_path / "b"), *common, "--layout", "specforge", "--output", str(tmp_path / "c")])
    export(["--drafter", str(tmp_path / "c"), *common, "--output", str(tmp_path / "d")])
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()

    # While another process exports there, not even an empty folder is written to.
    with lock_folder(tmp_path / "e", "the export"), pytest.raises(SystemExit):
        export(["--drafter", str(tmp_path / "c"), *common, "--output", str(tmp_path / "e")])
    assert "Another process is writing the export" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "{full}"], "holds something already"),
        (["--output", "{new}", "--layout", "gguf"], "gguf"),
        (["--output", "{new}", "--drafter", "{new}"], "is not a folder"),
    ],
)
def test_export_refuses_in_a_sentence(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str
) -> None:
    target, drafter = pair
    save_drafter(tmp_path / "full", drafter, target)
    named = [word.format(full=tmp_path / "full", new=tmp_path / "new") for word in argv]
    with pytest.raises(SystemExit) as stop:
        export(["--drafter", str(tmp_path / "full"), "--target", target.name, *named])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
