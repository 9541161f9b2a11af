"""Continuous batching: the host fills, runs and empties the slots of the compiled loop.

The host acts only between dispatches, each of many rounds. Between two of them waiting requests move into free slots
and a bounded number of prompt tokens is prefilled, so that a long prompt does not hold up the requests that decode.
Chunks are padded to length buckets, so that new prompts reuse compiled programs. docs/engine.md has the contract:
threads, interrupts, failures, bounds.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import numpy as np

from dspark_jax.decoding.dispatch import record_alone, record_rounds, run_alone, run_rounds
from dspark_jax.decoding.prefill import admit, retire
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import Admission, DecodeState
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import VerifyPolicy
from dspark_jax.serving.assembly import Assembly
from dspark_jax.serving.booking import Made, Recorder, book
from dspark_jax.serving.chunks import next_chunk, plan_chunks
from dspark_jax.serving.crowd import Crowd
from dspark_jax.serving.jobs import make_job, require_room
from dspark_jax.serving.memory import Memory, memory_of
from dspark_jax.serving.metering import Metering
from dspark_jax.serving.prefixes import PrefixCache
from dspark_jax.serving.requests import EngineBroken, Generation, Progress, Request
from dspark_jax.serving.roster import Entry, Roster
from dspark_jax.serving.sampling import SamplingParams, require_mode
from dspark_jax.serving.settings import EngineConfig, check_engine
from dspark_jax.serving.warming import programs_of
from dspark_jax.targets.target import Target


@dataclass
class Engine:
    """Continuous batching over the slots of one compiled loop.

    `submit`, `cancel`, `close` and the properties may be called from any thread and never wait for the device. After an
    interrupt or a failure inside `step`, the next `step` resumes the open requests after the tokens that have been
    reported; a second failure in a row breaks the engine, and every later call raises EngineBroken.

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
    # Called in every step that decodes once its dispatch has started: takes no time from the device. Set at any time.
    meanwhile: Callable[[], None] | None = field(default=None, init=False, repr=False)
    why: str = field(init=False)  # one line: the policy that was chosen, and the reason
    loop: DecodeLoop = field(init=False)
    params: LoopParams = field(init=False)
    crowd: Crowd = field(init=False, repr=False)  # when requests are decoded by a program without the drafter
    state: DecodeState = field(init=False, repr=False)
    memory: Memory = field(init=False, repr=False)  # which requests the caches have room for
    prefixes: PrefixCache | None = field(init=False, repr=False)  # None: prompts are always prefilled whole

    def __post_init__(self) -> None:
        check_engine(self.config)
        chosen = Assembly.of(self.target, self.drafter, self.config, self.sampling, self.strategy, self.tables)
        self.drafter, self.loop, self.params, self.why = chosen.drafter, chosen.loop, chosen.params, chosen.why
        most = self.config.slots if chosen.most is None else chosen.most
        self.crowd = Crowd(most, self.loop.drafter is not None and self.loop.policy.always_drafts)

        # The clock of a dispatch includes the call itself, which the predicted seconds of its rounds do not.
        self.tables = self.params.tables
        if self.tables is not None and self.tables.costs.dispatch is not None:
            self.metering.dispatch_seconds = float(self.tables.costs.dispatch)

        self.state = init_state(self.loop, self.params)
        self.memory = memory_of(self.loop, self.config.rounds_per_dispatch)
        self.prefixes = PrefixCache.of(self.config, self.loop, self.state, self.memory.pool, self.drafter)
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
            EngineClosed: `close` was called.
            EngineBroken: the engine decodes no more.
        """
        self._require_whole()
        # Refused before the prompt is tokenised, which takes time; `add` checks again, under its lock.
        self._roster.require_room(index, self.config.queue)
        job = make_job(self.target, self.sampling, index, request)
        require_mode(job.sampling, self.sampling.mode, f"Request {index}")

        require_room(job, self.config)
        self._roster.add(job, self.config.queue)

    def cancel(self, index: int) -> Generation | None:
        """End a waiting or running request. Its slot is free for the next `step`.

        Returns:
            Its Generation with the tokens that have been reported and finish_reason "cancelled"; None if no such
            request is open.
        """
        entry = self._roster.remove(index)
        return None if entry is None else entry.generation("cancelled", time.perf_counter())

    def close(self, grace: float | None = None) -> None:
        """Take no more requests. The open ones, those that wait too, go on; step until `idle`.

        Args:
            grace: seconds from now after which they are cut, with finish_reason "deadline". None: they run on.
        """
        self._roster.close(math.inf if grace is None else time.perf_counter() + grace)

    @property
    def closed(self) -> bool:
        """Whether new requests are refused."""
        return self._roster.closed

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
        """Positions that the requests in slots hold."""
        seated = [entry for entry in self._roster.entries() if entry.slot is not None]
        return sum(len(entry.job.prompt) + len(entry.seen.tokens) for entry in seated)

    @property
    def occupancy(self) -> Occupancy:
        """The load and signal of the last dispatch."""
        return self.metering.occupancy

    def step(self) -> list[Progress]:
        """Admit what fits, run one dispatch, and report the new tokens.

        Returns:
            A Progress for each request that decoded or that its deadline has cut; empty if all of them are still being
            prefilled.
        Raises:
            EngineBroken: this step and the one before failed, or an earlier pair did.
        """
        with self._stepping:
            self._require_whole()
            try:
                self._begin()
                progress = self._book(self._advance())
            except Exception as error:  # an interrupt is not an Exception, and not counted as a failure
                self._failures.append(error)
                self._require_whole()
                raise
            return progress

    def _require_whole(self) -> None:
        """Raise EngineBroken once two failures have followed each other."""
        if len(self._failures) > 1:
            raise EngineBroken.by(self._failures[-1]) from self._failures[-1]

    def _begin(self) -> None:
        """Recover from an interrupted or failed dispatch, and mark what this one starts from."""
        if self._roster.unsettled:
            # The state was donated to a call whose result never came: all requests start again, in a new state.
            self._seats.clear()
            # A failure may have been one of memory, of which the kept chunks hold some; pages went with the state.
            if self.prefixes is not None and (self._failures or self.prefixes.pool is not None):
                self.prefixes.clear()
            self.state = None  # type: ignore[assignment]  # first, so that two never fill the memory
            self.state = init_state(self.loop, self.params)
            self.memory.clear()
            self._roster.rewind()

        self._roster.mark()

    def _advance(self) -> Made | None:
        """Admit, dispatch and read the results; None if nothing decodes. Some dispatches are timed for the meter."""
        self._admit()
        decoding = [entry.decoding for entry in self._seats.values()]
        # Every seated request is in the middle of its prompt: there is nothing to decode.
        if not any(decoding):
            return None

        rounds = self.config.rounds_per_dispatch
        # Recording dispatches are compiled for their number of rounds: there is one of them.
        if not all(decoding) and self.recorder is None:
            rounds = max(1, rounds // 4)  # another prompt waits for its next chunk

        alone = self.crowd.alone(self._seats.values(), recorded=self.recorder is not None)
        # A recorder copies records to the host between rounds and clock, so its dispatches are never timed.
        timed = self.tables is not None and self.recorder is None and not alone and self.metering.due(self._prefilling)
        if not timed:
            self._dispatch(rounds, alone)
            return self._read()

        # Work queued earlier, such as a prefill, must not be counted as time of the rounds.
        jax.block_until_ready(self.state.length)
        started = time.perf_counter()
        self._dispatch(rounds, busy=False)

        predicted = float(self.state.predicted_seconds)  # waits for the dispatch
        self.metering.took(time.perf_counter() - started, predicted)
        # Behind the clock: work of the host that outlasts the device would be taken for load.
        if self.meanwhile is not None:
            self.meanwhile()
        return self._read()

    def _dispatch(self, rounds: int, alone: bool = False, busy: bool = True) -> None:
        """Start up to `rounds` rounds on the device and, where `busy`, do `meanwhile`; waits only with a recorder."""
        # Read once: it may be set by another thread in between.
        occupancy, recorder, records = self.metering.current(), self.recorder, None
        if recorder is not None:
            record = record_alone if alone else record_rounds
            self.state, records = record(self.loop, self.params, self.state, occupancy, rounds)
        else:
            # An early return is worth its overhead only if a waiting request can take the free slot.
            soon = self.waiting > 0 or self.config.return_at_once
            limits = jax.device_put((np.int32(rounds), np.bool_(soon)))
            run = run_alone if alone else run_rounds
            self.state = run(self.loop, self.params, self.state, occupancy, *limits)

        if busy and self.meanwhile is not None:
            self.meanwhile()
        if recorder is not None:
            holders = {slot: entry.job.index for slot, entry in self._seats.items() if entry.decoding}
            recorder(tuple(holders.get(slot) for slot in range(self.config.slots)), jax.device_get(records))

    # Prompts

    def admit(self) -> int:
        """Move waiting requests into free slots and prefill one chunk of each prompt, in their order: all of them
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
        # Prompts that have just been seated begin with the chunks that are kept of them: copied into their pages, which
        # the tables must name by then, or given as pages, by which the tables change.
        self.state = self.memory.placed(self.state)
        if self.prefixes is not None:
            self.state = self.memory.placed(self.prefixes.begin(self.loop, self.state, self._seats))
        budget = self.config.prefill_budget if decoding else None
        keeps = self.prefixes is not None
        plan = plan_chunks(self.config, self.loop.size, self._seats, budget, keeps)
        # First chunks of one width run together, since all attend to themselves alone; later ones have each its own
        # start.
        for width, slots, rows in plan.fresh:
            self._prefill(width, slots, rows)

        for slot, width in plan.later:
            self._prefill(width, [slot], 1)
        return plan.spent

    def _seat(self) -> None:
        """Empty the slots of requests that have left or that memory is too short for, and seat waiting requests in the
        free ones, in their order, while there is memory for them."""
        left = [slot for slot, entry in self._seats.items() if not self._roster.holds(entry)]
        for slot in left:
            del self._seats[slot]
        for slot in self.memory.settle(self._seats):
            self._seats.pop(slot).unseat()
            left.append(slot)
        if left:
            # All of them may still be active on the device.
            leaving = np.isin(np.arange(self.config.slots), left)
            self.state = retire(self.loop, self.state, jax.device_put(leaving))

        now = time.perf_counter()
        free = [slot for slot in range(self.config.slots) if slot not in self._seats]
        for slot, entry in zip(free, self._roster.queue(now), strict=False):
            begins = [] if self.prefixes is None else self.prefixes.pages(entry.running.prompt)
            # A shorter request behind it has to wait, too: else this one might wait for ever.
            if not self.memory.admit(slot, entry, self._seats, begins):
                break
            self._seats[slot], entry.slot = entry, slot
            entry.admitted = now if entry.admitted is None else entry.admitted  # kept when it is seated again

    def _prefill(self, width: int, slots: list[int], rows: int) -> None:
        """Prefill the next chunk, of `width` positions, of the prompts in `slots`; the first is repeated up to `rows`
        rows, which writes its slot again with the same content."""
        filled = slots + slots[:1] * (rows - len(slots))
        entries = [(slot, self._seats[slot]) for slot in filled]
        batch = next_chunk(self.loop, width, [(slot, entry.running, entry.prefilled) for slot, entry in entries])
        self._run_chunk(batch, fresh=not self._seats[slots[0]].prefilled)

        for slot in slots:
            entry = self._seats[slot]
            start, entry.prefilled = entry.prefilled, min(entry.prefilled + width, len(entry.running.prompt))
            # Copied at once, before a round or another chunk changes the slot.
            if self.prefixes is not None:
                self.prefixes.keep(self.loop, self.state, slot, start, entry.running.prompt[: entry.prefilled])

    def _run_chunk(self, batch: Admission, fresh: bool) -> None:
        self._prefilling = True
        self.state = admit(self.loop, self.params, self.state, jax.device_put(batch), fresh)

    def warm_up(self) -> None:
        """Compile every program that a request can need, so that none waits for the compiler; those that record, if
        there is a recorder.

        Raises:
            UserError: the engine has requests already.
        """
        for compiling in programs_of(self):
            compiling()

    @contextmanager
    def unused(self) -> Iterator[None]:
        """Hold the engine, without requests, for a call that compiles a program and changes nothing.

        Raises:
            UserError: the engine has requests.
        """
        with self._stepping:
            if not self.idle:
                raise UserError("The engine has requests; warm it up before the first one.")
            self._begin()
            yield
            self._roster.settle()

    # Results

    def _read(self) -> Made:
        """The results of the dispatch, for which it waits."""
        made = Made.read(self.state, list(self._seats.values()))
        self._prefilling = False
        self._failures.clear()
        return made

    def _book(self, made: Made | None) -> list[Progress]:
        """Add what the dispatch has made to the requests, and end those that have ended or are out of time."""
        now, progress, ended = time.perf_counter(), list[Progress](), list[Entry]()
        decode = None if self.target.tokenizer is None else self.target.tokenizer.decode

        # Held while booking, so that a `cancel` sees a request before or after the dispatch, never halfway.
        with self._roster.held():
            for entry in self._roster.entries():
                gained = book(entry, made, decode, now)
                if gained is None:
                    continue
                progress.append(gained)
                if gained.generation is not None:
                    ended.append(entry)
                    # Slots that are still active are retired by the next step: a stop string or a deadline ended them.
                    if made is not None and entry.decoding and not made.active[entry.slot]:
                        del self._seats[entry.slot]  # type: ignore[arg-type]
            self._roster.settle(ended)
        return progress
