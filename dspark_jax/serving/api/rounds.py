"""Origins of tokens: the drafted blocks of requests that asked for them, from the records of the compiled rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark_jax.decoding.state import RoundRecord


@dataclass(frozen=True)
class DraftRound:
    """One round of one request.

    Attributes:
        tokens: ids of the K drafts; empty where nothing was drafted.
        confidence: of each draft, 0 to 1; empty without a confidence head.
        verified: the number of drafts that the target looked at, the first ones of the block.
        accepted: the number of drafts that it kept.
        committed: tokens that the round added: the accepted drafts and, unless one of them ended the answer, the
            target's own.
    """

    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    verified: int
    accepted: int
    committed: int


@dataclass(frozen=True)
class Origin:
    """Where a token came from: a place in the drafted block, counted from 1, or the target itself (None)."""

    position: int | None = None


def origins(rounds: Sequence[DraftRound], tokens: int) -> list[Origin]:
    """The origins of `tokens` new tokens, the last of which these rounds committed.

    Tokens before the first round's come from the prompt's own pass, or from one that was run again after an interrupt:
    the target's. Tokens behind a stop string are not among the new ones, so that the rounds may have committed more.
    """
    found = []
    for played in rounds:
        # A stop token among the accepted drafts ends the round without the target's own (docs/algorithm.md, rule 10).
        drafts = min(played.accepted, played.committed)
        found += [Origin(place) for place in range(1, drafts + 1)] + [Origin()] * (played.committed - drafts)

    # From the end: the rounds stand for the last tokens, and whatever came before them is the target's own.
    return ([Origin()] * (tokens - len(found)) + found)[:tokens]


class RoundLog:
    """The rounds of watched requests, from their dispatch until they are reported; `record` is a `Recorder`."""

    def __init__(self) -> None:
        self._rounds: dict[int, list[DraftRound]] = {}

    @property
    def watching(self) -> bool:
        """Whether any request is watched."""
        return bool(self._rounds)

    def watch(self, index: int) -> None:
        """Begin to keep the rounds of a request."""
        self._rounds[index] = []

    def forget(self, index: int) -> None:
        """Stop keeping the rounds of a request."""
        self._rounds.pop(index, None)

    def take(self, index: int) -> tuple[DraftRound, ...]:
        """The rounds since the last call; empty for a request that is not watched."""
        rounds = self._rounds.get(index)
        if not rounds:
            return ()
        taken = tuple(rounds)
        rounds.clear()
        return taken

    def discard(self) -> None:
        """Drop the rounds of a dispatch that failed: the engine runs them again."""
        # Copied first, since requests begin to be watched on other threads.
        for rounds in list(self._rounds.values()):
            rounds.clear()

    def record(self, holders: tuple[int | None, ...], records: RoundRecord) -> None:
        """Keep a dispatch's rounds of the watched requests; see `serving.booking.Recorder`."""
        # The dictionary may gain requests in other threads meanwhile; those have no slot yet.
        # By the holders at the dispatch, since a slot may have another request by now.
        watched = [(slot, index) for slot, index in enumerate(holders) if index is not None and index in self._rounds]
        for slot, index in watched:
            rounds = self._rounds.get(index)
            if rounds is not None:
                rounds += _rounds_of(records, slot)


def _rounds_of(records: RoundRecord, slot: int) -> list[DraftRound]:
    """The rounds of a dispatch in which a slot committed something; leaves of `records` are [rounds, R, ...]."""
    # [rounds] each, of this slot alone.
    columns: list[Any] = [
        np.asarray(leaf)[:, slot]
        for leaf in (
            records.committed, records.draft_tokens, records.confidence, records.verify_lengths, records.accepted
        )
    ]  # fmt: skip

    found = []
    for committed, drafts, logits, verified, accepted in zip(*columns, strict=True):
        if not committed:
            continue
        # A plain round is recorded with zeros in the place of drafts.
        drafted = drafts.size > 0 and (verified > 0 or drafts.any() or logits.any())
        tokens = tuple(drafts.tolist()) if drafted else ()
        # Clipped, since exp overflows where the head is certain.
        confidence = tuple((1 / (1 + np.exp(-np.clip(logits, -30, 30)))).tolist()) if drafted else ()
        found.append(DraftRound(tokens, confidence, int(verified), int(accepted), int(committed)))
    return found
