"""The JSON of a session's answers, whole or as server-sent events, in the forms that OpenAI's clients read."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark_jax.serving.api.answers import Delta, Session
from dspark_jax.serving.api.details import Told, told_logprobs, told_origins
from dspark_jax.serving.requests import Generation

FINISH = {"stop": "stop", "length": "length", "deadline": "length"}
"""OpenAI's finish reasons by the engine's: an answer that is cut at its deadline has reached a limit, of time."""

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
FRAMED = uuid.uuid4().hex
"""Stands for the text in an event that others are made from; nothing else in it can be equal."""


class Writer:
    """Makes the JSON of a session's answers."""

    def __init__(self, session: Session, model: str):
        self._session, self._ask = session, session.ask
        kind = "chat.completion" if session.ask.chat else "text_completion"
        self._head = {"id": session.id, "object": kind, "created": session.created, "model": model}
        chunk = "chat.completion.chunk" if session.ask.chat else "text_completion"
        # Completions have one name for both forms, chats two.
        self._chunk_head = {**self._head, "object": chunk}
        # Chunks of such requests differ in their text alone.
        detailed = session.ask.speculation or session.ask.sampling.logprobs is not None
        self._only_text = not (detailed or session.ask.usage_in_chunks)
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by the answer's place

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before any text: the role of each chat answer."""
        if not self._ask.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [self._chunk([self._choice(answer.place, said)]) for answer in self._session.answers]

    def event(self, delta: Delta) -> bytes:
        """The event of a delta; empty if nothing visible has changed."""
        # A dispatch whose tokens are all held back changes nothing that a client can see.
        if not (delta.text or delta.told or delta.generation):
            return b""
        if not self._only_text or delta.generation is not None:
            return event(self._chunk_of(delta))

        # Nearly all events of a stream: made from the one event of which they differ in a text.
        if delta.place not in self._frames:
            text, whole = encoded(FRAMED), event(self._chunk_of(replace(delta, text=FRAMED)))
            before, _, behind = whole.partition(text)
            self._frames[delta.place] = before, behind
        before, behind = self._frames[delta.place]
        return before + encoded(delta.text) + behind

    def _chunk_of(self, delta: Delta) -> dict[str, Any]:
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


def encoded(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return ENCODER.encode(value).encode()


def event(value: Any) -> bytes:
    """A server-sent event that holds a JSON value."""
    return b"data: " + encoded(value) + b"\n\n"
