"""Calibrations beside each other: the fits on made-up rounds, and `infer.studies.calibration` from beginning to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.errors import UserError
from dspark_jax.evaluation.calibrate import Rounds
from dspark_jax.evaluation.calibration_metrics import calibration_metrics, prefix_survival
from dspark_jax.evaluation.calibrators import Isotonic, conditional_logits, online_survival
from infer.studies.calibration import METHODS, main
from tests.test_calibration import made_profile
from tests.test_infer_programs import folder, refused

__all__ = ["folder"]  # a fixture: a tiny target, a drafter with a confidence head, prompts


def bold(count: int, seed: int, scale: float = 2.0, shift: float = 0.7) -> Rounds:
    """Rounds of `count` / 20 requests whose confidences are too bold by a factor and a constant."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0.6, 1.2, (count, 3))
    accepted = np.cumprod(rng.random(honest.shape) < 1 / (1 + np.exp(-honest)), axis=1).astype(bool)
    observed = np.arange(3) < rng.integers(2, 4, (count, 1))
    logits = (scale * honest + shift).astype(np.float32)
    return Rounds(np.arange(count) // 20, logits, accepted & observed, observed)


def ece(rounds: Rounds, survival: np.ndarray) -> float:
    return calibration_metrics(survival, rounds.accepted, rounds.observed).mean("ece")


def test_isotonic_and_online_fits_mend_scale_and_shift() -> None:
    fit, test = bold(20_000, 0), bold(20_000, 1)
    raw = ece(test, prefix_survival(test.logits))
    assert raw > 0.06
    assert ece(test, Isotonic(fit)(test.logits)) < 0.015
    assert ece(test, online_survival(test, np.ones(3))) < 0.25 * raw


def test_survival_never_rises_and_returns_from_its_logits() -> None:
    found = Isotonic(bold(500, 2))(bold(300, 3).logits)
    assert np.all(np.diff(found, axis=1) <= 0)
    back = prefix_survival(conditional_logits(found))
    np.testing.assert_allclose(back, found, atol=1e-5)


def test_an_online_fit_reads_no_round_before_its_end() -> None:
    """The outcome of a round changes no prediction of its own batch or of an earlier one."""
    rounds = bold(200, 4)
    found = online_survival(rounds, np.ones(3), slots=2)
    # The last rounds of the first two requests are observed after all others of theirs.
    other = rounds._replace(accepted=rounds.accepted.copy(), observed=np.ones_like(rounds.observed))
    other.accepted[19] = ~rounds.accepted[19]
    same = rounds._replace(observed=np.ones_like(rounds.observed))
    before, after = online_survival(same, np.ones(3), slots=2), online_survival(other, np.ones(3), slots=2)
    np.testing.assert_array_equal(before[:40], after[:40])
    assert np.any(before[40:] != after[40:])
    np.testing.assert_allclose(found[0], prefix_survival(rounds.logits[:1])[0], rtol=1e-6)


def test_an_unobserved_position_is_refused() -> None:
    rounds = bold(40, 5)
    rounds.observed[:, 2] = False
    with pytest.raises(UserError, match="No round observed draft 3"):
        Isotonic(rounds)


@pytest.mark.long
def test_the_study_from_beginning_to_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny pair has blocks of 3: costs of two users, of rounds of one token a request to whole blocks.
    grid = ((1.0, 1.2, 1.5),)
    profile = replace(
        made_profile(), tokens=(2, 4, 8), contexts=(20.0,), rounds=grid, rounds_spread=grid,
        drafting=(0.1,), drafting_spread=(0.0,), alone=(0.9,), alone_spread=(0.0,),
    )  # fmt: skip
    profile.save(tmp_path / "sps-2.json")
    files = [str(folder / name) for name in ("code.jsonl", "chat.jsonl")]
    pair = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter"), "--prompts", *files]
    short = ["--slots", "4", "--max-new-tokens", "12", "--samples", "2", "--temperatures", "0", "1"]
    out = ["--profiles", str(tmp_path / "sps-2.json"), "--output", str(tmp_path / "out")]
    main([*pair, *short, *out])
    assert "ECE, mean over positions" in capsys.readouterr().out

    cases = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"]
    found, bold_found = cases["as trained"], cases["bolder by 1.5"]
    assert bold_found["t1"]["ece"]["none"]["all"]["ece"] > found["t1"]["ece"]["none"]["all"]["ece"]
    assert set(found) == {"t0", "t1"} and set(found["t1"]["ece"]) == set(METHODS)
    assert set(found["t1"]["ece"]["sts"]) == {"all", "chat", "code"}
    assert found["t1"]["ece"]["known"]["all"]["ece"] < 1e-6 < found["t1"]["ece"]["none"]["all"]["ece"]
    speeds = found["t1"]["load"]["causal"]["2"]
    # Known outcomes verify what will be accepted and nothing else, so nothing is faster.
    assert speeds["known"]["tokens_per_second"] >= max(row["tokens_per_second"] for row in speeds.values())
    assert (tmp_path / "out" / "bolder-by-1.5.png").stat().st_size > 1000

    assert "was begun with samples" in refused(main, [*pair, *short, *out, "--samples", "3"], capsys)
    # Continued from its recordings alone: nothing is decoded again.
    monkeypatch.setattr("infer.studies.calibration.record", None)
    main([*pair, *short, *out])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"] == cases
    capsys.readouterr()

    replace(profile, tokens=(2, 4, 6)).save(tmp_path / "sps-2.json")
    assert "expected 8, blocks of 3" in refused(main, [*pair, *short, *out], capsys)
