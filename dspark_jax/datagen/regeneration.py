"""Answers from the target itself: every assistant turn of a conversation is regenerated, many conversations at once.

A conversation's answers depend only on its prompts, its index and the decoding settings, to the last bit: its random
numbers come from its index, its prompt is prefilled by itself, and every round runs one program over all slots. The
other conversations in the batch do not matter, so a run that was killed and continued ends with the same file.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dspark_jax.data.chat import Message, encode_prompt
from dspark_jax.data.conversations import Segments
from dspark_jax.errors import UserError
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

_TURN_SLACK = 16  # tokens: an answer's end-of-turn marker, and the growth of its text when tokenised again


@dataclass(frozen=True)
class Source:
    """A conversation to answer.

    Attributes:
        index: its place among all sources, which with the seed of the settings determines its random numbers.
        segments: the turns before each answer.
        extra: fields carried over to the output (a domain, ...).
        where: file and line, for messages.
    """

    index: int
    id: str
    segments: Segments
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Finished:
    """A conversation with the target's answers; `tokens` counts the generated ones, stop tokens included."""

    source: Source
    messages: tuple[Message, ...]
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Rejected:
    """A conversation set aside, with the reason."""

    source: Source
    reason: str


class Answerer(Protocol):
    """A source of answers: `Regenerator` decodes with the target, `server.ServedAnswers` asks a server."""

    def sort_out(self, sources: Iterable[Source]) -> tuple[list[Source], list[Rejected]]:
        """The sources that can be answered, and those set aside before any decoding."""
        ...

    def answers(self, todo: Sequence[Source], fitting: Sequence[Source]) -> Iterator[list[Finished | Rejected]]:
        """Yields conversations of `todo` as they finish; `fitting`: all that can be answered, with finished ones."""
        ...


def answer_message(text: str, finish_reason: str) -> Message:
    """The assistant's turn; one cut by the length limit is marked, and loses a character that was cut in two."""
    if finish_reason == "stop":
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text.rstrip("\ufffd"), "truncated": True}


@dataclass
class _Open:
    """A conversation being answered: its messages so far, and the segment whose answer is next."""

    source: Source
    messages: list[Message] = field(default_factory=list)
    turn: int = 0
    tokens: int = 0


