"""`infer.evaluate`: sets from files and folders, turns fed back, and the figures of a tiny pair."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.chat import encode_prompt
from dspark_jax.errors import UserError
from dspark_jax.evaluation.answers import Answered, Proposals, answer, reach, turn_seed
from dspark_jax.evaluation.datasets import domain_of, read_datasets
from dspark_jax.evaluation.measurement import averages
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from infer.evaluate import main
from tests.test_infer_programs import refused, write_drafter
from tests.tiny import write_tiny_target

TURNS = [["one", "and two?", "three"], ["What is the sum of three and four?"], ["Return the list.", "again"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, its drafter, and two sets in a folder: one of turns, one of conversations in two domains."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_target(folder / "target")
    write_drafter(folder / "target", folder / "drafter")
    (folder / "sets").mkdir()
    (folder / "sets" / "mt-bench.jsonl").write_text("".join(json.dumps({"turns": t}) + "\n" for t in TURNS))
    user, made = {"role": "user", "content": "what"}, {"role": "assistant", "content": "no"}
    rows = [
        {"id": "a", "domain": "gsm8k", "messages": [{"role": "system", "content": "s"}, user, made, user]},
        {"id": "b", "domain": "own", "messages": [user]},
    ]
    (folder / "sets" / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_sets_from_files_and_folders(folder: Path) -> None:
    sets = read_datasets([str(folder / "sets")])
    assert {name: len(samples) for name, samples in sets.items()} == {"gsm8k": 1, "own": 1, "mt-bench": 3}
    assert [[m["content"] for (m,) in sample.segments] for sample in sets["mt-bench"]] == TURNS
    what = {"role": "user", "content": "what"}
    assert sets["gsm8k"][0].segments == (({"role": "system", "content": "s"}, what), (what,))
    samples = [sample for group in sets.values() for sample in group]
    assert sorted(sample.index for sample in samples) == list(range(5))
    assert len(read_datasets([str(folder / "sets" / "mt-bench.jsonl")], limit=2)["mt-bench"]) == 2
    assert [domain_of(name) for name in ("gsm8k", "humaneval", "alpaca", "own")] == ["math", "code", "chat", "own"]
    with pytest.raises(UserError, match="neither a file nor a folder here"):
        read_datasets([str(folder / "nothing")])
    (folder / "bare").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"holds no .jsonl or .parquet file"):
        read_datasets([str(folder / "bare")])
    for row, message in (({"turns": []}, "expected a list of texts"), ({"turns": [1]}, "expected a list of texts")):
        (folder / "odd.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=message):
            read_datasets([str(folder / "odd.jsonl")])


def said_by(done: Answered, dialogue: int) -> dict[int, tuple[tuple[int, ...], ...]]:
    return {turn: (g.prompt_tokens, g.tokens) for (index, turn), g in done.generations.items() if index == dialogue}


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_are_fed_back(folder: Path, thinking: bool) -> None:
    target = load_target(folder / "target")
    samples = read_datasets([str(folder / "sets" / "mt-bench.jsonl")])["mt-bench"]
    # Of both, so that they share their programs.
    longest = max(reach(target, sample, 6, mode) for sample in samples for mode in (False, True))
    engine = Engine(target, None, EngineConfig(2, longest), SamplingParams(6, 1.0))
    done = answer(engine, samples, 5, thinking)
    assert not done.cut and set(done.generations) == {(s.index, t) for s in samples for t in range(len(s.segments))}
    for sample in samples:
        messages = []
        for turn, said in enumerate(sample.segments):
            messages += said
            made = done.generations[sample.index, turn]
            expected = encode_prompt(target.tokenizer, messages, thinking)
            assert made.prompt_tokens == tuple(expected.tolist())
            messages.append({"role": "assistant", "content": made.text})
    one = answer(engine, samples[2:], 5, thinking)
    assert said_by(one, 2) == said_by(done, 2)
    shorter = len(done.generations[samples[1].index, 0].prompt_tokens) + 6
    small = Engine(target, None, replace(engine.config, longest=shorter), engine.sampling)
    assert set(answer(small, samples, 5, thinking).cut) <= {0, 2} and small.idle


class Hashing:
    """An engine whose answers are hashes of prompt and seed: a dialogue of any length costs nothing."""

    def __init__(self, target: Target):
        self.target, self.sampling = target, SamplingParams(1, 1.0)
        self.open: list[tuple[int, Request]] = []
        self.seeds: list[int | None] = []

    @property
    def idle(self) -> bool:
        return not self.open

    def submit(self, index: int, request: Request) -> None:
        self.open.append((index, request))
        self.seeds.append(None if request.sampling is None else request.sampling.seed)

    def step(self) -> list[Any]:
        ended, self.open = self.open, []
        return [SimpleNamespace(index=i, generation=SimpleNamespace(text=self.said(r))) for i, r in ended]

    @staticmethod
    def said(request: Request) -> str:
        return hashlib.sha256(repr((tuple(request.prompt), request.sampling)).encode()).hexdigest()[:8]


def test_more_turns_than_any_bound_stay_their_own_samples(folder: Path, tmp_path: Path) -> None:
    """70 turns of one dialogue beside the turns of the next: no answer is written over another's, no seed repeats."""
    turns = [[f"{i}" for i in range(70)], ["a", "b"]]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"turns": t}) + "\n" for t in turns))
    target = load_target(folder / "target")
    samples = read_datasets([str(tmp_path / "long.jsonl")])["long"]
    engine = Hashing(target)
    done = answer(cast(Engine, engine), samples, seed=0)
    assert set(done.generations) == {(0, turn) for turn in range(70)} | {(1, 0), (1, 1)} and not done.cut
    for dialogue, one in enumerate(samples):
        alone = answer(cast(Engine, Hashing(target)), [one], seed=0)
        assert {key: g.text for key, g in done.generations.items() if key[0] == dialogue} == {
            key: g.text for key, g in alone.generations.items()
        }
    assert len(set(engine.seeds)) == 72 == len({g.text for g in done.generations.values()})
    assert len({turn_seed(seed, i, t) for seed in (0, 1, 64) for i in range(20) for t in range(200)}) == 12_000


