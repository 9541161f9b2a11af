"""Conversations to token ids and loss masks, through the tokenizer's own chat template: one renderer for everything.

Decoding, regeneration, evaluation and training share one rule, whatever the template (docs/algorithm.md, rule 103): the
prompt sent in decoding is, token for token, a prefix of the training row and carries no loss; the loss covers exactly
the tokens the target generates after it, its end marker included. Nothing is inserted into a conversation, and no
marker is searched for in text: how a template closes an answer is read off from its own rendering.

Message text stays text: the name of a special token in a message becomes ordinary tokens.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from dspark_jax.data.special_tokens import aliased
from dspark_jax.data.templates import render
from dspark_jax.errors import UserError
from dspark_jax.readers import MAX_DEPTH

Message = Mapping[str, Any]
"""One turn: "role" and "content", plus whatever else the tokenizer's template reads (tool_calls, ...).

A last answer cut by a length limit has "truncated": true: the target did not end it there, so no end marker follows.
"""

ROLES = ("system", "developer", "user", "assistant", "tool")

_STAND_INS = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # Unicode's private use: no meaning of their own


@dataclass(frozen=True)
class Encoded:
    """One training row: `input_ids` int32 [T], `loss_mask` uint8 [T] (1: the token is to be predicted)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray

    @property
    def loss_tokens(self) -> int:
        """Supervised tokens after truncation, the count compared with `min_loss_tokens`."""
        return int(self.loss_mask.sum())


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], thinking: bool = False, variables: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Token ids of a prompt that ends where the assistant's answer begins.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: the turns so far, rendered as they are.
        thinking: setting of the template's thinking switch, where it has one.
        variables: further variables of the template, such as `tools`; they overrule the switch.

    Returns:
        int32 [T].

    Raises:
        UserError: no messages, messages of another form, or ones that the template refuses.
    """
    check_messages(messages)
    chat = _Chat(tokenizer, messages, thinking, variables or {})
    return np.asarray(chat.tokenise(chat.prompt(len(messages))), np.int32)


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], max_length: int | None = None, thinking: bool = False
) -> tuple[Encoded, ...]:
    """The training rows of a conversation: prompts as decoding sends them, each followed by its answer.

    There is one row as long as each prompt continues the row so far. Where a template renders an earlier answer other
    than it was generated (thoughts dropped, spaces trimmed, a merge across its start), the next prompt begins a new
    row, so that no answer is learnt after a context that decoding never has. Turns after the last answer are left out.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: the whole conversation.
        max_length: tokens that a row is cut to, at its end; None: not cut. A cut answer keeps its part of the mask.
        thinking: setting of the template's thinking switch, where it has one.

    Returns:
        One row or more; a single one without loss where no turn is the assistant's.

    Raises:
        UserError: messages of another form, a first turn that is not the user's, messages that the template refuses, a
            truncated answer that is not last.
    """
    _check_conversation(messages)
    chat = _Chat(tokenizer, messages, thinking)
    # Each answer is learnt after the prompt that decoding would have sent for it.
    answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answered:
        ids = chat.tokenise(chat.prompt(len(messages)))
        return (_row(ids, [0] * len(ids), max_length),)

    # `ids` and `mask` are the row so far: all prompts and answers up to here, in one context.
    rows: list[Encoded] = []
    ids, mask = list[int](), list[int]()
    for index in answered:
        prompt, answer = chat.turn(index)
        # The template changed the history, so the row so far is finished as decoding saw it.
        if prompt[: len(ids)] != ids:
            rows.append(_row(ids, mask, max_length))
            ids, mask = [], []
        # Only the part of the prompt that is new to the row is added, without loss.
        mask += [0] * (len(prompt) - len(ids)) + [1] * len(answer)
        ids = prompt + answer

    return (*rows, _row(ids, mask, max_length))


def check_messages(messages: Sequence[Message]) -> None:
    """UserError unless there is a turn, and each has a known role and text as its content."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise UserError("The conversation has no turns, expected a list with at least one user turn.")

    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"Turn {index} of the conversation is {message!r:.80}, expected an object with a role.")

        if message["role"] not in ROLES:
            raise UserError(
                f"Turn {index} of the conversation has the role {message['role']!r:.40}, expected one of "
                f"{', '.join(ROLES)}."
            )

        content = message.get("content")
        if not isinstance(content, str):
            raise UserError(
                f"Turn {index} of the conversation has content {content!r:.80}, expected text; only text turns can be "
                "used."
            )

        # Null as well: tables give every row every field.
        if (cut := message.get("truncated")) is not None and not isinstance(cut, bool):
            raise UserError(f"Turn {index} of the conversation has truncated = {cut!r:.40}, expected true or false.")

        # JSON can hold half a pair as an escape; it has no UTF-8 form.
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise UserError(
                f"Turn {index} of the conversation holds half of a UTF-16 surrogate pair, which no tokenizer takes."
            )


