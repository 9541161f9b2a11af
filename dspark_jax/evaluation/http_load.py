"""Load on a server over HTTP: streaming clients in a closed loop or with Poisson arrivals, timed token by token.

The client is as thin as it can be, since it often shares the machine with the server that it measures.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dspark_jax.errors import UserError

LINE_LIMIT = 1 << 22
"""Bytes of an event at most."""


@dataclass(frozen=True)
class Address:
    """A server's address, as `address_of` reads it."""

    host: str
    port: int
    prefix: str
    key: str = ""


@dataclass
class Asked:
    """One request and its answer.

    Attributes:
        status: of HTTP; 0 where the connection failed.
        text: of the answer, as far as it came.
        finish_reason: None where the stream broke off.
        first_token: seconds from sending to the first token.
        gaps: seconds between tokens: the gap before each chunk, divided by the chunk's tokens, once for each.
        chunk_gaps: seconds between chunks.
        seconds: from sending to the end.
    """

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    chunk_gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    retry_after: float = 1.0
    error: str = ""


def address_of(server: str, key: str = "") -> Address:
    """The address of a server such as http://127.0.0.1:8000, with or without /v1.

    Raises:
        UserError: anything but http with a host.
    """
    try:
        parts = urlsplit(server)
        port = parts.port or 80
    except ValueError:
        # A port that is no number: refused below, with the other addresses that are none.
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname:
        raise UserError(f"--server is {server!r}; expected an address as in http://127.0.0.1:8000.")
    return Address(parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"), key)


async def ask(
    address: Address, body: dict[str, Any], path: str = "/v1/chat/completions", leave_after: int | None = None
) -> Asked:
    """Ask for a streamed answer.

    Args:
        address: of the server.
        body: the request; stream and its options are added.
        path: of the endpoint.
        leave_after: hang up once so many chunks have come; None: stay to the end.
    """
    # Token counts in every chunk: one chunk may carry several tokens, as after an accepted block.
    options = {"include_usage": True, "continuous_usage_stats": True}
    data = json.dumps({**body, "stream": True, "stream_options": options}).encode()
    asked, began = Asked(), time.perf_counter()
    try:
        # A connection for each request, as clients that do not know each other have; its time counts.
        reader, writer = await asyncio.open_connection(address.host, address.port, limit=LINE_LIMIT)
    except OSError as error:
        asked.error = str(error)
        return asked

    try:
        writer.write(_head(address, path, len(data)) + data)
        await writer.drain()
        await _read(reader, asked, began, leave_after)
    # A broken answer is a finding like any other: the load goes on.
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        asked.error = f"{type(error).__name__}: {error}"
    finally:
        # However it ended. Closing without reading on is how a client hangs up.
        asked.seconds = time.perf_counter() - began
        writer.close()
    return asked


def _head(address: Address, path: str, length: int) -> bytes:
    key = f"Authorization: Bearer {address.key}\r\n" if address.key else ""
    return (
        f"POST {address.prefix}{path} HTTP/1.1\r\nHost: {address.host}:{address.port}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


async def _read(reader: asyncio.StreamReader, asked: Asked, began: float, leave_after: int | None) -> None:
    status = (await reader.readline()).split()
    asked.status = int(status[1]) if len(status) > 1 else 0
    # One header is of use: it says when a full queue may be asked again.
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        if name.lower() == b"retry-after":
            asked.retry_after = float(value)
    if asked.status != 200:
        # No stream but one JSON object, of which the beginning says enough.
        asked.error = (await reader.read(4096)).decode(errors="replace")
        return

    last, chunks = began, 0
    # Lines between the events are the sizes of HTTP's own chunks.
    while line := await reader.readline():
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        # Taken before the event is parsed, so that the client's own work is not in the gap.
        now = time.perf_counter()
        if _take(json.loads(line[6:]), asked, began, last, now):
            last, chunks = now, chunks + 1
        if leave_after is not None and chunks >= leave_after:
            return


def _take(event: dict[str, Any], asked: Asked, began: float, last: float, now: float) -> bool:
    """Add an event; whether it brought tokens."""
    # An error after the stream has begun arrives as an event: the status was sent long before.
    if "error" in event:
        asked.error = str(event["error"].get("message"))
        return False

    text = ""
    for choice in event["choices"]:
        text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        asked.finish_reason = choice.get("finish_reason") or asked.finish_reason
    asked.text += text

    # A server that does not count in every chunk is taken to send a token a chunk.
    usage = event.get("usage")
    made = usage["completion_tokens"] if usage else asked.tokens + bool(text)
    new, asked.tokens = made - asked.tokens, made
    if new <= 0:
        return False

    if asked.first_token is None:
        asked.first_token = now - began
    else:
        # The tokens of a chunk came together; each is charged an equal part of the wait.
        asked.chunk_gaps.append(now - last)
        asked.gaps += [(now - last) / new] * new
    return True


Ask = Callable[[int], Awaitable[Asked]]
"""Sends the request of a number."""


async def closed_loop(send: Ask, users: int, requests: int) -> tuple[list[Asked], float]:
    """`users` clients, each of whom sends its next request when the last one is answered, `requests` in all.

    Returns:
        (the answers in the order of their ends, seconds).
    """
    done: list[Asked] = []
    # Shared by all users, so that a fast one takes over what a slow one leaves.
    numbers = iter(range(requests))
    began = time.perf_counter()

    async def user() -> None:
        for number in numbers:
            done.append(await send(number))

    await asyncio.gather(*(user() for _ in range(min(users, requests))))
    return done, time.perf_counter() - began


async def poisson(send: Ask, rate: float, requests: int, seed: int = 0) -> tuple[list[Asked], float]:
    """`requests` Poisson arrivals at `rate` per second, whether or not earlier ones have been answered.

    Returns:
        (the answers in the order of arrival, seconds).
    """
    # Drawn beforehand: the moments do not depend on how the server copes, which a closed loop's do.
    moments = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
    began = time.perf_counter()

    async def arrive(number: int) -> Asked:
        await asyncio.sleep(max(0.0, began + float(moments[number]) - time.perf_counter()))
        return await send(number)

    done = await asyncio.gather(*(arrive(number) for number in range(requests)))
    return list(done), time.perf_counter() - began


def figures(done: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """Throughput, and percentiles of times in milliseconds; None where nothing was measured."""
    # Times of whole answers only. Refusals are counted apart: a full server that says so has not failed.
    good = [asked for asked in done if asked.status == 200 and not asked.error]
    tokens = sum(asked.tokens for asked in good)
    return {
        "requests": len(done),
        "refused": sum(asked.status not in (0, 200) for asked in done),
        "failed": len(done) - len(good) - sum(asked.status not in (0, 200) for asked in done),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds > 0 else None,
        "first_token_ms": percentiles([a.first_token for a in good if a.first_token is not None]),
        "inter_token_ms": percentiles([gap for asked in good for gap in asked.gaps]),
        "chunk_gap_ms": percentiles([gap for asked in good for gap in asked.chunk_gaps]),
        "request_ms": percentiles([asked.seconds for asked in good]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 in milliseconds."""
    if not seconds:
        return None
    # Percentiles and no mean: one slow request in a hundred is what users notice.
    found = np.percentile(np.asarray(seconds) * 1e3, (50, 95, 99))
    return {f"p{p}": round(float(value), 3) for p, value in zip((50, 95, 99), found, strict=True)}
