"""infer.accelerator: every part on a CPU in tiny shapes, and what a run keeps that is cut, fails or does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from infer.accelerator.__main__ import main
from infer.accelerator.report import Report, by_requests


@pytest.mark.long
def test_all_parts_run_and_a_second_run_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "accelerator-cpu.json"
    words = ["--shapes", "tiny", "--output", str(output), "--one-process"]
    main(words)
    found: dict[str, Any] = json.loads(output.read_text())
    parts = found["parts"]
    assert not [part for part, figures in parts.items() if {"failed", "left_out", "unfinished"} & set(figures)], parts
    assert found["about"]["machine"]["device"] == "cpu"

    assert parts["plain-tiny"]["R=2"]["seconds"] > 0 and parts["plain-tiny"]["R=2"]["gigabytes"] > 0
    rounds = parts["rounds-tiny"]["R=2"]
    assert list(rounds["verify_by_tokens"]) == ["4", "6"] and set(rounds["speedup_at_the_papers_tau"]) > {"math"}
    assert parts["logits"]["float32, highest"]["same_best_token"] == 1
    assert parts["greedy"]["identical"] + parts["greedy"]["near_ties"] == parts["greedy"]["prompts"] == 2
    assert parts["golden"]["sampling"]["ok"] and parts["training"]["seconds a step"] > 0
    attention = parts["attention"]["R=2 W=8 S=512 held=256"]
    assert attention["kernel_over_einsum"] > 0 and attention["pages_over_kernel"] > 0
    assert set(parts["head"]) > {"R=2 block=2", "R=2 block=4"} and "look-ahead R=2" in parts["scheduler"]
    assert set(parts["simulated-tiny"]["R=2"]["tokens_per_second"]) == {"plain", "fixed", "causal", "look-ahead"}

    # Nothing is measured twice, and a part that had failed is tried again.
    del parts["device"]["platform"]
    parts["device"]["failed"] = "RuntimeError: once"
    output.write_text(json.dumps(found))
    capsys.readouterr()
    main(words)
    assert capsys.readouterr().err.startswith("device (")
    again = json.loads(output.read_text())["parts"]
    assert again["device"]["platform"] == "cpu" and "failed" not in again["device"]
    assert {name: again[name] for name in again if name != "device"} == {
        n: p for n, p in parts.items() if n != "device"
    }


@pytest.mark.subprocesses
def test_a_part_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "accelerator.json"
    # A part that had failed is tried again there, from the report that says so.
    output.write_text(json.dumps({"about": {}, "parts": {"device": {"failed": "RuntimeError: once"}}}))
    main(["--shapes", "tiny", "--output", str(output), "--parts", "device"])
    found = json.loads(output.read_text())
    assert found["parts"]["device"]["platform"] == "cpu" and "failed" not in found["parts"]["device"]
    assert [file.name for file in tmp_path.iterdir()] == ["accelerator.json"]

    main(["--shapes", "tiny", "--output", str(output), "--parts", "scheduler", "--minutes", "0.1"])
    assert "No time was left" in json.loads(output.read_text())["parts"]["scheduler"]["left_out"]

    (tmp_path / "other.json").write_text("{}")
    elsewhere = tmp_path / "elsewhere.json"
    found["about"]["machine"]["device"] = "NVIDIA H200"
    elsewhere.write_text(json.dumps(found))
    for words, said in (
        (["--output", str(tmp_path / "other.json")], "is no report of infer.accelerator"),
        (["--shapes", "tiny", "--output", str(elsewhere)], "another machine (device NVIDIA H200, here cpu); give"),
        (["--output", str(output), "--parts", "plane-4b"], "There is no part plane-4b; known are device, plain-4b"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err
    assert json.loads(elsewhere.read_text())["parts"] == found["parts"]


def test_what_does_not_fit_is_tried_with_half_as_many(tmp_path: Path) -> None:
    report = Report.continued(tmp_path / "x.json", 60)
    asked = []

    def measured(requests: int) -> dict[str, Any]:
        asked.append(requests)
        if requests > 20:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if requests == 1:
            raise ValueError("another fault")
        return {"seconds": 1.0}

    by_requests(report, "plain", (1, 8, 64, 128), measured)
    # 128 and 64 are not tried again once 64 and 32 have failed, and what is known is not measured again.
    assert asked == [1, 8, 64, 32, 16]
    kept = json.loads((tmp_path / "x.json").read_text())["parts"]["plain"]
    assert kept["R=1"] == {"failed": "ValueError: another fault"} and kept["R=16"] == {"seconds": 1.0}
    assert "RESOURCE_EXHAUSTED" in kept["R=64"]["failed"] and "R=128" not in kept
    assert not report.out_of_time("plain")

    late = Report.continued(tmp_path / "x.json", -1)
    by_requests(late, "plain", (2,), measured)
    assert "The time was up" in late.parts["plain"]["unfinished"] and not late.done("plain")
