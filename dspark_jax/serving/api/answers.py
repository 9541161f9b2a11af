"""The answers of one HTTP request: from the engine's pieces to the objects that OpenAI's clients read."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from dspark_jax.serving.api.channel import Channel, Piece
from dspark_jax.serving.api.details import Details, Told, told_logprobs, told_origins
from dspark_jax.serving.api.driver import EngineDriver
from dspark_jax.serving.api.errors import ApiError
from dspark_jax.serving.api.logprobs import TokenNames
from dspark_jax.serving.api.metrics import Metrics
from dspark_jax.serving.api.schema import Ask
from dspark_jax.serving.requests import Generation

FINISH = {"stop": "stop", "length": "length", "deadline": "length"}
"""OpenAI's finish reasons by the engine's: an answer that is cut at its deadline has reached a limit, of time."""


@dataclass(frozen=True)
class Delta:
    """An answer's increment: new `text`, and details of its tokens where the client asked for them."""

    place: int
    text: str
    told: Told = Told()
    before: int = 0  # characters of the answer ahead of the reported tokens
    generation: Generation | None = None  # at its end


@dataclass
class Answer:
    """One of the answers of a request, as far as it has been reported.

    Attributes:
        place: its index among the request's answers.
        details: of its tokens; None where the client asked for none.
        prompt_tokens, tokens: of the prompt, and new ones.
        said: characters.
        told: characters of the tokens reported with details.
        told_at: `perf_counter` when its last tokens came; None before the first.
        generation: at its end.
    """

    place: int
    details: Details | None
    prompt_tokens: int
    tokens: int = 0
    said: int = 0
    told: int = 0
    told_at: float | None = None
    generation: Generation | None = None

    def grown(self, piece: Piece) -> Delta:
        """Add a piece from the engine.

        Raises:
            ApiError: the target gave no finite law, so that the answer ended.
        """
        progress, ended = piece.progress, piece.progress.generation
        # An error and not a shorter answer, which would look whole.
        if ended is not None and ended.finish_reason == "error":
            raise ApiError(500, ended.error, code="no_finite_law")

        self.said += len(progress.text)
        self.tokens += len(progress.tokens)
        self.generation = ended
        if self.details is None:
            return Delta(self.place, progress.text, generation=ended)

        # Details lag behind the text: a token is reported once its own text is final, so offsets count reported
        # characters.
        before, told = self.told, self.details.grown(piece, self.said, ended is not None)
        self.told += sum(map(len, told.texts))
        return Delta(self.place, progress.text, told, before, ended)


