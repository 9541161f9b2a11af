"""Controls of requests: penalties, biases, log-probabilities, ignore_eos, deadlines, priorities, a closed engine."""

import time
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.penalties import LogitEdits, Penalties
from dspark_jax.errors import UserError
from dspark_jax.serving import engine as engine_module
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import EngineClosed, Generation, Progress, Request
from dspark_jax.serving.sampling import SamplingParams
from tests.decoding_tiny import next_logits, tiny_pair
from tests.penalised import edited_row
from tests.test_engine_trust import CONFIG, PROMPTS, SAMPLING, failing, lettered

TARGET = tiny_pair()[0]
VOCAB = TARGET.config.vocab_size
NEW = SAMPLING.max_new_tokens
# Every kind of edit, alone and together, strong enough to change what these prompts say; the last has none.
SETTINGS = tuple(
    replace(SAMPLING, **settings)
    for settings in (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"repetition_penalty": 1.6},
        {"logit_bias": {3: 2.5, 9: -100.0}},
        {"presence_penalty": -1.0, "frequency_penalty": 0.4, "repetition_penalty": 0.8, "logit_bias": ((1, 1.5),)},
        {},
    )
)
Told = dict[int, list[Progress]]


def told(engine: Engine, requests: list[Request]) -> Told:
    """What every request was told, through interrupts."""
    for index, request in enumerate(requests):
        engine.submit(index, request)
    said: Told = {index: [] for index in range(len(requests))}
    for _ in range(300):
        if engine.idle:
            return said
        try:
            for progress in engine.step():
                said[progress.index].append(progress)
        except KeyboardInterrupt:
            continue
    raise AssertionError("the engine hangs")


def ended(said: Told) -> list[Generation]:
    made = [said[index][-1].generation for index in sorted(said)]
    assert all(made)
    return [generation for generation in made if generation is not None]


@cache
def engine_of(speculative: bool) -> Engine:
    target, drafter = tiny_pair()
    return Engine(target, drafter if speculative else None, CONFIG, SAMPLING)


