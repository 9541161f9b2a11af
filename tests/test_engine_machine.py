"""Any sequence of submits, steps, cancellations, interrupts and bad requests: requests end as plain decoding's do."""

import contextlib
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark_jax.decoding.round import init_state
from dspark_jax.errors import UserError
from dspark_jax.serving import engine as engine_module
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Generation, QueueFull, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from tests.decoding_tiny import prompts, tiny_pair

SLOTS, QUEUE, NEW = 2, 3, 8
PROMPTS = prompts(5, tiny_pair()[0].config.vocab_size, seed=7, longest=12)
CONFIG = EngineConfig(
    SLOTS, 24, "fixed", rounds_per_dispatch=1, buckets=(10,), smallest_prompt_bucket=8, prefill_chunk=8, queue=QUEUE
)
BAD: list[Any] = [
    Request(()), Request((10**9,)), Request(None), None, Request((1,), SamplingParams(10**6)),
    Request((1,), SamplingParams(2, temperature=float("nan"))), Request((1,), SamplingParams(2, stop_tokens=(2**40,))),
]  # fmt: skip
CALLS = ("admit", "run_rounds", "retire", "init_state")


@cache
def plain() -> tuple[tuple[int, ...], ...]:
    return tuple(g.tokens for g in generate(tiny_pair()[0], None, PROMPTS, SamplingParams(NEW), CONFIG_PLAIN))


CONFIG_PLAIN = EngineConfig(SLOTS, 24, smallest_prompt_bucket=8, prefill_chunk=8)


@cache
def the_engine() -> Engine:
    """One for all runs: its programs are compiled once, and a run leaves it idle."""
    return Engine(*tiny_pair(), CONFIG, SamplingParams(NEW))


class EngineMachine(RuleBasedStateMachine):
    """Facts about every open request: its prompt, its limit, and the tokens that have been reported."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = the_engine()
        assert self.engine.idle
        self.open: dict[int, tuple[int, int]] = {}
        self.said: dict[int, tuple[int, ...]] = {}
        self.patch = pytest.MonkeyPatch()

    def teardown(self) -> None:
        self.patch.undo()
        for _ in range(200):
            if self.engine.idle:
                break
            self.step()
        self.engine.admit()  # empties the slots, so that every run starts alike
        assert self.engine.idle and not self.open, "the engine hangs"

    @rule(index=st.integers(0, 9), prompt=st.integers(0, 4), new=st.integers(1, NEW))
    def submit(self, index: int, prompt: int, new: int) -> None:
        request = Request(PROMPTS[prompt], SamplingParams(new))
        if index in self.open:
            with pytest.raises(UserError):
                self.engine.submit(index, request)
            return
        try:
            self.engine.submit(index, request)
        except QueueFull:
            assert self.engine.waiting == QUEUE
            return
        self.open[index], self.said[index] = (prompt, new), ()

    @rule(kind=st.integers(0, len(BAD) - 1), index=st.one_of(st.integers(20, 29), st.sampled_from(["a", None, 1.5])))
    def submit_what_is_refused(self, kind: int, index: Any) -> None:
        with pytest.raises(UserError):
            self.engine.submit(index, BAD[kind])

    @rule()
    def step(self) -> None:
        for progress in self.engine.step():
            prompt, new = self.open[progress.index]
            self.said[progress.index] += progress.tokens
            expected = plain()[prompt][:new]
            assert self.said[progress.index] == expected[: len(self.said[progress.index])]
            if progress.generation is not None:
                assert progress.generation.tokens == expected == self.said[progress.index]
                assert progress.generation.prompt_tokens == PROMPTS[prompt]
                del self.open[progress.index]

    @rule(index=st.integers(0, 9))
    def cancel(self, index: int) -> None:
        made: Generation | None = self.engine.cancel(index)
        assert (made is None) == (index not in self.open)
        if made is not None:
            assert made.tokens == self.said[index] and made.finish_reason == "cancelled"
            del self.open[index]

    @precondition(lambda self: self.open)
    @rule(name=st.sampled_from(CALLS), at=st.integers(0, 1), after=st.booleans())
    def interrupt(self, name: str, at: int, after: bool) -> None:
        """The `at`-th call of one of the step's compiled functions is interrupted, before it runs or behind it."""
        real, seen = getattr(engine_module, name), 0

        def call(*given: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > at and not after:
                raise KeyboardInterrupt
            made = real(*given)
            if seen > at:
                raise KeyboardInterrupt
            return made

        with self.patch.context() as patch:
            patch.setattr(engine_module, name, call)
            with contextlib.suppress(KeyboardInterrupt):
                self.step()

    @rule()
    def retire_all(self) -> None:
        for index in list(self.open):
            self.cancel(index)
        assert self.engine.idle

    @invariant()
    def counts_are_bounded(self) -> None:
        assert self.engine.running <= SLOTS and self.engine.waiting + self.engine.running == len(self.open)
        assert self.engine.idle == (not self.open)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def test_the_machine_sees_a_lost_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: an engine that goes on in a state that was given away is found out."""
    engine = Engine(*tiny_pair(), CONFIG, SamplingParams(NEW))
    engine.submit(0, Request(PROMPTS[0]))
    engine.step()
    engine.state = init_state(engine.loop, engine.params)  # what the slots held is gone, and the engine is not told
    gained = [p.generation for _ in range(20) if not engine.idle for p in engine.step() if p.generation is not None]
    assert not gained or gained[0].tokens != plain()[0]
