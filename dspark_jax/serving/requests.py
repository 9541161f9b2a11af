"""What goes into an engine and what comes out: requests, progress, generations, and the errors of the way between."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.serving.sampling import SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text as it is, token ids, or the messages of a chat."""


class QueueFull(UserError):
    """The engine's queue holds no more requests; try again once some have ended."""


class EngineBroken(UserError):
    """The engine failed twice in a row and decodes no more; make a new one."""


@dataclass(frozen=True)
class Request:
    """A prompt with settings of its own.

    Attributes:
        prompt: text as it is, token ids, or chat messages, rendered with the tokenizer's template.
        sampling: the request's own settings. None: those of the call or of the engine.
        thinking: what the chat template's switch is set to, where it has one.
    """

    prompt: Prompt
    sampling: SamplingParams | None = None
    thinking: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds since a request was submitted, as the host saw it, dispatch by dispatch.

    `admitted`: it left the queue; `first_token`: its first token was there; `ended`. A moment that never came is equal
    to `ended`.
    """

    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Generation:
    """A request that has ended.

    Attributes:
        index: the request's place in the call, or the name that it was submitted under.
        prompt_tokens: token ids of the prompt.
        tokens: the new ones, a stop token included; those behind a stop string are left out.
        text: of the new tokens, without the stop token, or up to the stop string. Bytes at the end that are no whole
            character are left out.
        finish_reason: "stop", "length", "cancelled" or "error".
        rounds: rounds since the request was admitted.
        committed: tokens that those rounds committed.
        verified_at: drafts verified, by block position.
        accepted_at: drafts accepted, by block position.
        drafted: rounds with drafts.
        timing: seconds, no part of an equality.
        error: one sentence where the reason is "error".
    """

    index: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    rounds: int
    committed: int
    verified_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    drafted: int = 0
    timing: Timing = field(default=Timing(), compare=False)
    error: str = ""

    @property
    def accepted_length(self) -> float:
        """tau: tokens committed a round, the target's own included; 0 when the first token ended the request.

        A round counts up to the stop token or the limit of new tokens that ends the request, so the tokens but the
        first, which comes from the prompt's own pass, are the committed ones. Behind a stop string, which only the host
        sees, rounds count whole.
        """
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds in a slot, prefill included; 0 for a request that never had one."""
        seconds = self.timing.ended - self.timing.admitted
        return len(self.tokens) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Progress:
    """New tokens of a request since its last Progress.

    Attributes:
        index: the request.
        tokens: the new ones.
        text: what can be said since the last Progress: whole characters that are no beginning of a stop string. The
            texts of a request, joined, are its Generation's.
        generation: once the request has ended.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    generation: Generation | None