@cache
def logits_of(rows: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """[n, T, V] of whole rows, padded on the right to one length for all tests."""
    padded = np.zeros((len(rows), 40), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return next_logits(TARGET, padded)


# Penalties and biases


def test_each_row_counts_the_tokens_before_it() -> None:
    rng = np.random.default_rng(0)
    tokens, block = rng.integers(0, 12, (6, 20)), rng.integers(0, 12, (6, 4))
    lengths, given = np.asarray([1, 5, 9, 20, 20, 7]), np.asarray([1, 2, 9, 3, 19, 4])
    block[:, 0] = np.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]  # the anchor is committed
    logits = rng.standard_normal((6, 4, 12)).astype(np.float32) * 3

    settings = [s.checked(VOCAB, "it") for s in SETTINGS]
    biases = np.zeros((2, 6, 2), np.float32)
    for row, one in enumerate(settings):
        for place, pair in enumerate(one.logit_bias):
            biases[:, row, place] = pair
    columns = [[getattr(s, name) for s in settings] for name in ("presence_penalty", "frequency_penalty")]
    columns.append([s.repetition_penalty for s in settings])
    penalties = Penalties(
        *(jnp.asarray(column, jnp.float32) for column in columns),
        jnp.asarray(given), jnp.asarray(biases[0], jnp.int32), jnp.asarray(biases[1]),
    )  # fmt: skip
    made = LogitEdits(penalties, jnp.ones(6, bool), *map(jnp.asarray, (tokens, lengths, block)))(jnp.asarray(logits))

    for row, sampling in enumerate(settings):
        prompt, output = tokens[row, : given[row]], tokens[row, given[row] : lengths[row]]
        for column in range(4):
            before = [*output, *block[row, 1 : column + 1]]
            expected = edited_row(logits[row, column], prompt, before, sampling)
            np.testing.assert_allclose(made[row, column], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(made[5], logits[5]), "a request without edits keeps its logits bit for bit"
    assert penalties.wanted.tolist() == [True] * 5 + [False]

    edits = LogitEdits(penalties, jnp.ones(6, bool), *map(jnp.asarray, (tokens, lengths, block)))
    huge = np.where(logits > 0, 3e38, -3e38).astype(np.float32)
    huge[:, :, 11] = -np.inf  # an id that pads the vocabulary
    assert (
        np.isfinite(edits(jnp.asarray(huge))[:, :, :11]).all() and np.isneginf(edits(jnp.asarray(huge))[..., 11]).all()
    )


@pytest.mark.parametrize("speculative", [True, False])
def test_greedy_answers_follow_the_edited_logits(speculative: bool) -> None:
    """As the target on whole rows says, with and without drafts, in slots whose last requests had other penalties."""
    requests = [Request(p, s) for p, s in zip(PROMPTS, SETTINGS, strict=True)]
    made = ended(told(engine_of(speculative), requests))
    plain = ended(told(engine_of(speculative), [Request(p) for p in PROMPTS]))
    for request, generation, free in zip(requests, made, plain, strict=True):
        row, sampling = (*request.prompt, *generation.tokens), request.sampling
        assert isinstance(sampling, SamplingParams) and len(generation.tokens) == NEW
        logits = logits_of((row,))[0]
        for i, token in enumerate(generation.tokens):
            at = len(request.prompt) + i - 1
            assert token == int(np.argmax(edited_row(logits[at], request.prompt, generation.tokens[:i], sampling)))
        assert (generation.tokens == free.tokens) == (sampling == SAMPLING)
    if speculative:
        assert sum(sum(g.accepted_at) for g in made[:-1]) > 3, "drafts are accepted under edits too"


def test_an_interrupt_keeps_counts_and_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(p, replace(s, logprobs=2)) for p, s in zip(PROMPTS, SETTINGS, strict=True)]
    undisturbed = ended(told(engine_of(True), requests))
    failing(monkeypatch, "run_rounds", KeyboardInterrupt(), {1, 3, 6}, after=True)
    found = ended(told(engine_of(True), requests))
    assert [g.tokens for g in found] == [g.tokens for g in undisturbed]
    for one, other in zip(found, undisturbed, strict=True):
        assert len(one.logprobs) == len(one.tokens)
        np.testing.assert_allclose([t.logprob for t in one.logprobs], [t.logprob for t in other.logprobs], atol=1e-4)


# Log-probabilities


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("speculative", [True, False])
def test_log_probabilities_are_those_of_the_raw_logits(speculative: bool, temperature: float) -> None:
    """The first token's too, whatever the settings; neighbours that ask for none get none."""
    asked = [
        replace(s, temperature=temperature, seed=5, logprobs=(None, 0, 3, 20)[i % 4]) for i, s in enumerate(SETTINGS)
    ]
    requests = [Request(p, s) for p, s in zip(PROMPTS, asked, strict=True)]
    said = told(engine_of(speculative), requests)
    for request, sampling, generation in zip(requests, asked, ended(said), strict=True):
        reported = tuple(noted for progress in said[generation.index] for noted in progress.logprobs)
        assert reported == generation.logprobs
        if sampling.logprobs is None:
            assert reported == ()
            continue
        assert tuple(noted.token for noted in reported) == generation.tokens

        logits = logits_of(((*request.prompt, *generation.tokens),))[0].astype(np.float64)
        law = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        for i, noted in enumerate(reported):
            row = law[len(request.prompt) + i - 1]
            assert noted.logprob == pytest.approx(row[noted.token], abs=1e-4)
            assert len(noted.top) == sampling.logprobs
            best = np.sort(row)[::-1][: sampling.logprobs]
            np.testing.assert_allclose([value for _, value in noted.top], best, atol=1e-4)
            np.testing.assert_allclose([row[token] for token, _ in noted.top], best, atol=1e-4)


def test_log_probabilities_end_where_a_stop_string_cuts() -> None:
    target, drafter = lettered()
    engine = Engine(target, drafter, CONFIG, SAMPLING)
    whole = ended(told(engine, [Request(PROMPTS[0])]))[0]
    said = told(engine, [Request(PROMPTS[0], replace(SAMPLING, stop=(whole.text[5:7],), logprobs=1))])
    made = ended(said)[0]
    assert (
        made.finish_reason == "stop" and len(made.logprobs) == len(made.tokens) == whole.text.index(whole.text[5:7]) + 2
    )
    assert made.text == "".join(p.text for p in said[0]) == whole.text[: whole.text.index(whole.text[5:7])]


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presence_penalty": 2.5}, "has presence_penalty = 2.5, which is out of range; expected -2 to 2"),
        ({"frequency_penalty": "1"}, "has frequency_penalty = '1'; expected a number"),
        ({"repetition_penalty": 0.0}, "has repetition_penalty = 0.0, which is out of range; expected 0.01 to 100"),
        ({"logit_bias": {VOCAB: 1.0}}, "has a token of logit_bias = 61, which is out of range"),
        ({"logit_bias": {1: 101}}, "has a bias of 1 = 101, which is out of range; expected -100 to 100"),
        ({"logit_bias": {"1": 1.0}}, "has a token of logit_bias = '1'; expected a whole number"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "names token 1 twice in logit_bias"),
        ({"logit_bias": (1, 2)}, "has 1 in logit_bias; expected a token id and a number"),
        ({"logit_bias": 7}, "has logit_bias = 7; expected token ids with a number each"),
        ({"logprobs": -1}, "has logprobs = -1, which is out of range"),
        ({"logprobs": 21}, "asks for 21 log-probabilities a token; this engine holds 20"),
        ({"ignore_eos": 1}, "has ignore_eos = 1; expected True or False"),
    ],
)
def test_bad_controls_are_refused_in_a_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        engine_of(True).submit(3, Request((1,), replace(SAMPLING, **settings)))
    assert message in str(refused.value) and "Request 3" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deadline": -1.0}, "has deadline = -1.0, which is out of range"),
        ({"deadline": "soon"}, "has deadline = 'soon'; expected a number"),
        ({"priority": 2}, "has priority = 2, which is out of range; expected 0 to 1"),
    ],
)
def test_bad_fields_of_requests_are_refused_in_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(True).submit(0, Request((1,), **fields))
    assert engine_of(True).idle


