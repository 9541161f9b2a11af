"""The study of codecs: its table from finished points, its points' configurations, what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.kill_cache import SPEC, write_cache
from train.studies.compare_codecs import CodecSettings, main, point_config, report

CODECS = ("bfloat16", "float8_e4m3", "int8")


def point(committed: int) -> dict:
    counts = {"rounds": 100, "committed": committed, "verified": [100, 50], "accepted": [50, 20], "judged": [100, 25]}
    return {"t1": {"math": counts, "code": counts}, "t0": {"math": counts}, "train_loss": 1.5}


@pytest.fixture
def settings(tmp_path: Path) -> CodecSettings:
    """Caches of all codecs; int8 lacks one seed's point."""
    settings = CodecSettings(output=tmp_path, codecs=CODECS, seeds=2, passes=1)
    (tmp_path / "points").mkdir()
    for codec, committed in zip(CODECS, (200, 199, 190)):
        write_cache(settings.cache(codec), dataclasses.replace(SPEC, dtype=codec))
        for seed in range(2 if codec != "int8" else 1):
            settings.result(codec, seed).write_text(json.dumps(point(committed)))
    return settings


def test_the_table_holds_codecs_against_bfloat16(settings: CodecSettings, capsys: pytest.CaptureFixture[str]):
    report(settings, "the command")
    metrics = json.loads((settings.output / "metrics.json").read_text())
    rows = metrics["codecs"]
    assert list(rows) == list(CODECS) and metrics["command"] == "the command"
    assert rows["bfloat16"]["bytes_per_token"] == 3 * 16 * 2 + 5
    assert rows["int8"]["share_of_bfloat16"] == (3 * 16 + 3 * 4 + 5) / 101
    assert rows["int8"]["tau_t1"]["mean"] == pytest.approx(1.9) and rows["int8"]["tau_t1"]["ci95"] is None
    assert rows["float8_e4m3"]["tau_loss_t0"]["mean"] == pytest.approx(0.005)
    assert rows["bfloat16"]["tau_loss_t1"]["mean"] == 0 and len(rows["bfloat16"]["tau_t1"]["values"]) == 2
    assert all(row["reading"]["tokens_per_second"] > 0 for row in rows.values())
    shown = capsys.readouterr().out
    assert "5.0%" in shown and "bytes/token" in shown


def test_points_of_a_seed_differ_in_the_cache_alone(settings: CodecSettings):
    one, other = (point_config(settings, codec, 1) for codec in ("bfloat16", "int8"))
    assert one.data.cache != other.data.cache and one.seed == one.data.seed == 1
    free = {"name": "", "run_dir": ""}
    same = dataclasses.replace(other, **free, data=one.data)
    assert dataclasses.replace(one, **free) == same


def test_a_study_without_its_reference_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "study"), "--codecs", "int8"])
    assert stop.value.code == 2 and "bfloat16, which the others are held against, is not" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
