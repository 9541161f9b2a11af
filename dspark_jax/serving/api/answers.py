"""The answers of one HTTP request: from the engine's pieces to the objects that OpenAI's clients read."""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.serving.api.channel import Channel, Piece
from dspark_jax.serving.api.driver import EngineDriver
from dspark_jax.serving.api.errors import ApiError
from dspark_jax.serving.api.metrics import Metrics
from dspark_jax.serving.api.pieces import TokenTexts
from dspark_jax.serving.api.rounds import DraftRound, Origin, origins
from dspark_jax.serving.api.schema import Ask
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.text import Decode

FINISH = {"stop": "stop", "length": "length", "cancelled": "length"}
"""OpenAI's finish reasons by the engine's: an answer that is cut has reached a limit, of time."""


@dataclass(frozen=True)
class Delta:
    """What an answer has gained: `text`, and how its tokens came where the client asked for it."""

    place: int
    text: str
    speculation: dict[str, Any] | None = None
    generation: Generation | None = None  # at its end


@dataclass
class Answer:
    """One of the answers of a request, as far as it has been told.

    Attributes:
        place: its index among the request's answers.
        decode: the tokenizer's; None: the client does not ask how tokens came.
    """

    place: int
    decode: Decode | None
    prompt_tokens: int = 0
    tokens: int = 0
    said: int = 0  # characters
    generation: Generation | None = None
    told_at: float | None = None
    _texts: TokenTexts | None = field(init=False)
    _origins: deque[Origin] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._texts = None if self.decode is None else TokenTexts(self.decode)

    def grown(self, piece: Piece) -> Delta:
        """Take a piece of the engine's.

        Raises:
            ApiError: the target gave no finite law, so that the answer ended.
        """
        progress, ended = piece.progress, piece.progress.generation
        if ended is not None and ended.finish_reason == "error":
            raise ApiError(500, ended.error, code="no_finite_law")

        # A cut answer has text that was held back until then; it is in the whole text, not in the piece.
        text = progress.text if ended is None else ended.text[self.said :]
        self.said += len(text)
        self.tokens += len(progress.tokens)
        self.generation = ended
        return Delta(self.place, text, self._told(piece), ended)

    def _told(self, piece: Piece) -> dict[str, Any] | None:
        if self._texts is None or self.decode is None:
            return None
        new = piece.progress.tokens
        self._texts.add(new)
        self._origins += origins(piece.rounds, len(new))

        tokens = []
        for token, text in self._texts.release(self.said, self.generation is not None):
            position = self._origins.popleft().position
            source = "target" if position is None else "draft"
            tokens.append({"text": text, "id": token, "from": source, "position": position})
        return {"tokens": tokens, "rounds": [_round(played, self.decode) for played in piece.rounds]}


def _round(played: DraftRound, decode: Decode) -> dict[str, Any]:
    drafted = [
        {
            "text": decode([token]),
            "confidence": round(played.confidence[place], 4) if played.confidence else None,
            "accepted": place < played.accepted,
            "verified": place < played.verified,
        }
        for place, token in enumerate(played.tokens)
    ]
    return {"drafted": drafted, "accepted_length": played.committed}


