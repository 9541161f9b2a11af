"""Conversations as token rows: rendered, tokenised, weighted and packed several to a row.

Axes: B row of a batch, T position in a row.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dspark_jax.datagen.corpora import conversations

from .tokenizer import DEFAULT_SYSTEM, END, START

_POOL = 160  # conversations to choose from when filling the rest of a row


class Encoded(NamedTuple):
    """One conversation: token ids and the loss weight of predicting each of them."""

    tokens: np.ndarray
    weights: np.ndarray


class Rows(NamedTuple):
    """Packed rows, each array [B, T]; int32 except for the float32 weights.

    Attributes:
        tokens: ids.
        positions: restart at 0 in each segment.
        segments: 1, 2, ... for the conversations of a row; 0 is padding.
        labels: labels[t] is token t + 1.
        weights: weight of labels[t]; 0 where it belongs to another segment.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """Renders conversations and weights their tokens: assistant text and its end 1, all others `context_weight`.

    One conversation of `system_every` (by its question's checksum) opens with the default system message, as the
    shipped chat template renders it; the others open with the user's turn.
    """

    tokenizer: Tokenizer
    context_weight: float
    system_every: int = 2

    def __call__(self, messages: list[dict[str, str]]) -> Encoded:
        # By checksum, not by count: a question has the same form in every pass over the corpora.
        system = zlib.crc32(messages[0]["content"].encode()) % self.system_every == 0
        turns = with_default_system(messages) if system else messages
        tokens = np.array(self.tokenizer.encode(render(turns)).ids, np.int32)
        # The last header is the assistant's; each of its three parts is one token.
        answer = int(np.flatnonzero(tokens == self.tokenizer.token_to_id(START))[-1]) + 3  # <|im_start|>assistant\n
        weights = np.full(len(tokens), self.context_weight, np.float32)
        weights[answer:] = 1.0
        return Encoded(tokens, weights)


def with_default_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation as the shipped chat template completes it."""
    return [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]


def render(messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
    """The text of a conversation in the chat template's format, without its default system message."""
    text = "".join(f"{START}{turn['role']}\n{turn['content']}{END}\n" for turn in messages)
    return f"{text}{START}assistant\n" if generation_prompt else text


def endless(encoder: Encoder, domain: str, longest: int) -> Iterator[Encoded]:
    """Yields the training conversations of a domain for ever, reshuffled and reworded in every pass."""
    epoch = 0
    while True:
        for item in conversations(domain, "train", seed=epoch):
            encoded = encoder(item["messages"])
            # A conversation is never cut: its answer would lose its end.
            if len(encoded.tokens) <= longest:
                yield encoded
        epoch += 1


def mixture(encoder: Encoder, shares: Mapping[str, float], longest: int) -> Iterator[Encoded]:
    """Interleaves the domains so that their token counts follow `shares` at every moment."""
    sources = {domain: endless(encoder, domain, longest) for domain in shares}
    given = dict.fromkeys(shares, 0)
    while True:
        # The domain furthest behind its share: no random draw, so no drift either.
        domain = min(shares, key=lambda name: given[name] / shares[name])
        encoded = next(sources[domain])
        given[domain] += len(encoded.tokens)
        yield encoded


def pack(stream: Iterator[Encoded], length: int) -> Iterator[list[Encoded]]:
    """Groups conversations into rows of at most `length` tokens; each gap takes the longest waiting one that fits.

    Every conversation of a finite stream is yielded once. The oldest waiting one opens each row, so none is starved.
    """
    # Choosing among many waiting ones fills rows almost whole, so little is spent on padding.
    waiting: list[Encoded] = []
    while True:
        while len(waiting) < _POOL and (item := next(stream, None)) is not None:
            waiting.append(item)

        if not waiting:
            return

        row = [waiting.pop(0)]
        room = length - len(row[0].tokens)
        while fitting := [i for i, item in enumerate(waiting) if len(item.tokens) <= room]:
            best = max(fitting, key=lambda i: len(waiting[i].tokens))
            row.append(waiting.pop(best))
            room -= len(row[-1].tokens)

        yield row


def batches(stream: Iterator[Encoded], rows: int, length: int) -> Iterator[Rows]:
    """Batches of packed rows; a finite stream's last batch is filled up with empty rows."""
    packed = pack(stream, length)
    # `zip` draws from `range` first, so no packed row is lost at a batch's end.
    while chosen := [row for _, row in zip(range(rows), packed, strict=False)]:
        yield _to_arrays(chosen, rows, length)


def single_rows(stream: Iterator[Encoded], rows: int, length: int) -> Iterator[Rows]:
    """Batches of rows that hold one conversation each, for models that cannot run packed rows."""
    while chosen := [[item] for _, item in zip(range(rows), stream, strict=False)]:
        yield _to_arrays(chosen, rows, length)


def _to_arrays(chosen: list[list[Encoded]], rows: int, length: int) -> Rows:
    tokens, positions, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
    own = np.zeros((rows, length), np.float32)
    for b, row in enumerate(chosen):
        start = 0
        for segment, item in enumerate(row, start=1):
            span = slice(start, start + len(item.tokens))
            tokens[b, span], own[b, span], segments[b, span] = item.tokens, item.weights, segment
            positions[b, span] = np.arange(len(item.tokens))
            start = span.stop

    labels, weights = np.zeros_like(tokens), np.zeros_like(own)
    # Position t predicts token t + 1, but never across a border or from padding.
    labels[:, :-1] = tokens[:, 1:]
    weights[:, :-1] = np.where(segments[:, 1:] == segments[:, :-1], own[:, 1:], 0.0) * (segments[:, :-1] > 0)
    return Rows(tokens, positions, segments, labels, weights)
