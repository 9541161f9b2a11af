"""An adaptive engine leaves its drafter out where drafts do not pay, says the same, and finds its way back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.dispatch import run_undrafted
from dspark_jax.decoding.round import LoopParams
from dspark_jax.drafters.registry import DRAFTERS
from dspark_jax.errors import UserError
from dspark_jax.scheduling.policies import Fixed, LookAhead
from dspark_jax.serving import engine as engine_module
from dspark_jax.serving.engine import Engine, make_loop
from dspark_jax.serving.requests import DecodeConfig, Generation, Request
from dspark_jax.serving.resting import DraftRest
from tests.decoding_tiny import kind_pair, prompts, tiny_pair
from tests.test_scheduled_loop import check_in_place, engine_of, tables

LONG, LONGEST = 80, 100


def test_it_takes_long_and_little_drafting_to_rest() -> None:
    rest = DraftRest(64)
    for rounds, drafted in ((16, 12), (16, 1), (16, 0), (16, 0), (16, 1)):
        assert not rest.resting
        rest.saw(rounds, drafted)
    assert rest.resting, "two probes in the last 64 rounds"
    rest.wake()
    rest.saw(15, 0)
    assert not rest.resting
    rest.saw(1, 1)
    assert rest.resting, "a quarter of the rounds, one of which probed"
    rest.wake()
    rest.saw(16, 9)
    rest.saw(40, 0)
    assert not rest.resting, "drafts paid for a while, so the wait is the whole one again"


def drain(engine: Engine, until: Callable[[], bool] = lambda: False) -> dict[int, Generation]:
    done: dict[int, Generation] = {}
    while not engine.idle and not until():
        done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
    return done


def dear(drafting: float, **config: Any) -> Engine:
    engine = engine_of(LookAhead(), drafting, LONGEST, rest_after=8, **config)
    for i, prompt in enumerate(ROWS):
        engine.submit(i, Request(prompt))
    return engine


ROWS = prompts(6, tiny_pair()[0].config.vocab_size, seed=3)


def plain_answers(new: int) -> dict[int, tuple[int, ...]]:
    engine = engine_of(Fixed(), longest=LONGEST, max_new_tokens=new, verify_length=0)
    for i, prompt in enumerate(ROWS):
        engine.submit(i, Request(prompt))
    return {i: g.tokens for i, g in drain(engine).items()}


@pytest.mark.lossless
def test_answers_are_the_targets_whether_or_not_the_drafter_rests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It rests, then drafting becomes cheap: running requests draft within two dispatches, and in time all do. Dear
    again, it rests again. Nothing is compiled on the way."""
    expected = plain_answers(LONG)
    engine = dear(50.0, max_new_tokens=LONG, prefill_chunk=8, smallest_prompt_bucket=4)
    expensive, cheap = engine.params.tables, engine_of(LookAhead(), 0.01).params.tables
    fed: list[bool] = []

    def admit(*args: Any) -> Any:
        fed.append(args[5])
        return real(*args)

    real = engine_module.admit
    monkeypatch.setattr(engine_module, "admit", admit)
    waiting = dict(enumerate(ROWS))
    for i in waiting:
        engine.cancel(i)
    engine.warm_up()
    for i, prompt in waiting.items():
        engine.submit(i, Request(prompt))
    fed.clear()
    caplog.clear()
    with jax.log_compiles():
        done = drain(engine, lambda: engine._resting)
        assert engine._resting and all(fed) and not done
        for _ in range(2):
            engine.step()
        assert not any(entry.context for entry in engine._slots.values())
        assert not np.any(np.asarray(engine.state.verify_cap)[list(engine._slots)])

        assert any(entry.worth_recalling for entry in engine._slots.values())
        engine.params = engine.params._replace(tables=cheap)
        before = np.asarray(engine.state.counters.drafted).sum()
        for _ in range(3):  # one to see that it pays, then those whose tokens fit the budget are recalled
            engine.step()
        assert not engine._resting and np.asarray(engine.state.counters.drafted).sum() > before

        engine.params = engine.params._replace(tables=expensive)
        done |= drain(engine, lambda: engine._resting)
        assert engine._resting and len(done) < len(ROWS)
        done |= drain(engine)
    assert {i: g.tokens for i, g in done.items()} == expected
    assert not [r.message for r in caplog.records if "Compiling" in r.message]


