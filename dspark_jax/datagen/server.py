"""Conversations answered by an OpenAI-compatible server of the target, many at once.

A server's answers depend on its batching, so unlike with `Regenerator` a continued run does not end with the bytes of
an undisturbed one. Still every conversation is answered once, and finished ones are never requested again.
"""

import json
import random
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from dspark_jax.data.chat import Message
from dspark_jax.datagen.client import Answer, ChatClient, ServerError, UnansweredError
from dspark_jax.datagen.regeneration import Finished, Rejected, Source, answer_message
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.errors import UserError
from dspark_jax.evaluation.answers import turn_seed

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts: doubled each time, or as the server asks, up to the second."""
FIRST_ALIKE = 16
"""Conversations which, refused first and all for the same reason, show a fault of server or options."""


class _GaveUp(Exception):
    """A conversation with a turn that no attempt got an answer for."""

    def __init__(self, rejected: Rejected):
        super().__init__(rejected.reason)
        self.rejected = rejected


class ServedAnswers:
    """Answers conversations turn by turn through a `ChatClient`."""

    def __init__(self, settings: PrepareSettings):
        self.settings = settings
        self.client = ChatClient(settings.server, settings.server_timeout)
        self._stopped = threading.Event()

    def sort_out(self, sources: Iterable[Source]) -> tuple[list[Source], list[Rejected]]:
        """All sources: the server itself refuses a prompt that is too long."""
        return list(sources), []

    def answers(self, todo: Sequence[Source], fitting: Sequence[Source]) -> Iterator[list[Finished | Rejected]]:
        """Yields the conversations that ended, in any order.

        A conversation is set aside only once others have been answered; until then refusals are held back.

        Raises:
            UserError: the server is down (more than `server_concurrency` conversations in a row, or all of them, got no
                answer in all attempts), or refuses the first conversations alike. Finished ones are kept.
        """
        # Threads are the measure of concurrency: each conversation occupies one from its first turn to its last.
        waiting, most = iter(todo), self.settings.server_concurrency
        held = _Held(self.client.url, nothing_finished=len(todo) == len(fitting))
        with ThreadPoolExecutor(most) as pool:
            try:
                running = {pool.submit(self._converse, source) for source in islice(waiting, most)}
                while running and len(held.unanswered) <= most:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    # As many new ones as ended: the pool holds no queue, so a stop has little to cancel.
                    running |= {pool.submit(self._converse, source) for source in islice(waiting, len(done))}
                    if ended := held.sift(done):
                        yield ended
                yield held.rest(most)
            finally:
                # In this order: no new attempts, then the open requests end, then the threads can.
                self._stopped.set()
                self.client.close()
                pool.shutdown(wait=True, cancel_futures=True)

    def _converse(self, source: Source) -> Finished | Rejected:
        """Answers all turns of a conversation; a truncated answer ends it. Runs in a thread of the pool."""
        messages: list[Message] = []
        tokens, reason = 0, "stop"
        for turn, segment in enumerate(source.segments):
            messages += segment
            try:
                answer = self._ask(messages, source.index, turn)
            except UnansweredError as error:
                raise _GaveUp(Rejected(source, f"turn {turn + 1}: {error}")) from None
            # Before its base class: this one ends the run.
            except ServerError:
                raise
            except UserError as error:
                return Rejected(source, f"turn {turn + 1}: {error}")

            messages.append(answer_message(answer.text, answer.finish_reason))
            tokens, reason = tokens + answer.tokens, answer.finish_reason
            if reason != "stop":
                break

        return Finished(source, tuple(messages), reason, tokens)

    def _ask(self, messages: Sequence[Message], index: int, turn: int) -> Answer:
        """One answer; UserError for an unusable one, UnansweredError where no attempt got any."""
        # Encoded once: every attempt sends the same bytes.
        body = json.dumps(self.request(messages, index, turn)).encode()
        attempt, pause = 0, FIRST_PAUSE
        while True:
            attempt += 1
            try:
                return self.client.ask(body)
            except UnansweredError as error:
                if attempt == self.settings.server_attempts or self._stopped.is_set():
                    raise UnansweredError(f"no answer in {attempt} attempts, the last: {error}") from None
                # Jitter, so that requests that failed together are not repeated together.
                asked = pause * random.uniform(0.5, 1.0) if error.pause is None else error.pause
                self._stopped.wait(min(asked, LONGEST_PAUSE))
                pause *= 2

    def request(self, messages: Sequence[Message], index: int, turn: int) -> dict[str, Any]:
        """The body of a request; its seed follows from the conversation's place, for servers that honour seeds."""
        settings = self.settings
        # Servers take a signed 32-bit seed; `extra_fields` come last, to override any of these.
        fields: dict[str, Any] = {
            "model": settings.server_model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": turn_seed(settings.seed, index, turn) % 2**31,
        }

        return fields | ({"top_k": settings.top_k} if settings.top_k else {}) | settings.extra_fields


class _Held:
    """Conversations without an answer that are held back, since the server may be at fault."""

    def __init__(self, url: str, nothing_finished: bool):
        self.url, self.nothing_finished = url, nothing_finished
        self.unanswered: list[Rejected] = []
        self.refused: list[Rejected] = []
        self._trusted = False

    def sift(self, done: Iterable[Future[Finished | Rejected]]) -> list[Finished | Rejected]:
        """The conversations that can be reported now; UserError where the first ones were refused alike."""
        ended: list[Finished | Rejected] = []
        for future in done:
            try:
                ended.append(future.result())
            except _GaveUp as gave_up:
                self.unanswered.append(gave_up.rejected)

        refused = [e for e in ended if isinstance(e, Rejected)]
        if not ended:
            return []

        if not self._trusted and len(refused) == len(ended):
            self.refused += refused
            if self._alike():
                if len(self.refused) >= FIRST_ALIKE:
                    raise self._refusal()
                return []
            ended = []  # refused for several reasons: the conversations are at fault, not the server

        # An answer came, or refusals differ: the server works, and what was held back is reported.
        self._trusted = True
        ended = [*self.unanswered, *self.refused, *ended]
        self.unanswered, self.refused = [], []
        return ended

    def rest(self, most: int) -> list[Finished | Rejected]:
        """The conversations still held back at the end of the run; UserError where the server answered none."""
        if len(self.unanswered) > most or (self.unanswered and not self._trusted):
            raise UserError(
                f"{self.url} left {len(self.unanswered)} conversations in a row unanswered, the last: "
                f"{self.unanswered[-1].reason} What is finished is kept; run again when the server answers."
            )

        # In a continued run a few refused ones may be all that was left, so there they are set aside.
        if self.refused and self.nothing_finished:
            raise self._refusal()
        return [*self.unanswered, *self.refused]

    def _alike(self) -> bool:
        return len({_kind(rejected.reason) for rejected in self.refused}) == 1

    def _refusal(self) -> UserError:
        return UserError(
            f"{self.url} answered none of the first {len(self.refused)} conversations, all refused alike, the last: "
            f"{self.refused[-1].reason} Nothing was set aside; mend the options or the server, and run again."
        )


def _kind(reason: str) -> str:
    """The kind of a refusal: its HTTP status, or its sentence with numbers masked."""
    status = re.search(r"\(HTTP \d+", reason)
    return status.group() if status else re.sub(r"\d+", "#", reason)
