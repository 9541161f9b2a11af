"""DeepSeek-V4's counted costs, the floor of a plan, and the study of its load by arithmetic."""

import json
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.planning.decoding import DecodePlan, PlanOptions
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.planning.v4_costs import V4Costs
from dspark_jax.roofline.decoding import distinct_experts
from dspark_jax.roofline.hardware import total
from infer.studies import v4_load


@pytest.mark.parametrize(
    ("repository", "gigabytes"),
    [("Flash-DSpark", (11.2, 27.3, 86.1, 140.0)), ("Pro-DSpark", (39.7, 101.0, 352.3, 667.8))],
)
def test_a_pass_reads_the_experts_that_its_rows_choose(repository: str, gigabytes: tuple[float, ...]) -> None:
    """GB of a pass over 1, 6, 32 and 96 rows: all weights but the embedding, 8.85 GB less 1.06 GB of Flash's, and of
    each layer's experts of 13.4 MB those that even routing is expected to choose."""
    costs = V4Costs.of(PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"], "dspark")
    read = [sum(term.bytes for term in costs.verify(rows, 1, 0)) / 1e9 for rows in (1, 6, 32, 96)]
    np.testing.assert_allclose(read, gigabytes, rtol=2e-3)
    # A dense target's pass over six rows reads hardly more than one over a single row; this one over twice as much.
    assert 2.3 < read[1] / read[0] < 2.6


def test_expected_experts_are_those_of_random_choices() -> None:
    rng = np.random.default_rng(0)
    picked = [len({e for _ in range(7) for e in rng.choice(16, 3, replace=False)}) for _ in range(4000)]
    assert distinct_experts(16, 3, 7) == pytest.approx(np.mean(picked), rel=0.01)
    assert distinct_experts(16, 3, 0) == 0 and distinct_experts(16, 3, 1) == pytest.approx(3)


def test_longer_contexts_cost_by_what_a_layer_sees() -> None:
    costs = V4Costs.of(PUBLISHED["deepseek-ai/DeepSeek-V4-Flash"], "mtp")

    def cache(rows: int, context: int) -> float:
        return {term.name: term for term in costs.verify(rows, 1, context)}[
            "verify: attention, windows and entries"
        ].bytes

    # Past the indexer's 512 entries a row of 21 CSA layers reads no more keys, only index rows: 128 numbers an entry.
    # 20 HCA layers read an entry of 512 numbers for each 128 tokens.
    grown = cache(1, 1 << 20) - cache(1, 1 << 19)
    assert grown == pytest.approx((1 << 19) * 2 * (21 * 128 / 4 + 20 * 512 / 128))
    # Rows of one request share the window and the index rows, and select entries of their own.
    assert cache(1, 4096) < cache(6, 4096) < 6 * cache(1, 4096)


def test_a_plans_floor_is_of_the_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of Flash, one of each kind, and the block of MTP-1, which a plan without a drafter leaves out."""
    cut = PUBLISHED["deepseek-ai/DeepSeek-V4-Flash"] | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]}
    monkeypatch.setitem(PUBLISHED, "cut", cut)
    plan = DecodePlan.of(PlanOptions(target="cut", slots=4, longest=64, compile=False))
    floor = total(plan.floor(32) or [])
    assert floor == total(V4Costs.of(cut, None).verify(4, 4, 32))
    # fp4 experts: bfloat16 ones would take four times the bytes.
    experts = 3 * distinct_experts(256, 6, 4) * 3 * 4096 * 2048
    assert floor.bytes < 1.06e9 + 3 * 0.16e9 + experts * (0.5 + 1 / 32) + 0.1e9


def test_the_study_of_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--users", "1", "32", "--strategies", "mtp", "look-ahead", "--answer", "24"]
    v4_load.main([*short, "--output", str(tmp_path), "--results", str(tmp_path / "copy.json")])
    found = json.loads((tmp_path / "copy.json").read_text())
    alone, many = found["closed"]["1"], found["closed"]["32"]
    # More users make more tokens, each of them slower; DSpark's blocks beat MTP-1's single draft.
    for strategy in ("mtp", "look-ahead"):
        assert many[strategy]["tokens_per_second"] > alone[strategy]["tokens_per_second"]
        assert many[strategy]["user_median"] < alone[strategy]["user_median"]
    assert alone["look-ahead"]["user_median"] > alone["mtp"]["user_median"]
    assert alone["mtp"]["verify_budget"] == pytest.approx(2, abs=0.1)
    assert "over MTP-1 at its throughput" in capsys.readouterr().out
    assert (tmp_path / "throughput.png").exists() and (tmp_path / "budget.png").exists()


def test_an_unknown_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        v4_load.main(["--device", "abacus", "--output", str(tmp_path / "new")])
    assert "no device 'abacus'; known are TPU v4" in capsys.readouterr().err and not (tmp_path / "new").exists()
