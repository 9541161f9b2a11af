"""The demo's second act, answers by the origin of their tokens, and the comparison of runtimes; no real target."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.errors import UserError
from dspark_jax.evaluation.drafted import drafted_pieces, pieces
from dspark_jax.evaluation.timing import Timed
from dspark_jax.report import painted
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from infer import demo
from infer.studies.runtimes import LlamaCpp, row_of


def answering(monkeypatch: pytest.MonkeyPatch, codes: dict[str, int]) -> list[str]:
    """Stands in for the programs: each ends with its code (0 where none is given); their names, as they run."""
    ran: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        words = [word for word in command if word.startswith(("train.", "infer."))]
        ran.append(words[0])
        if "--result" in command:
            result = Path(command[command.index("--result") + 1])
            result.parent.mkdir(parents=True)
            result.write_text(json.dumps({"speculative_over_plain_t0": 1.5}))
        return subprocess.CompletedProcess(command, codes.get(words[0], 0))

    monkeypatch.setattr(demo.subprocess, "run", run)
    return ran


def test_the_second_act_measures_the_real_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, seconds = answering(monkeypatch, {}), dict[str, float]()
    found = demo.second_act(demo.DemoSettings(folder=tmp_path), seconds)
    assert found == {"speculative_over_plain_t0": 1.5} and len(seconds) == 3
    assert ran == ["train.real_target", "train.embedded.corpora", "infer.studies.real_pair"]


def test_without_a_package_index_the_demo_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = answering(monkeypatch, {"train.real_target": 2})
    assert demo.second_act(demo.DemoSettings(folder=tmp_path), {}) is None
    assert ran == ["train.real_target"] and "The real pair is left out" in capsys.readouterr().out


def test_another_failure_stops_the_second_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"infer.studies.real_pair": 1})
    with pytest.raises(UserError, match="stopped at the step 'decode with the real pair'"):
        demo.second_act(demo.DemoSettings(folder=tmp_path), {})


def test_pieces_follow_origins_and_keep_characters_whole() -> None:
    texts = "Ünïted".encode()
    made = pieces(lambda ids: texts[: len(ids)].decode(errors="replace"), range(len(texts)), [False, True, True] * 3)
    assert "".join(text for text, _ in made) == "Ünïted"
    # The first byte of Ü is the target's own, the second drafted: the character is drafted.
    assert made[0] == ("Ün", True)
    assert painted([("a", True), ("b", False)], colour=False) == "‹a›b"


def test_drafted_pieces_are_the_answer_and_count_what_was_accepted() -> None:
    from dspark_jax.checkpoints.drafters import load_drafter
    from dspark_jax.checkpoints.huggingface import load_target

    target = load_target("embedded", dtype="float32")
    drafter = load_drafter("embedded", target, dtype="float32")
    prompt, sampling = "Tom has 3 apples and buys 4 more.", SamplingParams(24, 0.0)
    engine = EngineConfig(1, 64, "fixed")
    made = drafted_pieces(target, drafter, prompt, sampling, engine)
    (plain,) = generate(target, drafter, [prompt], sampling, engine)
    assert "".join(text for text, _ in made) == plain.text
    assert any(drafted for _, drafted in made) == (sum(plain.accepted_at) > 0)
    assert not made[0][1]


def test_a_row_compares_with_plain_decoding() -> None:
    def timed(tokens: tuple[int, ...], seconds: float) -> Timed:
        return Timed((Generation(0, (1,), tokens, "", "length", 1, 1, (), (), ()),), seconds)

    row = row_of([timed((1, 2), 1.0)], [timed((1, 2), 2.0)], [(1, 2)])
    assert row == {"tokens_per_second": 2.0, "over_plain": 2.0, "identical": 1}
    assert row_of([timed((1, 3), 1.0)], [timed((1, 2), 2.0)], [(1, 2)])["identical"] == 0


def test_llama_cpp_needs_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no GGUF file"):
        LlamaCpp.load(str(tmp_path), None, 64, 8)
