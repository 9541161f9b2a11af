"""Answers from an OpenAI-compatible server of the target, many conversations at once.

What the server gives depends on its batching, so unlike `Regenerator` a run that was killed does not end with the bytes
it would have had; every conversation is asked for once all the same, and finished ones are never asked for again.
"""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dspark_jax.data.chat import Message
from dspark_jax.datagen.regeneration import Finished, Rejected, Source, answer_message
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.errors import UserError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts: doubled each time, or what the server asks for."""
RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})
WRONG_SERVER = {401: "wants another key (OPENAI_API_KEY)", 403: "denies access", 404: "has no such address or model"}


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    tokens: int


class _Unanswered(Exception):
    """An attempt that may succeed when it is repeated, after `pause` seconds where the server named them."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class _GaveUp(Exception):
    def __init__(self, rejected: Rejected):
        super().__init__(rejected.reason)
        self.rejected = rejected


class ServedAnswers:
    """Answers conversations turn by turn through `POST {server}/chat/completions`."""

    def __init__(self, settings: PrepareSettings):
        self.settings = settings
        address = settings.server.rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--server is {settings.server!r}; an address as in http://host:8000/v1 was expected.")
        self.url = address if address.endswith("/chat/completions") else f"{address}/chat/completions"
        self._stopped = threading.Event()

    def sort_out(self, sources: Iterable[Source]) -> tuple[list[Source], list[Rejected]]:
        """All of them: what is too long, the server says."""
        return list(sources), []

    def answers(self, todo: Sequence[Source], fitting: Sequence[Source]) -> Iterator[list[Finished | Rejected]]:
        """Yields the conversations that ended, in any order.

        One that got no answer in all its attempts counts as set aside only beside others that were answered: when more
        than `server_concurrency` in a row get none, or all do, the server is down, and the run ends with a UserError
        that loses nothing.
        """
        waiting, unanswered = iter(todo), list[Rejected]()
        most, answered = self.settings.server_concurrency, False
        with ThreadPoolExecutor(most) as pool:
            try:
                running = {pool.submit(self._converse, source) for source in islice(waiting, most)}
                while running and len(unanswered) <= most:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    running |= {pool.submit(self._converse, source) for source in islice(waiting, len(done))}
                    if ended := _ended(done, unanswered):
                        yield [*unanswered, *ended]
                        unanswered.clear()
                        answered = True
                if len(unanswered) > most or (unanswered and not answered):
                    raise UserError(
                        f"{self.url} left {len(unanswered)} conversations in a row unanswered, the last: "
                        f"{unanswered[-1].reason} What is finished is kept; run again when the server answers."
                    )
                yield list(unanswered)
            finally:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _converse(self, source: Source) -> Finished | Rejected:
        """All turns of a conversation; a truncated answer ends it. Runs in a thread of the pool."""
        messages: list[Message] = []
        tokens, reason = 0, "stop"
        for turn, segment in enumerate(source.segments):
            messages += segment
            try:
                answer = self._ask(messages, source.index, turn)
            except _Unanswered as error:
                raise _GaveUp(Rejected(source, f"turn {turn + 1}: {error}")) from None
            except _ServerError:
                raise
            except UserError as error:
                return Rejected(source, f"turn {turn + 1}: {error}")
            messages.append(answer_message(answer.text, answer.finish_reason))
            tokens, reason = tokens + answer.tokens, answer.finish_reason
            if reason != "stop":
                break
        return Finished(source, tuple(messages), reason, tokens)

    def _ask(self, messages: Sequence[Message], index: int, turn: int) -> Answer:
        """One answer; UserError for one that can't be used, _Unanswered when no attempt got any."""
        body = json.dumps(self.request(messages, index, turn)).encode()
        attempt, pause = 0, FIRST_PAUSE
        while True:
            attempt += 1
            try:
                return self._usable(_read_answer(self._post(body)))
            except _Unanswered as error:
                if attempt == self.settings.server_attempts or self._stopped.is_set():
                    raise _Unanswered(f"no answer in {attempt} attempts, the last: {error}") from None
                # Spread out, so that what failed together does not come back together.
                asked = pause * random.uniform(0.5, 1.0) if error.pause is None else error.pause
                self._stopped.wait(min(asked, LONGEST_PAUSE))
                pause *= 2

    def request(self, messages: Sequence[Message], index: int, turn: int) -> dict[str, Any]:
        """The body of a request. The seed follows from the conversation's place, for servers that honour it."""
        settings = self.settings
        fields: dict[str, Any] = {
            "model": settings.server_model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": (settings.seed * 1_000_003 + index * 101 + turn) % 2**31,
        }
        return fields | ({"top_k": settings.top_k} if settings.top_k else {}) | settings.extra_fields

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, body, headers)
        began = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=self.settings.server_timeout) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except TimeoutError:
            raise _Unanswered(f"nothing came for {time.monotonic() - began:.1f} seconds.") from None
        except urllib.error.URLError as error:
            raise _Unanswered(f"{error.reason}.") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Unanswered(f"the connection broke off ({type(error).__name__}).") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        except (OSError, http.client.HTTPException):
            said = ""
        if error.code in RETRIED:
            named = error.headers.get("Retry-After", "")
            return _Unanswered(f"HTTP {error.code}: {said}", float(named) if named.isdigit() else None)
        if error.code in WRONG_SERVER:
            return _ServerError(f"{self.url} {WRONG_SERVER[error.code]} (HTTP {error.code}: {said})")
        return UserError(f"the server refused the request (HTTP {error.code}: {said})")

    def _usable(self, answer: Answer) -> Answer:
        if not answer.text.strip("\ufffd \t\r\n"):
            raise UserError("the answer is empty.")
        return answer


def _ended(done: Iterable[Future[Finished | Rejected]], unanswered: list[Rejected]) -> list[Finished | Rejected]:
    """The conversations that came to an end; those without an answer go to `unanswered`."""
    ended: list[Finished | Rejected] = []
    for future in done:
        try:
            ended.append(future.result())
        except _GaveUp as gave_up:
            unanswered.append(gave_up.rejected)
    return ended


class _ServerError(UserError):
    """What no other conversation would fare better with: it ends the run."""


def _read_answer(reply: bytes) -> Answer:
    """The answer in a reply; _Unanswered where the reply is not one, UserError where it can't be trained on."""
    try:
        value = json.loads(reply)
        choice = value["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        text = message["content"]
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        tokens = (value.get("usage") or {}).get("completion_tokens") or 0
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        shown = reply[:80].decode(errors="replace").strip()
        raise _Unanswered(f"the reply is no chat completion: {shown!r}") from None
    if thoughts:
        raise UserError(
            "the server gives the answer's reasoning apart from it; turn thinking off by --server-extra, or the "
            "server's reasoning parser."
        )
    if reason not in ("stop", "length"):
        raise UserError(f"the answer ended with {reason!r}; stop or length was expected.")
    if text is not None and not isinstance(text, str):
        raise UserError(f"the answer is a {type(text).__name__}; text was expected.")
    return Answer(text or "", reason, int(tokens))