def template_id(tokenizer: Any, thinking: bool = False) -> str:
    """Identity of a template and its switch, recorded with everything rendered by it, so that a change is detected."""
    # Some tokenizers have several templates by name, hence JSON and not the text itself.
    content = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return f"{hashlib.sha256(content.encode(errors='replace')).hexdigest()[:16]}{' thinking' if thinking else ''}"


@dataclass(frozen=True)
class _Chat:
    """A conversation being rendered by a template.

    During rendering, names of special tokens in messages are replaced by `stand_ins`, single characters that occur
    nowhere else. Special tokens in the rendered text are then exactly those written by the template.
    """

    tokenizer: Any
    messages: Sequence[Message]
    thinking: bool
    variables: Mapping[str, Any] = field(default_factory=dict)
    specials: Mapping[str, tuple[int, Any]] = field(init=False)
    stand_ins: Mapping[str, str] = field(init=False)
    probe: str = field(init=False)

    def __post_init__(self) -> None:
        # Only special tokens: other added tokens are ordinary words, and a message may use them.
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        specials = {token.content: (number, token) for number, token in added.items() if token.special}
        # All text of a message, not its content alone: templates write tool calls and thoughts as well.
        texts = "\n".join(text for i, message in enumerate(self.messages) for text in _texts(message, i))
        # Longest first: one special token's name may contain another's.
        named = [name for name in sorted(specials, key=len, reverse=True) if name in texts]
        taken = set(texts)
        free = list(islice((chr(code) for code in _STAND_INS if chr(code) not in taken), len(named) + 1))
        if len(free) <= len(named):
            raise UserError("The conversation holds every character of Unicode's private use areas; leave it out.")
        # The dataclass is frozen; these three derive from its fields.
        object.__setattr__(self, "specials", specials)
        object.__setattr__(self, "stand_ins", dict(zip(named, free, strict=False)))
        object.__setattr__(self, "probe", free[-1])

    def prompt(self, end: int) -> str:
        """Text of the first `end` turns, up to where the next answer begins."""
        return self._render(self._shielded[:end], add_generation_prompt=True)

    def turn(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids of the prompt before answer `index`, and of what the target generates after it."""
        # Tokenised apart and together: the border between prompt and answer must fall between two tokens.
        text = self.prompt(index)
        answer = self._answer(index, text)
        prompt, whole = self.tokenise(text), self.tokenise(text + answer)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        # A merge crosses the border. In decoding the prompt is tokenised alone, so here too it keeps its tokens.
        return prompt, self.tokenise(answer)

    def tokenise(self, text: str) -> list[int]:
        """Token ids of a rendered text, its stand-ins replaced by the names they stand for."""
        if not self.stand_ins:
            return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

        if getattr(self.tokenizer, "backend_tokenizer", None) is not None:
            return aliased(self.tokenizer).ids(text, self.stand_ins)

        ids: list[int] = []
        # `re.split` with a group alternates: text at even places, names of special tokens at odd ones.
        for at, part in enumerate(re.split(self._special_names, text)):
            if at % 2:
                ids.append(self.specials[part][0])
                continue
            for name, stand_in in self.stand_ins.items():
                part = part.replace(stand_in, name)
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            ids += self.tokenizer(part, **plain)["input_ids"]

        return ids

    @cached_property
    def _shielded(self) -> list[Message]:
        if not self.stand_ins:
            return list(self.messages)
        return [{**self._shield(message), "role": message["role"]} for message in self.messages]

    def _shield(self, value: Any) -> Any:
        """A message, or a part of one, with stand-ins in all its text."""
        if isinstance(value, Mapping):
            # Names as well: a tool's arguments are written with theirs.
            return {self._shield(name): self._shield(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._shield(item) for item in value]
        if isinstance(value, str):
            for name, stand_in in self.stand_ins.items():
                value = value.replace(name, stand_in)
        return value

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{k: v for k, v in message.items() if k != "truncated"} for message in messages]
        # Two names of one switch: Qwen, Gemma and GLM read the first, DeepSeek and Granite the second.
        switches = {"enable_thinking": self.thinking, "thinking": self.thinking}
        variables = {**switches, **self.variables, "add_generation_prompt": add_generation_prompt}
        return render(self.tokenizer, turns, **variables)

    def _answer(self, index: int, prompt: str) -> str:
        """Text of answer `index` as the target generates it after `prompt`, its end marker included."""
        # A one-character probe in the answer's place: what the template writes after it closes any answer.
        message, before = self._shielded[index], self._shielded[:index]
        probed = self._render([*before, {"role": "assistant", "content": self.probe}], add_generation_prompt=False)
        # The last occurrence: the template may have put the probe into its own summary of the turns as well.
        at = probed.rfind(self.probe)
        if at < 0:
            raise UserError("The chat template leaves out what the assistant says, so it cannot be trained on.")

        # Rendering a finished conversation also writes what the template puts between turns, which no target
        # generates.
        closing = probed[at + 1 :]
        end = "" if message.get("truncated") else self._end_marker(closing)
        # Text between the prompt and the answer, when the template writes any (a space, an empty thought).
        lead = probed[len(prompt) : at] if probed.startswith(prompt) else ""

        if lead.strip() or message.get("tool_calls") or (self.thinking and message.get("reasoning_content")):
            # More than the content is generated, in the template's own notation.
            whole = self._render([*before, message], add_generation_prompt=False)
            if not whole.startswith(prompt) or not whole.endswith(closing):
                raise UserError(
                    f"Turn {index} of the conversation has tool calls or thoughts that the chat template does not "
                    "write where the answer begins; leave the conversation out."
                )
            return whole[len(prompt) : len(whole) - len(closing)] + end

        # Some templates put a space before each answer; a generated answer may begin with it already.
        return message["content"] + end if message["content"].startswith(lead) else lead + message["content"] + end

    def _end_marker(self, closing: str) -> str:
        """The first special token after an answer, where the target stops; the rest is the template's own text."""
        # A template without special tokens is closed by the tokenizer's end of text.
        first = re.search(self._special_names, closing) if self.specials else None
        if first:
            return closing[: first.end()]
        return getattr(self.tokenizer, "eos_token", None) or ""

    @cached_property
    def _special_names(self) -> str:
        return "(" + "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) + ")"


