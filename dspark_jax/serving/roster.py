"""The open requests of an engine: those that wait, those in slots, and the tokens of each so far.

Pure host bookkeeping. Its own lock is never held while the device works, so `submit` and `cancel` do not wait for a
dispatch. The changes of a dispatch can be undone (`mark`, `rewind`), so that an interrupted one leaves no trace.
"""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dspark_jax.errors import UserError
from dspark_jax.serving.jobs import Job
from dspark_jax.serving.requests import Counts, EngineClosed, Generation, QueueFull, Timing, TokenLogprob
from dspark_jax.serving.text import AnswerText, Decode

NO_LAW = (
    "The target gave no finite probabilities for the next token: its weights or the dtype that it runs in do not fit; "
    "try float32."
)


@dataclass(frozen=True)
class Seen:
    """The part of a request's output that the host has read."""

    tokens: tuple[int, ...] = ()
    counts: Counts = Counts()
    text: AnswerText = AnswerText()
    first_token: float | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, where the request asked for them


@dataclass(eq=False)
class Entry:
    """A request in the engine; times are of `perf_counter`."""

    job: Job
    submitted: float
    admitted: float | None = None
    slot: int | None = None  # None: waiting
    prefilled: int = 0  # tokens of `running`'s prompt that the slot holds
    cached: int = 0  # prompt tokens that were never prefilled, since a kept prefix held them
    begun: bool = False  # whether an earlier slot held some of the prompt
    undrafted: bool = False  # its drafter's context lacks tokens: nothing is drafted for it in this slot any more
    running: Job = field(init=False)  # what the slot decodes: the job, going on behind the tokens of `before`
    before: Seen = Seen()  # what had been seen when it entered the slot: nothing, unless it had to leave an earlier one
    seen: Seen = Seen()
    due: float = math.inf  # its deadline

    def __post_init__(self) -> None:
        # They differ only once the request has lost a slot, and goes on behind its reported tokens.
        self.running = self.job
        if self.job.deadline is not None:
            self.due = self.submitted + self.job.deadline

    def expired(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return now >= self.due

    @property
    def turn(self) -> tuple[int, float]:
        """Sorts requests into the order in which they are served: by priority, then by arrival."""
        return self.job.priority, self.submitted

    @property
    def decoding(self) -> bool:
        """Whether it is in a slot and its whole prompt is prefilled."""
        return self.slot is not None and self.prefilled == len(self.running.prompt)

    @property
    def plain(self) -> bool:
        """Whether it asks for no drafts."""
        return self.job.sampling.verify_length == 0

    @property
    def left_to_prefill(self) -> int:
        """Prompt tokens that its slot lacks."""
        return len(self.running.prompt) - self.prefilled

    def unseat(self) -> None:
        """Return the request to the queue, to be continued after the tokens that have been seen."""
        # Tokens that were reported are prefilled again, not decoded again; the last of them is the next round's anchor.
        self.begun |= self.prefilled > 0
        self.slot, self.prefilled, self.undrafted = None, 0, False
        self.before, self.running = self.seen, self.job.after(self.seen.tokens)

    def see(
        self,
        decode: Decode | None,
        new: Sequence[int],
        counts: Counts,
        stopped: bool,
        now: float,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> bool:
        """Add new tokens; those after a stop string are left out.

        Args:
            decode: the tokenizer's; None: the request gets no text.
            new: token ids since the last call.
            counts: totals since the request entered its slot.
            stopped: whether the last of the tokens is a stop token.
            now: the time of reading, by `perf_counter`.
            logprobs: of the new tokens, or none.
        Returns:
            Whether a stop string has ended the request.
        """

        text, kept = self.seen.text, None
        if decode is not None:
            # The stop token belongs to the tokens but not to the text.
            text, kept = text.grown(decode, self.job.sampling.stop, new[:-1] if stopped else new)

        tokens = (*self.seen.tokens, *new[:kept])
        # The host's clock: tokens are seen with their dispatch, however early in it they were decoded.
        first = now if self.seen.first_token is None else self.seen.first_token

        # The counters of a slot start at 0 with each admission, so what earlier slots counted is added.
        noted = (*self.seen.logprobs, *logprobs[:kept])
        self.seen = Seen(tokens, self.before.counts + counts, text, first, noted)
        return kept is not None

    def generation(self, reason: str, now: float) -> Generation:
        """The result of the request, ended at `now` with the finish reason `reason`."""
        seen, counts = self.seen, self.seen.counts
        # An event that never happened counts as happening at the end.
        times = (now if at is None else at for at in (self.admitted, seen.first_token, now))

        return Generation(
            index=self.job.index,
            prompt_tokens=self.job.prompt,
            tokens=seen.tokens,
            # Text that was held back for a stop string is released now.
            text=seen.text.ended().said,
            finish_reason=reason,
            rounds=counts.rounds,
            committed=counts.committed,
            verified_at=counts.verified_at,
            accepted_at=counts.accepted_at,
            judged_at=counts.judged_at,
            drafted=counts.drafted,
            timing=Timing(*(at - self.submitted for at in times)),
            error=NO_LAW if reason == "error" else "",
            logprobs=seen.logprobs,
            cached_tokens=self.cached,
        )


Mark = dict[Entry, Seen]
"""The open requests at a moment, and what had been seen of each."""


class Roster:
    """The open requests of an engine, in order of arrival. Its methods may be called from any thread."""

    def __init__(self) -> None:
        # Reentrant, as a booking holds it over calls that lock it themselves.
        self._lock = threading.RLock()
        self._open: dict[int, Entry] = {}
        # None between a settled dispatch and the next mark.
        self._mark: Mark | None = None
        self.closed = False  # whether new requests are refused

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock over several calls; it is reentrant, so they may lock it again."""
        with self._lock:
            yield

    def add(self, job: Job, bound: int | None) -> None:
        """Queue a request.

        Args:
            job: the checked request.
            bound: the most requests that may wait; None: any number.
        Raises:
            QueueFull: `bound` others wait already.
            EngineClosed: no more requests are taken.
            UserError: its index is in use.
        """
        with self._lock:
            # Indices are how callers name requests; a second one would take over the first one's tokens.
            if job.index in self._open:
                raise UserError(f"Request {job.index} is in the engine already; give every open request its own index.")
            # Checked under the lock: another thread may have taken the last place since the first check.
            self.require_room(job.index, bound)
            self._open[job.index] = Entry(job, time.perf_counter())

    def require_room(self, index: int, bound: int | None) -> None:
        """Raise EngineClosed after `close`, or QueueFull if `bound` requests wait; `index` is for the sentence."""
        if self.closed:
            raise EngineClosed(f"Request {index} came after the engine was closed; send it to another one.")
        if bound is not None and self.waiting >= bound:
            raise QueueFull(
                f"Request {index} finds {self.waiting} others waiting, as many as this engine's queue holds; "
                "submit it again once some have ended."
            )

    def close(self, due: float) -> None:
        """Refuse new requests, and cut the open ones at `due` unless their own deadline comes first."""
        with self._lock:
            self.closed = True
            for entry in self._open.values():
                entry.due = min(entry.due, due)

    def remove(self, index: int) -> Entry | None:
        """Remove a request; None if it is not open. It is returned as it was before the dispatch that is under way."""
        # A booking that was interrupted halfway will be undone: only tokens that have been reported count.
        with self._lock:
            entry = self._open.pop(index, None)
            if entry is not None and self._mark is not None:
                entry.seen = self._mark.pop(entry, entry.seen)
            return entry

    def holds(self, entry: Entry) -> bool:
        """Whether this very entry is open; another may have taken its index since it was cancelled."""
        # By identity, not equality: a new request under an old index is another entry.
        return self._open.get(entry.job.index) is entry

    def entries(self) -> list[Entry]:
        """The open requests in order of arrival, as a copy."""
        with self._lock:
            # A copy: `submit` and `cancel` change the dictionary on other threads.
            return list(self._open.values())

    def queue(self, now: float) -> list[Entry]:
        """The requests without a slot, in their turn."""
        # Those whose deadline has passed are not worth a prefill; they are cut at the end of the step.
        waiting = [entry for entry in self.entries() if entry.slot is None and not entry.expired(now)]
        return sorted(waiting, key=lambda entry: entry.turn)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return sum(entry.slot is None for entry in self.entries())

    @property
    def running(self) -> int:
        """Requests in slots."""
        return sum(entry.slot is not None for entry in self.entries())

    @property
    def unsettled(self) -> bool:
        """Whether a dispatch has begun and not been booked."""
        return self._mark is not None

    def mark(self) -> None:
        """Remember what has been seen, until `settle` or `rewind`."""
        with self._lock:
            self._mark = {entry: entry.seen for entry in self._open.values()}

    def settle(self, ended: Sequence[Entry] = ()) -> None:
        """Keep what has been seen since the mark, and remove the requests that have ended."""
        with self._lock:
            left = {index: entry for index, entry in self._open.items() if entry not in ended}
            # An interrupt comes at a call or a loop, so that it finds both as they were or both as they are now.
            self._open, self._mark = left, None

    def rewind(self) -> None:
        """Restore what had been seen at the mark, and return every request to the queue. Safe to repeat if it is
        interrupted itself."""
        with self._lock:
            # The mark is dropped last: until then a repeated call finds the same state to restore.
            mark = self._mark or {}
            for entry in self._open.values():
                entry.seen = mark.get(entry, entry.seen)
                entry.unseat()
            self._mark = None
