"""The engine's figures over time: totals since the start, and a point every half second for the page's plots."""

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from dspark_jax.serving.requests import Counts, Progress

TICK_SECONDS = 0.5
POINTS = 1200
"""Points that are kept: ten minutes."""
RECENT = 10
"""Points that recent figures are taken over: five seconds."""


@dataclass(frozen=True)
class Totals:
    """Sums over all requests since the server started.

    Attributes:
        prompt_tokens: of requests that have ended.
        tokens: new tokens.
        rounds: of all requests: two requests in one round of the loop count twice.
        committed: tokens that rounds committed; the first of an answer comes from its prompt's pass.
        verified, accepted: drafts.
        drafted: rounds with drafts.
        request_seconds: in slots.
    """

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    committed: int = 0
    verified: int = 0
    accepted: int = 0
    drafted: int = 0
    request_seconds: float = 0.0


@dataclass(frozen=True)
class Load:
    """The engine at one moment."""

    running: int = 0
    waiting: int = 0
    load: float = 1.0  # seconds that rounds take, by seconds that the cost table predicts
    synthetic: int = 0  # synthetic users


@dataclass(frozen=True)
class Point:
    """One tick."""

    index: int
    at: float  # perf_counter
    totals: Totals
    load: Load
    running_seconds: float  # integral of `running` since the start


class Pulse:
    """Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.failures = 0  # dispatches that failed
        self.restarts = 0  # engines replaced after a failure
        self._counts: dict[int, Counts] = {}  # of open requests
        self._started = time.perf_counter()
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._points.append(Point(0, self._started, self.totals, Load(), 0.0))

    def saw(self, progress: Progress) -> None:
        """Add a request's progress."""
        # Progress carries totals since submission; the difference is this dispatch's.
        before = self._counts.get(progress.index, Counts())
        counts, ended = progress.counts, progress.generation
        if ended is None:
            self._counts[progress.index] = counts
        else:
            self._counts.pop(progress.index, None)

        was = self.totals
        # Replaced whole, so that readers in other threads never see half of an update.
        self.totals = Totals(
            was.requests + (ended is not None),
            was.prompt_tokens + (0 if ended is None else len(ended.prompt_tokens)),
            was.tokens + len(progress.tokens),
            was.rounds + counts.rounds - before.rounds,
            was.committed + counts.committed - before.committed,
            was.verified + sum(counts.verified_at) - sum(before.verified_at),
            was.accepted + sum(counts.accepted_at) - sum(before.accepted_at),
            was.drafted + counts.drafted - before.drafted,
            was.request_seconds + (0.0 if ended is None else ended.timing.ended - ended.timing.admitted),
        )

    def forget(self, index: int) -> None:
        """A request has left without ending."""
        self._counts.pop(index, None)

    def tick(self, load: Load) -> None:
        """Add a point; called every `TICK_SECONDS`."""
        last, now = self._points[-1], time.perf_counter()
        # By the trapezoid rule, as requests come and go between ticks.
        users = (last.load.running + load.running) / 2
        seconds = last.running_seconds + users * (now - last.at)
        self._points.append(Point(last.index + 1, now, self.totals, load, seconds))

    def recent(self) -> dict[str, Any]:
        """Figures over the last seconds, with the fields of `since`'s points."""
        # Copied in one step: the event loop adds points while other threads read.
        points = list(self._points)
        return self._figures(points[max(len(points) - 1 - RECENT, 0)], points[-1])

    def since(self, index: int) -> list[dict[str, Any]]:
        """Points from `index` on, as far as they are kept, each with figures since the point before it.

        Fields: `index`; `time`, seconds since the server started; `tokens_per_second`, of all requests;
        `tokens_per_second_per_user`, of a request in a slot; `running`, `waiting`, `synthetic`, `load`;
        `accepted_length`, tokens a round and request; `verified_per_round`, tokens verified for each request and round,
        its anchor included; `drafting_share`, of rounds. The last three are null where no round was run.
        """
        points = list(self._points)
        pairs = zip(points, points[1:], strict=False)
        return [self._figures(before, point) for before, point in pairs if point.index >= index]

    @property
    def last(self) -> Load:
        """The load at the last tick."""
        return self._points[-1].load

    def everything(self) -> dict[str, Any]:
        """The totals, as JSON."""
        return {**asdict(self.totals), "failures": self.failures, "restarts": self.restarts}

    def _figures(self, before: Point, point: Point) -> dict[str, Any]:
        # Two points of one instant, as at the start, must not divide by 0.
        seconds = max(point.at - before.at, 1e-9)
        # Seconds of all requests in slots together: the divisor for the speed that one of them sees.
        user_seconds = point.running_seconds - before.running_seconds
        was, now = before.totals, point.totals
        tokens, rounds = now.tokens - was.tokens, now.rounds - was.rounds

        def share(count: int) -> float | None:
            return round(count / rounds, 4) if rounds else None

        return {
            "index": point.index,
            "time": round(point.at - self._started, 3),
            "tokens_per_second": round(tokens / seconds, 2),
            "tokens_per_second_per_user": round(tokens / user_seconds, 2) if user_seconds > 0 else 0.0,
            **asdict(point.load),
            "accepted_length": share(now.committed - was.committed),
            "verified_per_round": share(now.verified - was.verified + rounds),
            "drafting_share": share(now.drafted - was.drafted),
        }
