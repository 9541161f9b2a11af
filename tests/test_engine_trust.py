"""The engine's contract (docs/engine.md): interrupts, failures, threads, stop strings, text as it comes."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from dspark_jax.errors import UserError
from dspark_jax.serving import engine as engine_module
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import drain, generate, stream
from dspark_jax.serving.requests import EngineBroken, Generation, Progress, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.serving.text import AnswerText
from tests.decoding_tiny import prompts, tiny_pair

SAMPLING = SamplingParams(12)
CONFIG = EngineConfig(
    4, 90, "fixed", rounds_per_dispatch=2, buckets=(20,), smallest_prompt_bucket=8, prefill_chunk=8, prefill_budget=8
)
PROMPTS = prompts(6, tiny_pair()[0].config.vocab_size, seed=2)


def new_engine(speculative: bool = True) -> Engine:
    target, drafter = tiny_pair()
    return Engine(target, drafter if speculative else None, CONFIG, SAMPLING)


@cache
def plain() -> tuple[tuple[int, ...], ...]:
    """Greedy outputs of PROMPTS without a drafter."""
    return tuple(g.tokens for g in generate(tiny_pair()[0], None, PROMPTS, SAMPLING, CONFIG))


def finish(engine: Engine, said: dict[int, list[int]], most: int = 300) -> dict[int, Generation]:
    """Steps until no request is open, through interrupts; `said` gathers what each Progress told."""
    done: dict[int, Generation] = {}
    for _ in range(most):
        if engine.idle:
            return done
        try:
            gained = engine.step()
        except KeyboardInterrupt:
            continue
        for progress in gained:
            said.setdefault(progress.index, []).extend(progress.tokens)
            if progress.generation is not None:
                done[progress.index] = progress.generation
    raise AssertionError("the engine hangs")


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, at: set[int], after: bool, owner: Any = None
) -> None:
    """Calls `at` of the function `name` of the engine or `owner` raise: before it has run, or after, when the state
    is given away."""
    owner = owner or engine_module
    calls, real = iter(range(10**6)), getattr(owner, name)

    def call(*args: Any) -> Any:
        number = next(calls)
        if number in at and not after:
            raise error
        made = real(*args)
        if number in at:
            raise error
        return made

    monkeypatch.setattr(owner, name, call)


# Interrupts and failures


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["admit", "run_rounds", "retire", "init_state"])
def test_an_interrupt_loses_nothing(name: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it falls: every request ends with plain decoding's tokens, and tells each of them once."""
    engine = new_engine()
    failing(monkeypatch, "run_rounds" if name == "init_state" else name, KeyboardInterrupt(), {0, 2, 5, 9}, after)
    if name == "init_state":  # an interrupt while the engine mends itself
        failing(monkeypatch, name, KeyboardInterrupt(), {0, 2}, after)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(index, Request(prompt))
    said: dict[int, list[int]] = {}
    if name == "retire":
        for progress in [*engine.step(), *engine.step()]:
            said.setdefault(progress.index, []).extend(progress.tokens)
        cancelled = engine.cancel(0)
        assert cancelled is not None and list(cancelled.tokens) == said.get(0, [])
        engine.submit(0, Request(PROMPTS[0]))
        said.pop(0, None)
    done = finish(engine, said)
    assert [done[i].tokens for i in range(len(PROMPTS))] == list(plain())
    assert {i: tuple(tokens) for i, tokens in said.items()} == {i: g.tokens for i, g in done.items()}
    assert all(g.prompt_tokens == p for g, p in zip((done[i] for i in range(6)), PROMPTS, strict=True))


