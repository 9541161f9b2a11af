"""Prompts that a target writes itself: what is kept, what is dropped and why, continuation, the program's options."""

import json
from pathlib import Path

import pytest

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.datagen.self_prompts import (
    DOMAINS,
    WINDOW,
    Domain,
    Filter,
    Writer,
    excluded_prompts,
    read_domains,
    same_as,
    write_prompts,
)
from dspark_jax.errors import UserError
from dspark_jax.serving.settings import EngineConfig
from tests.tiny import write_tiny_target
from train.prepare_data import main

CHAT, MATH = Domain("chat", ("You help.",), ("Why", "How")), Domain("math", ("You count.",), ("Tom has",), "number")


@pytest.mark.parametrize(
    ("text", "domain", "ended", "reason"),
    [
        ("Why is the sky so blue today?", CHAT, True, None),
        ("Why is the sky so blue today?", CHAT, False, "does not end"),
        ("Why not?", CHAT, True, "too short"),
        ("Why " + "is this so very long " * 40, CHAT, True, "too long"),
        ("Why is " + "天空蓝色" * 9 + " a word here", CHAT, True, "Latin"),
        ("Why is it so it is so it is so it is so it is so it is so it is so", CHAT, True, "repeats"),
        ("Tom has apples and gives them away to whom?", MATH, True, "numbers"),
        ("Tom has three apples and eats one. How many are left?", MATH, True, None),
        ("WHY is the rain -- so wet?", CHAT, True, "is there or excluded"),
    ],
)
def test_what_is_no_prompt_is_dropped(text: str, domain: Domain, ended: bool, reason: str | None) -> None:
    found = Filter(set(same_as("Why is the rain so wet"))).reason(text, domain, ended)
    assert (found is None) if reason is None else reason in str(found)


def test_a_prompt_is_kept_once() -> None:
    sieve = Filter(set())
    assert sieve.reason("Why is the sky so blue today?", CHAT, True) is None
    assert "is there" in str(sieve.reason("why is the sky so blue, today", CHAT, True))


def test_evaluation_sets_are_excluded(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(
        json.dumps({"turns": ["Tom has 3 apples. How many?\nReason step by step."]}) + "\n"
    )
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Why is it so?"}]}) + "\n"
    )
    sieve = Filter(excluded_prompts([tmp_path / "set.jsonl", tmp_path / "chat.jsonl"]))
    assert "excluded" in str(sieve.reason("Tom has 3 apples. How many?", MATH, True))
    assert "excluded" in str(sieve.reason("Why is it so?", CHAT, True))


def test_domains_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "domains.jsonl"
    file.write_text(json.dumps({"domain": "law", "system": ["You know the law."], "openers": ["May I"]}) + "\n")
    assert read_domains(file) == (Domain("law", ("You know the law.",), ("May I",)),)
    for row in ({"domain": "law"}, {"domain": "law", "system": [], "openers": []}, {"domain": 1, "system": ["x"]}):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match="line 1 is no domain"):
            read_domains(file)
    assert {domain.name for domain in DOMAINS} == {"math", "code", "chat"}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    target = load_target(write_tiny_target(tmp_path_factory.mktemp("writer") / "target"))
    return Writer(target, (CHAT, MATH), EngineConfig(16, policy="plain", smallest_prompt_bucket=64), seed=3)


def test_a_turn_is_begun_as_the_template_renders_it(writer: Writer) -> None:
    text = writer.target.tokenizer.decode(writer.prefix("You help.", "Why"))
    assert text == "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWhy"


def test_a_run_that_was_cut_ends_with_the_same_prompts(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model writes noise, so everything is kept here."""
    monkeypatch.setattr(Filter, "reason", lambda self, text, domain, ended: None if "h" in text else "no h")
    whole = list(write_prompts(writer, WINDOW + 5, tmp_path / "whole.jsonl", set()))
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[: WINDOW + 7]) + lines[WINDOW + 8][:10])
    assert list(write_prompts(writer, WINDOW + 5, tmp_path / "cut.jsonl", set())) == whole
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole) == WINDOW + 5 == len({row["id"] for row in whole})


def test_the_program_answers_what_the_target_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Filter, "reason", lambda self, text, domain, ended: None)
    folder = write_tiny_target(tmp_path / "target")
    options = [
        "--target",
        str(folder),
        "--self-prompts",
        "5",
        "--max-new-tokens",
        "8",
        "--output",
        str(tmp_path / "o.jsonl"),
    ]
    main(options)
    prompts = [json.loads(line) for line in (tmp_path / "o.prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in prompts] == [f"self-{i}" for i in range(5)]
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert rows and all(row["source"] == "self" and row["domain"] in {"math", "code", "chat"} for row in rows)
    main(options)
    with pytest.raises(SystemExit):
        main([*options, "--seed", "1"])
    with pytest.raises(SystemExit):
        main(["--target", str(folder), "--domains", str(tmp_path), "--embedded-prompts", "code", "--output", "x"])
