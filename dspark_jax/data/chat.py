"""Conversations to token ids and a loss mask, as the DeepSpec reference parser does it.

The loss covers what the assistant says, its end-of-turn marker and the newline after it. Spans are found in the
*rendered text*, then turned into token spans by tokenising the two prefixes: when a merge crosses a span's start (an
answer that opens with newlines) the token span shifts, and a drafter trained on the reference's masks has seen exactly
that shift.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.errors import UserError

Message = Mapping[str, Any]
"""One turn: "role" and "content", plus whatever else the tokenizer's template reads (tool_calls, ...).

A last answer that a length limit cut has "truncated": true: the template closes it like any other, but the target never
said that it ends there, so its end-of-turn marker is not supervised.
"""


@dataclass(frozen=True)
class ChatFormat:
    """How one family of chat templates marks an assistant turn.

    Attributes:
        assistant_header: text after which an assistant turn starts.
        end_of_turn: marker that closes it, with its newline; part of the loss.
        system_prompt: system message of training text whose data has none (None: insert nothing).
        answer_prefix: put before an assistant's text where it is missing, and left out of the loss (Gemma's empty
            thought, which its generation prompt ends with when thinking is off).
    """

    name: str
    assistant_header: str
    end_of_turn: str
    system_prompt: str | None = None
    answer_prefix: str = ""

    def render(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """The training text of a conversation, through the tokenizer's own template.

        Raises:
            UserError: no messages, a first turn that is not the user's, or a turn the template refuses.
        """
        _require_messages(messages)
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        if turns and turns[0]["role"] != "user":
            raise UserError(
                f"The conversation's first turn after the system message has the role {turns[0]['role']!r}, "
                "expected 'user'; "
                "drop the turns before the first user turn."
            )
        if not system and self.system_prompt is not None:
            system = [{"role": "system", "content": self.system_prompt}]
        return _apply_template(tokenizer, [*system, *map(self._with_prefix, turns)], add_generation_prompt=False)

    def loss_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans [start, end) of rendered `text` that carry the loss, in order.

        A span runs from after the header (and the answer prefix) through the end-of-turn marker, or to the end of the
        text where the marker is missing.
        """
        spans = []
        for match in re.finditer(
            f"{re.escape(self.assistant_header)}([\\s\\S]*?(?:{re.escape(self.end_of_turn)}|$))", text
        ):
            start, end = match.span(1)
            if self.answer_prefix and text.startswith(self.answer_prefix, start):
                start += len(self.answer_prefix)
            spans.append((start, end))
        return spans

    def _with_prefix(self, message: Message) -> Message:
        if (
            not self.answer_prefix
            or message["role"] != "assistant"
            or message["content"].startswith(self.answer_prefix)
        ):
            return message
        return {**message, "content": self.answer_prefix + message["content"]}


CHAT_FORMATS: dict[str, ChatFormat] = {
    form.name: form
    for form in (
        ChatFormat("qwen", "<|im_start|>assistant\n", "<|im_end|>\n", system_prompt="You are a helpful assistant."),
        ChatFormat("gemma4", "<|turn>model\n", "<turn|>\n", answer_prefix="<|channel>thought\n<channel|>"),
    )
}


def chat_format(name: str) -> ChatFormat:
    """The registered format of that name; UserError names the known ones."""
    if name not in CHAT_FORMATS:
        raise UserError(f"Unknown chat format {name!r}; known are {', '.join(sorted(CHAT_FORMATS))}.")
    return CHAT_FORMATS[name]


