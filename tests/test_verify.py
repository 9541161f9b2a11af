"""infer.verify: every kind of folder is recognised, told what it was made from, and found whole or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.debug import get_config
from dspark_jax.checkpoints.drafters import save_drafter
from dspark_jax.checkpoints.layouts import LAYOUTS
from dspark_jax.checkpoints.serving_tables import SpsTable, StsTable, write_sps
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash
from dspark_jax.integrity import KINDS, examine
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.temperatures import write_calibration
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.run_folder import write_config
from infer.verify import main as verify
from tests.drafters_tiny import write_pair
from tests.kill_cache import write_cache

TURNS = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole thing of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    target, drafter = write_pair(folder / "target")
    for layout in LAYOUTS:
        save_drafter(folder / layout, drafter, target, layout=layout)
    write_cache(folder / "cache")
    shutil.copytree(Path(__file__).parent / "data" / "target_cache" / "cache", folder / "deepspec_cache")

    run = folder / "run"
    write_config(run, get_config())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / "metrics.json").write_text('{"step": 1}\n')
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, {"weight": jax.numpy.arange(64.0)}, {"tokens": 3})
        checkpoints.wait()
    save_drafter(run / "drafter", drafter, target)

    rows = [{"id": str(i), "messages": TURNS, "tokens": 2, "finish_reason": "stop"} for i in range(3)]
    answers = folder / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers.with_suffix(".settings.json").write_text('{"settings": {"temperature": 0.7}}')
    answers.with_suffix(".metrics.json").write_text(json.dumps({"conversations": 3, "xxh3": file_hash(answers)}))

    tables = folder / "tables"
    tables.mkdir()
    write_calibration(tables / "sts.json", StsTable((1.25, 2.0)), {"target": "a", "target_name": "b"})
    grid, line = ((0.125, 0.2), (0.2, 0.3)), (0.1, 0.2)
    Profile({"device": "cpu"}, (1, 2), (3.0, 4.0), grid, grid, line, line, line, line, 0.1).save(tables / "sps.json")
    write_sps(folder / "sps.json", SpsTable((1, 2), (10.0, 5.0), 4))
    return folder


@pytest.mark.parametrize(
    ("name", "kinds", "facts"),
    [
        ("target", ["target"], {"family": "qwen3", "layers": 4}),
        *((layout, ["drafter"], {"layout": layout, "kind": "dspark", "hashes": "as written"}) for layout in LAYOUTS),
        ("cache", ["target cache"], {"target": "tiny", "layers": [-1, 2]}),
        ("deepspec_cache", ["target cache"], {"sources sha256": "not recorded"}),
        ("run", ["run", "drafter"], {"finished": "yes", "checkpoints": "1", "records": 1}),
        ("answers.jsonl", ["conversations"], {"conversations": 3, "temperature": 0.7}),
        ("tables", ["calibration", "profile"], {"positions": 2, "target_name": "b"}),
        ("sps.json", ["profile"], {"form": "SpsTable"}),
    ],
)
def test_what_it_is_and_was_made_from(whole: Path, name: str, kinds: list[str], facts: dict[str, Any]) -> None:
    findings = examine(whole / name)
    assert [finding.kind for finding in findings] == kinds
    assert not any(finding.fault for finding in findings)
    assert {key: findings[0].facts.get(key) for key in facts} == facts


def flip(name: str, back: int = 40, bit: int = 0) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path = path / name if name else path
        data = bytearray(path.read_bytes())
        data[-back] ^= 1 << bit
        path.write_bytes(data)

    return spoil


def cut(name: str, to: float = 0.6) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path = path / name if name else path
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * to)])

    return spoil


def nan_weight(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"][0] = np.nan
    save_file(stored, folder / "model.safetensors")
    (folder / "hashes.json").unlink()


def flip_array(folder: Path) -> None:
    """A bit of the largest file of the checkpoint."""
    files = [path for path in (folder / "checkpoints" / "1").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    flip("", back=largest.stat().st_size // 2)(largest)


FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "target flipped": ("target", flip("model.safetensors"), r"model\.safetensors is not the file that was written"),
    "target cut": ("target", cut("model.safetensors"), "is not"),
    "target NaN": ("target", nan_weight, r"Tensor model\.norm\.weight in .* not finite"),
    "target config": ("target", cut("config.json"), "not JSON"),
    "tokenizer": ("target", cut("tokenizer.json"), "tokenizer.json: not JSON"),
    **{
        f"{layout} flipped": (layout, flip("model.safetensors"), "is not the file that was written")
        for layout in LAYOUTS
    },
    "drafter cut": ("deepspec", cut("model.safetensors"), "is not the file that was written"),
    "drafter config": ("specforge", flip("config.json", back=30), "is not the file that was written"),
    "manifest": ("deepspec", cut("dspark.json"), "not JSON"),
    "no weights": ("deepspec", lambda path: (path / "model.safetensors").unlink(), "cannot be read"),
    "cache flipped": ("cache", flip("shard-00000.array_record", back=900), "damaged"),
    "cache cut": ("cache", cut("samples.idx"), "expected"),
    "cache manifest": ("cache", cut("manifest.json"), "not JSON"),
    "deepspec cache cut": ("deepspec_cache", cut("shard-00000.bin"), "truncated"),
    "checkpoint": ("run", flip_array, "checkpoint of step 1 in .* is damaged"),
    "run config": ("run", cut("config.json"), "not JSON"),
    "records": ("run", lambda path: (path / "metrics.jsonl").write_text("{\n{}\n") and None, "line 1: not JSON"),
    "no drafter": ("run", lambda path: shutil.rmtree(path / "drafter"), "is finished and has no drafter"),
    "run's drafter": ("run", flip("drafter/model.safetensors"), "is not the file that was written"),
    "answers flipped": ("answers.jsonl", flip("", back=60), "is not the file that was written|expected"),
    "answers cut": ("answers.jsonl", cut(""), "line 2"),
    "calibration": ("tables", lambda p: replace_text(p / "sts.json", "1.25", "1.75"), "its own hash"),
    "profile": ("tables", lambda p: replace_text(p / "sps.json", "0.125", "0.225"), "its own hash"),
}  # fmt: skip


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_a_sentence_and_exit_code_1(
    whole: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, spoil, message = FAULTS[case]
    mine = tmp_path / name
    if (whole / name).is_dir():
        shutil.copytree(whole / name, mine)
    else:
        for path in whole.glob(f"{Path(name).stem}.*"):
            shutil.copy(path, tmp_path)
    assert verify([str(mine)]) == 0
    assert "NOT WHOLE" not in capsys.readouterr().out
    spoil(mine)
    assert verify([str(mine)]) == 1
    out = capsys.readouterr().out
    assert "NOT WHOLE" in out
    with pytest.raises(AssertionError, match=message):
        raise AssertionError([finding.fault for finding in examine(mine) if finding.fault])


def test_the_hubs_names_are_hashes(whole: Path, tmp_path: Path) -> None:
    import hashlib

    snapshot, blobs = tmp_path / "m" / "snapshots" / "a", tmp_path / "m" / "blobs"
    shutil.copytree(whole / "target", snapshot)
    (snapshot / "hashes.json").unlink()
    blobs.mkdir()
    data = (snapshot / "model.safetensors").read_bytes()
    blob = blobs / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blob)
    assert not examine(snapshot)[0].fault
    flip("")(blob)
    assert "the hub says" in examine(snapshot)[0].fault


def test_what_is_of_no_kind_is_exit_code_2(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = "target, drafter, target cache, run, conversations, calibration, profile"
    for path, found in ((tmp_path, "is none of"), (tmp_path / "missing", "does not exist; expected one of")):
        with pytest.raises(UserError, match=f"{path} {found}: {kinds}. Give the path of one."):
            examine(path)
    assert verify([str(whole / "tables"), str(tmp_path)]) == 2
    assert "calibration, whole" in capsys.readouterr().out
    assert len(KINDS) == 7


def test_the_embedded_pair_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(["assets/embedded_target", "assets/embedded_drafter"]) == 0
    assert "as written" in capsys.readouterr().out
