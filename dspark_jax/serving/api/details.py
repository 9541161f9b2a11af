"""Details of an answer's single tokens: where they came from, and their log-probabilities."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.serving.api.channel import Piece
from dspark_jax.serving.api.logprobs import TokenNames, chat_logprobs, completion_logprobs
from dspark_jax.serving.api.pieces import TokenTexts
from dspark_jax.serving.api.rounds import DraftRound, Origin, origins
from dspark_jax.serving.requests import TokenLogprob
from dspark_jax.serving.text import Decode


@dataclass(frozen=True)
class Told:
    """Consecutive tokens' ids, texts, origins and log-probabilities, and the rounds they came from."""

    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    origins: tuple[Origin, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    rounds: tuple[DraftRound, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tokens or self.rounds)

    def __add__(self, other: "Told") -> "Told":
        # Every field is a tuple of one kind of thing, so that two batches join field by field.
        return Told(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Details:
    """The tokens of one answer. Each is reported once its text is final and cannot become part of a stop string.

    Attributes:
        decode: the tokenizer's.
    """

    decode: Decode
    _texts: TokenTexts = field(init=False)
    _held: deque[tuple[Origin, TokenLogprob | None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        # A decoder of its own, without stop strings: the answer's text decides what they cut.
        self._texts = TokenTexts(self.decode)

    def grown(self, piece: Piece, said: int, ended: bool) -> Told:
        """Add a piece from the engine.

        Args:
            piece: with its rounds if the request is watched.
            said: characters of the answer that are final.
            ended: whether no more follow.
        Returns:
            The details that are final now.
        """
        progress = piece.progress
        self._texts.add(progress.tokens)
        logprobs: Sequence[TokenLogprob | None] = progress.logprobs or (None,) * len(progress.tokens)
        # Origins and log-probabilities wait in step with the texts: a token whose bytes end in the middle of a
        # character, or in what may become a stop string, is released by a later piece.
        self._held.extend(zip(origins(piece.rounds, len(progress.tokens)), logprobs, strict=True))

        # One entry of `_held` leaves with each token: both queues are in the order of the tokens.
        released = self._texts.release(said, ended)
        held = [self._held.popleft() for _ in released]
        return Told(
            tuple(token for token, _ in released),
            tuple(text for _, text in released),
            tuple(origin for origin, _ in held),
            # Empty unless the request asked for them, in which case every token has one.
            tuple(logprob for _, logprob in held if logprob is not None),
            piece.rounds,
        )


def told_origins(told: Told, decode: Decode) -> dict[str, Any]:
    """The extension `speculation` of a choice; docs/serving.md lists its fields."""
    tokens = [
        {
            "text": text,
            "id": token,
            "from": "target" if origin.position is None else "draft",
            "position": origin.position,
        }
        for token, text, origin in zip(told.tokens, told.texts, told.origins, strict=True)
    ]
    return {"tokens": tokens, "rounds": [_round(played, decode) for played in told.rounds]}


def told_logprobs(told: Told, names: TokenNames, chat: bool, before: int) -> dict[str, Any] | None:
    """The `logprobs` of a choice; None without any. `before`: characters of the answer ahead of these tokens."""
    if not told.logprobs:
        return None

    if chat:
        return chat_logprobs(names, told.logprobs)

    # Characters rather than bytes, as OpenAI's older form counts them.
    offsets = [before + sum(map(len, told.texts[:place])) for place in range(len(told.texts))]
    return completion_logprobs(names, told.logprobs, offsets)


def _round(played: DraftRound, decode: Decode) -> dict[str, Any]:
    drafted = [
        {
            "text": decode([token]),
            "confidence": round(played.confidence[place], 4) if played.confidence else None,
            # Prefixes both: drafts past the verify length were drawn, and never shown to the target.
            "accepted": place < played.accepted,
            "verified": place < played.verified,
        }
        for place, token in enumerate(played.tokens)
    ]
    return {"drafted": drafted, "accepted_length": played.committed}