@dataclass(frozen=True)
class Encoded:
    """One tokenised conversation: `input_ids` int32 [T], `loss_mask` uint8 [T] (1: the token is to be predicted)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray

    @property
    def loss_tokens(self) -> int:
        """Supervised tokens, counted after truncation: what `min_loss_tokens` is compared with."""
        return int(self.loss_mask.sum())


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], form: ChatFormat | str, max_length: int | None = None
) -> Encoded:
    """Tokenises a conversation and marks the assistant's tokens; cut at the end to `max_length` (None: not cut).

    A cut answer keeps its partial mask. Whether enough of it is left is the caller's decision (`Encoded.loss_tokens`).

    Raises:
        UserError: messages the template cannot render (see `ChatFormat.render`), a truncated answer that is not last.
    """
    form = chat_format(form) if isinstance(form, str) else form
    text = form.render(tokenizer, messages)
    spans = form.loss_spans(text)
    if _ends_truncated(messages) and spans:
        spans[-1] = (spans[-1][0], spans[-1][0] + len(text[slice(*spans[-1])].removesuffix(form.end_of_turn)))
    input_ids = np.asarray(_tokenise(tokenizer, text)[:max_length], np.int32)
    loss_mask = np.zeros(len(input_ids), np.uint8)
    for start, end in spans:
        # Not the tokenizer's offsets: see the module docstring.
        first = len(_tokenise(tokenizer, text[:start]))
        if first >= len(input_ids):
            break
        loss_mask[first : len(_tokenise(tokenizer, text[:end]))] = 1
    return Encoded(input_ids, loss_mask)


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], form: ChatFormat | str = "qwen", enable_thinking: bool | None = False
) -> np.ndarray:
    """Token ids int32 [T] of a prompt that ends where the assistant's answer begins.

    Messages are rendered as they are: no default system message (the reference's evaluator inserts none), no answer
    prefix on earlier turns. `enable_thinking` goes to the template; None leaves it to the template's default.

    Raises:
        UserError: an unknown format, no messages, or messages the template refuses.
    """
    _ = chat_format(form) if isinstance(form, str) else form
    _require_messages(messages)
    kwargs = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    text = _apply_template(tokenizer, messages, add_generation_prompt=True, **kwargs)
    return np.asarray(_tokenise(tokenizer, text), np.int32)


def collate_conversations(samples: Sequence[Encoded], min_loss_tokens: int) -> dict[str, np.ndarray] | None:
    """Right-padded batch with zeros, or None when every sample has fewer than `min_loss_tokens` supervised tokens.

    Returns:
        input_ids int32 [B, T], attention_mask uint8 [B, T], loss_mask uint8 [B, T]; T is the longest kept sample.
    """
    kept = [s for s in samples if s.loss_tokens >= min_loss_tokens]
    if not kept:
        return None
    shape = (len(kept), max(len(s.input_ids) for s in kept))
    batch: dict[str, np.ndarray] = {
        "input_ids": np.zeros(shape, np.int32),
        "attention_mask": np.zeros(shape, np.uint8),
        "loss_mask": np.zeros(shape, np.uint8),
    }
    for row, sample in enumerate(kept):
        length = len(sample.input_ids)
        batch["input_ids"][row, :length] = sample.input_ids
        batch["attention_mask"][row, :length] = 1
        batch["loss_mask"][row, :length] = sample.loss_mask
    return batch


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The Hugging Face tokenizer of a folder or hub id, never running code that comes with it.

    Raises:
        UserError: nothing loadable there.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    if path.is_dir() and not any(
        (path / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    ):
        raise UserError(f"{path} holds no tokenizer: expected tokenizer.json beside tokenizer_config.json.")
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types for a bad folder
        reason = str(error).strip().splitlines()[:1]
        raise UserError(f"No tokenizer could be loaded from {folder}: {''.join(reason)}") from error


def tokenizer_hash(folder_or_tokenizer: Any) -> str:
    """sha256 (hex) of what decides token ids: vocabulary, merges, normaliser, pre-tokeniser, added tokens.

    The same for a folder and for the tokenizer loaded from it, and untouched by earlier calls with truncation or
    padding. The chat template is not part of it: it changes texts, not ids.
    """
    tokenizer = folder_or_tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)  # state of the last call, not of the tokenizer
        content.pop("padding", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _tokenise(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def _apply_template(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path} has no chat template; put a chat_template.jinja beside its "
            "tokenizer.json."
        )
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **kwargs)
    except Exception as error:  # jinja's own errors, and the templates' raise_exception
        roles = ", ".join(str(m["role"]) for m in messages)
        raise UserError(f"The chat template refused a conversation with the roles {roles}: {error}") from error


def _ends_truncated(messages: Sequence[Message]) -> bool:
    early = [index for index, message in enumerate(messages[:-1]) if message.get("truncated")]
    if early:
        raise UserError(
            f"Turn {early[0]} of the conversation is marked as truncated, but others follow; expected only the last "
            "answer to be cut."
        )
    return bool(messages[-1].get("truncated"))


def _require_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise UserError("The conversation has no turns, expected at least one user turn.")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(
                    f"Turn {index} of the conversation has {key} {message.get(key)!r}, expected text; only text "
                    "turns can be used."
                )