class Regenerator:
    """Answers conversations with `target` through one engine."""

    def __init__(self, target: Target, thinking: bool, sampling: SamplingParams, engine: EngineConfig, context: int):
        """`context` is the limit of a conversation's positions."""
        self.target, self.thinking, self.context = target, thinking, context
        self.sampling, self.config = sampling, engine
        added = target.tokenizer.added_tokens_decoder.items()
        self._special = frozenset(number for number, token in added if token.special)

    def sort_out(self, sources: Iterable[Source]) -> tuple[list[Source], list[Rejected]]:
        fitting: list[Source] = []
        rejected: list[Rejected] = []
        for source in sources:
            try:
                # Later prompts contain answers, so only the first can be checked here.
                self._encode(source.segments[0])
            except UserError as error:
                rejected.append(Rejected(source, str(error)))
            else:
                fitting.append(source)

        return fitting, rejected

    def answers(self, todo: Sequence[Source], fitting: Sequence[Source]) -> Iterator[list[Finished | Rejected]]:
        return self.run(todo, self.longest(fitting))

    def longest(self, sources: Sequence[Source]) -> int:
        """Upper bound of the positions of these conversations, at most the context."""
        return min(self.context, max(map(self._reach, sources), default=1))

    def run(self, sources: Iterable[Source], longest: int) -> Iterator[list[Finished | Rejected]]:
        """Yields the conversations that ended in each dispatch; their order depends on their lengths.

        Args:
            sources: conversations to answer.
            longest: positions of the engine's caches. It shapes the compiled programs, so runs that are to agree pass
                the same value (`self.longest` over all sources, finished ones included).
        """
        slots = self.config.slots
        stops = max(1, len(self.target.stop_tokens))
        config = replace(self.config, longest=longest, stop_slots=stops)
        engine = Engine(self.target, None, config, self.sampling)
        # At most half the slots are filled at once: the engine then prefills each prompt by itself, and a prompt's
        # hidden states do not depend on how many others arrived with it.
        together = max(1, slots // 2)
        # `waiting` requests are submitted and have no slot; `running` ones have. Both follow the engine's own count.
        fresh, later = iter(sources), deque[_Open]()
        open_: dict[int, _Open] = {}
        waiting = running = 0

        while True:
            ended: list[Finished | Rejected] = []
            while waiting < together:
                # Begun conversations first, so that few are open at a time.
                conversation = later.popleft() if later else _start(fresh)
                if conversation is None:
                    break
                if (refusal := self._submit(engine, conversation, longest)) is not None:
                    ended.append(refusal)
                    continue

                open_[conversation.source.index] = conversation
                waiting += 1

            if not open_ and not ended:
                return

            # The step below admits in the order of submission, as far as slots are free.
            admitted = min(waiting, slots - running)
            waiting, running = waiting - admitted, running + admitted
            for progress in engine.step():
                if progress.generation is not None:
                    running -= 1
                    conversation = open_.pop(progress.index)
                    outcome = self._answer(conversation, progress.generation)
                    ended += [] if outcome is None else [outcome]
                    later.extend([conversation] if outcome is None else [])

            yield ended

    def _encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a prompt; UserError when it leaves no room for an answer or the tokenizer isn't the target's."""
        # Room for the longest answer: whether a conversation fits must not depend on how long its answer becomes.
        prompt = tuple(int(t) for t in encode_prompt(self.target.tokenizer, messages, self.thinking))
        new = self.sampling.max_new_tokens
        if len(prompt) + new > self.context:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room for {new} new ones in a context of {self.context}."
            )

        # A tokenizer copied from another model can have more tokens than the target has rows.
        vocabulary = self.target.config.vocab_size
        if max(prompt) >= vocabulary:
            raise UserError(f"token id {max(prompt)} is outside the target's vocabulary of {vocabulary}.")

        return prompt

    def _reach(self, source: Source) -> int:
        # Every answer at its longest, and what is added when it returns as part of a prompt.

        turns = len(source.segments)
        messages: list[Message] = []
        for segment in source.segments:
            messages += [*segment, {"role": "assistant", "content": ""}]
        prompt = encode_prompt(self.target.tokenizer, messages[:-1], self.thinking)
        return len(prompt) + turns * self.sampling.max_new_tokens + (turns - 1) * _TURN_SLACK

    def _submit(self, engine: Engine, conversation: _Open, longest: int) -> Rejected | None:
        source = conversation.source
        # The whole history is sent anew each turn, as a chat program would.
        conversation.messages += source.segments[conversation.turn]
        try:
            prompt = self._encode(conversation.messages)
        except UserError as error:
            return Rejected(source, f"turn {conversation.turn + 1}: {error}")

        # `_reach` is an estimate: an answer's text can take more tokens as part of a prompt.
        if len(prompt) + self.sampling.max_new_tokens > longest:
            return Rejected(source, f"turn {conversation.turn + 1}: its {len(prompt)} tokens outgrew the engine.")

        engine.submit(source.index, Request(prompt))
        return None

    def _answer(self, conversation: _Open, made: Generation) -> Finished | Rejected | None:
        """Adds an answer; None when the next turn is to be answered. An answer cut by the limit ends a conversation."""
        source, tokenizer = conversation.source, self.target.tokenizer
        # A special token within an answer would, as text in the next prompt, become ordinary tokens.
        said = made.tokens[:-1] if made.finish_reason == "stop" else made.tokens
        special = next((t for t in said if t in self._special), None)
        turn = f"turn {conversation.turn + 1}"
        if special is not None:
            return Rejected(source, f"{turn}: the answer holds the special token {tokenizer.decode([special])!r}.")
        # Nothing but space would teach a drafter to end at once.
        if not made.text.strip("\ufffd \t\r\n"):
            return Rejected(source, f"{turn}: the answer is empty.")

        # An answer cut by the limit is kept, marked as such: no turn can follow it.
        conversation.messages.append(answer_message(made.text, made.finish_reason))
        conversation.tokens += len(made.tokens)
        conversation.turn += 1
        if made.finish_reason == "stop" and conversation.turn < len(source.segments):
            return None

        return Finished(source, tuple(conversation.messages), made.finish_reason, conversation.tokens)


def _start(sources: Iterator[Source]) -> _Open | None:
    source = next(sources, None)
    return None if source is None else _Open(source)
