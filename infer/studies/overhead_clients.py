"""Streaming clients that cost little, in a process of their own, for studies of what a server costs.

Each keeps one connection open, as OpenAI's client does, and reads no JSON but the token count at an answer's end. They
report their own CPU seconds, which on a shared machine are taken from the server.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.evaluation.http_load import Address

Messages = list[dict[str, Any]]

OK = b"HTTP/1.1 200 "
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
"""The last event, in the last of HTTP's chunks, and the empty chunk behind it."""
COUNT = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True)
class Round:
    """What the clients got from a closed loop of requests."""

    tokens: int
    events: int  # of all streams
    seconds: float
    cpu_seconds: float  # of the clients' process


class _Client(asyncio.Protocol):
    """One client: sends the next request as soon as its last answer has ended."""

    def __init__(self, requests: Iterator[bytes]):
        self._requests, self._answer = requests, bytearray()
        self.tokens = self.events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not self._answer.startswith(OK[: len(self._answer)]):
            # A refusal is whole once it ends as JSON does; its sentence is reported.
            if self._answer.endswith(b"}"):
                self._transport.close()
        elif self._answer.endswith(END):
            # The usage comes last, and only there.
            self.tokens += int(COUNT.findall(self._answer)[-1])
            self.events += self._answer.count(b"data: ")
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            # A refusal's sentence stands behind the headers.
            said = bytes(self._answer).rpartition(b"\r\n\r\n")[2][:400].decode(errors="replace")
            self.done.set_exception(UserError(f"the server refused a request or broke off: {said}"))

    def _send(self) -> None:
        self._answer.clear()
        request = next(self._requests, None)
        if request is not None:
            self._transport.write(request)
        else:
            self.done.set_result(None)
            self._transport.close()


async def _closed_loop(address: Address, clients: int, bodies: Sequence[bytes], requests: int) -> Round:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
    whole = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    # Shared by all, so that a fast client takes over what a slow one leaves.
    numbered = (whole[number % len(whole)] for number in range(requests))

    loop = asyncio.get_running_loop()
    began, spent = time.perf_counter(), time.process_time()
    # Not more clients than requests: each sends one as soon as it is connected.
    made = [
        await loop.create_connection(lambda: _Client(numbered), address.host, address.port)
        for _ in range(min(clients, requests))
    ]
    protocols = [protocol for _, protocol in made]
    await asyncio.gather(*(protocol.done for protocol in protocols))
    return Round(
        sum(protocol.tokens for protocol in protocols),
        sum(protocol.events for protocol in protocols),
        time.perf_counter() - began,
        time.process_time() - spent,
    )


def _work(pipe: Connection, address: Address, rows: Sequence[Messages], max_tokens: int) -> None:
    """The clients' process: runs closed loops until it gets None."""
    options = {"max_tokens": max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    bodies = [json.dumps({"messages": messages, **options}).encode() for messages in rows]
    while (asked := pipe.recv()) is not None:
        try:
            clients, requests = asked
            pipe.send(asyncio.run(_closed_loop(address, clients, bodies, requests)))
        except (UserError, OSError) as error:
            pipe.send(error)


class Clients:
    """The process of the clients, as its parent sees it."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe

    def run(self, clients: int, requests: int) -> Round:
        """Run a closed loop of `clients` streams, `requests` in all.

        Raises:
            UserError: the server refused a request or broke off.
        """
        self._pipe.send((clients, requests))
        try:
            found = self._pipe.recv()
        except EOFError:
            raise UserError("The clients' process has ended before its time.") from None
        if isinstance(found, Exception):
            raise UserError(f"The clients failed: {found}")
        return found


@contextmanager
def client_process(address: Address, rows: Sequence[Messages], max_tokens: int) -> Iterator[Clients]:
    """Start the clients of a server; they end with the context.

    Args:
        address: of the server.
        rows: the conversations that are asked in turn, greedily.
        max_tokens: of each answer.
    """
    # Spawned and not forked: a fork would copy a process with running threads.
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, address, rows, max_tokens), daemon=True)
    process.start()
    # The child holds the other end alone, so that its death ends a wait for it.
    theirs.close()
    try:
        yield Clients(ours)
    finally:
        with suppress(BrokenPipeError):
            ours.send(None)
        process.join(10)
