"""Continuous batching: slots of the compiled loop filled, run and emptied from the host.

The host acts between dispatches only; a dispatch is many rounds. Between two of them waiting requests move into free
slots and a bounded number of prompt tokens is prefilled, so that a long prompt holds up nobody who decodes. Chunks are
padded to length buckets, so that other prompts meet compiled programs.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding.dispatch import record_rounds, run_rounds
from dspark_jax.decoding.prefill import admit, retire
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import Admission, DecodeState, RoundRecord
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import LoadMeter, Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import bucket_ladder
from dspark_jax.serving.chunks import blank_chunk, chunk_widths, next_chunk, prompt_bucket
from dspark_jax.serving.profile import load_or_measure
from dspark_jax.serving.requests import (
    DecodeConfig,
    Generation,
    Job,
    Progress,
    QueueFull,
    Request,
    Timing,
    make_job,
)
from dspark_jax.sharding import parameter_mesh
from dspark_jax.targets.target import Target

CACHE_MULTIPLE = 64
SELDOM_TIMED = 4

# (index of the request in each slot, None for a free one; numpy records [rounds, R, ...] of one dispatch).
Recorder = Callable[[tuple[int | None, ...], RoundRecord], None]


@dataclass(eq=False)
class _Entry:
    """A request in the engine. `tokens` and the counts are what the host has seen; times are of `perf_counter`."""

    job: Job
    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    counts: tuple[int, int, tuple[int, ...], tuple[int, ...]] = (0, 0, (), ())
    drafted: int = 0

    @property
    def decoding(self) -> bool:
        return self.prefilled == len(self.job.prompt)

    def timing(self, now: float) -> Timing:
        times = (now if at is None else at for at in (self.admitted, self.first_token, now))
        return Timing(*(at - self.submitted for at in times))


@dataclass
class Engine:
    """Continuous batching over the slots of one compiled loop.

    `longest` is the most positions a request may take (prompt and new tokens); `submit` refuses longer ones. `signal`,
    the user's word for what else the device carries, may be set at any time, and so may `recorder`, for studies.
    """

    target: Target
    drafter: Drafter | None
    config: DecodeConfig
    longest: int
    stop_slots: int = 4
    tables: ScheduleTables | None = None  # what adaptive policies need; None: profiled now, or read from the cache
    temperatures: tuple[float, ...] | None = None  # of the confidence logits, for an engine that profiles itself
    signal: float = 1.0
    meter: LoadMeter | None = field(default_factory=LoadMeter)  # None: the load stays as profiled
    recorder: Recorder | None = None
    occupancy: Occupancy = field(default_factory=Occupancy.of)  # what the next dispatch is told
    loop: DecodeLoop = field(init=False)
    params: LoopParams = field(init=False)
    state: DecodeState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_engine(self.config)
        self.loop = make_loop(self.target, self.drafter, self.config, self.longest, self.stop_slots)
        weights = self.target.params, {} if self.drafter is None else self.drafter.params
        if self.tables is None and self.config.policy.needs_tables and self.loop.block:
            # Before the state exists: a profile makes one of its own.
            profile = load_or_measure(self.loop, LoopParams(*weights), self.config.temperature)
            self.tables = ScheduleTables.of(profile.cost_table(), self.temperatures or (1.0,) * self.loop.block)
        self.params = LoopParams(*weights, self.tables)
        self.state = init_state(self.loop, self.params)
        self._pending: deque[_Entry] = deque()
        self._slots: dict[int, _Entry] = {}
        self._open: dict[int, _Entry] = {}  # by request index: waiting or in a slot
        self._told = (1.0, 1.0)  # load and signal in `occupancy`
        beside = None if self.tables is None else self.tables.costs.dispatch
        self._dispatch_seconds = 0.0 if beside is None else float(beside)
        self._prefilling = False  # whether the device may still be at prompts
        self._untimed = 0  # dispatches since one was timed

    # Requests in and out

    def submit(self, index: int, request: Request) -> None:
        """Queues a request under a name of the caller's. Raises UserError, in a sentence, for one that can't be
        decoded or whose index is in use, and QueueFull where the queue is at its bound."""
        if self.config.queue is not None and len(self._pending) >= self.config.queue:
            raise QueueFull(
                f"Request {index} finds {len(self._pending)} others waiting, as many as this engine's queue holds; "
                "submit it again once some have ended."
            )
        job = make_job(self.target, self.config, index, request)
        if job.longest > self.longest:
            raise UserError(
                f"Request {index} needs {job.longest} positions (a prompt of {len(job.prompt)} tokens and up to "
                f"{job.settings.max_new_tokens} new ones); this engine holds {self.longest}. "
                "Shorten it or raise the limit."
            )
        if len(job.settings.stop_tokens or ()) > self.stop_slots:
            raise UserError(
                f"Request {index} names {len(job.settings.stop_tokens or ())} stop tokens; this engine holds "
                f"{self.stop_slots}."
            )
        if index in self._open:
            raise UserError(f"Request {index} is in the engine already; give every open request its own index.")
        self._open[index] = _Entry(job, time.perf_counter())
        self._pending.append(self._open[index])

    def cancel(self, index: int) -> Generation | None:
        """Ends a waiting or running request: its Generation with what it had made so far, finish_reason "cancelled".
        None where no such request is open. The slot is free for the next `step`."""
        entry = self._open.get(index)
        if entry is None:
            return None
        if entry.admitted is None:
            self._pending.remove(entry)
        else:
            slot = next(slot for slot, running in self._slots.items() if running is entry)
            del self._slots[slot]
            self.state = retire(self.loop, self.state, jax.device_put(np.arange(self.config.slots) == slot))
        return self._generation(entry, "cancelled", time.perf_counter())

    @property
    def idle(self) -> bool:
        return not self._pending and not self._slots

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._pending)

    @property
    def running(self) -> int:
        """Requests in slots, decoding or being prefilled."""
        return len(self._slots)

    def step(self) -> list[Progress]:
        """Admits what fits, runs one dispatch, and returns what each request gained."""
        self.admit()
        if not any(entry.decoding for entry in self._slots.values()):
            return []
        rounds = self.config.rounds_per_dispatch
        if not all(entry.decoding for entry in self._slots.values()):
            rounds = max(1, rounds // 4)  # a prompt waits for its next chunk
        self._tell_occupancy()
        if (meter := self._due_meter()) is None:
            self._dispatch(rounds)
            return self._harvest()
        jax.block_until_ready(self.state.length)
        started = time.perf_counter()
        self._dispatch(rounds)
        predicted = float(self.state.predicted_seconds)  # waits for the dispatch
        meter.update(time.perf_counter() - started - self._dispatch_seconds, predicted)
        self._untimed = 0
        return self._harvest()

    def _due_meter(self) -> LoadMeter | None:
        """The meter, if the coming dispatch is to be timed. A prefill's seconds say nothing about the rounds', and to
        wait for its end costs more than it tells: behind one, one dispatch in `SELDOM_TIMED` is. The first, which may
        meet the compiler, is behind one."""
        if self.meter is None or self.tables is None or self.recorder is not None:
            return None
        self._untimed += 1
        return self.meter if not self._prefilling or self._untimed >= SELDOM_TIMED else None

    def _dispatch(self, rounds: int) -> None:
        if self.recorder is not None:
            self.state, records = record_rounds(self.loop, self.params, self.state, self.occupancy, rounds)
            holders = {slot: entry.job.index for slot, entry in self._slots.items() if entry.decoding}
            self.recorder(tuple(holders.get(slot) for slot in range(self.config.slots)), jax.device_get(records))
            return
        soon = bool(self._pending) or self.config.return_at_once
        how = self.occupancy, *jax.device_put((np.int32(rounds), np.bool_(soon)))
        self.state = run_rounds(self.loop, self.params, self.state, *how)

    def _tell_occupancy(self) -> None:
        known = (1.0 if self.meter is None else self.meter.load, self.signal)
        if known != self._told:
            self.occupancy, self._told = Occupancy.of(*known), known

    # Prompts

    def admit(self) -> int:
        """Moves waiting requests into free slots and prefills their prompts, in order of arrival, one chunk each:
        all of them while nobody decodes, else up to `prefill_budget` tokens (at least one chunk). Returns how many
        tokens were prefilled, padding included."""
        now = time.perf_counter()
        decoding = any(entry.decoding for entry in self._slots.values())
        for slot in range(self.config.slots):
            if self._pending and slot not in self._slots:
                self._slots[slot] = self._pending.popleft()
                self._slots[slot].admitted = now
        budget = self.config.prefill_budget if decoding else None
        fresh: dict[int, list[int]] = {}
        later: list[int] = []
        spent = 0
        waiting = [slot for slot, entry in self._slots.items() if not entry.decoding]
        for slot in sorted(waiting, key=lambda slot: self._slots[slot].submitted):
            width = self._chunk_bucket(self._slots[slot])
            if budget is not None and spent and spent + width > budget:
                break
            spent += width
            if self._slots[slot].prefilled:
                later.append(slot)
            else:
                fresh.setdefault(width, []).append(slot)
        for width, slots in fresh.items():
            # Two compiled shapes a bucket, one prompt or a full house: more would only cost compile time.
            together = len(slots) * 2 > self.config.slots
            for part in [slots] if together else [[slot] for slot in slots]:
                self._prefill(width, part, self.config.slots if together else 1)
        for slot in later:
            self._prefill(self._chunk_bucket(self._slots[slot]), [slot], 1)
        return spent

    def warm_up(self) -> None:
        """Compiles every program that a request can meet, so that none waits for the compiler. Needs an idle engine."""
        if not self.idle:
            raise UserError("The engine has requests; warm it up before the first one.")
        first, later = chunk_widths(self.config, self.loop.size, self.longest - 1)
        for width in sorted(first):
            for rows in {1, self.config.slots}:
                self._run_chunk(blank_chunk(self.loop, rows, width), fresh=True)
        for width in sorted(later):
            self._run_chunk(blank_chunk(self.loop, 1, width), fresh=False)
        how = self.occupancy, jnp.asarray(0, jnp.int32), jnp.asarray(False)
        self.state = run_rounds(self.loop, self.params, self.state, *how)
        self.state = retire(self.loop, self.state, jax.device_put(np.zeros(self.config.slots, bool)))

    def _chunk_bucket(self, entry: _Entry) -> int:
        return prompt_bucket(self.config, self.loop.size, entry.prefilled, len(entry.job.prompt) - entry.prefilled)

    def _prefill(self, width: int, slots: list[int], rows: int) -> None:
        """The next chunk of the prompts in `slots`, which fit in `width`; the first is repeated up to `rows`."""
        filled = slots + slots[:1] * (rows - len(slots))
        entries = [(slot, self._slots[slot]) for slot in filled]
        batch = next_chunk(self.loop, width, [(slot, entry.job, entry.prefilled) for slot, entry in entries])
        self._run_chunk(batch, fresh=not self._slots[slots[0]].prefilled)
        for slot in slots:
            entry = self._slots[slot]
            entry.prefilled = min(entry.prefilled + width, len(entry.job.prompt))

    def _run_chunk(self, batch: Admission, fresh: bool) -> None:
        self._prefilling = True
        self.state = admit(self.loop, self.params, self.state, jax.device_put(batch), fresh)

    # Results

    def _harvest(self) -> list[Progress]:
        state = self.state
        tokens, length, active, stopped, counters = jax.device_get(
            (state.tokens, state.length, state.active, state.stopped, state.counters)
        )
        self._prefilling = False
        now, progress = time.perf_counter(), []
        for slot, entry in list(self._slots.items()):
            if not entry.decoding:
                continue
            start = len(entry.job.prompt)
            new = tokens[slot, start + len(entry.tokens) : length[slot]].tolist()
            entry.tokens += new
            entry.first_token = now if entry.first_token is None else entry.first_token
            entry.counts = (
                int(counters.rounds[slot]),
                int(counters.committed[slot]),
                tuple(counters.verified_at[slot].tolist()),
                tuple(counters.accepted_at[slot].tolist()),
            )
            entry.drafted = int(counters.drafted[slot])
            generation = None
            if not active[slot]:
                generation = self._generation(entry, "stop" if stopped[slot] else "length", now)
                del self._slots[slot]
            progress.append(Progress(entry.job.index, tuple(new), generation))
        return progress

    def _generation(self, entry: _Entry, reason: str, now: float) -> Generation:
        del self._open[entry.job.index]
        text, made = "", tuple(entry.tokens)
        if self.target.tokenizer is not None:
            text = self.target.tokenizer.decode(list(made[:-1] if reason == "stop" else made))
        timing = entry.timing(now)
        return Generation(entry.job.index, entry.job.prompt, made, text, reason, *entry.counts, entry.drafted, timing)


def check_engine(config: DecodeConfig) -> None:
    """UserError for settings that no engine can run with."""
    for name in ("slots", "rounds_per_dispatch", "smallest_prompt_bucket", "prefill_chunk", "prefill_budget"):
        if getattr(config, name) < 1:
            raise UserError(f"The decoding setting {name} is {getattr(config, name)}; expected 1 or more.")
    if config.queue is not None and config.queue < 1:
        raise UserError(f"The decoding setting queue is {config.queue}; expected 1 or more, or None for no bound.")


def make_loop(
    target: Target, drafter: Drafter | None, config: DecodeConfig, longest: int, stop_slots: int
) -> DecodeLoop:
    """The loop for these settings; a slot holds `longest` positions and the widest write behind them."""
    block = 0 if drafter is None else drafter.config.block_size
    buckets = config.buckets or bucket_ladder(config.slots, block + 1)
    if buckets[-1] != config.slots * (block + 1) or list(buckets) != sorted(set(buckets)):
        raise UserError(
            f"Token buckets {buckets} must ascend and end at slots x (block + 1), {config.slots * (block + 1)}."
        )
    return DecodeLoop(
        target=target.graphdef,
        drafter=None if drafter is None else drafter.graphdef,
        requests=config.slots,
        size=-(-(longest + block + 1) // CACHE_MULTIPLE) * CACHE_MULTIPLE,
        block=block,
        tap_layers=() if drafter is None else drafter.config.target_layer_ids,
        buckets=buckets,
        stop_slots=stop_slots,
        policy=config.policy,
        mesh=parameter_mesh(target.params),
    )
