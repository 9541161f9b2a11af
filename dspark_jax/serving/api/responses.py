"""Sends answers: as one JSON object, or as server-sent events; ends what is open when the client goes."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark_jax.serving.api.answers import Delta, Session
from dspark_jax.serving.api.details import Told
from dspark_jax.serving.api.errors import ApiError
from dspark_jax.serving.api.writers import Writer, encoded, event

EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]


class Answered(Response):
    """The answers of a session. The status is sent with the first of them, so that a failure before it has its own.

    Args:
        session: submitted.
        writer: makes the JSON.
        stall_seconds: that the client may read nothing before the connection is given up.
    """

    def __init__(self, session: Session, writer: Writer, stall_seconds: float):
        super().__init__()
        self._session, self._writer, self._stall = session, writer, stall_seconds
        self._sending: float | None = None  # `perf_counter` at the beginning of a send that has not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client hangs up first."""
        # Two tasks, as an answer that waits for the engine sends nothing, and would not see the client hang up.
        hung_up = asyncio.create_task(_hung_up(receive))
        work = asyncio.create_task(self._stream(send) if self._session.ask.stream else self._whole(send))

        try:
            while not (hung_up.done() or work.done()):
                # Looked at now and then: a timeout around each send would cost more than the send.
                await asyncio.wait({hung_up, work}, timeout=self._stall / 4, return_when=asyncio.FIRST_COMPLETED)
                self._require_reader()
            # Raises what the work raised: before the status is sent, the application's handlers turn it into a
            # response.
            if work.done():
                work.result()
        finally:
            # Cancelled tasks are awaited, so that neither sends after the session is closed.
            hung_up.cancel()
            work.cancel()
            await asyncio.gather(hung_up, work, return_exceptions=True)
            self._session.close()

    async def _whole(self, send: Send) -> None:
        told: dict[int, Told] = {}
        # Nothing is sent before the last answer has ended, and so a failure always has a status of its own.
        async for batch in self._session.deltas():
            for delta in batch:
                told[delta.place] = told.get(delta.place, Told()) + delta.told

        data = encoded(self._writer.whole(told))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, {"type": "http.response.body", "body": data})

    async def _stream(self, send: Send) -> None:
        batches = self._session.deltas()
        # Nothing is sent before this: a request that fails in the queue or in its prompt gets a status of its own.
        first: list[Delta] = await anext(batches, [])
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": EVENTS})
        await self._write(send, [*map(event, self._writer.opening()), *map(self._writer.event, first)])
        try:
            await self._follow(send, batches)
        except ApiError as error:
            # The status is gone; clients look for an error among the events.
            await self._write(send, [event(error.body())])
            await self._send(send, {"type": "http.response.body", "body": b""})
            return

        end = b"".join(map(event, self._writer.closing())) + b"data: [DONE]\n\n"
        await self._send(send, {"type": "http.response.body", "body": end})

    async def _follow(self, send: Send, batches: AsyncIterator[list[Delta]]) -> None:
        async for batch in batches:
            await self._write(send, list(map(self._writer.event, batch)))

    async def _write(self, send: Send, events: list[bytes]) -> None:
        # One send for a batch: each is a write to the socket. None for a batch that changes nothing that can be seen.
        if body := b"".join(events):
            await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    async def _send(self, send: Send, message: Any) -> None:
        self._sending = time.perf_counter()
        await send(message)
        self._sending = None

    def _require_reader(self) -> None:
        """Raise TimeoutError if a send has waited too long. It holds up this answer, and no other."""
        if self._sending is not None and time.perf_counter() - self._sending > self._stall:
            raise TimeoutError


async def _hung_up(receive: Receive) -> None:
    # The body has been read; the only other message is an empty part of it.
    while (await receive())["type"] != "http.disconnect":
        pass