def test_biases_beyond_the_engines_places_are_refused() -> None:
    target, drafter = tiny_pair()
    engine = Engine(target, drafter, replace(CONFIG, bias_slots=2), SAMPLING)
    with pytest.raises(UserError, match="biases 3 tokens; this engine holds 2"):
        engine.submit(0, Request((1,), replace(SAMPLING, logit_bias={1: 1.0, 2: 1.0, 3: 1.0})))


# Ends of requests


def test_ignore_eos_goes_on_after_the_targets_own_stop_tokens() -> None:
    target, drafter = tiny_pair()
    free = ended(told(engine_of(True), [Request(PROMPTS[0])]))[0]
    stop, other = free.tokens[4], free.tokens[7]
    engine = Engine(replace(target, stop_tokens=(stop,)), drafter, CONFIG, SAMPLING)
    variants = [{}, {"ignore_eos": True}, {"ignore_eos": True, "stop_tokens": (other,)}]
    made = ended(told(engine, [Request(PROMPTS[0], replace(SAMPLING, **v)) for v in variants]))
    assert [g.finish_reason for g in made] == ["stop", "length", "stop"]
    assert made[0].tokens == free.tokens[: free.tokens.index(stop) + 1] and made[1].tokens == free.tokens
    assert made[2].tokens == free.tokens[: free.tokens.index(other) + 1]


def test_a_deadline_cuts_what_waits_and_what_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: clock[0])
    engine, done = engine_of(True), dict[int, Generation]()
    for index in range(4):
        engine.submit(index, Request(PROMPTS[1], deadline=5.0 if index == 0 else None))
    engine.submit(4, Request(PROMPTS[1], deadline=5.0))  # waits for a slot
    said: list[int] = []
    for _ in range(100):
        for progress in engine.step():
            said += progress.tokens if progress.index == 0 else ()
            if progress.generation is not None:
                done[progress.index] = progress.generation
        if said:
            clock[0] += 10.0
        if engine.idle:
            break
    assert engine.idle and {i: g.finish_reason for i, g in done.items()} == {
        0: "deadline", 1: "length", 2: "length", 3: "length", 4: "deadline",
    }  # fmt: skip
    assert tuple(said) == done[0].tokens == done[1].tokens[: len(said)] and 0 < len(said) < NEW
    assert done[4].tokens == () and done[4].tokens_per_second == 0
    assert ended(told(engine, [Request(PROMPTS[1])]))[0].tokens == done[1].tokens, "the slot is free again"


def test_background_requests_give_way_to_others() -> None:
    """Two classes: one of priority 1 is seated only while none of priority 0 waits; neither is ever thrown out."""
    engine, order = engine_of(True), list[int]()
    for index in range(12):
        engine.submit(index, Request(PROMPTS[2], priority=int(index < 8)))
    while not engine.idle:
        order += [p.index for p in engine.step() if p.generation is not None]
    assert sorted(order[:4]) == [8, 9, 10, 11] and sorted(order[4:8]) == [0, 1, 2, 3]


def test_a_closed_engine_ends_what_is_open_and_takes_nothing() -> None:
    target, drafter = tiny_pair()
    for grace in (None, 0.0):
        engine = Engine(target, drafter, CONFIG, SAMPLING)
        for index in range(6):
            engine.submit(index, Request(PROMPTS[3]))
        first = engine.step()
        assert not engine.closed
        engine.close(grace)
        with pytest.raises(EngineClosed, match="Request 9 came after the engine was closed; send it to another one"):
            engine.submit(9, Request(PROMPTS[3]))
        done = [g for p in first if (g := p.generation) is not None]
        while not engine.idle:
            done += [g for p in engine.step() if (g := p.generation) is not None]
        assert engine.closed and len(done) == 6
        assert {g.finish_reason for g in done} == ({"length"} if grace is None else {"deadline"})


def test_waiting_for_a_deadline_takes_no_longer_than_a_step() -> None:
    engine = engine_of(True)
    engine.submit(0, Request(PROMPTS[0], deadline=0.0))
    time.sleep(0.001)
    (only,) = engine.step()
    assert only.generation is not None and only.generation.finish_reason == "deadline" and engine.idle
