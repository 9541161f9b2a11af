"""The parser of the DeepSpec reference, for its two chat formats only.

It differs from `dspark_jax.data.chat`, which every program uses: it inserts a default system message (Qwen) or an
empty thought before each answer (Gemma), and finds answers by their markers in the rendered text
(docs/algorithm.md, rules 85 to 88). Released DeepSpec drafters were trained on these masks, so they are kept exactly
and compared with recorded ones. A template is not recognised as one of them: the caller names the format, and only the
recorded cases do.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark_jax.data.chat import Encoded, Message, check_messages
from dspark_jax.data.templates import render


@dataclass(frozen=True)
class DeepSpecFormat:
    """The markers that one family of chat templates puts around an assistant's turn.

    Attributes:
        assistant_header: text after which an assistant turn starts.
        end_of_turn: marker that closes it, with its newline; part of the loss.
        system_prompt: system message of training text whose data has none (None: insert nothing).
        answer_prefix: put before an assistant's text where it is missing, and left out of the loss.
    """

    assistant_header: str
    end_of_turn: str
    system_prompt: str | None = None
    answer_prefix: str = ""

    def render(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """The training text of a conversation; UserError for messages that the template refuses."""
        check_messages(messages)
        # DeepSpec changes the conversation before rendering, which the chat renderer of this project never does.
        turns = [self._with_prefix(message) for message in messages]
        if turns[0]["role"] != "system" and self.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return render(tokenizer, turns, add_generation_prompt=False)

    def loss_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans [start, end) of rendered `text` that carry the loss, in order.

        A span runs from after the header (and the answer prefix) through the end-of-turn marker, or to the end of the
        text where the marker is missing.
        """
        pattern = f"{re.escape(self.assistant_header)}([\\s\\S]*?(?:{re.escape(self.end_of_turn)}|$))"
        spans = []
        # The pattern is DeepSpec's: lazy up to the first end marker, or to the end of a text cut before it.
        for match in re.finditer(pattern, text):
            start, end = match.span(1)
            if self.answer_prefix and text.startswith(self.answer_prefix, start):
                start += len(self.answer_prefix)
            spans.append((start, end))

        return spans

    def encode(self, tokenizer: Any, messages: Sequence[Message], max_length: int | None = None) -> Encoded:
        """Token ids and loss mask of a conversation, cut at the end to `max_length` (None: not cut).

        A token span is counted by tokenising the two prefixes, not by the tokenizer's offsets: where a merge crosses a
        span's start (an answer that opens with newlines) it shifts, and so it did when the drafters were trained.
        """

        def tokenise(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

        # The mask is found by character spans of the rendered text, then counted in tokens of its prefixes (rule 87).
        text = self.render(tokenizer, messages)
        input_ids = np.asarray(tokenise(text)[:max_length], np.int32)
        loss_mask = np.zeros(len(input_ids), np.uint8)
        for start, end in self.loss_spans(text):
            # A span past the cut is empty: slices end with the array.
            loss_mask[len(tokenise(text[:start])) : len(tokenise(text[:end]))] = 1

        return Encoded(input_ids, loss_mask)

    def _with_prefix(self, message: Message) -> Message:
        content = message["content"]
        # An answer that already has a thought keeps it; only a missing one is filled in (rule 86).
        if not self.answer_prefix or message["role"] != "assistant" or content.startswith(self.answer_prefix):
            return message
        return {**message, "content": self.answer_prefix + content}


DEEPSPEC_FORMATS = {
    "qwen": DeepSpecFormat("<|im_start|>assistant\n", "<|im_end|>\n", system_prompt="You are a helpful assistant."),
    "gemma4": DeepSpecFormat("<|turn>model\n", "<turn|>\n", answer_prefix="<|channel>thought\n<channel|>"),
}
"""Formats by the names used in the recorded cases."""
