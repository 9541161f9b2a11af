"""From the engine's thread to the event loop: the pieces of one HTTP request's answers."""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from dspark_jax.serving.api.errors import ApiError
from dspark_jax.serving.api.rounds import DraftRound
from dspark_jax.serving.requests import Progress


@dataclass(frozen=True)
class Piece:
    """New tokens of a request, and the rounds that they came from if the request is watched."""

    progress: Progress
    rounds: tuple[DraftRound, ...] = ()


Event = Piece | ApiError
"""A request gets pieces until one carries its Generation, or a failure."""


class Wakeups:
    """Wakes the tasks of one event loop: all those that another thread has something for, in one call.

    A dispatch brings something for every request. One call into the loop for each would cost more than the pieces do.
    """

    def __init__(self) -> None:
        self._due: deque[asyncio.Event] = deque()
        self._called = False  # whether the loop will look

    def wake(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
        """Set an event of the loop's, from any thread."""
        self._due.append(ready)
        if self._called:
            return
        self._called = True
        # The loop may have been closed by then, and with it the tasks.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        # First: what is added from here on is either found below, or calls again.
        self._called = False
        while self._due:
            self._due.popleft().set()


class Channel:
    """A queue that any thread may put into, and one task takes from.

    It needs no bound: a request makes at most as many tokens as it was admitted for, and a client that reads slowly
    keeps only its own.

    Args:
        wakeups: of the event loop that runs now, whose task takes.
    """

    def __init__(self, wakeups: Wakeups):
        self._loop, self._wakeups = asyncio.get_running_loop(), wakeups
        self._events: deque[tuple[int, Event]] = deque()
        self._ready = asyncio.Event()

    def put(self, index: int, event: Event) -> None:
        """Add an event of the request `index`."""
        # A deque's append is atomic: the engine's thread never waits for a lock that the event loop holds.
        self._events.append((index, event))
        self._wakeups.wake(self._loop, self._ready)

    async def take(self) -> list[tuple[int, Event]]:
        """All events that have come, at least one; waits for it."""
        while not self._events:
            self._ready.clear()
            # Checked again after clearing: an event may have come in between.
            if not self._events:
                await self._ready.wait()
        # As many as there are now: others may be put meanwhile, and belong to the next batch.
        return [self._events.popleft() for _ in range(len(self._events))]
