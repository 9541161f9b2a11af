"""`infer.studies.auto`, `infer.studies.capacity` and `infer.studies.paged` from beginning to end on a tiny pair."""

import json
from pathlib import Path

import pytest

from dspark_jax.serving.prompts import EncodedPrompt
from infer.studies import auto, capacity, paged
from infer.studies.auto import STRATEGIES, AutoSettings, mixed
from tests.test_infer_programs import refused, write_drafter
from tests.tiny import write_tiny_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    write_tiny_target(folder / "target")
    write_drafter(folder / "target", folder / "drafter")
    rows = [{"turns": [text]} for text in ("one", "Return the length of the list.", "two words")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.long
def test_auto_is_compared_by_users(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_JAX_CACHE", str(tmp_path / "cache"))
    results = tmp_path / "auto.json"
    results.write_text('{"another pair": {}, "drafter": {"1": {}}}')
    pair = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
    short = ["--users", "2", "--requests", "4", "--repeats", "1", "--max-new-tokens", "8", "--results", str(results)]
    auto.main([*pair, "--prompts", str(folder / "prompts.jsonl"), *short])

    found = json.loads(results.read_text())
    assert set(found) == {"another pair", "drafter"} and set(found["drafter"]) == {"1", "2"}, "added to the others"
    row = found["drafter"]["2"]
    assert row["settings"]["requests"] == 4 and row["machine"]["cores"]
    assert set(row["medians"]) == set(STRATEGIES) and min(row["medians"].values()) > 0
    best = max(row["medians"]["plain"], row["medians"]["fixed"])
    assert row["auto_over_best"] == pytest.approx(row["medians"]["auto"] / best) and row["slots"] == 2
    assert row["why"].startswith(("plain decoding: drafting cannot pay", "look-ahead: drafts where that pays"))


def test_domains_take_turns() -> None:
    made = [EncodedPrompt(str(i), domain, (i,)) for i, domain in enumerate("aaabbc")]
    assert [prompt.domain for prompt in mixed(made, 2)] == ["a", "b", "c", "a", "b"]
    assert AutoSettings("t", "d", ()).users == (1, 4, 16)


@pytest.mark.long
def test_rounds_are_timed_by_capacity(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter"), "--held", "32"]
    short = ["--rounds", "1", "--repeats", "1", "--results", str(tmp_path / "capacity.json")]
    # One whose positions are read chunk by chunk; two would compile twice as much.
    capacity.main([*pair, *short, "--capacities", "2112"])
    rows = json.loads((tmp_path / "capacity.json").read_text())["capacities"]
    assert list(rows) == ["2112"] and rows["2112"]["plain"]["ratio"] == 1 and rows["2112"]["whole"]["seconds"] > 0
    assert "plain round, ms (ratio)" in capsys.readouterr().out
    said = refused(capacity.main, [*pair, *short, "--capacities", "100"], capsys)
    assert "The capacities are [100]; expected multiples of 64" in said


def test_requests_are_replayed_in_pages(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--target", str(folder / "target"), "--drafter", str(folder / "drafter")]
    # Answers of more than one dispatch, between two of which they are counted.
    short = ["--requests", "3", "--slots", "1", "--paged-slots", "3", "--longest", "384", "--new", "20", "--page", "16"]
    results = tmp_path / "paged.json"
    # All begin with the tokens of the first prompt, a chunk of which is kept.
    rows = [{"turns": [8 * text]} for text in ("x y ", "y x ", "x x ")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ["--prompts", str(tmp_path / "prompts.jsonl"), "--temperatures", "1.0", "--shared", "128"]
    paged.main([*pair, *prompts, *short, "--results", str(results)])
    found = json.loads(results.read_text())
    assert found["identical"] == {"t1": 3} and found["settings"]["prompts"] == "prompts"
    slots, pages, shared = (found[name] for name in ("by slot", "in pages", "in shared pages"))
    reused = [one["t1"]["prompt_tokens_reused_so_far"] for one in (slots, pages, shared)]
    # The first two come in at once, before anything is kept; the third waits for pages.
    assert reused == [0, 0, 128] and shared["whole_cache_copies"] == 0
    assert slots["whole_cache_copies"] == pages["whole_cache_copies"] == 0
    assert pages["state_mib"] <= slots["state_mib"] and pages["t1"]["requests_at_once_most"] > 1
    assert "requests at once, ratio" in capsys.readouterr().out
    said = refused(paged.main, [*pair, *prompts, *short, "--paged-slots", "40"], capsys)
    assert "too few for one request of 384 positions" in said
