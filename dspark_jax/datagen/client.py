"""A client of an OpenAI-compatible server: bounded requests, and replies that are checked before use.

Redirects are never followed, so neither prompts nor the key can reach another host than the one given.
"""

import asyncio
import concurrent.futures
import os
import re
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from dspark_jax.errors import UserError
from dspark_jax.readers import parse_json

MOST_BYTES = 16 << 20
"""Longest reply in bytes, far above that of any real answer."""
RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})
"""HTTP statuses of conditions that pass."""
WRONG_SERVER = {401: "wants another key (OPENAI_API_KEY)", 403: "denies access", 404: "has no such address or model"}

_SHOWN_BYTES = 2000  # of a refusal's body


@dataclass(frozen=True)
class Answer:
    """A text, its finish reason ("stop" or "length"), and its tokens as counted by the server, 0 where not reported."""

    text: str
    finish_reason: str
    tokens: int


class UnansweredError(Exception):
    """A failed attempt that may succeed when repeated; `pause` is the server's Retry-After in seconds, if any."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class ServerError(UserError):
    """A fault that would affect every request: it ends the run."""


class ChatClient:
    """Sends requests to `POST {server}/chat/completions`, from any thread.

    A request is bounded as a whole, from the connection to the last byte: its coroutine runs on the client's own loop,
    where a deadline can cancel it at any point. httpx alone bounds each read, which a slow server can repeat for ever.
    """

    def __init__(self, server: str, seconds: float):
        """
        Args:
            server: address, as in http://host:8000/v1. A key is read from OPENAI_API_KEY.
            seconds: limit of a whole reply.

        Raises:
            UserError: an invalid address, or a key that no header can carry.
        """
        self.url, self.seconds = _url(server), seconds
        # Replies are read raw, so that `MOST_BYTES` bounds them; compression is declined.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not re.fullmatch(r"[!-~]+", key):
                raise UserError("OPENAI_API_KEY holds characters that no header can carry; expected visible ASCII.")
            headers["Authorization"] = f"Bearer {key}"

        try:
            self._client = httpx.AsyncClient(headers=headers, timeout=seconds, follow_redirects=False)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError, OSError) as error:
            raise UserError(f"No client of {self.url} can be made ({error}); look at the proxy variables.") from error

        # The client's own loop, in its own thread: callers are threads of a pool without a loop of theirs.
        self._closed, self._lock = False, threading.Lock()
        # Requests under way. Tasks that httpx makes below them are its own to cancel.
        self._open: set[Coroutine[Any, Any, Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def ask(self, body: bytes) -> Answer:
        """Sends one request and returns its answer.

        Args:
            body: the request as JSON.

        Raises:
            UnansweredError: no reply in time, a reply that is no chat completion, or a passing status (429, 5xx).
            ServerError: the server rejects the key, has no such model, or redirects.
            UserError: the request is refused, or its answer cannot be trained on.
        """
        # Under the lock, so that no request is scheduled on a loop that `close` has stopped.
        with self._lock:
            if self._closed:
                raise UnansweredError("the run was stopped.")
            request = self._post(body)
            self._open.add(request)
            future = asyncio.run_coroutine_threadsafe(request, self._loop)
            future.add_done_callback(lambda _: self._open.discard(request))

        try:
            status, headers, data = future.result()
        except (concurrent.futures.CancelledError, asyncio.CancelledError):
            raise UnansweredError("the run was stopped.") from None
        except TimeoutError:
            raise UnansweredError(f"no whole reply within {self.seconds:g} seconds.") from None
        except httpx.TimeoutException:
            raise UnansweredError(f"nothing came for {self.seconds:g} seconds.") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError) as error:
            raise UnansweredError(f"no connection ({_shown(error) or type(error).__name__}).") from None

        if status == 200:
            return read_answer(data)

        raise self._refusal(status, headers, data)

    def close(self) -> None:
        """Cancels requests under way; later ones raise UnansweredError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True

        # Outside the lock: threads whose requests are cancelled may be waiting for it.
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        # One deadline over connecting, sending and reading; a server that trickles bytes cannot reset it.
        async with asyncio.timeout(self.seconds), self._client.stream("POST", self.url, content=body) as reply:
            data = bytearray()
            async for part in reply.aiter_raw():
                data += part
                # A refusal is only quoted, so its beginning is enough.
                if reply.status_code != 200 and len(data) > _SHOWN_BYTES:
                    break
                if len(data) > MOST_BYTES:
                    raise UserError(f"the reply is longer than {MOST_BYTES >> 20} MiB.")
            return reply.status_code, reply.headers, bytes(data)

    async def _cancel(self) -> None:
        # Each cancelled request wakes its thread, which then sees that the run was stopped. The connection attempts
        # below it end with it; cancelled from here, one that has not begun would never be awaited.
        tasks = [task for task in asyncio.all_tasks() if task.get_coro() in self._open]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _refusal(self, status: int, headers: Mapping[str, str], data: bytes) -> Exception:
        # One line of what was said, as servers answer with pages of HTML too, without characters that steer a terminal.
        said = " ".join(data[:_SHOWN_BYTES].decode(errors="replace").split())[:300]
        said = "".join(character if character.isprintable() else "\ufffd" for character in said)
        if 300 <= status < 400:
            where = headers.get("Location", "elsewhere")[:200]
            return ServerError(
                f"{self.url} redirects to {where!r} (HTTP {status}), which is not followed; give --server the address "
                "that answers."
            )

        # A success without a body to read (204) is no answer either.
        if status in RETRIED or status < 300:
            named = headers.get("Retry-After", "")
            return UnansweredError(
                f"HTTP {status}: {said}", float(named) if re.fullmatch("[0-9]{1,6}", named) else None
            )

        if status in WRONG_SERVER:
            return ServerError(f"{self.url} {WRONG_SERVER[status]} (HTTP {status}: {said})")
        # Whatever is left concerns this request alone, such as a prompt that is too long.
        return UserError(f"the server refused the request (HTTP {status}: {said})")