@pytest.mark.parametrize("place", ["device_get", "generation"])
def test_a_result_that_was_not_read_is_made_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt falls while the host reads what a dispatch has made, or books it."""
    engine = new_engine()
    for index, prompt in enumerate(PROMPTS):
        engine.submit(index, Request(prompt))
    owner: Any = engine_module.jax if place == "device_get" else engine_module.Entry
    real, interrupted = getattr(owner, place), iter([False, True, False, True])
    monkeypatch.setattr(owner, place, lambda *given: _interrupt() if next(interrupted, False) else real(*given))
    said: dict[int, list[int]] = {}
    done = finish(engine, said)
    assert [done[i].tokens for i in range(len(PROMPTS))] == list(plain())
    assert {i: tuple(tokens) for i, tokens in said.items()} == {i: g.tokens for i, g in done.items()}


def _interrupt() -> Any:
    raise KeyboardInterrupt


def test_one_failure_is_mended_and_two_in_a_row_break_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, outcomes = new_engine(), list[str]()
    for index, prompt in enumerate(PROMPTS):
        engine.submit(index, Request(prompt))
    failing(monkeypatch, "run_rounds", RuntimeError("out of memory\nand more"), {1, 3, 4}, after=True)
    with pytest.raises(
        EngineBroken, match=r"failed twice in a row \(RuntimeError: out of memory\) and decodes no more"
    ):
        for _ in range(100):
            try:
                outcomes.append("gained" if engine.step() else "prefilled")
            except RuntimeError:
                outcomes.append("failed")
    assert [o for o in outcomes if o != "prefilled"] == ["gained", "failed", "gained", "failed"]
    for call in (engine.step, engine.admit, lambda: engine.submit(99, Request((1,)))):
        with pytest.raises(EngineBroken):
            call()
    left = engine.cancel(5)
    assert not engine.idle and left is not None, "what has been made can still be fetched"


# Threads


def test_requests_come_from_many_threads() -> None:
    """Eight threads submit and cancel while one steps: no request is lost, none waits for a dispatch."""
    engine, stop = new_engine(), threading.Event()
    done: dict[int, Generation] = {}
    cancelled: dict[int, Generation] = {}

    def serve() -> None:
        while not stop.is_set() or not engine.idle:
            for progress in engine.step():
                if progress.generation is not None:
                    done[progress.index] = progress.generation

    def ask(first: int) -> None:
        for index in range(first, first + 8):
            engine.submit(index, Request(PROMPTS[index % 6]))
            if index % 4 == 3 and (made := engine.cancel(index)) is not None:
                cancelled[index] = made

    server = threading.Thread(target=serve)
    clients = [threading.Thread(target=ask, args=(8 * i,)) for i in range(8)]
    for thread in (server, *clients):
        thread.start()
    for thread in clients:
        thread.join(60)
    stop.set()
    server.join(120)
    assert not server.is_alive() and not any(thread.is_alive() for thread in clients)
    assert sorted([*done, *cancelled]) == list(range(64))
    assert all(g.tokens == plain()[i % 6] for i, g in done.items())


# Text


class Letters:
    """A tokenizer of bytes: token t is the UTF-8 byte BYTES[t]."""

    bytes = "né€😀aab".encode()

    def decode(self, tokens: list[int]) -> str:
        return bytes(self.bytes[t % len(self.bytes)] for t in tokens).decode("utf-8", errors="replace")


def grow(text: AnswerText, stops: tuple[str, ...], *chunks: list[int]) -> tuple[list[str], AnswerText, int | None]:
    said, kept = [], None
    for chunk in chunks:
        before = len(text.said)
        text, kept = text.grown(Letters().decode, stops, chunk)
        said.append(text.said[before:])
        if kept is not None:
            break
    return said, text, kept


def test_characters_are_whole_wherever_a_dispatch_ends() -> None:
    whole = list(range(len(Letters.bytes)))
    for first in range(len(whole) + 1):
        for second in range(first, len(whole) + 1):
            said, text, _ = grow(AnswerText(), (), whole[:first], whole[first:second], whole[second:])
            assert "".join(said) == text.said == "né€😀aab" and "\ufffd" not in "".join(said)
    _, cut, _ = grow(AnswerText(), (), whole[:7])  # the first byte of the emoji, and there it ends
    assert cut.ended().said == "né€"
    _, broken, _ = grow(AnswerText(), (), [6, 6, 0], [1])
    assert broken.said == "\ufffd\ufffdn", "bytes that are no character, with others behind them, are shown"


class Fallback(Letters):
    """As tokenizers that fall back to bytes: where a run of bytes is no text as a whole, each of them is broken."""

    bytes = "語字".encode()

    def decode(self, tokens: list[int]) -> str:
        raw = bytes(self.bytes[t % len(self.bytes)] for t in tokens)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(raw)


@pytest.mark.parametrize("size", [1, 7, 128, 200])
def test_no_dispatch_breaks_a_character(size: int) -> None:
    """Long dispatches that nearly always end within a character, of a tokenizer in which it breaks its neighbours."""
    text, tokens = AnswerText(), [t % 6 for t in range(1200)]
    for at in range(0, len(tokens), size):
        text, _ = text.grown(Fallback().decode, (), tokens[at : at + size])
        assert "\ufffd" not in text.said and len(text.window) <= 64 + 2 * size
    assert text.ended().said == "語字" * 200


def test_a_window_is_bounded_and_its_text_the_same() -> None:
    rows = [list(range(len(Letters.bytes)))] * 60
    said, text, _ = grow(AnswerText(), (), *rows)
    assert "".join(said) == "né€😀aab" * 60 and len(text.window) < 100
    _, noise, _ = grow(AnswerText(), (), *[[6] * 10] * 60)
    assert len(noise.window) < 300


@pytest.mark.parametrize("stop", ["é€", "aab", "ab", "b", "😀a", "né€😀aab"])
def test_stop_strings_cut_exactly_over_any_boundary(stop: str) -> None:
    whole = list(range(len(Letters.bytes))) + [0, 1, 2]
    for size in range(1, len(whole) + 1):
        chunks = [whole[at : at + size] for at in range(0, len(whole), size)]
        said, text, kept = grow(AnswerText(), (stop, "zz"), *chunks)
        assert kept is not None and text.said == "".join(said) == "né€😀aab".split(stop)[0], size
        told = sum(map(len, chunks[: len(said) - 1])) + kept
        assert told == len("né€😀aab"[: "né€😀aab".index(stop)].encode()) + len(stop.encode()), size


def test_what_was_held_for_a_stop_string_is_told_in_the_end() -> None:
    said, text, kept = grow(AnswerText(), ("aabb",), list(range(len(Letters.bytes))))
    assert kept is None and said == ["né€😀"] and text.ended().said == "né€😀aab"


@cache
def lettered() -> Any:
    """The tiny pair with a tokenizer of letters: token t is the t-th letter, so that stop strings can be found."""

    class Alphabet:
        def decode(self, tokens: list[int]) -> str:
            return "".join(chr(ord("a") + t) for t in tokens)

    target, drafter = tiny_pair()
    return replace(target, tokenizer=Alphabet()), drafter


def test_stop_strings_end_requests_alike_at_every_dispatch_size() -> None:
    target, drafter = lettered()
    expected = ["".join(chr(ord("a") + t) for t in tokens) for tokens in plain()]
    for rounds in (1, 2, 16):
        config = replace(CONFIG, rounds_per_dispatch=rounds)
        asked = [
            Request(p, replace(SAMPLING, stop=(text[n : n + 2], "never")))
            for n, (p, text) in enumerate(zip(PROMPTS, expected, strict=True))
        ]
        told: dict[int, list[Progress]] = {}
        for progress in stream(target, drafter, asked, engine=config):
            told.setdefault(progress.index, []).append(progress)
        for index, text in enumerate(expected):
            generation, stop = told[index][-1].generation, text[index : index + 2]
            assert generation is not None and generation.finish_reason == "stop"
            at = text.index(stop)
            assert generation.text == text[:at] and len(generation.tokens) == at + 2
            assert "".join(p.text for p in told[index]) == generation.text
            assert tuple(t for p in told[index] for t in p.tokens) == generation.tokens
    engine = Engine(target, drafter, CONFIG, SAMPLING)
    engine.submit(0, asked[0])
    engine.submit(1, Request(PROMPTS[1]))
    done = {p.index: p.generation for p in drain(engine) if p.generation is not None}
    assert done[1].tokens == plain()[1] and engine.idle


# Lists of prompts


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "prompts is a str; expected a list of prompts: put a single one in a list"),
        (b"text", "prompts is a bytes"),
        ({"role": "user", "content": "a"}, "prompts is a dict"),
        (7, "prompts is a int"),
        (
            [{"role": "user", "content": "a"}],
            "Request 0 is a dict; expected text, token ids or a list of chat messages",
        ),
        ([1, 2, 3], "Request 0 is a int"),
        ([np.array(3)], "Request 0 is a ndarray"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(bad: Any, message: str) -> None:
    calls: list[Callable[..., Any]] = [generate, stream]
    for call in calls:
        with pytest.raises(UserError, match=message):
            call(*tiny_pair(), bad)
