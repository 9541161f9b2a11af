"""Accepted length by decoding while a run trains: recorded, compiled once, resumed, and what is kept by it."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import load_config, parse
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.evaluation.acceptance import Acceptance, acceptance_by_domain, macro_tau
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.evaluation import Evaluator
from dspark_jax.training.run import Run
from dspark_jax.training.run_folder import read_records
from dspark_jax.training.start import initial_state
from tests.tiny import write_tiny_target
from tests.untimed import untimed
from train.fit import main

pytestmark = pytest.mark.usefixtures("shared_steps")

PROMPTS = {"chat": ("What is the sum of three and four?", "one"), "code": ("Return the length of the list.",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_tiny_target(folder / "target", num_hidden_layers=3)
    rows = [
        {"id": f"{domain}-{i}", "domain": domain, "messages": [{"role": "user", "content": text}]}
        for domain, texts in PROMPTS.items()
        for i, text in enumerate(texts)
    ]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder: Path, run: str, *more: object) -> list[str]:
    small = "--drafter.target-layer-ids 0 1 --drafter.num-anchors 4 --data.max-length 24 --max-steps 4"
    watch = "--evaluation.every-steps 2 --evaluation.max-new-tokens 12 --evaluation.temperature 0 --checkpoint.keep 1"
    places = [
        "--target",
        folder / "target",
        "--run-dir",
        folder / run,
        "--evaluation.prompts",
        folder / "heldout.jsonl",
    ]
    return [str(w) for w in ("--config", "debug", *places, *small.split(), *watch.split(), *more)]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    main(command(folder, "run"))
    return folder / "run"


def test_evaluations_are_records_of_their_steps(folder: Path, trained: Path):
    records = read_records(trained / "metrics.jsonl")
    evaluated = [record for record in records if "eval_tau" in record]
    assert [record["step"] for record in evaluated] == [2, 4]
    for record in evaluated:
        assert record["eval_tau"] == pytest.approx((record["eval_tau_chat"] + record["eval_tau_code"]) / 2)
        assert 1 <= record["eval_tau"] <= 5 and 0 <= record["eval_accept@0"] <= 1
    summary = json.loads((trained / "metrics.json").read_text())
    assert summary["eval_tau"] == evaluated[-1]["eval_tau"]
    assert summary["best_eval_tau"] == max(record["eval_tau"] for record in evaluated)


def test_a_record_says_what_decoding_the_exported_drafter_gives(folder: Path, trained: Path):
    target = load_target(folder / "target", dtype="float32")
    planned = Run.of(parse(load_config("debug"), command(folder, "run")[2:]))
    assert planned.heldout is not None
    config = EngineConfig(3, policy="fixed", smallest_prompt_bucket=64)
    drafter = load_drafter(trained / "drafter", target)
    by_domain = acceptance_by_domain(target, drafter, planned.heldout.prompts, SamplingParams(12), config)
    assert set(by_domain) == {"chat", "code"}
    last = read_records(trained / "metrics.jsonl")[-1]
    assert last["eval_tau"] == macro_tau(by_domain) and last["eval_tau_code"] == by_domain["code"].tau


def test_later_evaluations_compile_nothing(folder: Path, trained: Path):
    planned = Run.of(parse(load_config("debug"), command(folder, "run")[2:]))
    assert planned.heldout is not None
    evaluator = Evaluator.of(planned.name, planned.target, planned.step, planned.heldout)
    params = initial_state(planned).params
    first, compiled = evaluator(params), run_rounds._cache_size()  # type: ignore[attr-defined]
    assert evaluator(params) == first
    evaluator(jax.tree.map(lambda x: 0.5 * x, params))
    assert run_rounds._cache_size() == compiled  # type: ignore[attr-defined]


def test_the_best_checkpoint_outlives_later_ones(tmp_path: Path):
    def state(value: float) -> dict[str, jax.Array]:
        return {"x": jax.numpy.full((2,), value)}

    with Checkpoints(tmp_path / "c", keep=1, keep_best=1) as checkpoints:
        for step, score in ((1, 2.0), (2, 3.0), (3, None), (4, 1.0), (5, None)):
            checkpoints.save(step, state(step), {}, score)
        checkpoints.wait()
        assert (checkpoints.best, checkpoints.latest) == (2, 5)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "5"]
    with Checkpoints(tmp_path / "c", keep=1, keep_best=1) as checkpoints:  # the scores are on the disk
        checkpoints.save(6, state(6.0), {}, 3.0)
        checkpoints.wait()
        assert (checkpoints.best, checkpoints.latest) == (6, 6)


def test_the_best_drafter_is_exported(folder: Path, trained: Path):
    summary = json.loads((trained / "metrics.json").read_text())
    config = parse(load_config("debug"), command(folder, "run")[2:])
    with Checkpoints(trained / "checkpoints", 1, 1) as checkpoints:
        assert checkpoints.best == summary["best_step"]
        state, _ = checkpoints.restore(summary["best_step"], Run.of(config).step.abstract)
    best = load_drafter(trained / "drafter_best", load_target(folder / "target", dtype="float32"))
    jax.tree.map(np.testing.assert_array_equal, best.params, state.params)


def test_a_stop_between_evaluations_changes_no_record(folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, *rest: Any) -> None:
        save(self, done, *rest)
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Checkpoints, "save", save_and_stop)
        main(command(folder, "stopped"))
    main(command(folder, "stopped"))
    one, other = untimed(trained), untimed(folder / "stopped")
    assert one == other and {"eval_tau", "loss"} <= one[-1].keys()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--evaluation.prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--evaluation.prompts", ""), "evaluation.prompts is ''; a JSONL file of held-out prompts was expected"),
        (("--evaluation.slots", 0), "evaluation.slots is 0; at least 1 was expected"),
    ],
)
def test_refusals_write_nothing(folder: Path, more: tuple, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(command(folder, "refused", *more))
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (folder / "refused").exists()


def generation(
    rounds: int, committed: int, verified: tuple[int, ...], accepted: tuple[int, ...], judged: tuple[int, ...]
) -> Generation:
    return Generation(0, (1,), (2,), "", "length", rounds, committed, verified, accepted, judged)


def test_acceptance_counts_by_hand():
    ended = generation(0, 0, (0, 0, 0), (0, 0, 0), (0, 0, 0))
    one = Acceptance.of([generation(10, 19, (10, 10, 10), (6, 3, 0), (10, 6, 3)), ended])
    assert one.tau == 1.9 and one.unconditional == (0.6, 0.3, 0.0) and one.conditional == (0.6, 0.5, 0.0)
    assert Acceptance.of([generation(4, 4, (), (), ())]).conditional == ()
    both = Acceptance.pooled([one, Acceptance.of([generation(10, 31, (10, 10, 10), (10, 7, 4), (10, 10, 7))])])
    assert both.tau == 2.5 and both.conditional == (0.8, 10 / 16, 0.4)
    assert macro_tau({"a": one, "b": both}) == pytest.approx(2.2)


def test_conditional_acceptance_counts_only_what_was_judged():
    """A schedule that stops at x_1 in rounds that accept it says nothing of x_2: 4 rounds of the second request judge
    x_2 after 2 accepted x_1, and 1 of those accepts it."""
    short, whole = generation(4, 7, (4, 0), (3, 0), (4, 0)), generation(4, 7, (4, 4), (2, 1), (4, 2))
    assert Acceptance.of([short, whole]).conditional == (5 / 8, 1 / 2)
    assert Acceptance.of([whole]).conditional == (2 / 4, 1 / 2)