class Session:
    """The answers of one HTTP request, from submission to the last of them.

    Args:
        driver: runs them.
        metrics: is told of times and ends.
        ask: the request.
        decode: the tokenizer's.
        seconds: after which answers are cut.
    """

    def __init__(self, driver: EngineDriver, metrics: Metrics, ask: Ask, decode: Decode | None, seconds: float):
        self.ask, self.channel, self.arrived = ask, Channel(), time.perf_counter()
        self.id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._driver, self._metrics = driver, metrics
        self._decode = decode if ask.speculation else None
        self._open: dict[int, Answer] = {}  # by the engine's index
        self.answers: list[Answer] = []
        self._timer = asyncio.get_running_loop().call_later(seconds, self._cut)

    def submitted(self, index: int, prompt_tokens: int) -> None:
        """The next answer is the engine's request `index`."""
        answer = Answer(len(self.answers), self._decode, prompt_tokens)
        self.answers.append(answer)
        self._open[index] = answer

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What the answers gain, as it comes, until the last of them has ended.

        Raises:
            ApiError: the engine failed, or the target's law did.
        """
        while self._open:
            batch = []
            for index, event in await self.channel.take():
                if isinstance(event, ApiError):
                    del self._open[index]
                    self._metrics.ended.labels("failed").inc()
                    raise event
                batch.append(self._delta(index, event))
            yield batch

    def close(self) -> None:
        """End what is still open: the client has gone, or all is said."""
        self._timer.cancel()
        for index in self._open:
            self._driver.cancel(index)
            self._metrics.ended.labels("abandoned").inc()
        self._open = {}

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and answers so far; each prompt counts once."""
        prompt = sum(answer.prompt_tokens for answer in self.answers[:: self.ask.choices])
        completion = sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _delta(self, index: int, piece: Piece) -> Delta:
        answer, now = self._open[index], time.perf_counter()
        delta = answer.grown(piece)
        self._time(answer, len(piece.progress.tokens), now)
        if delta.generation is not None:
            del self._open[index]
            self._metrics.ended.labels(delta.generation.finish_reason).inc()
            self._metrics.whole.observe(now - self.arrived)
        return delta

    def _time(self, answer: Answer, tokens: int, now: float) -> None:
        if not tokens:
            return
        if answer.told_at is None:
            self._metrics.first_token.observe(now - self.arrived)
            tokens -= 1
        else:
            # The tokens of a dispatch come together: each of them took its share of the time since the last ones.
            for _ in range(tokens):
                self._metrics.between_tokens.observe((now - answer.told_at) / tokens)
        answer.told_at = now

    def _cut(self) -> None:
        for index in list(self._open):
            self._driver.cut(index)


class Writer:
    """The JSON objects of a session's answers, whole or in chunks."""

    def __init__(self, session: Session, model: str):
        self._session, self._ask = session, session.ask
        kind = "chat.completion" if session.ask.chat else "text_completion"
        self._head = {"id": session.id, "object": kind, "created": session.created, "model": model}
        chunk = "chat.completion.chunk" if session.ask.chat else "text_completion"
        self._chunk_head = {**self._head, "object": chunk}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before any text: the role of each chat answer."""
        if not self._ask.chat:
            return []
        said = {"role": "assistant", "content": ""}
        return [self._chunk([self._choice(answer.place, None, delta=said)]) for answer in self._session.answers]

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a delta; None where there is nothing to tell."""
        told = delta.speculation
        if not delta.text and delta.generation is None and not (told and (told["tokens"] or told["rounds"])):
            return None
        content = {"content": delta.text} if delta.text else {}
        said: dict[str, Any] = {"delta": content} if self._ask.chat else {"text": delta.text}
        if told is not None:
            said["speculation"] = told
        return self._chunk([self._choice(delta.place, delta.generation, **said)])

    def closing(self) -> list[dict[str, Any]]:
        """The chunk of the usage, if it was asked for."""
        return [self._chunk([])] if self._ask.include_usage else []

    def whole(self, told: Mapping[int, Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """The answer that is not streamed; `told`: by place, how the tokens came, in parts."""
        choices = []
        for answer in self._session.answers:
            text = "" if answer.generation is None else answer.generation.text
            said: dict[str, Any] = {"text": text}
            if self._ask.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._ask.speculation:
                parts = told.get(answer.place, ())
                said["speculation"] = {
                    name: [item for part in parts for item in part[name]] for name in ("tokens", "rounds")
                }
            choices.append(self._choice(answer.place, answer.generation, **said))
        return {**self._head, "choices": choices, "usage": self._session.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._ask.include_usage:
            return {**self._chunk_head, "choices": choices}
        usage = self._session.usage() if self._ask.usage_in_chunks or not choices else None
        return {**self._chunk_head, "choices": choices, "usage": usage}

    def _choice(self, place: int, generation: Generation | None, **said: Any) -> dict[str, Any]:
        reason = None if generation is None else generation.finish_reason
        choice = {"index": place, **said, "logprobs": None, "finish_reason": FINISH.get(reason or "")}
        # Other servers' name for what OpenAI's reasons cannot say.
        if reason == "cancelled":
            choice["stop_reason"] = "deadline"
        return choice
