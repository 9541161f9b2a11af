"""The study of tiny V4 pairs: what it runs, keeps and prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.config.schema import TrainConfig
from train.studies import v4_tiny

COUNTED = {"rounds": 10, "committed": 30, "verified": [10], "accepted": [8], "judged": [10]}


def test_the_study_trains_both_drafters_and_decodes_held_out_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def run(module: str, *words: object) -> None:
        asked.append((module, *words))
        (tmp_path / "study" / "heldout.jsonl").write_text("{}\n", encoding="utf-8")

    def trained(config: TrainConfig, prompts: Path, **how: int) -> dict[str, Any]:
        asked.append((config.drafter.kind, config.max_steps, prompts.name, how))
        folder = Path(config.run_dir)
        folder.mkdir()
        records = [{"step": s, "loss": 1.0 / s, "tau_probabilistic": 1.0 + s, "epoch": 0} for s in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return {"t1": {"math": COUNTED}, "t0": {"math": COUNTED | {"committed": 40}}, "parameters": 7}

    monkeypatch.setattr(v4_tiny, "run", run)
    monkeypatch.setattr(v4_tiny, "train_and_decode", trained)
    results = tmp_path / "results" / "v4_tiny.json"
    words = ["--output", str(tmp_path / "study"), "--results", str(results), "--steps", "2", "--heldout", "3"]
    v4_tiny.main(words)

    assert asked[0][:5] == ("train.embedded.v4_target", "--output", tmp_path / "study", "--steps", 300)
    how = {"max_new_tokens": 64, "samples": 1}
    assert asked[1:] == [(kind, 2, "heldout.jsonl", how) for kind in ("dspark", "mtp")]
    found = json.loads(results.read_text())
    assert found["mtp"]["heldout"]["tau_t0"] == 4.0 and found["dspark"]["heldout"]["conditional_t1"] == [0.8]
    assert [record["step"] for record in found["dspark"]["training"]] == [1, 2]
    printed = capsys.readouterr().out
    assert "held out, tau" in printed and "4.00" in printed


def test_nothing_to_train_gets_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        v4_tiny.main(["--output", str(tmp_path), "--steps", "0"])
    assert "are 1 or more" in capsys.readouterr().err