class Session:
    """The answers of one HTTP request, from submission to the last of them.

    Args:
        driver: runs them.
        metrics: counts times and ends.
        ask: the request.
        names: of the target's tokens.
    """

    def __init__(self, driver: EngineDriver, metrics: Metrics, ask: Ask, names: TokenNames):
        self.ask, self.names, self.channel, self.arrived = ask, names, Channel(), time.perf_counter()
        self.id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._driver, self._metrics = driver, metrics
        # Emptied as answers end; whatever is left when the client goes is cancelled.
        self._open: dict[int, Answer] = {}  # by the engine's index
        self.answers: list[Answer] = []

    def submitted(self, index: int, prompt_tokens: int) -> None:
        """The next answer is the engine's request `index`."""
        # Details cost a decode of every token, so that they are kept only where they are shown.
        wanted = self.ask.speculation or self.ask.sampling.logprobs is not None
        details = Details(self.names.decode) if wanted else None
        answer = Answer(len(self.answers), details, prompt_tokens)
        self.answers.append(answer)
        self._open[index] = answer

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """The answers' increments, as they come, until the last answer has ended.

        Raises:
            ApiError: the engine failed, or the target's law did.
        """
        while self._open:
            batch = []
            # Everything that the engine's thread has put since the last take, in one batch: one chunk of the stream
            # each dispatch.
            for index, event in await self.channel.take():
                # One failed answer ends the whole session; `close` cancels the others.
                if isinstance(event, ApiError):
                    del self._open[index]
                    self._metrics.ended.labels("failed").inc()
                    raise event
                batch.append(self._delta(index, event))
            yield batch

    def close(self) -> None:
        """Cancel the answers that are still open, as when the client has gone."""
        for index in self._open:
            self._driver.cancel(index)
            self._metrics.ended.labels("abandoned").inc()
        self._open = {}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and answers so far; each prompt counts once."""
        # Answers to one prompt are neighbours; the first of each group stands for its prompt.
        firsts = self.answers[:: self.ask.choices]
        prompt = sum(answer.prompt_tokens for answer in firsts)
        completion = sum(answer.tokens for answer in self.answers)
        kept = sum(answer.generation.cached_tokens for answer in firsts if answer.generation is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": kept},
        }

    def _delta(self, index: int, piece: Piece) -> Delta:
        answer, now = self._open[index], time.perf_counter()
        delta = answer.grown(piece)
        self._time(answer, len(piece.progress.tokens), now)
        # Ended for the engine too: `close` must not cancel it, nor count it as abandoned.
        if delta.generation is not None:
            del self._open[index]
            self._metrics.ended.labels(delta.generation.finish_reason).inc()
            self._metrics.whole.observe(now - self.arrived)
        return delta

    def _time(self, answer: Answer, tokens: int, now: float) -> None:
        # Pieces without tokens only bring an end, or text that was held back for a stop string.
        if not tokens:
            return
        if answer.told_at is None:
            self._metrics.first_token.observe(now - self.arrived)
        else:
            # The tokens of a dispatch come together: each of them took its share of the time since the last ones.
            for _ in range(tokens):
                self._metrics.between_tokens.observe((now - answer.told_at) / tokens)
        answer.told_at = now


class Writer:
    """The JSON objects of a session's answers, whole or in chunks."""

    def __init__(self, session: Session, model: str):
        self._session, self._ask = session, session.ask
        kind = "chat.completion" if session.ask.chat else "text_completion"
        self._head = {"id": session.id, "object": kind, "created": session.created, "model": model}
        chunk = "chat.completion.chunk" if session.ask.chat else "text_completion"
        # Completions have one name for both forms, chats two.
        self._chunk_head = {**self._head, "object": chunk}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before any text: the role of each chat answer."""
        if not self._ask.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [self._chunk([self._choice(answer.place, said)]) for answer in self._session.answers]

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a delta; None if nothing visible has changed."""
        # A dispatch whose tokens are all held back changes nothing that a client can see.
        if not (delta.text or delta.told or delta.generation):
            return None
        content = {"content": delta.text} if delta.text else {}
        said: dict[str, Any] = {"delta": content} if self._ask.chat else {"text": delta.text}
        return self._chunk([self._choice(delta.place, said | self._told(delta.told, delta.before), delta.generation)])

    def closing(self) -> list[dict[str, Any]]:
        """The chunk of the usage, if it was asked for."""
        return [self._chunk([])] if self._ask.include_usage else []

    def whole(self, told: Mapping[int, Told]) -> dict[str, Any]:
        """The body of an answer that is not streamed; `told`: details of its tokens, by the answer's place."""
        choices = []

        for answer in self._session.answers:
            text = "" if answer.generation is None else answer.generation.text
            said: dict[str, Any] = {"text": text}

            if self._ask.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}

            said |= self._told(told.get(answer.place, Told()), 0)
            choices.append(self._choice(answer.place, said, answer.generation))
        return {**self._head, "choices": choices, "usage": self._session.usage()}

    def _told(self, told: Told, before: int) -> dict[str, Any]:
        names = self._session.names
        found: dict[str, Any] = {"logprobs": told_logprobs(told, names, self._ask.chat, before)}
        return found | ({"speculation": told_origins(told, names.decode)} if self._ask.speculation else {})

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # With the option every chunk has the field, null before the last one unless each is to count.
        if not self._ask.include_usage:
            return {**self._chunk_head, "choices": choices}
        usage = self._session.usage() if self._ask.usage_in_chunks or not choices else None
        return {**self._chunk_head, "choices": choices, "usage": usage}

    def _choice(self, place: int, said: Mapping[str, Any], ended: Generation | None = None) -> dict[str, Any]:
        reason = None if ended is None else ended.finish_reason
        choice = {"index": place, **said, "finish_reason": FINISH.get(reason or "")}
        # Other servers' name for what OpenAI's reasons cannot say.
        return choice | ({"stop_reason": "deadline"} if reason == "deadline" else {})