def test_proposals_become_arrays(folder: Path) -> None:
    target = load_target(folder / "target")
    drafter = load_drafter(folder / "drafter", target)
    engine = Engine(target, drafter, EngineConfig(2, 120, "fixed", buckets=(8,)), SamplingParams(20))
    engine.recorder = proposals = Proposals()
    samples = read_datasets([str(folder / "sets" / "mt-bench.jsonl")])["mt-bench"][1:2]
    made = answer(engine, samples, seed=0).generations[samples[0].index, 0]
    logits, accepted, observed = proposals.arrays()
    assert logits.shape == accepted.shape == observed.shape == (made.rounds, 3)
    assert tuple(accepted.sum(0)) == made.accepted_at and tuple(observed.sum(0)) == made.verified_at
    behind = np.pad(accepted[:, :-1], ((0, 0), (1, 0)), constant_values=1) > 0
    assert tuple((observed & behind).sum(0)) == made.judged_at
    assert np.all(np.diff(accepted, axis=1) <= 0) and Proposals().arrays()[0].size == 0


def test_domains_count_alike() -> None:
    def row(value: float) -> dict[str, float]:
        names = ("tau", "drafted_per_round", "verify_rate", "plain_tokens_per_second", "tokens_per_second", "speedup")
        return dict.fromkeys(names, value)

    found = averages({"own": row(8.0), "gsm8k": row(2.0), "aime25": row(4.0), "mbpp": row(1.0)})
    assert {name: values["tau"] for name, values in found["domains"].items()} == {"math": 3.0, "code": 1.0, "own": 8.0}
    assert list(found["domains"]) == ["math", "code", "own"] and found["macro"]["tau"] == 4.0


def test_evaluate_measures_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--datasets", folder / "sets", "--target", folder / "target", "--drafter", folder / "drafter"]
    argv += [
        "--temperatures",
        "0.0",
        "--max-new-tokens",
        "8",
        "--slots",
        "2",
        "--thresholds",
        "0.6",
        "--policy",
        "fixed",
    ]
    main([str(word) for word in [*argv, "--output", tmp_path / "out"]])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    figures = metrics["temperatures"]["t0"]
    assert set(figures["datasets"]) == {"gsm8k", "own", "mt-bench"}
    assert set(figures["domains"]) == {"math", "chat", "own"}
    for row in figures["datasets"].values():
        assert row["drafted_per_round"] == pytest.approx(3.0) and row["tau_whole"] == row["tau"]
        assert 0 < row["verify_rate"] <= 1 and row["plain_tokens_per_second"] > 0 and len(row["conditional"]) == 3
        assert set(row["thresholds"]) == {"0.6"} and row["thresholds"]["0.6"]["verified_share"] <= row["verified_share"]
        assert set(row["confidence"]) == {"before"} and 0 <= row["confidence"]["before"]["ece"] <= 1
    assert figures["datasets"]["mt-bench"]["answers"] == 6 and figures["datasets"]["mt-bench"]["samples"] == 3
    for name in ("conditional_acceptance", "reliability", "threshold_sweep"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "= macro" in capsys.readouterr().out


EVALUATE: dict[str, tuple[list[str], str]] = {
    "no sets": (["--datasets", "{}/nothing"], "neither a file nor a folder here"),
    "no repeats": (["--datasets", "{}/sets", "--repeats", "0"], "There is nothing to evaluate"),
    "no table": (["--datasets", "{}/sets", "--sts", "{}/sts.json", "--policy", "causal"], "sts.json"),
    "policy": (["--datasets", "{}/sets", "--policy", "clever"], "policy"),
}


@pytest.mark.parametrize("case", EVALUATE)
def test_evaluate_refuses(case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = EVALUATE[case]
    argv = [word.replace("{}", str(folder)) for word in argv] + ["--output", str(tmp_path / "out")]
    argv += ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
    assert message in refused(main, argv, capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
