"""Log-probabilities in OpenAI's two forms: of chats, with bytes, and the older one of completions, with offsets."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from dspark_jax.serving.requests import TokenLogprob
from dspark_jax.serving.text import BROKEN, Decode

LOWEST = -9999.0
"""For a probability of 0, whose logarithm JSON cannot hold."""


class TokenNames:
    """Texts and bytes of single tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.decode: Decode = tokenizer.decode
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def of(self, token: int) -> tuple[str, list[int] | None]:
        """(text, bytes) of a token; the bytes of one that holds a part of a character are its own, None if unknown."""
        # Kept without bound, as there are only so many tokens.
        if token not in self._known:
            text = self._tokenizer.decode([token])
            # A replacement character stands for bytes that form no character by themselves; clients that join `bytes`
            # need those.
            bytes_ = list(text.encode()) if BROKEN not in text else self._raw_bytes(token)
            self._known[token] = text, bytes_
        return self._known[token]

    def _raw_bytes(self, token: int) -> list[int] | None:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return None
        # Tokenizers with byte fallback write <0xE4>, byte-level ones a letter for each byte.
        if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            return [int(name[3:5], 16)]
        letters = byte_letters()
        return [letters[letter] for letter in name] if all(letter in letters for letter in name) else None


@cache
def byte_letters() -> dict[str, int]:
    """The byte of each letter that byte-level tokenizers write: printable ones as themselves, others from 256 on."""
    # GPT-2's table: bytes whose Latin-1 character is visible keep it, the others follow from 256 on in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def chat_logprobs(names: TokenNames, made: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    return {
        "content": [
            {**_entry(names, one.token, one.logprob), "top_logprobs": [_entry(names, *top) for top in one.top]}
            for one in made
        ],
        # Part of OpenAI's form; a target does not refuse.
        "refusal": None,
    }


def completion_logprobs(names: TokenNames, made: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
    """The `logprobs` of a completion's choice; `offsets`: characters of the answer before each token."""
    return {
        "tokens": [names.of(one.token)[0] for one in made],
        "token_logprobs": [_finite(one.logprob) for one in made],
        # By text, as the form has it: of two tokens with one text the more probable stays.
        "top_logprobs": [
            {names.of(token)[0]: _finite(value) for token, value in reversed(one.top)} if one.top else None
            for one in made
        ],
        "text_offset": list(offsets),
    }


def _entry(names: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    text, bytes_ = names.of(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": bytes_}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
