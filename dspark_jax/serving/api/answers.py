"""The answers of one HTTP request: from the engine's pieces to increments of text, with the times that are counted."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from dspark_jax.serving.api.channel import Channel, Piece, Wakeups
from dspark_jax.serving.api.details import Details, Told
from dspark_jax.serving.api.driver import EngineDriver
from dspark_jax.serving.api.errors import ApiError
from dspark_jax.serving.api.logprobs import TokenNames
from dspark_jax.serving.api.metrics import Metrics
from dspark_jax.serving.api.schema import Ask
from dspark_jax.serving.requests import Generation


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
        wakeups: of the event loop.
    """

    def __init__(self, driver: EngineDriver, metrics: Metrics, ask: Ask, names: TokenNames, wakeups: Wakeups):
        self.ask, self.names, self.channel, self.arrived = ask, names, Channel(wakeups), time.perf_counter()
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
            self._metrics.between_tokens.observe((now - answer.told_at) / tokens, tokens)
        answer.told_at = now
