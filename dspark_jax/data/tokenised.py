"""Training rows in memory, for runs that compute the target's states in the training step."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.data.chat import Encoded, encode_conversation
from dspark_jax.data.conversations import read_conversations
from dspark_jax.data.records import TokenSample
from dspark_jax.errors import UserError
from dspark_jax.readers import read_object
from dspark_jax.storage.replica import fetched_if_there


def encode_files(
    files: Sequence[str | os.PathLike[str]], tokenizer: Any, thinking: bool, max_length: int, vocabulary: int
) -> Iterator[Encoded]:
    """The training rows of every conversation of the files, in order, cut to `max_length`.

    Raises:
        UserError: a conversation that cannot be read or rendered, or with ids outside the vocabulary (names file and
            line); answers generated under the other setting of `thinking`.
    """
    for path in map(Path, files):
        _require_same_thinking(path, thinking)
        for record in read_conversations(path):
            try:
                rows = encode_conversation(tokenizer, record.messages, max_length, thinking)
            except UserError as error:
                raise UserError(f"{record.where}: {error}") from error
            # Indices past an array's end are no error in JAX: another model's ids would go unnoticed.
            for row in rows:
                if len(row.input_ids) and row.input_ids.max() >= vocabulary:
                    raise UserError(
                        f"{record.where}: token id {row.input_ids.max()} is outside the target's vocabulary of "
                        f"{vocabulary}; the tokenizer is another model's."
                    )
            yield from rows


def _require_same_thinking(path: Path, thinking: bool) -> None:
    """UserError for answers generated after another prompt than the one their training rows would begin with."""
    note = fetched_if_there(path.with_suffix(".settings.json"))
    # Left by train.prepare_data beside the file; data from elsewhere has none, and is taken as it is.
    recorded = None if note is None else read_object(note).get("settings")
    if not isinstance(recorded, dict) or "weights_xxh3" not in recorded:
        return  # not answered by train.prepare_data with a target of its own

    answered = recorded.get("thinking", False)
    if answered != thinking:
        name, option = ("on", "--thinking") if answered else ("off", "--no-thinking")
        raise UserError(f"{path} was answered with thinking {name}; give {option}.")


@dataclass(frozen=True)
class Tokenised:
    """A `TokenSource` of the training rows with enough supervised tokens, one after the other in two flat arrays.

    Attributes:
        input_ids, loss_mask: int32 and uint8 [all tokens].
        starts: int64 [len(self) + 1], each row's first token, then the end of the last row.
        sample_ids: int64 [len(self)], index among all training rows, dropped ones included.
        sha256: hex digest of the four arrays.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    starts: np.ndarray
    sample_ids: np.ndarray
    sha256: str

    @classmethod
    def of(cls, conversations: Iterator[Encoded], min_loss_tokens: int) -> "Tokenised":
        # Numbered before short ones are dropped, so that a sample id names a row of the files.
        kept = [(i, c) for i, c in enumerate(conversations) if c.loss_tokens >= min_loss_tokens]
        sizes = [len(c.input_ids) for _, c in kept]
        arrays = (
            # The empty array gives a dtype to a run without rows.
            np.concatenate([np.zeros(0, np.int32), *(c.input_ids for _, c in kept)]),
            np.concatenate([np.zeros(0, np.uint8), *(c.loss_mask for _, c in kept)]),
            np.cumsum([0, *sizes], dtype=np.int64),
            np.array([i for i, _ in kept], np.int64),
        )
        # Hashed in memory: the same files under another tokenizer or cut are other data.
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array.data)

        return cls(*arrays, digest.hexdigest())

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> TokenSample:
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return TokenSample(int(self.sample_ids[index]), self.input_ids[span], self.loss_mask[span])
