"""Which requests an engine has: those that wait, those in slots, and what each has made so far.

Host bookkeeping alone, behind a lock of its own that is never held while the device works: `submit` and `cancel` do not
wait for a dispatch. What a dispatch changes can be taken back (`mark`, `rewind`), so that an interrupted one leaves no
trace.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dspark_jax.errors import UserError
from dspark_jax.serving.jobs import Job
from dspark_jax.serving.requests import Generation, QueueFull, Timing
from dspark_jax.serving.text import AnswerText, Decode

NO_LAW = (
    "The target gave no finite probabilities for the next token: its weights or the dtype that it runs in do not fit; "
    "try float32."
)


@dataclass(frozen=True)
class Counts:
    """Of a request since it was submitted: rounds, tokens that they committed, drafts verified and accepted by block
    position, rounds with drafts."""

    rounds: int = 0
    committed: int = 0
    verified_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    drafted: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        if not self.verified_at:
            verified, accepted = other.verified_at, other.accepted_at
        else:
            verified = tuple(a + b for a, b in zip(self.verified_at, other.verified_at, strict=True))
            accepted = tuple(a + b for a, b in zip(self.accepted_at, other.accepted_at, strict=True))
        totals = self.rounds + other.rounds, self.committed + other.committed
        return Counts(*totals, verified, accepted, self.drafted + other.drafted)


@dataclass(frozen=True)
class Seen:
    """What the host has seen of a request."""

    tokens: tuple[int, ...] = ()
    counts: Counts = Counts()
    text: AnswerText = AnswerText()
    first_token: float | None = None


@dataclass(eq=False)
class Entry:
    """A request in the engine; times are of `perf_counter`.

    `running` is what its slot was given: the job, behind the tokens that had been seen when it entered the slot
    (`before`), of which there are some only after an interrupted dispatch.
    """

    job: Job
    submitted: float
    admitted: float | None = None
    slot: int | None = None
    prefilled: int = 0
    running: Job = field(init=False)
    before: Seen = Seen()
    seen: Seen = Seen()

    def __post_init__(self) -> None:
        self.running = self.job

    @property
    def decoding(self) -> bool:
        return self.slot is not None and self.prefilled == len(self.running.prompt)

    @property
    def left_to_prefill(self) -> int:
        return len(self.running.prompt) - self.prefilled

    def unseat(self) -> None:
        """Back to the queue, to go on behind what has been seen."""
        self.slot, self.prefilled = None, 0
        self.before, self.running = self.seen, self.job.after(self.seen.tokens)

    @property
    def made(self) -> int:
        """Tokens seen since the request entered its slot."""
        return len(self.seen.tokens) - len(self.before.tokens)

    def see(self, decode: Decode | None, new: Sequence[int], counts: Counts, stopped: bool, now: float) -> bool:
        """Takes over new tokens, and the counts since the request entered its slot. Tokens behind a stop string are
        left out.

        Args:
            decode: the tokenizer's; None: there is no text.
            stopped: whether the last of the tokens is a stop token.
        Returns:
            Whether a stop string has ended the request.
        """
        text, kept = self.seen.text, None
        if decode is not None:
            text, kept = text.grown(decode, self.job.sampling.stop, new[:-1] if stopped else new)
        tokens = (*self.seen.tokens, *new[:kept])
        first = now if self.seen.first_token is None else self.seen.first_token
        self.seen = Seen(tokens, self.before.counts + counts, text, first)
        return kept is not None

    def generation(self, reason: str, now: float) -> Generation:
        seen, counts = self.seen, self.seen.counts
        times = (now if at is None else at for at in (self.admitted, seen.first_token, now))
        return Generation(
            index=self.job.index,
            prompt_tokens=self.job.prompt,
            tokens=seen.tokens,
            text=seen.text.ended().said,
            finish_reason=reason,
            rounds=counts.rounds,
            committed=counts.committed,
            verified_at=counts.verified_at,
            accepted_at=counts.accepted_at,
            drafted=counts.drafted,
            timing=Timing(*(at - self.submitted for at in times)),
            error=NO_LAW if reason == "error" else "",
        )


Mark = dict[Entry, Seen]
"""The open requests at a moment, and what had been seen of each."""


class Roster:
    """The open requests of an engine, in order of arrival. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: dict[int, Entry] = {}
        self._mark: Mark | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Several calls as one."""
        with self._lock:
            yield

    def add(self, job: Job, bound: int | None) -> None:
        """Queues a request. Raises QueueFull where `bound` others wait, UserError where its index is in use."""
        with self._lock:
            if job.index in self._open:
                raise UserError(f"Request {job.index} is in the engine already; give every open request its own index.")
            self.require_room(job.index, bound)
            self._open[job.index] = Entry(job, time.perf_counter())

    def require_room(self, index: int, bound: int | None) -> None:
        if bound is not None and self.waiting >= bound:
            raise QueueFull(
                f"Request {index} finds {self.waiting} others waiting, as many as this engine's queue holds; "
                "submit it again once some have ended."
            )

    def remove(self, index: int) -> Entry | None:
        """Takes a request out, as it was before the dispatch that is under way."""
        with self._lock:
            entry = self._open.pop(index, None)
            if entry is not None and self._mark is not None:
                entry.seen = self._mark.pop(entry, entry.seen)
            return entry

    def holds(self, entry: Entry) -> bool:
        return self._open.get(entry.job.index) is entry

    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._open.values())

    @property
    def waiting(self) -> int:
        return sum(entry.slot is None for entry in self.entries())

    @property
    def running(self) -> int:
        return sum(entry.slot is not None for entry in self.entries())

    @property
    def unsettled(self) -> bool:
        """Whether a dispatch has begun and not been booked."""
        return self._mark is not None

    def mark(self) -> None:
        """Remembers what has been seen, until `settle` or `rewind`."""
        with self._lock:
            self._mark = {entry: entry.seen for entry in self._open.values()}

    def settle(self, ended: Sequence[Entry] = ()) -> None:
        """What has been seen since the mark stands; requests that have ended leave."""
        with self._lock:
            self._mark = None
            self._open = {index: entry for index, entry in self._open.items() if entry not in ended}

    def rewind(self) -> None:
        """As at the mark, with every request back in the queue. Can itself be interrupted and repeated."""
        with self._lock:
            mark = self._mark or {}
            for entry in self._open.values():
                entry.seen = mark.get(entry, entry.seen)
                entry.unseat()
            self._mark = None
