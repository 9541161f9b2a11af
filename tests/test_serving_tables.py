"""`sts.json` and `sps.json`: the exact fields that SGLang reads, its lookups, and sentences where it would refuse."""

import json
from pathlib import Path

import pytest

from dspark_jax.checkpoints.serving_tables import (
    SpsAdditiveTable,
    SpsTable,
    StsTable,
    read_sps,
    read_sts,
    write_sps,
    write_sts,
)
from dspark_jax.errors import UserError


def test_sts_has_the_servers_fields_and_comes_back(tmp_path: Path) -> None:
    table = StsTable((1.0, 1.25, 0.8), "gsm8k", 120, (0.05, 0.06, 0.07), (0.01, 0.02, 0.01))
    write_sts(tmp_path / "sts.json", table)
    assert json.loads((tmp_path / "sts.json").read_text()) == {
        "temperatures": [1.0, 1.25, 0.8],
        "dataset": "gsm8k",
        "num_samples": 120,
        "ece_before": [0.05, 0.06, 0.07],
        "ece_after": [0.01, 0.02, 0.01],
    }
    assert read_sts(tmp_path / "sts.json") == table
    table.check_block(3)
    with pytest.raises(UserError, match="3 temperatures, the drafter's block 7 positions"):
        table.check_block(7)


def test_a_table_with_only_temperatures_reads(tmp_path: Path) -> None:
    (tmp_path / "sts.json").write_text('{"temperatures": [1.5]}')
    assert read_sts(tmp_path / "sts.json") == StsTable((1.5,))


def test_sps_looks_up_the_next_smaller_probe(tmp_path: Path) -> None:
    table = SpsTable((1, 8, 64), (100.0, 90.0, 40.0), 128)
    write_sps(tmp_path / "sps.json", table)
    assert json.loads((tmp_path / "sps.json").read_text()) == {
        "sample_batch_tokens": [1, 8, 64],
        "sample_steps_per_sec": [100.0, 90.0, 40.0],
        "max_batch_tokens": 128,
    }
    assert read_sps(tmp_path / "sps.json") == table
    assert [table.steps_per_second(n) for n in (0, 1, 7, 8, 63, 64, 1000)] == [100, 100, 100, 90, 90, 40, 40]


def test_additive_sps_interpolates_and_is_told_by_its_bias(tmp_path: Path) -> None:
    table = SpsAdditiveTable(0.01, (1, 5), (0.0, 0.4), (2, 10, 20), (0.0, 0.8, 1.0))
    write_sps(tmp_path / "sps.json", table)
    assert set(json.loads((tmp_path / "sps.json").read_text())) == {
        "bias_seconds", "bs_probes", "alpha_seconds", "m_probes", "theta_seconds",
    }  # fmt: skip
    assert read_sps(tmp_path / "sps.json") == table
    assert table.step_seconds(1, 0) == pytest.approx(0.01)
    assert table.step_seconds(3, 3) == pytest.approx(0.01 + 0.2 + 0.4)
    assert table.step_seconds(5, 10) == pytest.approx(0.01 + 0.4 + 0.9)
    assert table.step_seconds(50, 50) == pytest.approx(0.01 + 0.4 + 1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperatures": []}, "1 or more, each a number above 0"),
        ({"temperatures": [1.0, 0.0]}, "each a number above 0"),
        ({"temperatures": [1.0], "ece_after": [0.1, 0.2]}, "2 values of ece_after for 1 temperatures"),
        ({"temperature": [1.0]}, "has the field 'temperature'"),
        ({"dataset": "x"}, "has no field 'temperatures'"),
        ({"temperatures": ["1.0"]}, r"temperatures = \[.1\.0.\]; expected a list"),
    ],
)
def test_bad_sts_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "sts.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_sts(tmp_path / "sts.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sample_batch_tokens": [], "sample_steps_per_sec": [], "max_batch_tokens": 1}, "1 or more"),
        ({"sample_batch_tokens": [2, 1], "sample_steps_per_sec": [1.0, 1.0], "max_batch_tokens": 2}, "increasing"),
        ({"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [1.0], "max_batch_tokens": 2}, "a value for each"),
        ({"sample_batch_tokens": [1], "sample_steps_per_sec": [0.0], "max_batch_tokens": 2}, "above 0"),
        ({"sample_batch_tokens": [4], "sample_steps_per_sec": [1.0], "max_batch_tokens": 2}, "below its largest probe"),
        (
            {"bias_seconds": 0, "bs_probes": [1], "alpha_seconds": [1.0], "m_probes": [1], "theta_seconds": [1.0]},
            "bias_seconds = 0; expected a number above 0",
        ),
    ],
)
def test_bad_sps_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "sps.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_sps(tmp_path / "sps.json")
