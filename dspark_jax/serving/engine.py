"""Continuous batching: the host fills, runs and empties the slots of the compiled loop.

The host acts only between dispatches, each of many rounds. Between two of them waiting requests move into free slots
and a bounded number of prompt tokens is prefilled, so that a long prompt does not hold up the requests that decode.
Chunks are padded to length buckets, so that new prompts reuse compiled programs. docs/engine.md has the contract:
threads, interrupts, failures, bounds.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from dspark_jax.decoding.dispatch import record_rounds, run_rounds
from dspark_jax.decoding.prefill import admit, retire
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import Admission, DecodeState, RoundCounters, RoundRecord
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import VerifyPolicy
from dspark_jax.serving.assembly import Assembly
from dspark_jax.serving.chunks import blank_chunk, chunk_widths, next_chunk, prompt_bucket
from dspark_jax.serving.jobs import make_job
from dspark_jax.serving.metering import Metering
from dspark_jax.serving.requests import Counts, EngineBroken, Generation, Progress, Request
from dspark_jax.serving.roster import Entry, Roster
from dspark_jax.serving.sampling import SamplingParams, require_mode
from dspark_jax.serving.settings import EngineConfig, check_engine
from dspark_jax.targets.target import Target

Recorder = Callable[[tuple[int | None, ...], RoundRecord], None]
"""Called after each dispatch with the index of the request in each slot (None for a free one) and the dispatch's numpy
records, leaves [rounds, R, ...]."""


@dataclass
class Engine:
    """Continuous batching over the slots of one compiled loop.

    `submit`, `cancel` and the properties may be called from any thread and never wait for the device. `step` may be
    called from any thread too; a second call waits for the first. After an interrupt or a failure inside `step`, the
    next `step` resumes the open requests after the tokens that have been reported; a second failure in a row breaks the
    engine, and every later call raises EngineBroken.

    Args:
        target: the model that decides.
        drafter: proposes; None: plain decoding.
        config: capacity of the engine, and its policy by name; `longest` must be set.
        sampling: settings of requests that have none of their own; its mode is that of every request.
        strategy: a verify policy instead of the one named, for studies.
        tables: costs and temperatures instead of measured ones.
        metering: the load meter and the external load factor.
        recorder: called with every round's record, for studies. May be set at any time.
    Raises:
        UserError: settings that no engine can run with, or files that don't fit.
    """

    target: Target
    drafter: Drafter | None
    config: EngineConfig
    sampling: SamplingParams = SamplingParams()
    strategy: VerifyPolicy | None = None
    tables: ScheduleTables | None = None
    metering: Metering = field(default_factory=Metering)
    recorder: Recorder | None = None
    why: str = field(init=False)  # one line: the policy that was chosen, and the reason
    loop: DecodeLoop = field(init=False)
    params: LoopParams = field(init=False)
    state: DecodeState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_engine(self.config)
        chosen = Assembly.of(self.target, self.drafter, self.config, self.sampling, self.strategy, self.tables)
        self.drafter, self.loop, self.params, self.why = chosen.drafter, chosen.loop, chosen.params, chosen.why

        # The clock of a dispatch includes the call itself, which the predicted seconds of its rounds do not.
        self.tables = self.params.tables
        if self.tables is not None and self.tables.costs.dispatch is not None:
            self.metering.dispatch_seconds = float(self.tables.costs.dispatch)

        self.state = init_state(self.loop, self.params)
        self._roster = Roster()
        self._stepping = threading.RLock()
        self._seats: dict[int, Entry] = {}  # by slot: requests on the device, cancelled ones included
        self._prefilling = False  # whether the device may still be running a prefill
        self._failures: list[Exception] = []  # since the last dispatch that succeeded

    # Requests in and out

    def submit(self, index: int, request: Request) -> None:
        """Queue a request.

        Args:
            index: a whole number chosen by the caller, unique among the open requests.
            request: the prompt and its settings.
        Raises:
            UserError: a request that cannot be decoded, or an index that is in use; the engine goes on as before.
            QueueFull: as many wait as `config.queue` allows.
            EngineBroken: the engine decodes no more.
        """
        self._require_whole()
        # Refused before the prompt is tokenised, which takes time; `add` checks again, under its lock.
        self._roster.require_room(index, self.config.queue)
        job = make_job(self.target, self.sampling, index, request)
        require_mode(job.sampling, self.sampling.mode, f"Request {index}")

        longest, stops = self.config.longest or 0, job.sampling.stop_tokens or ()
        # Both limits are shapes of the compiled loop.
        if job.longest > longest:
            raise UserError(
                f"Request {index} needs {job.longest} positions (a prompt of {len(job.prompt)} tokens and up to "
                f"{job.sampling.max_new_tokens} new ones); this engine holds {longest}. Shorten it or raise the limit."
            )
        if len(stops) > self.config.stop_slots:
            raise UserError(
                f"Request {index} names {len(stops)} stop tokens; this engine holds {self.config.stop_slots}."
            )

        self._roster.add(job, self.config.queue)

    def cancel(self, index: int) -> Generation | None:
        """End a waiting or running request. Its slot is free for the next `step`.

        Returns:
            Its Generation with the tokens that have been reported and finish_reason "cancelled"; None if no such
            request is open.
        """
        entry = self._roster.remove(index)
        return None if entry is None else entry.generation("cancelled", time.perf_counter())

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return not self._roster.entries()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._roster.waiting

    @property
    def running(self) -> int:
        """Requests in slots, decoding or being prefilled."""
        return self._roster.running

    @property
    def positions(self) -> int:
        """Positions that the requests in slots hold, of `slots` times `loop.size`."""
        seated = [entry for entry in self._roster.entries() if entry.slot is not None]
        return sum(len(entry.job.prompt) + len(entry.seen.tokens) for entry in seated)

    @property
    def occupancy(self) -> Occupancy:
        """The load and signal of the last dispatch."""
        return self.metering.occupancy

    def step(self) -> list[Progress]:
        """Admit what fits, run one dispatch, and report the new tokens.

        Returns:
            A Progress for each request that decoded; empty if all of them are still being prefilled.
        Raises:
            EngineBroken: this step and the one before failed, or an earlier pair did.
        """
        with self._stepping:
            self._require_whole()
            try:
                self._begin()
                progress = self._advance()
            except Exception as error:  # an interrupt is not an Exception, and not counted as a failure
                self._failures.append(error)
                self._require_whole()
                raise
            return progress

    def _require_whole(self) -> None:
        """Raise EngineBroken once two failures have followed each other."""
        if len(self._failures) > 1:
            error = self._failures[-1]
            reason = "".join(str(error).strip().splitlines()[:1])
            raise EngineBroken(
                f"The engine failed twice in a row ({type(error).__name__}: {reason}) and decodes no more; make a new "
                "one and submit the open requests again."
            ) from error

    def _begin(self) -> None:
        """Recover from an interrupted or failed dispatch, and mark what this one starts from."""
        if self._roster.unsettled:
            # The state was donated to a call whose result never came: all requests start again, in a new state.
            self._seats.clear()
            self.state = None  # type: ignore[assignment]  # first, so that two never fill the memory
            self.state = init_state(self.loop, self.params)
            self._roster.rewind()

        self._roster.mark()

    def _advance(self) -> list[Progress]:
        """Admit, dispatch and harvest; every dispatch that the meter asks for is timed."""
        self._admit()
        decoding = [entry.decoding for entry in self._seats.values()]
        # Every seated request is in the middle of its prompt: there is nothing to decode.
        if not any(decoding):
            self._roster.settle()
            return []

        rounds = self.config.rounds_per_dispatch
        if not all(decoding):
            rounds = self._fewer_rounds  # another prompt waits for its next chunk

        # A recorder copies records to the host between rounds and clock, so its dispatches are never timed.
        timed = self.tables is not None and self.recorder is None and self.metering.due(self._prefilling)
        if not timed:
            self._dispatch(rounds)
            return self._harvest()

        # Work queued earlier, such as a prefill, must not be counted as time of the rounds.
        jax.block_until_ready(self.state.length)
        started = time.perf_counter()
        self._dispatch(rounds)

        predicted = float(self.state.predicted_seconds)  # waits for the dispatch
        self.metering.took(time.perf_counter() - started, predicted)
        return self._harvest()

    @property
    def _fewer_rounds(self) -> int:
        """Rounds of a dispatch while a prompt waits for its next chunk."""
        return max(1, self.config.rounds_per_dispatch // 4)

    def _dispatch(self, rounds: int) -> None:
        """Start up to `rounds` rounds on the device; waits for them only with a recorder."""
        occupancy = self.metering.current()
        if self.recorder is not None:
            self.state, records = record_rounds(self.loop, self.params, self.state, occupancy, rounds)
            holders = {slot: entry.job.index for slot, entry in self._seats.items() if entry.decoding}
            self.recorder(tuple(holders.get(slot) for slot in range(self.config.slots)), jax.device_get(records))
            return

        # An early return is worth its overhead only if a waiting request can take the free slot.
        soon = self.waiting > 0 or self.config.return_at_once
        limits = jax.device_put((np.int32(rounds), np.bool_(soon)))
        self.state = run_rounds(self.loop, self.params, self.state, occupancy, *limits)

    # Prompts

    def admit(self) -> int:
        """Move waiting requests into free slots and prefill one chunk of each prompt, in order of arrival: all of them
        while no request decodes, else up to `prefill_budget` tokens (at least one chunk). Part of every `step`.

        Returns:
            Tokens prefilled, padding included.
        """
        with self._stepping:
            self._require_whole()
            self._begin()
            spent = self._admit()
            self._roster.settle()
            return spent

    def _admit(self) -> int:
        """Seat and prefill, as `admit` describes; returns the tokens prefilled, padding included."""
        # Asked before seating: only requests that decode already are held up by a prefill.
        decoding = any(entry.decoding for entry in self._seats.values() if self._roster.holds(entry))
        self._seat()

        budget = self.config.prefill_budget if decoding else None
        fresh: dict[int, list[int]] = {}
        later: list[int] = []
        spent = 0

        # Within the budget, oldest first. A first chunk that is wider than the budget still runs, or its prompt never
        # would.
        waiting = [slot for slot, entry in self._seats.items() if not entry.decoding]
        for slot in sorted(waiting, key=lambda slot: self._seats[slot].submitted):
            width = self._chunk_bucket(self._seats[slot])
            if budget is not None and spent and spent + width > budget:
                break
            spent += width

            if self._seats[slot].prefilled:
                later.append(slot)
            else:
                fresh.setdefault(width, []).append(slot)

        # First chunks of one width run together, since all attend to themselves alone; later ones have each its own
        # start.
        for width, slots in fresh.items():
            # Two compiled shapes a bucket, one prompt or a full house: more would only cost compile time.
            together = len(slots) * 2 > self.config.slots
            for part in [slots] if together else [[slot] for slot in slots]:
                self._prefill(width, part, self.config.slots if together else 1)

        for slot in later:
            self._prefill(self._chunk_bucket(self._seats[slot]), [slot], 1)
        return spent

    def _seat(self) -> None:
        """Empty the slots of requests that have left, and give free slots to waiting requests in order of arrival."""
        left = [slot for slot, entry in self._seats.items() if not self._roster.holds(entry)]
        if left:
            # Requests cancelled or ended by a stop string are still active on the device.
            leaving = np.isin(np.arange(self.config.slots), left)
            self.state = retire(self.loop, self.state, jax.device_put(leaving))
            for slot in left:
                del self._seats[slot]

        now = time.perf_counter()
        free = [slot for slot in range(self.config.slots) if slot not in self._seats]
        waiting = [entry for entry in self._roster.entries() if entry.slot is None]

        for slot, entry in zip(free, waiting, strict=False):
            self._seats[slot], entry.slot = entry, slot
            entry.admitted = now if entry.admitted is None else entry.admitted  # kept when it is seated again

    def _chunk_bucket(self, entry: Entry) -> int:
        return prompt_bucket(self.config, self.loop.size, entry.prefilled, entry.left_to_prefill)

    def _prefill(self, width: int, slots: list[int], rows: int) -> None:
        """Prefill the next chunk, of `width` positions, of the prompts in `slots`; the first is repeated up to `rows`
        rows, which writes its slot again with the same content."""
        filled = slots + slots[:1] * (rows - len(slots))
        entries = [(slot, self._seats[slot]) for slot in filled]
        batch = next_chunk(self.loop, width, [(slot, entry.running, entry.prefilled) for slot, entry in entries])
        self._run_chunk(batch, fresh=not self._seats[slots[0]].prefilled)

        for slot in slots:
            entry = self._seats[slot]
            entry.prefilled = min(entry.prefilled + width, len(entry.running.prompt))

    def _run_chunk(self, batch: Admission, fresh: bool) -> None:
        self._prefilling = True
        self.state = admit(self.loop, self.params, self.state, jax.device_put(batch), fresh)

    def warm_up(self) -> None:
        """Compile every program that a request can need, so that none waits for the compiler; those that record, if
        there is a recorder.

        Raises:
            UserError: the engine has requests already.
        """
        with self._stepping:
            if not self.idle:
                raise UserError("The engine has requests; warm it up before the first one.")

            self._begin()
            first, later = chunk_widths(self.config, self.loop.size, (self.config.longest or 1) - 1)
            for width in sorted(first):
                # The row counts that `_admit` uses: one prompt, or as many rows as slots.
                for rows in {1, self.config.slots}:
                    self._run_chunk(blank_chunk(self.loop, rows, width), fresh=True)
            for width in sorted(later):
                self._run_chunk(blank_chunk(self.loop, 1, width), fresh=False)

            # No round and no slot: these calls compile and change nothing.
            limits = jax.device_put((np.int32(0), np.bool_(False)))
            self.state = run_rounds(self.loop, self.params, self.state, self.metering.current(), *limits)
            if self.recorder is not None:
                for rounds in sorted({self.config.rounds_per_dispatch, self._fewer_rounds}):
                    occupancy = self.metering.current()
                    self.state, _ = record_rounds(self.loop, self.params, self.state, occupancy, rounds)
            self.state = retire(self.loop, self.state, jax.device_put(np.zeros(self.config.slots, bool)))
            self._roster.settle()

    # Results

    def _harvest(self) -> list[Progress]:
        """Read the results of the dispatch from the device, and book them."""
        state = self.state
        # One transfer for everything; it also waits for the dispatch.
        read = state.tokens, state.length, state.active, state.stopped, state.failed, state.counters
        made = _Made(*jax.device_get(read))
        self._prefilling = False
        self._failures.clear()

        now, progress, ended = time.perf_counter(), list[Progress](), list[Entry]()
        # Held while booking, so that a `cancel` sees a request before or after the dispatch, never halfway.
        with self._roster.held():
            for slot, entry in list(self._seats.items()):
                # Slots in the middle of a prompt have no tokens yet; cancelled ones are retired by the next step.
                if not entry.decoding or not self._roster.holds(entry):
                    continue
                before = entry.seen
                reason = self._see(entry, slot, made, now)

                generation = None if reason is None else entry.generation(reason, now)
                # At the end the held text is released too, and the last Progress reports it.
                text = entry.seen.text.said if generation is None else generation.text
                gained = entry.seen.tokens[len(before.tokens) :], text[len(before.text.said) :]

                progress.append(Progress(entry.job.index, *gained, generation, entry.seen.counts))
                if generation is not None:
                    ended.append(entry)
                    if not made.active[slot]:  # else a stop string ended it, and the slot is still to be retired
                        del self._seats[slot]
            self._roster.settle(ended)
        return progress

    def _see(self, entry: Entry, slot: int, made: "_Made", now: float) -> str | None:
        """Add a request's new tokens and counts to its entry.

        Returns:
            The finish reason if the request has ended, else None.
        """
        # The slot's tokens: the running prompt, what has been seen since it entered the slot, and the new ones.
        new = made.tokens[slot, len(entry.running.prompt) + entry.made : made.length[slot]].tolist()
        counts = Counts(
            int(made.counters.rounds[slot]),
            int(made.counters.committed[slot]),
            tuple(made.counters.verified_at[slot].tolist()),
            tuple(made.counters.accepted_at[slot].tolist()),
            int(made.counters.drafted[slot]),
        )

        # A stop string comes first: it may lie before the stop token, the limit or the failure.
        stopped = bool(made.stopped[slot])
        decode = None if self.target.tokenizer is None else self.target.tokenizer.decode
        if entry.see(decode, new, counts, stopped, now) or stopped:
            return "stop"

        if made.failed[slot]:
            return "error"
        return None if made.active[slot] else "length"


class _Made(NamedTuple):
    """The part of the state that the host reads after a dispatch, as numpy arrays."""

    tokens: Any  # [R, S]
    length: Any  # [R]
    active: Any  # [R] bool
    stopped: Any  # [R] bool
    failed: Any  # [R] bool
    counters: RoundCounters
