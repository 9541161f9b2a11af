"""The simulator on numbers worked out by hand, and `infer.studies.load` from beginning to end on a tiny pair."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax import native
from dspark_jax.errors import UserError
from dspark_jax.evaluation.simulator import LoadFigures, Prefill, SimulatedDevice, Traces, simulate
from dspark_jax.evaluation.traffic import (
    OpenFigures,
    Traffic,
    closed_loop,
    overheads,
    poisson,
    read_traces,
    record_traces,
    save_traces,
)
from dspark_jax.files import lock_folder
from dspark_jax.scheduling.costs import CostTable, ScheduleTables
from dspark_jax.scheduling.policies import Causal, Fixed, Threshold
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from infer.studies.load import IDENTITY, LoadSettings, main, requests_of
from infer.studies.load_recorded import recorded_figures
from infer.studies.load_runs import Load, RunLog, summarise
from infer.studies.load_strategies import verdict
from tests.decoding_tiny import prompts, tiny_pair
from tests.test_infer_programs import refused, write_drafter
from tests.tiny import write_tiny_target

SAMPLING = SamplingParams(12, stop_tokens=())
CONFIG = EngineConfig(4, 40, "fixed", rounds_per_dispatch=4, buckets=(20,), return_at_once=True)


def traces(accepted: list[int], length: int, logit: float = 2.0, block: int = 4) -> Traces:
    """Two requests with the same rounds."""
    rounds = accepted * 2
    return Traces(
        logits=np.full((len(rounds), block), logit, np.float32),
        accepted=np.array(rounds, np.int32),
        request=np.repeat([0, 1], len(accepted)).astype(np.int32),
        prompts=np.array([10, 10], np.int32),
        lengths=np.array([length, length], np.int32),
    )


def device(verify: list[float], buckets: tuple[int, ...], **more: Any) -> SimulatedDevice:
    tables = ScheduleTables.of(CostTable.of(buckets, verify, 0.5), (1.0,) * 4)
    return SimulatedDevice(tables, buckets, **more)


# The simulator


def test_a_simulated_clock_is_the_cost_table() -> None:
    """One user, whole blocks: rounds of 3 tokens; 1 + 3 + 3 + 3 tokens a request, at 2 + 0.5 seconds a round."""
    found = simulate(Fixed(), 4, traces([2], 10), device([1.0, 2.0], (1, 5)), 1, 5)
    rounds, tokens = 4 * 3, 4 * 9 + 5
    assert found.tokens_per_second == pytest.approx(tokens / (rounds * 2.5))
    assert found.user_speeds == pytest.approx((10 / 7.5,) * 4)
    assert (found.verify_budget, found.tau) == (5.0, 3.0)


def test_prompts_that_come_together_are_prefilled_together() -> None:
    """More than half a house of one width at once, fewer one by one; what is wider than all goes with the widest."""
    prefill = Prefill((64, 128), (1.0, 2.0), (3.0, 5.0))
    assert prefill.seconds(np.array([10, 64, 65]), 4) == 2 * 1.0 + 2.0
    assert prefill.seconds(np.array([10, 64, 64, 500]), 4) == 3.0 + 2.0
    assert prefill.seconds(np.array([100, 100, 100]), 4) == 5.0 and prefill.seconds(np.array([], int), 4) == 0


def test_plain_decoding_drafts_nothing() -> None:
    prefill = Prefill((16,), (1.0,), (1.0,))
    found = simulate(Fixed(), 0, traces([2], 10), device([1.0, 2.0], (1, 5), plain_prefill=prefill), 1, 2)
    assert (found.verify_budget, found.tau) == (1.0, 1.0)
    assert found.tokens_per_second == pytest.approx((9 + 2) / (9 * 1.0 + 1.0))


def test_a_threshold_cuts_what_is_accepted() -> None:
    sure, unsure = traces([4], 11), traces([4], 11, logit=-2.0)
    at = device([1.0, 2.0], (2, 10))
    assert simulate(Threshold(0.5), 4, sure, at, 2, 6).tau == 5.0
    assert simulate(Threshold(0.5), 4, unsure, at, 2, 6).tau == 1.0


def test_load_makes_adaptive_lengths_short() -> None:
    """Free width: every draft is verified. Width that costs what it is worth to plain decoding: hardly any."""
    recorded = traces([1, 0, 2], 30, logit=0.0)
    free = simulate(Causal(), 4, recorded, device([1.0, 1.01], (4, 20)), 4, 12)
    dear = simulate(Causal(), 4, recorded, device([1.0, 9.0], (4, 20)), 4, 12)
    fixed = simulate(Fixed(), 4, recorded, device([1.0, 9.0], (4, 20)), 4, 12)
    assert free.verify_budget > 4 and dear.verify_budget < 1.5
    assert dear.tokens_per_second > 1.5 * fixed.tokens_per_second


def test_dispatches_and_requests_that_do_not_fit_together() -> None:
    quick = simulate(Fixed(), 4, traces([2], 10), device([1.0, 2.0], (1, 5)), 1, 5)
    slow = simulate(Fixed(), 4, traces([2], 10), device([1.0, 2.0], (1, 5), dispatch_seconds=2.5), 1, 5)
    assert slow.tokens_per_second == pytest.approx(quick.tokens_per_second * 7.5 / 10)
    with pytest.raises(UserError, match="1 requests cannot keep 2 users busy"):
        simulate(Fixed(), 4, traces([2], 10), device([1.0, 2.0], (1, 5)), 2, 1)
    with pytest.raises(UserError, match="requests without a round"):
        Traces(np.zeros((1, 4)), np.zeros(1), np.zeros(1), np.ones(2), np.ones(2))


# Real traffic


def made_prompts() -> list[EncodedPrompt]:
    tokens = prompts(6, tiny_pair()[0].config.vocab_size)
    return [EncodedPrompt(str(i), "tiny", p) for i, p in enumerate(tokens)]


def test_traffic_and_traces_of_an_engine(tmp_path: Path) -> None:
    engine = Engine(*tiny_pair(), CONFIG, SAMPLING)
    closed = closed_loop(engine, Traffic(made_prompts(), 12), 3, 9)
    assert engine.idle and 6 <= len(closed.user_speeds) <= 9 and closed.tokens_per_second > 0
    assert 4 < closed.verify_budget <= 5 and 1 < closed.tau < 5, "whole blocks, cut where a request ends"
    opened = poisson(engine, Traffic(made_prompts(), 12), 200.0, 8)
    assert engine.idle and len(opened.first_token_seconds) == len(opened.user_speeds) == 8
    assert all(a <= b for a, b in zip(opened.queued_seconds, opened.first_token_seconds, strict=True))
    recorded = record_traces(engine, Traffic(made_prompts(), 12), 5)
    assert engine.recorder is None and len(recorded.lengths) == 5 and set(recorded.lengths) == {12}
    assert recorded.logits.shape == (len(recorded.accepted), 4) and set(recorded.request) == set(range(5))
    # The recorded rounds make up the answers: what they accepted, a token a round, and the prefill's own.
    made = np.bincount(recorded.request, recorded.accepted + 1) + 1
    assert np.all(made >= recorded.lengths) and np.all(made < recorded.lengths + 5)
    save_traces(tmp_path / "traces.npz", recorded)
    np.testing.assert_array_equal(read_traces(tmp_path / "traces.npz").logits, recorded.logits)
    with pytest.raises(UserError, match="expected traces of a load study"):
        read_traces(tmp_path / "nothing.npz")
    prefill, dispatch = overheads(engine, made_prompts(), repeats=2)
    assert dispatch > 0 and all(seconds > 0 for seconds in (*prefill.alone, *prefill.house))
    assert list(prefill.widths) == sorted(prefill.widths) and len(prefill.house) == len(prefill.widths)


def new_tokens(traffic: Traffic, index: int) -> int:
    sampling = traffic.request(index, SAMPLING).sampling
    assert sampling is not None
    return sampling.max_new_tokens


def test_answers_are_of_many_lengths() -> None:
    """Those of a number the same whoever asks, evenly spread down to the share named; of a spread of 0 all the same."""
    spread, level = (Traffic(made_prompts(), 12, share, seed=3) for share in (0.5, 0.0))
    lengths = [new_tokens(spread, i) for i in range(400)]
    assert lengths == [new_tokens(spread, i) for i in range(400)]
    assert set(lengths) == set(range(6, 13)) and np.mean(lengths) == pytest.approx(9, abs=0.5)
    assert {new_tokens(level, i) for i in range(20)} == {12}
    long = level.request(7, SAMPLING)
    assert spread.request(7, SAMPLING) == Request(long.prompt, replace(SAMPLING, max_new_tokens=lengths[7], seed=10))
    assert min(new_tokens(Traffic(made_prompts(), 12, 1.0), i) for i in range(200)) == 1


def test_figures_of_runs() -> None:
    row = summarise(OpenFigures(7.0, tuple(range(1, 101)), 2.0, 1.5, (0.1, 0.3), (0.0, 0.2)))
    assert row["user_median"] == 50.5 and row["user_p95"] == pytest.approx(5.95)
    assert row["first_token_seconds_median"] == pytest.approx(0.2)
    closed = {
        "8": {
            n: {"tokens_per_second": v, "verify_budget": 2.0}
            for n, v in (("plain", 10.0), ("fixed", 8.0), ("causal", 11.0))
        }
    }
    assert verdict(closed) == {
        "8": {"best_static": "plain", "causal": {"over_best_static": 1.1, "budget": 2.0, "over_fixed": 1.375}}
    }


def test_a_study_continues_where_it_stopped(tmp_path: Path) -> None:
    path, identity, load = tmp_path / "runs.jsonl", {"seed": 3, "prompts": (Path("some.jsonl"),)}, Load("closed", 4, 4)
    log = RunLog(path, identity)
    for speed in (1.0, 5.0, 2.0):
        log.add(load, "plain", int(speed), LoadFigures(speed, (1.0,), 1.0, 1.0))
    with path.open("a") as file:
        file.write('{"key": ["closed", 4, "pl')  # killed while it wrote
    again = RunLog(path, identity)
    assert again.has(load, "plain", 5) and not again.has(load, "fixed", 0)
    assert again.medians(load, "plain")["tokens_per_second"] == 2.0
    # Arrivals at one rate wait longer on fewer slots, so these are other runs.
    assert not again.has(load._replace(slots=8), "plain", 5)
    for other in (identity | {"seed": 4}, identity | {"prompts": (Path("others.jsonl"),)}):
        with pytest.raises(UserError, match="holds runs of other settings"):
            RunLog(path, other)


def test_every_setting_that_shapes_a_run_is_in_its_identity() -> None:
    """The others: what the runs are, where figures go, and the loads, which each run has in its key."""
    free = {"output", "results", "strategies", "concurrency", "rates", "repeats", "validate", "record", "simulate"}
    assert set(IDENTITY) == set(LoadSettings.__dataclass_fields__) - free


def test_a_study_has_one_writer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--target", folder / "target", "--drafter", folder / "drafter", "--prompts", folder / "prompts.jsonl"]
    with lock_folder(tmp_path / "out"), pytest.raises(SystemExit):
        main([str(word) for word in [*argv, "--output", tmp_path / "out"]])
    assert "Another process is writing the study" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["{}", "[1]", '{"key": "x", "figures": {}}', '{"key": [0, 1, 2, 3, 4], "figures": {"a": "b"}}', "{{"]
)
def test_a_line_that_is_no_run_is_named(line: str, tmp_path: Path) -> None:
    log, load = tmp_path / "runs.jsonl", Load("closed", 4, 4)
    RunLog(log, {}).add(load, "plain", 0, LoadFigures(1.0, (), 1.0, 1.0))
    assert np.isnan(RunLog(log, {}).medians(load, "plain")["user_median"]), "a figure that a run has not"
    log.write_text(log.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"runs.jsonl line 3"):
        RunLog(log, {})


BAD_TRACES: dict[str, dict[str, Any]] = {
    "more accepted than drafted": {"accepted": np.array([5, 0, 0, 0], np.int32)},
    "other counts": {"accepted": np.zeros(3, np.int32)},
    "requests out of order": {"request": np.array([1, 1, 0, 0], np.int32)},
    "a request without a round": {"prompts": np.ones(3, np.int32), "lengths": np.ones(3, np.int32)},
    "another dtype": {"logits": np.zeros((4, 4))},
    "pickled": {"logits": np.array([{}], object)},
}


@pytest.mark.parametrize("fault", BAD_TRACES)
def test_traces_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "traces.npz"
    np.savez(path, **vars(traces([1, 2], 8)) | BAD_TRACES[fault])
    with pytest.raises(UserError, match="traces"):
        read_traces(path)


def test_damaged_traces_are_one_sentence(tmp_path: Path) -> None:
    """Cut at any place, and with any byte of its directory and headers changed."""
    path = tmp_path / "traces.npz"
    save_traces(path, traces([1, 2], 8))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for cut in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="traces"):
            read_traces(path)
    for at in rng.integers(len(whole), size=200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            read_traces(path)


def test_few_users_ask_often_enough_to_be_timed() -> None:
    settings = LoadSettings(requests_per_user=5, least_requests=48)
    assert [requests_of(settings, users) for users in (1, 4, 16)] == [49, 52, 96]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    write_tiny_target(folder / "target")
    write_drafter(folder / "target", folder / "drafter")
    rows = [{"turns": [text]} for text in ("one", "Return the length of the list.", "two words")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_load_measures_validates_and_simulates(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.ready()  # built where all tests find the kernels; profiles alone are measured anew
    monkeypatch.setenv("DSPARK_JAX_CACHE", str(tmp_path / "cache"))
    # The validation has the programs of the measured runs.
    monkeypatch.setattr("infer.studies.load.forget_programs", lambda: None)
    argv = ["--target", folder / "target", "--drafter", folder / "drafter", "--prompts", folder / "prompts.jsonl"]
    argv += ["--concurrency", "2", "--repeats", "1", "--requests-per-user", "2", "--max-new-tokens", "8"]
    argv += ["--strategies", "plain", "fixed", "causal", "--validate", "--output", tmp_path / "out"]
    main([str(word) for word in [*argv, "--results", tmp_path / "results.json"]])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert json.loads((tmp_path / "results.json").read_text()) == metrics
    rows = metrics["closed"]["2"]
    assert set(rows) == {"plain", "fixed", "causal"} and rows["plain"]["verify_budget"] == 1.0
    assert 3 < rows["fixed"]["verify_budget"] <= 4 and metrics["verdict"]["2"]["best_static"]
    assert set(metrics["simulator"]["by_users"]["2"]) == set(rows) and metrics["simulator"]["summary"]["largest"] >= 0
    for name in ("throughput", "budget"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    sps = {"sample_batch_tokens": [1, 3, 9], "sample_steps_per_sec": [100.0, 90.0, 10.0], "max_batch_tokens": 64}
    (tmp_path / "sps.json").write_text(json.dumps(sps))
    again = ["--simulate", tmp_path / "out" / "traces.npz", "--sps", tmp_path / "sps.json", "--concurrency", "2", "8"]
    main([str(word) for word in [*again, "--output", tmp_path / "simulated"]])
    found = json.loads((tmp_path / "simulated" / "metrics.json").read_text())
    assert found["simulated"] and set(found["closed"]) == {"2", "8"}

    # Recorded alone, and simulated with a table for each number of users.
    kept, sps_of, modes = tmp_path / "recorded", tmp_path / "profiles", list[str | None]()

    def recording(engine: Engine, *rest: Any) -> Traces:
        modes.append(engine.sampling.mode)
        return traces([2, 2, 2], 8, block=3)

    monkeypatch.setattr(Engine, "warm_up", lambda self: None)
    monkeypatch.setattr("infer.studies.load.record_traces", recording)
    alone = ["--max-new-tokens", "8", "--record", "4", "--mode", "coupled", "--output", kept]
    main([str(word) for word in [*argv[:10], *alone]])
    assert (kept / "traces.npz").exists() and not (kept / "metrics.json").exists() and modes == ["coupled"]
    sps_of.mkdir()
    for users, slower in (("1", 1), ("2", 10)):
        rates = [rate / slower for rate in sps["sample_steps_per_sec"]]
        (sps_of / f"sps-{users}.json").write_text(json.dumps(sps | {"sample_steps_per_sec": rates}))
    again = ["--simulate", kept / "traces.npz", "--sps", sps_of, "--concurrency", "1", "2", "--strategies", "plain"]
    main([str(word) for word in [*again, "--output", tmp_path / "simulated"]])
    closed = json.loads((tmp_path / "simulated" / "metrics.json").read_text())["closed"]
    assert closed["1"]["plain"]["tokens_per_second"] > 4 * closed["2"]["plain"]["tokens_per_second"]


def test_recorded_rounds_say_what_a_threshold_keeps_and_how_sure_confidences_are() -> None:
    """Two drafts a round: the first is always accepted, the second never, and confidences say so or do not."""
    rounds = traces([1] * 8, 17)
    sure = replace(rounds, logits=np.tile(np.float32([9.0, -9.0, -9.0, -9.0]), (len(rounds.accepted), 1)))
    found = recorded_figures(sure, (1.0,) * 4, False)
    assert found["thresholds"]["0.6"] == {"tau": 2.0, "verify_rate": 1.0} and set(found["confidence"]) == {"before"}
    assert found["confidence"]["before"]["ece"] < 0.01
    # Temperatures that make all of them as good as equal; a threshold looks at confidences as they are.
    found = recorded_figures(sure, (100.0,) * 4, True)
    assert found["thresholds"]["0.6"] == {"tau": 2.0, "verify_rate": 1.0}
    assert found["confidence"]["after"]["ece"] > 0.1 > found["confidence"]["before"]["ece"]


LOAD: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "A load study needs --target"),
    "no users": (["--concurrency", "0"], "every concurrency must be 1 or more"),
    "too much spread": (["--answer-spread", "1.5"], "The answer spread is 1.5; expected a share, 0 to 1"),
    "mtp": (["--strategies", "mtp"], "The strategy mtp needs --mtp DIR"),
    "no table": (["--simulate", "{}/traces.npz"], "expected traces of a load study"),
}


@pytest.mark.parametrize("case", LOAD)
def test_load_refuses(case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = LOAD[case]
    argv = [word.replace("{}", str(folder)) for word in argv] + ["--output", str(tmp_path / "out")]
    if case == "mtp":
        argv += ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
        argv += ["--prompts", str(folder / "prompts.jsonl")]
    assert message in refused(main, argv, capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
