"""Regenerated answers: what the engine is asked, what becomes of its answers, and independence of the neighbours."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import dspark_jax.datagen.regeneration as regeneration
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.chat import encode_prompt
from dspark_jax.data.conversations import prompt_segments
from dspark_jax.datagen.preparation import summarise
from dspark_jax.datagen.regeneration import Finished, Regenerator, Rejected, Source, answer_message
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.errors import UserError
from dspark_jax.serving import engine
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.tiny import SPECIAL, write_tiny_target

STOP = SPECIAL.index("<|im_end|>")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(write_tiny_target(tmp_path_factory.mktemp("target") / "tiny"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class ScriptedEngine:
    """Answers each request with the next text of its conversation; None is an answer cut by the limit."""

    def __init__(self, script: dict[int, list[str | None]], tokenizer):
        self.script, self.tokenizer = script, tokenizer
        self.prompts: dict[int, list[tuple[int, ...]]] = {}
        self.pending: list[int] = []
        self.most_pending = 0

    def __call__(self, *_: object) -> "ScriptedEngine":
        return self

    def submit(self, index: int, request) -> None:
        self.prompts.setdefault(index, []).append(tuple(request.prompt))
        self.pending.append(index)
        self.most_pending = max(self.most_pending, len(self.pending))

    def step(self) -> list:
        ended, self.pending = self.pending, []
        return [SimpleNamespace(index=index, generation=self.generation(index)) for index in ended]

    def generation(self, index: int) -> SimpleNamespace:
        text = self.script[index].pop(0)
        ids = tuple(self.tokenizer(text or "cut", add_special_tokens=False)["input_ids"])
        if text is None:
            return SimpleNamespace(tokens=ids, text="cut", finish_reason="length")
        return SimpleNamespace(tokens=(*ids, STOP), text=text, finish_reason="stop")


def scripted(
    target: Target, monkeypatch: pytest.MonkeyPatch, conversations: list[list[dict]], script: dict, **config
) -> tuple[list[Finished | Rejected], ScriptedEngine]:
    fake = ScriptedEngine(script, target.tokenizer)
    monkeypatch.setattr(regeneration, "Engine", fake)
    sources = [Source(i, str(i), prompt_segments(c)) for i, c in enumerate(conversations)]
    regenerator = Regenerator(target, False, SamplingParams(8), EngineConfig(**({"slots": 4} | config)), 200)
    ended = [e for batch in regenerator.run(sources, regenerator.longest(sources)) for e in batch]
    return sorted(ended, key=lambda e: e.source.index), fake


def test_segments_drop_the_answers():
    turns = [{"role": "system", "content": "s"}, user("a"), assistant("x"), user("b"), user("c"), assistant("y")]
    assert prompt_segments(turns) == ((turns[0], turns[1]), (turns[3], turns[4]))
    for turns, said in (
        ([assistant("x")], "no user turn"),
        ([user("a"), {"role": "tool", "content": "1"}], "it uses tools"),
        ([user("a"), assistant("x") | {"tool_calls": [{}]}], "it uses tools"),
    ):
        with pytest.raises(UserError, match=said):
            prompt_segments(turns)


def test_turns_are_answered_one_after_the_other(target: Target, monkeypatch: pytest.MonkeyPatch):
    conversation = [user("one"), assistant("dropped"), user("two"), assistant("dropped as well"), user("three")]
    (ended,), fake = scripted(target, monkeypatch, [conversation], {0: ["A", "B", "C"]})
    expected = [user("one"), assistant("A"), user("two"), assistant("B"), user("three"), assistant("C")]
    assert list(ended.messages) == expected and ended.finish_reason == "stop" and ended.tokens == 6
    prompts = [tuple(encode_prompt(target.tokenizer, expected[:end]).tolist()) for end in (1, 3, 5)]
    assert fake.prompts[0] == prompts


def test_a_cut_answer_ends_its_conversation(target: Target, monkeypatch: pytest.MonkeyPatch):
    (ended,), _ = scripted(target, monkeypatch, [[user("one"), assistant(""), user("two")]], {0: [None, "never"]})
    assert list(ended.messages) == [user("one"), assistant("cut") | {"truncated": True}]
    assert ended.finish_reason == "length"


def test_a_cut_answer_loses_the_character_it_was_cut_within():
    assert answer_message("caf\ufffd", "length") == {"role": "assistant", "content": "caf", "truncated": True}
    assert answer_message("caf\ufffd", "stop") == {"role": "assistant", "content": "caf\ufffd"}


def test_what_is_set_aside(target: Target, monkeypatch: pytest.MonkeyPatch):
    long = user("x" * 400)
    conversations = [[user("a")], [user("b")], [long], [user("c"), assistant(""), long], [user("d")]]
    script = {0: ["\n "], 1: ["so<|mask|>"], 3: ["fine"], 4: ["fine"]}
    ended, _ = scripted(target, monkeypatch, conversations, script)
    reasons = [e.reason if isinstance(e, Rejected) else "" for e in ended]
    assert reasons[0] == "turn 1: the answer is empty."
    assert reasons[1] == "turn 1: the answer holds the special token '<|mask|>'."
    assert "turn 1: a prompt of " in reasons[2] and "no room for 8 new ones in a context of 200" in reasons[2]
    assert "turn 2: a prompt of " in reasons[3]
    assert isinstance(ended[4], Finished)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", '{"id": "x", "finish_reason": "stop"}', r"a\.jsonl, the row with id .x., has no field 'tokens'"),
        (
            "a.jsonl",
            '{"id": "x", "finish_reason": "stop", "tokens": "3"}',
            r'has tokens = "3"; expected a whole number',
        ),
        ("a.jsonl", '{"id": "x", "tokens": NaN}', "line 2: found NaN"),
        ("a.rejected.jsonl", '{"id": "x"}', r"a\.rejected\.jsonl, the row with id .x., has no field 'reason'"),
        ("a.rejected.jsonl", '["x"]', "found a list of 1"),
    ],
)
def test_rows_of_an_earlier_run_are_checked(tmp_path: Path, name: str, line: str, message: str) -> None:
    settings = PrepareSettings(tmp_path / "a.jsonl", target="tiny", embedded_prompts="code")
    settings.output.write_text('{"id": "y", "tokens": 3, "finish_reason": "stop"}\n')
    with open(tmp_path / name, "a") as handle:
        handle.write(line + "\n")
    with pytest.raises(UserError, match=message):
        summarise(settings, 3, 1.0)


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 1), (5, 2), (16, 8)])
def test_at_most_half_the_slots_are_filled_at_once(slots: int, most: int, target: Target, monkeypatch):
    conversations = [[user(str(i))] for i in range(20)]
    ended, fake = scripted(target, monkeypatch, conversations, {i: ["A"] for i in range(20)}, slots=slots)
    assert len(ended) == 20 and fake.most_pending == most


def test_answers_do_not_depend_on_the_batch(target: Target, monkeypatch: pytest.MonkeyPatch):
    """The same answers in another order, with other neighbours and slots; every prompt prefilled by itself."""
    prefilled: list[int] = []

    def admit(loop, params, state, batch, *how):
        prefilled.append(len(batch.tokens))
        return whole(loop, params, state, batch, *how)

    whole = engine.admit
    monkeypatch.setattr(engine, "admit", admit)
    sampling = SamplingParams(12, temperature=0.9, top_p=0.95)
    regenerator = Regenerator(target, False, sampling, EngineConfig(4, rounds_per_dispatch=4), 200)
    sources = [Source(i, str(i), ((user("word " * (i % 5) + str(i)),),)) for i in range(10)]
    longest = regenerator.longest(sources)

    def answers(chosen: list[Source]) -> dict[int, object]:
        ended = [e for batch in regenerator.run(chosen, longest) for e in batch]
        return {e.source.index: replace(e, source=None) for e in ended}

    everything = answers(sources)
    assert set(everything) == set(range(10)) and set(prefilled) == {1}
    assert len({str(answer) for answer in everything.values()}) == 10
    assert answers(sources[:2:-1]) == {i: everything[i] for i in range(3, 10)}