def test_a_request_that_meets_a_resting_drafter_is_kept_from_it() -> None:
    engine = dear(50.0, max_new_tokens=12)
    drain(engine)
    assert engine._resting
    engine.submit(9, Request(ROWS[0]))
    engine.step()
    assert [entry.context for entry in engine._slots.values()] == [False]
    assert drain(engine)[9].drafted == 0


def test_a_request_that_may_not_draft_is_not_recalled() -> None:
    engine = engine_of(LookAhead(), 50.0, LONGEST, rest_after=8, max_new_tokens=LONG)
    for i, length in enumerate((0, None)):
        engine.submit(i, Request(ROWS[i], verify_length=length))
    drain(engine, lambda: engine._resting)
    engine.step()
    assert engine._rest is not None and not any(entry.context for entry in engine._slots.values())
    engine._rest.wake()
    engine._recall()
    assert [engine._slots[slot].context for slot in (0, 1)] == [False, True]
    assert np.asarray(engine.state.verify_cap)[:2].tolist() == [0, engine.loop.block]


@pytest.mark.parametrize("kind", DRAFTERS)
def test_what_a_drafter_missed_is_made_up(kind: str) -> None:
    """It drafts as if it had been told of every token, prompt and answer; the prompts take more than one chunk. What is
    drawn meanwhile, at temperature 1, is what is drawn where the drafter never rests."""
    target, drafter = kind_pair(kind)
    config = DecodeConfig(
        slots=3, policy=LookAhead(), max_new_tokens=40, rounds_per_dispatch=4, prefill_chunk=8,
        smallest_prompt_bucket=4, prefill_budget=1000, rest_after=4,
    )  # fmt: skip
    rows = prompts(3, target.config.vocab_size, seed=1, longest=14)
    assert max(map(len, rows)) > config.prefill_chunk
    loop = make_loop(target, drafter, config, 56, 4)
    costs = tables(loop.buckets, [1.0 + 0.1 * i for i in range(len(loop.buckets))], 50.0, loop.block)

    def after_three(rest_after: int | None) -> Engine:
        engine = Engine(target, drafter, replace(config, rest_after=rest_after), 56, tables=costs, meter=None)
        for i, row in enumerate(rows):
            engine.submit(i, Request(row, temperature=1.0, seed=i))
        for _ in range(3):
            assert all(p.generation is None for p in engine.step())
        return engine

    rested, told = after_three(4), after_three(None)
    assert rested._resting and not told._resting and rested._rest is not None
    np.testing.assert_array_equal(rested.state.length, told.state.length)
    for row, other, length in zip(rested.state.tokens, told.state.tokens, told.state.length, strict=True):
        np.testing.assert_array_equal(row[:length], other[:length])

    @jax.jit
    def drafts(state: Any) -> jax.Array:
        starts = state.length - 1
        anchors = jnp.take_along_axis(state.tokens, starts[:, None], axis=1)[:, 0]
        return loop.draft(
            *loop.models(LoopParams(target.params, drafter.params, costs)), state, anchors, starts, None
        ).probs

    def probs(engine: Engine) -> np.ndarray:
        return np.asarray(drafts(engine.state))

    expected = probs(told)
    assert np.abs(probs(rested) - expected).max() > 1e-3, "it has missed something"
    rested._rest.wake()
    rested._recall()
    np.testing.assert_allclose(probs(rested), expected, atol=1e-5)
    np.testing.assert_array_equal(rested.state.verify_cap, told.state.verify_cap)


def test_a_rest_updates_the_state_in_place() -> None:
    check_in_place(run_undrafted, LookAhead())


def test_static_policies_and_those_told_so_never_rest() -> None:
    for engine in (engine_of(Fixed()), engine_of(LookAhead(), rest_after=None)):
        assert engine._rest is None
    with pytest.raises(UserError, match="The decoding setting rest_after is 0"):
        engine_of(LookAhead(), rest_after=0)
