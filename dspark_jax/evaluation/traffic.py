"""Load on a real engine: closed loops, Poisson arrivals, and traces recorded for the simulator."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.arrays import read_arrays
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.state import RoundRecord
from dspark_jax.errors import UserError
from dspark_jax.evaluation.simulator import LoadFigures, Prefill, Traces
from dspark_jax.serving.chunks import prompt_bucket
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams


@dataclass(frozen=True)
class Traffic:
    """The requests of a study, the same for every strategy.

    Attributes:
        prompts: request i has prompt i, cyclically.
        max_new_tokens: of the longest answers.
        spread: largest share of `max_new_tokens` by which an answer is shortened, drawn uniformly.
        seed: of the requests' lengths and random numbers.
    """

    prompts: Sequence[EncodedPrompt]
    max_new_tokens: int
    spread: float = 0.0
    seed: int = 0

    def request(self, index: int, sampling: SamplingParams) -> Request:
        # From (seed, index) alone, so that a request is the same in whatever order it is sent.
        less = np.random.default_rng((self.seed, index)).integers(int(self.spread * self.max_new_tokens) + 1)
        tokens = self.prompts[index % len(self.prompts)].tokens
        new = max(1, self.max_new_tokens - int(less))
        return Request(tokens, replace(sampling, seed=self.seed + index, max_new_tokens=new))


@dataclass(frozen=True)
class OpenFigures(LoadFigures):
    """Figures under Poisson arrivals.

    Attributes:
        first_token_seconds: from each request's arrival to its first token.
        queued_seconds: from each request's arrival to its slot.
    """

    first_token_seconds: tuple[float, ...]
    queued_seconds: tuple[float, ...]


def closed_loop(
    engine: Engine,
    traffic: Traffic,
    users: int,
    requests: int,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadFigures:
    """A closed loop: `users` users, each of whom sends a request when the last one is answered.

    It ends when `requests` have been sent; open ones are cancelled. Only the time in which every user has a request in
    a slot is measured, without the first prefills, by a clock in seconds.
    """
    asked, tokens = 0, 0
    done: list[Generation] = []

    def ask() -> None:
        nonlocal asked
        engine.submit(asked, traffic.request(asked, engine.sampling))
        asked += 1

    for _ in range(users):
        ask()

    engine.admit()
    # Dispatch is asynchronous: the clock starts once the prefills have run.
    jax.block_until_ready(engine.state.length)
    begin = clock()

    # Ends with the last request sent, not answered: from there on slots would run empty.
    while asked < requests:
        for progress in engine.step():
            tokens += len(progress.tokens)
            if progress.generation is not None:
                done.append(progress.generation)
                ask()

    seconds = clock() - begin
    for index in range(asked):
        engine.cancel(index)

    return LoadFigures(tokens / seconds, tuple(g.tokens_per_second for g in done), *_shares(done))


def poisson(engine: Engine, traffic: Traffic, rate: float, requests: int) -> OpenFigures:
    """`requests` Poisson arrivals at `rate` per second, at the same moments for every strategy.

    A user's speed includes the time in the queue.
    """
    # Drawn before the clock starts, from the seed alone: every strategy meets the same arrivals.
    moments = np.cumsum(np.random.default_rng(traffic.seed).exponential(1 / rate, requests))
    done: list[Generation] = []
    begin, asked = time.perf_counter(), 0

    while len(done) < requests:
        now = time.perf_counter() - begin
        while asked < requests and moments[asked] <= now:
            engine.submit(asked, traffic.request(asked, engine.sampling))
            asked += 1
        # Nothing runs: wait for the next arrival.
        if engine.idle:
            time.sleep(max(0.0, moments[asked] - now))
            continue
        done += [p.generation for p in engine.step() if p.generation is not None]

    seconds = time.perf_counter() - begin
    tokens = sum(len(g.tokens) for g in done)
    speeds = tuple(len(g.tokens) / g.timing.ended for g in done)
    waits = [tuple(getattr(g.timing, name) for g in done) for name in ("first_token", "admitted")]

    return OpenFigures(tokens / seconds, speeds, *_shares(done), *waits)


def _shares(done: Sequence[Generation]) -> tuple[float, float]:
    """(tokens verified per round, anchors included; accepted length)."""
    rounds = max(sum(g.rounds for g in done), 1)
    return sum(sum(g.verified_at) + g.rounds for g in done) / rounds, sum(g.committed for g in done) / rounds


def record_traces(engine: Engine, traffic: Traffic, requests: int) -> Traces:
    """Records every proposal of `requests` requests; the engine must verify whole blocks.

    Raises:
        UserError: no request lasted a round.
    """
    found: dict[int, list[tuple[np.ndarray, int]]] = {}

    def take(holders: tuple[int | None, ...], records: RoundRecord) -> None:
        # [rounds, R] of a dispatch, [rounds, R, K] the logits; empty slots commit nothing.
        live, logits, accepted = (np.asarray(x) for x in (records.committed, records.confidence, records.accepted))
        # Row-major: the rounds of a request stay in order.
        for r, slot in zip(*np.nonzero(live), strict=True):
            index = holders[slot]
            if index is not None:
                found.setdefault(index, []).append((logits[r, slot], int(accepted[r, slot])))

    engine.recorder = take
    for index in range(requests):
        engine.submit(index, traffic.request(index, engine.sampling))

    made: dict[int, Generation] = {}
    while not engine.idle:
        made |= {p.index: p.generation for p in engine.step() if p.generation is not None}

    engine.recorder = None
    # Requests that ended with their first token have no round, and no place in the traces.
    kept = sorted(found)
    rows = [(place, *row) for place, index in enumerate(kept) for row in found[index]]
    if not rows:
        raise UserError("No request lasted a round, so there is nothing to simulate with; raise --max-new-tokens.")

    return Traces(
        logits=np.array([logits for _, logits, _ in rows], np.float32),
        accepted=np.array([accepted for _, _, accepted in rows], np.int32),
        request=np.array([place for place, _, _ in rows], np.int32),
        prompts=np.array([len(made[i].prompt_tokens) for i in kept], np.int32),
        lengths=np.array([len(made[i].tokens) for i in kept], np.int32),
    )


def save_traces(path: Path, traces: Traces) -> None:
    """Writes traces as a compressed .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **vars(traces))