def _row(ids: Sequence[int], mask: Sequence[int], max_length: int | None) -> Encoded:
    return Encoded(np.asarray(ids[:max_length], np.int32), np.asarray(mask[:max_length], np.uint8))


def _check_conversation(messages: Sequence[Message]) -> None:
    check_messages(messages)
    # A system message may stand before the first user turn, an answer may not: it would have no prompt.
    first = next((m["role"] for m in messages if m["role"] not in ("system", "developer")), None)
    if first != "user":
        raise UserError(
            f"The conversation's first turn after the system message has the role {first!r}, expected 'user'; "
            "drop the turns before the first user turn."
        )

    # Only the last answer can have been cut: the user went on after every other one.
    early = [index for index, message in enumerate(messages[:-1]) if message.get("truncated")]
    if early:
        raise UserError(
            f"Turn {early[0]} of the conversation is marked as truncated, but others follow; expected only the last "
            "answer to be cut."
        )


def _texts(message: Message, index: int) -> list[str]:
    """Every text in a message, names of fields included; UserError where it is nested too deep for a template."""
    texts, level, depth = list[str](), list[Any]([message]), 0
    # Level by level and not recursively: Python's stack is no measure of what a message may hold.
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise UserError(f"Turn {index} of the conversation is nested deeper than {MAX_DEPTH} levels; leave it out.")
        texts += [item for item in level if isinstance(item, str)]
        lists = [item for item in level if isinstance(item, list | tuple)]
        objects = [item for item in level if isinstance(item, Mapping)]
        level = [part for item in lists for part in item]
        level += [part for item in objects for part in (*item, *item.values())]

    return texts
