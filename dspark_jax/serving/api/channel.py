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


class Channel:
    """A queue that any thread may put into, and one task takes from.

    It needs no bound: a request makes at most as many tokens as it was admitted for, and a client that reads slowly
    keeps only its own.
    """

    def __init__(self) -> None:
        # Of the thread that makes the channel, which is the one that takes from it.
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._ready = asyncio.Event()

    def put(self, index: int, event: Event) -> None:
        """Add an event of the request `index`."""
        # A deque's append is atomic: the engine's thread never waits for a lock that the event loop holds.
        self._events.append((index, event))
        # The loop may have been closed by then, and with it the task that would take the event.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self) -> list[tuple[int, Event]]:
        """All events that have come, at least one; waits for it."""
        while not self._events:
            self._ready.clear()
            # Checked again after clearing: an event may have come in between.
            if not self._events:
                await self._ready.wait()
        # As many as there are now: others may be put meanwhile, and belong to the next batch.
        return [self._events.popleft() for _ in range(len(self._events))]
