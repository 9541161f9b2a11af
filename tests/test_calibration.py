"""Temperatures, profiles and the programs that make them: the fit, the files and where they are refused, end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.serving_tables import StsTable, read_sps, read_sts
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.round import LoopParams
from dspark_jax.errors import UserError
from dspark_jax.evaluation.calibration_metrics import calibration_metrics, prefix_survival, reliability
from dspark_jax.evaluation.temperature_scaling import fit_shift, fit_temperatures
from dspark_jax.files import weights_hash
from dspark_jax.scheduling.policies import Asynchronous, Fixed, LookAhead
from dspark_jax.serving import profiling
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.profile import Profile, choose_ladder, monotone
from dspark_jax.serving.profiling import Effort, _Stopwatch, draft_passes, load_or_measure, measure_profile
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.serving.temperatures import (
    drafter_fingerprint,
    fingerprint,
    read_calibration,
    validity,
    write_calibration,
)
from dspark_jax.targets.joined import apart
from infer.calibrate import main as calibrate
from infer.profile import main as profile
from tests.decoding_tiny import tiny_pair
from tests.test_infer_programs import folder, refused
from tests.tiny import write_tiny_target

__all__ = ["folder"]  # a fixture: a tiny target, a drafter with a confidence head, prompts

# Temperatures


def proposals(count: int, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are `truth` times too bold at each position, whether x_<=k was accepted, and a cut by a stop."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(1.2, 1.5, (count, len(truth)))
    accepted = np.cumprod(rng.random(honest.shape) < 1 / (1 + np.exp(-honest)), axis=1)
    observed = np.arange(len(truth)) < rng.integers(2, 9, (count, 1))
    return honest * truth, accepted, observed


def test_temperatures_are_found_in_order() -> None:
    truth = np.array([2.5, 1.0, 0.5, 3.0])
    logits, accepted, observed = proposals(40000, truth, 0)
    found = fit_temperatures(logits, accepted, observed)
    np.testing.assert_allclose(found, truth, rtol=0.25)
    test = proposals(40000, truth, 1)
    before = calibration_metrics(prefix_survival(test[0]), *test[1:])
    after = calibration_metrics(prefix_survival(test[0], found), *test[1:])
    assert before.mean("ece") > 0.03 and after.mean("ece") < 0.012
    assert after.mean("brier") < before.mean("brier")


def test_a_shift_mends_what_temperatures_cannot() -> None:
    """A head too sure by a constant: the shift is found, and with it the temperatures."""
    rng = np.random.default_rng(3)
    honest = rng.normal(-0.3, 1.0, (40000, 3))
    accepted = np.cumprod(rng.random(honest.shape) < 1 / (1 + np.exp(-honest)), axis=1)
    logits, observed = honest + 0.9, np.ones(honest.shape, bool)
    shift = fit_shift(logits, accepted, observed)
    assert shift == pytest.approx(-0.9, abs=0.05)
    alone = prefix_survival(logits, fit_temperatures(logits, accepted, observed))
    both = prefix_survival(logits + shift, fit_temperatures(logits + shift, accepted, observed))
    ece = [calibration_metrics(a, accepted, observed).mean("ece") for a in (alone, both)]
    assert ece[0] > 0.04 and ece[1] < 0.01


def test_a_position_with_one_outcome_keeps_its_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 3))
    accepted = np.stack([np.ones(50), np.zeros(50), np.zeros(50)], axis=1)
    observed = np.stack([np.ones(50), np.ones(50), np.zeros(50)], axis=1).astype(bool)
    assert fit_temperatures(logits, accepted, observed).tolist() == [1.0, 1.0, 1.0]


def test_reliability_bins() -> None:
    points = reliability(np.array([0.05, 0.95, 0.97, 0.5]), np.array([0, 1, 0, 1]), np.array([1, 1, 1, 0], bool))
    np.testing.assert_allclose(points, [[0.05, 0.0, 1.0], [0.96, 0.5, 2.0]])


def test_a_calibration_is_refused_elsewhere(tmp_path: Path) -> None:
    target, drafter = tiny_pair()
    config = SamplingParams(temperature=1.0)
    valid = validity(target, drafter, config)
    path, table = tmp_path / "sts.json", StsTable((1.0, 2.0, 0.5, 1.0))
    write_calibration(path, table, valid)
    assert read_calibration(path, valid).tolist() == [1.0, 2.0, 0.5, 1.0] and read_sts(path) == table
    w1 = drafter.params["markov_head"]["w1_vr"]
    retrained = replace(
        drafter, params=drafter.params | {"markov_head": drafter.params["markov_head"] | {"w1_vr": 2 * w1}}
    )
    for other, message in (
        (validity(target, retrained, config), "calibrated for drafter bigram, this is bigram .of the same name, but"),
        (validity(tiny_pair(seed=3)[0], drafter, config), "calibrated for target tiny"),
        (validity(target, drafter, replace(config, temperature=0.5)), "calibrated for temperature 1.0, this is 0.5"),
        (validity(target, drafter, replace(config, top_p=0.9)), "calibrated for top-p 1.0, this is 0.9"),
    ):
        with pytest.raises(UserError, match=message):
            read_calibration(path, other)
    path.write_text('{"temperatures": [1.0]}')
    with pytest.raises(UserError, match="does not say what it is valid for"):
        read_calibration(path, valid)


def test_fingerprints_know_weights_and_not_dtypes() -> None:
    _, drafter = tiny_pair()
    import jax

    half = jax.tree.map(lambda x: x.astype("bfloat16"), drafter.params)
    assert fingerprint(half) == fingerprint(drafter.params) != fingerprint(tiny_pair(seed=1)[1].params)
    w1 = drafter.params["markov_head"]["w1_vr"]
    for place in ((0, 0), (3, 1), (w1.shape[0] - 1, w1.shape[1] - 1)):
        head = drafter.params["markov_head"] | {"w1_vr": w1.at[place].add(1.0)}
        assert fingerprint(drafter.params | {"markov_head": head}) != fingerprint(drafter.params), place


def test_joined_matrices_leave_calibrations_valid() -> None:
    """The fingerprint is of each matrix by itself, by its own name; of other values it is another."""
    _, drafter = tiny_pair()
    alone = apart(drafter.params, drafter.config.backbone)
    assert jax.tree.structure(alone) != jax.tree.structure(drafter.params)
    assert drafter_fingerprint(drafter) == fingerprint(alone)
    assert drafter_fingerprint(tiny_pair(seed=1)[1]) != fingerprint(alone)


def test_a_calibration_is_bound_to_whole_files_of_weights(tmp_path: Path) -> None:
    """One bit of the target's weights, wherever it is, makes its calibration another target's."""
    _, drafter = tiny_pair()
    target = load_target(write_tiny_target(tmp_path / "target"))
    valid = validity(target, drafter, SamplingParams())
    assert valid["target"] == weights_hash(tmp_path / "target")
    write_calibration(tmp_path / "sts.json", StsTable((1.0, 2.0, 0.5, 1.0)), valid)
    read_calibration(tmp_path / "sts.json", validity(target, drafter, SamplingParams()))
    weights = tmp_path / "target" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1001] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="of the same name, but other weights"):
        read_calibration(tmp_path / "sts.json", validity(target, drafter, SamplingParams()))


# Profiles


def test_cleaning_pools_what_falls() -> None:
    np.testing.assert_allclose(monotone(np.array([1.0, 3.0, 2.0, 4.0, 3.0, 2.0])), [1, 2.5, 2.5, 3, 3, 3])


def test_ladders_spend_their_rungs_where_costs_rise() -> None:
    tokens = tuple(range(8, 65, 8))
    cliff = [1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0]
    assert choose_ladder(tokens, cliff, 3) == (8, 32, 64)
    assert choose_ladder(tokens, [1.0] * 8, 4) == (8, 64)
    assert choose_ladder(tokens, np.arange(1.0, 9.0).tolist(), 8) == tokens
    assert choose_ladder((4,), [1.0], 3) == (4,)


def made_profile() -> Profile:
    rounds = ((1.0, 2.0, 1.9, 3.0), (1.5, 2.5, 2.6, 4.0))
    spread = ((0.1,) * 4, (0.2,) * 4)
    return Profile(
        {"device": "x"},
        (4, 8, 12, 20),
        (20.0, 50.0),
        rounds,
        spread,
        (0.5, 0.6),
        (0.01, 0.01),
        (0.9, 1.3),
        (0.1, 0.1),
        0.25,
    )


def test_profiles_become_tables_and_files(tmp_path: Path) -> None:
    profile = made_profile()
    table = profile.cost_table()
    # The anchors' own pass in a round that drafts: 4 tokens below the second rung, at 1.05 / 12 and 1.5 / 12 a token.
    np.testing.assert_allclose(table.verify, [[1.1, 1.45, 1.45, 2.5], [1.5, 1.9, 2.0, 3.4]], rtol=1e-6)
    np.testing.assert_allclose(table.plain, [1.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(table.drafting, [0.5, 0.6], rtol=1e-6)
    np.testing.assert_allclose(table.alone, [0.9, 1.3], rtol=1e-6)
    assert float(np.asarray(table.dispatch)) == 0.25
    profile.save(tmp_path / "sps.json")
    assert Profile.read(tmp_path / "sps.json") == profile
    served: Any = read_sps(tmp_path / "sps.json")
    assert served.sample_batch_tokens == (1, 5, 9, 13) and served.max_batch_tokens == 20
    assert served.steps_per_second(9) == served.steps_per_second(12) == pytest.approx(1 / (1.725 + 0.55), rel=1e-5)
    (tmp_path / "sps.json").write_text(json.dumps(profile.serving()))
    with pytest.raises(UserError, match="holds no profile"):
        Profile.read(tmp_path / "sps.json")


@pytest.mark.long
def test_a_loop_is_profiled_by_its_own_program_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bucket is run, nothing is compiled that decoding does not need, and the second start reads a file.

    Rounds of all buckets are one program; plain rounds without the drafter are another, and draft passes a third.
    """
    target, drafter = tiny_pair()
    loop = make_loop(target, drafter, EngineConfig(2, 60, buckets=(2, 5, 10)), LookAhead())
    params = LoopParams(target.params, drafter.params)
    rounds, drafts = run_rounds._cache_size(), draft_passes._cache_size()
    found = measure_profile(loop, params, 1.0, (0.2, 0.5), Effort(rounds=2, repeats=1))
    programs = run_rounds._cache_size(), draft_passes._cache_size()
    assert programs == (rounds + 2, drafts + 1)
    assert found.tokens == (2, 5, 10) and np.shape(found.rounds) == (2, 3) and min(map(min, found.rounds)) > 0
    assert found.key["requests"] == 2 and found.key["sampled"] and min(found.drafting) > 0
    assert found.dispatch > 0 and len(found.alone) == 2 and min(found.alone) > 0
    found.cost_table()

    def measured(*asked: Any, **options: Any) -> Profile:
        """The profile of a machine whose times spread by `spread` of themselves, whatever this one does beside."""
        made = measure_profile(*asked, **options)
        grid, lines = tuple(tuple(spread * x for x in row) for row in made.rounds), (made.drafting, made.alone)
        drafting, alone = (tuple(spread * x for x in line) for line in lines)
        return replace(made, rounds_spread=grid, drafting_spread=drafting, alone_spread=alone)

    monkeypatch.setattr(profiling, "measure_profile", measured)
    spread = 1.0
    assert not load_or_measure(loop, params, 0.0, tmp_path).steady and not list(tmp_path.iterdir())
    spread = 0.1
    first = load_or_measure(loop, params, 0.0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert load_or_measure(loop, params, 0.0, tmp_path) == first
    (path,) = tmp_path.iterdir()
    replace(first, alone_spread=(9.0, 9.0), drafting_spread=(9.0, 9.0), rounds_spread=((9.0,) * 3,) * 2).save(path)
    assert load_or_measure(loop, params, 0.0, tmp_path).steady
    path.write_text("{torn")
    assert load_or_measure(loop, params, 0.0, tmp_path).key == first.key
    assert (run_rounds._cache_size(), draft_passes._cache_size()) == programs, "other profiles compile nothing"
    assert Profile.read(path).key == first.key
    with pytest.raises(UserError, match="load-adaptive policy"):
        measure_profile(make_loop(target, drafter, EngineConfig(2, 60), Fixed()), params)


def test_junk_confidences_do_not_narrow_a_profiled_round() -> None:
    target, drafter = tiny_pair()
    head = drafter.params["confidence_head"]
    low = drafter.params | {"confidence_head": jax.tree.map(lambda x: jnp.full_like(x, -30.0 * (x.ndim == 1)), head)}
    loop = make_loop(target, drafter, EngineConfig(2, 60, buckets=(2, 5, 10)), Asynchronous())
    watch = _Stopwatch.of(loop, LoopParams(target.params, low), 1.0, (0.2, 0.5), 5)
    for bucket, extra in ((1, 3), (2, 8)):
        before = int(watch.state.counters.verified_at.sum())
        watch.seconds(0, bucket, 5)
        assert int(watch.state.counters.verified_at.sum()) - before == 5 * extra


def test_profiled_rows_are_of_different_tokens() -> None:
    """Rows of one token would all choose the same experts, which prices a mixture's wide passes too low."""
    target, drafter = tiny_pair()
    loop = make_loop(target, drafter, EngineConfig(8, 60, buckets=(8, 40)), LookAhead())
    state = _Stopwatch.of(loop, LoopParams(target.params, drafter.params), 1.0, (0.2, 0.5), 5).state
    for length in (12, 30):
        anchors = np.asarray(state.tokens)[:, length - 1]
        assert len(set(anchors.tolist())) > 4 and anchors.max() < target.config.vocab_size
    assert len(np.unique(np.asarray(state.keys), axis=0)) == 8


def test_what_a_call_takes_is_no_part_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a dispatch takes 5 seconds and each of its rounds 2."""
    target, drafter = tiny_pair()
    loop = make_loop(target, drafter, EngineConfig(2, 60, buckets=(2, 10)), LookAhead())
    now = 0.0

    def dispatch(loop: Any, params: Any, state: Any, occupancy: Any, rounds: Any, until_free: Any) -> Any:
        nonlocal now
        now += 5.0 + 2.0 * int(rounds)
        return state

    def alone(loop: Any, params: Any, state: Any, occupancy: Any, rounds: Any, until_free: Any) -> Any:
        nonlocal now
        now += 7.0 + 1.5 * int(rounds)
        return state

    def drafts(loop: Any, params: Any, state: Any, count: Any) -> Any:
        nonlocal now
        now += 3.0 + 0.5 * int(count)

    monkeypatch.setattr(profiling, "run_rounds", dispatch)
    monkeypatch.setattr(profiling, "run_alone", alone)
    monkeypatch.setattr(profiling, "draft_passes", drafts)
    params = LoopParams(target.params, drafter.params)
    found = measure_profile(loop, params, effort=Effort(rounds=3, repeats=2), clock=lambda: now)
    assert found.dispatch == 5.0 and found.drafting == (0.5, 0.5) and found.rounds == ((2.0, 2.0), (2.0, 2.0))
    assert found.alone == (1.5, 1.5)

    # A sweep, a round at each of two contexts in two buckets, the draft pass and the plain round without a drafter of
    # each, takes 52 of these seconds.
    began = now
    measure_profile(loop, params, effort=Effort(8, 5, seconds=120), clock=lambda: now)
    assert now - began == pytest.approx(2 * 52 + 2 * (40 + 52)), "two sweeps: calls alone, then with a round"


# Programs


@pytest.mark.long
def test_calibrate_from_beginning_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / name) for name in ("code.jsonl", "chat.jsonl")]
    pair = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter"), "--prompts", *files]
    out = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "kept.json")]
    calibrate([*pair, *out, "--samples", "3", "--slots", "4", "--max-new-tokens", "12"])
    metrics = json.loads((tmp_path / "kept.json").read_text())
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"ece_before_mean", "ece_after_mean", "auroc_mean", "command"} <= set(metrics)
    assert len(metrics["temperatures"]) == len(metrics["after"]["ece"]) == len(metrics["before"]["auc"]) == 3
    assert metrics["prompts"] == 5 and 0 < metrics["rounds_measured"] < metrics["rounds"]
    assert metrics["after"]["observations"][0] == metrics["rounds_measured"]
    target, drafter = metrics["valid_for"]["target"], metrics["valid_for"]["drafter"]
    sts = json.loads((tmp_path / "out" / "sts.json").read_text())
    judged, accepted = (sts["valid_for"].pop(name) for name in ("judged", "accepted"))
    assert sts["valid_for"].pop("xxh3") and sts["valid_for"] == metrics["valid_for"] and target != drafter
    # `auto` goes by them: every round judges its first draft, and a further one behind accepted ones alone.
    assert judged[0] == metrics["rounds"] and all(j <= a for j, a in zip(judged[1:], accepted, strict=False))
    assert "valid_for" not in json.loads((tmp_path / "out" / "serving" / "sts.json").read_text())
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 1000
    assert "temperature" in capsys.readouterr().out
    calibrate(
        [*pair, *out, "--samples", "3", "--slots", "4", "--max-new-tokens", "12", "--recenter", str(tmp_path / "c")]
    )
    again = json.loads((tmp_path / "kept.json").read_text())
    assert again["shift"] != 0 == metrics["shift"] and again["valid_for"]["drafter"] != drafter
    copy = load_drafter(tmp_path / "c", load_target(folder / "target"))
    old = load_drafter(folder / "drafter", load_target(folder / "target"))
    biases = [float(d.params["confidence_head"]["proj"]["bias_o"][0]) for d in (copy, old)]
    assert biases[0] - biases[1] == pytest.approx(again["shift"], abs=1e-5)
    assert drafter_fingerprint(copy) == again["valid_for"]["drafter"]


@pytest.mark.long
def test_profile_from_beginning_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter"), "--longest", "64"]
    short = ["--output", str(tmp_path), "--rounds", "2", "--repeats", "1", "--slots", "2"]
    profile([*pair, *short, "--widths", "3", "--contexts", "0.3"])
    found = Profile.read(tmp_path / "sps-2.json")
    assert found.tokens == (2, 5, 8) and len(found.contexts) == 1
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["profiles"][0]["ladder"][-1] == 8
    assert set(json.loads((tmp_path / "serving" / "sps-2.json").read_text())) == {
        "sample_batch_tokens", "sample_steps_per_sec", "max_batch_tokens",
    }  # fmt: skip
    profile([*pair, *short, "--scheduler-cost"])
    cost = json.loads((tmp_path / "metrics.json").read_text())["scheduler"]
    assert cost["requests"] == 2 and cost["seconds"] > 0 and cost["share"] == cost["seconds"] / cost["round_seconds"]
    assert "us" in capsys.readouterr().out


def test_programs_refuse_in_a_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
    prompts, out = ["--prompts", str(folder / "code.jsonl")], ["--output", str(tmp_path / "out")]
    assert "samples is 0" in refused(calibrate, [*pair, *prompts, *out, "--samples", "0"], capsys)
    assert "two prompts or more" in refused(calibrate, [*pair, *prompts, *out, "--limit", "1"], capsys)
    assert "shares of --longest" in refused(profile, [*pair, *out, "--contexts", "1.5"], capsys)
    assert "1 or more" in refused(profile, [*pair, *out, "--repeats", "0"], capsys)
    adaptive = [*pair, *out, "--scheduler-cost", "--policy", "fixed"]
    assert "name an adaptive one" in refused(profile, adaptive, capsys)
    assert not [*(tmp_path / "out").glob("*")], "the folder may be there, and nothing in it"