def read_answer(reply: bytes) -> Answer:
    """Parses a chat completion.

    Raises:
        UnansweredError: the reply is no chat completion.
        UserError: an answer that cannot be trained on.
    """
    try:
        value = parse_json(reply, "it", expected="a chat completion")
        choice = value["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        text = message["content"]
        # Two names of one field: servers differ.
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        tokens = (value.get("usage") or {}).get("completion_tokens") or 0
    except UserError as error:
        raise UnansweredError(f"the reply is no chat completion: {error}") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        shown = reply[:80].decode(errors="replace").strip()
        raise UnansweredError(f"the reply is no chat completion: {shown!r}") from None

    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens < 2**31:
        raise UnansweredError(f"the reply's completion_tokens are {tokens!r:.40}; a count was expected.")

    # The answer was generated after its thoughts; without them it would be trained after another context.
    if thoughts:
        raise UserError(
            "the server gives the answer's reasoning apart from it; turn thinking off by --server-extra, or the "
            "server's reasoning parser."
        )

    if reason not in ("stop", "length"):
        raise UserError(f"the answer ended with {reason!r:.60}; stop or length was expected.")
    if text is not None and not isinstance(text, str):
        raise UserError(f"the answer is a {type(text).__name__}; text was expected.")
    # A text of replacement characters alone was cut within its first character.
    if not (text or "").strip("\ufffd \t\r\n"):
        raise UserError("the answer is empty.")

    return Answer(text or "", reason, tokens)


def _url(server: str) -> str:
    try:
        # Both parsers: each accepts addresses that the other refuses.
        httpx.URL(server)
        url = urlsplit(server)
        _ = url.port  # a ValueError where it is none
        fits = url.scheme in ("http", "https") and url.hostname and not (url.username or url.query or url.fragment)
    except (httpx.InvalidURL, ValueError, TypeError):
        fits = False

    if not fits:
        raise UserError(
            f"--server is {server!r:.200}; an address as in http://host:8000/v1 was expected, without a key or a query."
        )

    address = server.rstrip("/")
    # Users give the address with or without the path.
    return address if address.endswith("/chat/completions") else f"{address}/chat/completions"


def _shown(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].encode(errors="replace").decode()
