"""The study of drafters: its points, its tables and figures from results by hand, and one point from end to end."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.files import weights_hash, write_settings
from dspark_jax.training.guards import Preempted
from dspark_jax.training.synthetic_cache import write_synthetic_cache
from tests.tiny import write_tiny_target
from train.studies import compare_point
from train.studies.compare import CompareSettings, all_points, finished, main, point_config, take_conversations
from train.studies.compare_report import TRAINED, estimate, publish, report
from train.studies.comparison import BLOCKS, CONTESTANTS, LOSSES, MAIN, NEXT, StudyPoint, study_points

pytestmark = pytest.mark.usefixtures("shared_steps")

ABOUT = {"command": "python -m train.studies.compare", "depth": 2, "block": 7, "steps": 10}


def test_the_parts_share_their_points():
    settings = CompareSettings(seeds=3)
    points = all_points(settings)
    assert len(study_points("main", 2, 3)) == 12 and len(points) == 12 + 4 + 12
    assert len({p.name for p in points}) == len(points)
    assert {p.block for p in points if p.drafter == "dspark_rnn"} == set(BLOCKS)
    main_only = all_points(replace(settings, only=("main",), seeds=2))
    assert [p.seed for p in main_only] == [0] * 4 + [1] * 4
    depths = {p.drafter: p.depth for p in main_only}
    assert depths == {"dspark": 2, "dflash": 2, "eagle3": 1, "mtp1": 1}
    shorter = all_points(replace(settings, only=("main", "next", "losses"), seeds=1, block=4))
    assert {p.drafter: p.block for p in shorter} == dict.fromkeys((*MAIN, *NEXT, *LOSSES), 4) | {"mtp1": 1}
    assert len(shorter) == 4 + 2 + 5


@pytest.mark.parametrize("name", CONTESTANTS)
def test_points_differ_in_kind_depth_and_block_alone(name: str):
    settings = CompareSettings(layers=(1, 4, 7), steps=20)
    one, other = (point_config(settings, StudyPoint(n, 1, 5, 2), 20) for n in (name, "dspark"))
    for field in ("data", "max_steps", "epochs", "seed", "target"):
        assert getattr(one, field) == getattr(other, field)
    taps = (9,) if name == "mtp1" else (1, 4, 7)
    assert one.drafter.target_layer_ids == taps and one.drafter.init_target_layers == ()
    assert (one.max_steps, one.seed, one.data.seed, one.drafter.num_layers) == (20, 2, 2, 1)


def test_dflash_is_the_backbone_alone():
    config = point_config(CompareSettings(), StudyPoint("dflash", 2, 7, 0), 20)
    assert (
        config.drafter.kind == "dflash"
        and config.drafter.markov_rank == 0
        and not config.drafter.enable_confidence_head
    )
    assert (config.loss.l1_alpha, config.loss.confidence_alpha) == (0.0, 0.0)


def test_one_loss_for_all_takes_the_place_of_each_contestants():
    settings = CompareSettings(loss="lk")
    losses = {point_config(settings, StudyPoint(n, 2, 7, 0), 20).loss for n in ("dspark", "dflash", "dspark_rnn")}
    assert [(x.ce_alpha, x.l1_alpha, x.lk_alpha, x.confidence_alpha) for x in losses] == [(0.0, 0.0, 1.0, 0.0)]
    both = point_config(CompareSettings(), StudyPoint("dspark_lk_reach", 2, 7, 0), 20).loss
    assert (both.lk_alpha, both.confidence_alpha, both.confidence_weights) == (1.0, 1.0, "reach")


def test_layers_may_start_as_the_target_s_last():
    settings = CompareSettings(start="target")
    assert point_config(settings, StudyPoint("dspark", 2, 7, 0), 20).drafter.init_target_layers == (8, 9)
    assert point_config(settings, StudyPoint("dflash", 1, 7, 0), 20).drafter.init_target_layers == (9,)
    assert point_config(settings, StudyPoint("eagle3", 1, 7, 0), 20).drafter.init_target_layers == (9,)


def test_another_target_s_recipe_shortens_the_vocabulary_of_those_that_can():
    settings = CompareSettings(recipe="smollm2_135m_dspark", max_length=192, batch=2)
    made = {name: point_config(settings, StudyPoint(name, 1, 7, 0), 20) for name in MAIN}
    assert all(
        (config.data.length_buckets, config.data.global_batch) == ((96, 144, 192), 2) for config in made.values()
    )
    short = point_config(replace(settings, max_length=128), StudyPoint("dspark", 1, 7, 0), 20)
    assert short.data.length_buckets == (128,)
    assert [bool(made[name].drafter.draft_vocabulary) for name in MAIN] == [True, True, False, False]
    assert {config.drafter.mask_token_id for config in made.values()} == {3}


def test_the_first_conversations_of_each_domain_are_taken(tmp_path: Path):
    rows = [{"id": str(i), "domain": "ab"[i % 2], "messages": []} for i in range(6)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    take_conversations(tmp_path / "all.jsonl", tmp_path / "some.jsonl", 2)
    assert [json.loads(line) for line in (tmp_path / "some.jsonl").open()] == rows[:4]


def test_estimates_have_student_s_intervals():
    made = estimate([1.0, 2.0, 3.0])
    assert made["mean"] == 2.0 and made["ci95"] == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert estimate([1.5])["ci95"] is None
    many = [float(i % 2) for i in range(13)]  # Student's t of 12 degrees of freedom, beyond any short table
    assert estimate(many)["ci95"] == pytest.approx(2.178813 * np.std(many, ddof=1) / np.sqrt(13), rel=1e-5)


def result(point: StudyPoint, tau: float) -> dict[str, Any]:
    """Counts of 1000 rounds a domain that give this tau in code, and half a token more in chat and in math."""

    def row(tau: float) -> dict[str, Any]:
        accepted = np.linspace(600, 600 / point.block, point.block).astype(int).tolist()
        judged = [1000, *accepted[:-1]]
        counts = {"rounds": 1000, "committed": round(1000 * tau), "verified": [1000] * point.block}
        return counts | {"accepted": accepted, "judged": judged}

    domains = {"code": row(tau), "chat": row(tau + 0.5), "math": row(tau + 0.5)}
    trained = dict.fromkeys(TRAINED, 1.0) | {"train_curve": [(1, 1.0), (2, tau)], "train_positions": [0.5]}
    return {"t1": domains, "t0": domains, **trained}


HEADS = {"none": 1e-3, "vanilla": 1.01e-3, "rnn": 1.02e-3}
COST = {
    "rank": 64,
    "repeats": 3,
    "rows": [
        {"slots": slots, "block": block, "round_seconds": HEADS, "overhead": {"vanilla": 0.01, "rnn": 0.02}}
        for slots in (1, 16)
        for block in BLOCKS
    ],
}


def test_the_report_of_a_whole_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    taus = {"dspark": 2.4, "dflash": 2.0, "eagle3": 1.8, "mtp1": 1.5, "dspark_rnn": 2.5}
    found = {p: result(p, taus[p.drafter] + 0.1 * p.seed) for p in all_points(CompareSettings())}
    assert report(tmp_path, found, COST, ABOUT)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    third = 1.0 / 3
    assert metrics["tau_macro_t1"] == pytest.approx({name: taus[name] + 0.1 + third for name in MAIN})
    assert metrics["table1_t1"]["dspark"]["code"]["values"] == pytest.approx([2.4, 2.5, 2.6])
    gains = [(2.4 + d + third) / (2.0 + d + third) - 1 for d in (0.0, 0.1, 0.2)]
    assert metrics["gains_t1"]["dflash"]["values"] == pytest.approx(gains)
    assert [len(metrics["figure2_t1"][name]["all"]["rates"]) for name in MAIN] == [7, 7, 7, 1]
    assert metrics["figure2_t1"]["dspark"]["math"]["rates"][0] == pytest.approx(0.6)
    assert set(metrics["figure3_t1"]["dflash"]) == {"1", "2", "3"} == set(metrics["figure3_t1"]["dspark"])
    assert len(metrics["figure3_t1"]["dspark"]["2"]["macro"]["values"]) == 3
    # The last fifth of two steps is the second.
    assert metrics["figure3_t1"]["dspark"]["2"]["expected"]["values"] == pytest.approx([2.4, 2.5, 2.6])
    assert {name: list(row) for name, row in metrics["figure4_t1"].items()} == {
        "dspark_rnn": [str(block) for block in BLOCKS]
    } | dict.fromkeys(("dflash", "dspark"), [str(block) for block in sorted((*BLOCKS, 7))])
    printed = capsys.readouterr().out
    assert "DSpark over DFlash: +" in printed and "MTP-1" in printed and "+2.0%" in printed
    for plot in ("figure2", "figure3", "figure4", "training"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 5000
    publish(tmp_path, tmp_path / "results", "compare")
    assert json.loads((tmp_path / "results" / "compare.json").read_text()) == metrics
    assert (tmp_path / "results" / "compare_figure2.png").exists()


def test_later_drafters_and_losses_have_tables_beside_dspark(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    points = all_points(CompareSettings(only=("next", "losses"), block=4))
    assert report(tmp_path, {p: result(p, 2.0 + 0.1 * i) for i, p in enumerate(points)}, None, {**ABOUT, "block": 4})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["next_t1"]["dflash2"]["code"]["mean"] == pytest.approx(2.2)
    assert list(metrics["losses_t1"]) == list(LOSSES) and list(metrics["tau_macro_t1"]) == ["dspark"]
    assert metrics["training"]["dspark_lk"]["curve"] == [[[1, 1.0], [2, 2.4]]] and not metrics["figure3_t1"]
    assert "DSpark + convolution" in capsys.readouterr().out


def test_a_study_that_decodes_nothing_has_curves_of_what_was_expected(tmp_path: Path):
    points = [StudyPoint(name, depth, 7, 0) for name in ("dspark", "dflash") for depth in (1, 2)]
    found = {p: {k: v for k, v in result(p, 2.0 + p.depth).items() if k.startswith("train_")} for p in points}
    found = {p: row | {"train_positions": [0.9, 0.25, 0.75]} for p, row in found.items()}
    assert report(tmp_path, found, None, ABOUT)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["figure3_t1"]["dflash"] == {
        str(d): {"expected": estimate([2.0 + d]), "later": estimate([0.5])} for d in (1, 2)
    }
    assert not metrics["figure3_t0"] and not metrics["table1_t1"] and not metrics["figure4_t1"]


def test_a_report_of_what_there_is_so_far(tmp_path: Path):
    assert not report(tmp_path, {}, None, ABOUT)
    point = StudyPoint("dflash", 2, 7, 1)
    assert report(tmp_path, {point: result(point, 2.0)}, None, ABOUT)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["tau_macro_t1"]) == ["dflash"] and metrics["gains_t1"] == {}
    assert metrics["table1_t1"]["dflash"]["macro"]["ci95"] is None
    unfinished = StudyPoint("dspark", 2, 7, 0)
    nothing = {"rounds": 0, "committed": 0, "verified": [0] * 7, "accepted": [0] * 7, "judged": [0] * 7}
    assert report(tmp_path, {unfinished: {**result(unfinished, 1.0), "t1": {"code": nothing}}}, None, ABOUT)


# The program, on a tiny target and a cache of random tokens.


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compare")
    target = write_tiny_target(folder / "target", num_hidden_layers=4)
    cache = folder / "study" / "cache"
    write_synthetic_cache(cache, describe_target(target), (0, 1, 3), records=8, length=24, seed=0)
    write_settings(cache / "build.json", {"weights_xxh3": weights_hash(target)})
    rows = [
        {"id": f"{d}{i}", "domain": d, "messages": [{"role": "user", "content": "one"}]} for d in "ab" for i in "01"
    ]
    (folder / "study" / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["--target", str(target), "--output", str(folder / "study")]
    options = "--layers 0 1 --steps 2 --max-new-tokens 8 --samples 2 --depth 1"
    return [*places, *options.split()]


def test_a_point_trains_decodes_and_is_found_again(study: list[str], capsys: pytest.CaptureFixture[str]):
    point = StudyPoint("dspark", 1, 7, 0)
    main([*study, "--only", "main", "--point", point.name])
    output = Path(study[3])
    found = finished(CompareSettings(output=output, depth=1))
    assert list(found) == [point] and found[point]["seed"] == 0
    for key, requests in (("t1", 4), ("t0", 2)):
        assert set(found[point][key]) == {"a", "b"}
        row = found[point][key]["a"]
        assert row["committed"] <= 7 * requests, "the first token is the prefill's"
        assert row["verified"][0] == row["rounds"] > 0
    assert (output / "points" / point.name / "drafter" / "model.safetensors").exists()
    assert [step for step, _ in found[point]["train_curve"]] == [1, 2] and len(found[point]["train_positions"]) == 7
    assert found[point]["train_cpu_seconds"] > 0


def test_a_stopped_point_ends_with_a_sentence(
    study: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: Any, **__: Any) -> None:
        raise Preempted(1)

    monkeypatch.setattr(compare_point, "train_and_decode", stopped)
    with pytest.raises(SystemExit) as stop:
        main([*study, "--only", "main", "--point", "dflash,depth=1,block=7,seed=0"])
    assert stop.value.code == 128 + signal.SIGTERM and "continues there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "3", "--point", "x"], "was begun with steps = 2, this run has 3"),
        (["--point", "x"], "no point 'x'; its points are dspark,depth=1,block=7,seed=0"),
        (["--layers", "0", "3"], "up to 2"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--loss", "lk", "--only", "losses"], "--loss lk gives all the same"),
    ],
)
def test_compare_refusals(study: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([*study, *more])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_cache_of_another_target_is_refused(study: list[str], capsys: pytest.CaptureFixture[str]):
    path = Path(study[3]) / "cache" / "build.json"
    kept = path.read_text()
    write_settings(path, {"weights_xxh3": "other"})
    with pytest.raises(SystemExit):
        main([*study, "--only", "data"])
    path.write_text(kept)
    assert "was built with target weights other" in capsys.readouterr().err