def read_traces(path: Path) -> Traces:
    """Reads traces; UserError where the file is missing, is damaged or holds something else."""
    layouts = {
        "logits": ("float32", 2),
        **dict.fromkeys(("accepted", "request", "prompts", "lengths"), ("int32", 1)),
    }
    traces = Traces(**read_arrays(path, layouts, "traces of a load study (traces.npz)"))

    rounds, block = traces.logits.shape
    right = (
        len(traces.accepted) == len(traces.request) == rounds
        and len(traces.prompts) == len(traces.lengths)
        and np.all((traces.accepted >= 0) & (traces.accepted <= block))
        # Sorted by request, each with a round or more: the simulator cuts them apart where the number changes.
        and np.array_equal(np.unique(traces.request), np.arange(len(traces.lengths)))
        and np.all(np.diff(traces.request) >= 0)
        and np.all(traces.lengths > 0)
    )
    if not right:
        raise UserError(f"{path} holds traces that do not fit together; record them again by a load study.")
    return traces


def overheads(engine: Engine, prompts: Sequence[EncodedPrompt], repeats: int = 7) -> tuple[Prefill, float]:
    """Medians on an idle engine: prefill by width, and seconds of a dispatch that runs no round.

    Args:
        engine: warmed up and idle.
        prompts: one of each width is timed.
        repeats: timed runs of each, after one that is dropped.
    """
    # A dispatch of no round runs the compiled loop's entrance and exit alone.
    none, until_free = jnp.asarray(0, jnp.int32), jnp.asarray(False)
    dispatch: list[float] = []

    def admitted(tokens: Sequence[int], count: int) -> float:
        for i in range(count):
            engine.submit(i, Request(tokens))

        start = time.perf_counter()
        engine.admit()
        jax.block_until_ready(engine.state.length)
        prefilled = time.perf_counter()
        # Zero rounds: only the call and the transfers that follow it are left.
        engine.state = run_rounds(engine.loop, engine.params, engine.state, engine.occupancy, none, until_free)
        jax.device_get((engine.state.tokens, engine.state.length))
        dispatch.append(time.perf_counter() - prefilled)
        for i in range(count):
            engine.cancel(i)

        engine.admit()  # empties the slots before the next timing
        return prefilled - start

    def median(tokens: Sequence[int], count: int) -> float:
        return float(np.median([admitted(tokens, count) for _ in range(repeats + 1)][1:]))

    by_width: dict[int, Sequence[int]] = {}
    # The shortest prompt of each compiled width: they differ only in padding.
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.tokens)):
        width = prompt_bucket(engine.config, engine.loop.size, 0, len(prompt.tokens))
        by_width.setdefault(width, prompt.tokens)

    alone = tuple(median(tokens, 1) for tokens in by_width.values())
    slots = engine.config.slots
    house = alone if slots == 1 else tuple(median(tokens, slots) for tokens in by_width.values())
    return Prefill(tuple(by_width), alone, house), float(np.median(dispatch))
