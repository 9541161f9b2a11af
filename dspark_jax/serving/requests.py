"""The data that an engine exchanges with its callers: requests, progress, generations, errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.serving.sampling import SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text without a template, token ids, or the messages of a chat."""


class QueueFull(UserError):
    """The engine's queue holds no more requests; try again once some have ended."""


class EngineClosed(UserError):
    """The engine is closing and takes no more requests; send them to another one."""


class EngineBroken(UserError):
    """The engine failed twice in a row and decodes no more; make a new one."""

    @classmethod
    def by(cls, error: Exception) -> "EngineBroken":
        """The sentence about the second failure, with the first line of its message."""
        # The first line alone: XLA's messages go on for pages.
        reason = "".join(str(error).strip().splitlines()[:1])
        return cls(
            f"The engine failed twice in a row ({type(error).__name__}: {reason}) and decodes no more; make a new one "
            "and submit the open requests again."
        )


@dataclass(frozen=True)
class Request:
    """A prompt with settings of its own.

    Attributes:
        prompt: text without a template, token ids, or chat messages, rendered with the tokenizer's template.
        sampling: the request's own settings. None: those of the call or of the engine.
        thinking: value of the chat template's switch, where it has one.
        deadline: seconds from `submit` on, after which the request is cut with finish_reason "deadline", whether it
            waits or decodes. Looked at between dispatches. None: no limit.
        priority: 0, or 1 for work in the background, which gets a slot only while no request of priority 0 waits. A
            request in a slot keeps it, unless the engine's pages run short.
    """

    prompt: Prompt
    sampling: SamplingParams | None = None
    thinking: bool = False
    deadline: float | None = None
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A new token's log-probability under the target's raw logits: before temperature, penalties, biases and
    truncation, without the ids that pad its tables. It does not depend on the drafter.

    Attributes:
        token: the token id.
        logprob: natural logarithm of its probability.
        top: (token id, log-probability) of the most probable tokens in its place, falling; as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Counts:
    """Totals of a request since it was submitted."""

    rounds: int = 0
    committed: int = 0  # tokens, by those rounds
    verified_at: tuple[int, ...] = ()  # drafts, by block position
    accepted_at: tuple[int, ...] = ()
    judged_at: tuple[int, ...] = ()  # verified behind a prefix that was accepted whole
    drafted: int = 0  # rounds with drafts

    def __add__(self, other: "Counts") -> "Counts":
        # Tuples would be joined by +, not added.
        def summed(name: str) -> tuple[int, ...]:
            mine, theirs = getattr(self, name), getattr(other, name)
            # Empty counts know no block size yet.
            return tuple(a + b for a, b in zip(mine, theirs, strict=True)) if mine else theirs

        return Counts(
            self.rounds + other.rounds,
            self.committed + other.committed,
            summed("verified_at"),
            summed("accepted_at"),
            summed("judged_at"),
            self.drafted + other.drafted,
        )


@dataclass(frozen=True)
class Timing:
    """Seconds since a request was submitted, as seen by the host, with the resolution of a dispatch.

    Attributes:
        admitted: when it left the queue.
        first_token: when the host read its first token.
        ended: when it ended. An event that never happened has this time too.
    """

    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Generation:
    """A request that has ended.

    Attributes:
        index: the request's place in the call, or the number that it was submitted under.
        prompt_tokens: token ids of the prompt.
        tokens: the new token ids, a stop token included; those after a stop string are left out.
        text: text of the new tokens without the stop token, cut before a stop string. Bytes at the end that form no
            whole character are left out.
        finish_reason: "stop", "length", "cancelled", "deadline" or "error".
        rounds: rounds since the request was admitted.
        committed: tokens that those rounds committed.
        verified_at: drafts verified, by block position.
        accepted_at: drafts accepted, by block position.
        judged_at: drafts verified behind a prefix that was accepted whole, by block position.
        drafted: rounds with drafts.
        timing: seconds; ignored when generations are compared.
        error: one sentence where the reason is "error".
        logprobs: one for each of `tokens` where the request asked for them, else empty.
        cached_tokens: prompt tokens that were not prefilled, since the engine had kept them; ignored when generations
            are compared.
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
    judged_at: tuple[int, ...]
    drafted: int = 0
    timing: Timing = field(default=Timing(), compare=False)
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = field(default=0, compare=False)

    @property
    def accepted_length(self) -> float:
        """tau: tokens committed per round, the target's own included; 0 if the first token ended the request.

        Rounds count up to the stop token or the limit of new tokens (docs/algorithm.md, rules 10 to 12), so the
        committed tokens are all but the first, which comes from prefill. Stop strings are found by the host after the
        dispatch: rounds that ran past one count in full.
        """
        # Every round commits its extra token, so that plain decoding has a tau of 1 (docs/algorithm.md, rule 12).
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second in a slot, prefill included; 0 for a request that never had a slot."""
        # A clock of coarse resolution may give 0 for a request that ended in its first dispatch.
        seconds = self.timing.ended - self.timing.admitted
        return len(self.tokens) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Progress:
    """New tokens of a request since its last Progress.

    Attributes:
        index: the request.
        tokens: the new token ids.
        text: new text that is final: whole characters that cannot become part of a stop string. The texts of a
            request, joined, are its Generation's.
        generation: the result once the request has ended, else None.
        counts: totals since the request was submitted.
        logprobs: one for each of `tokens` where the request asked for them, else empty.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    generation: Generation | None
    counts: Counts = Counts()
    logprobs: tuple[TokenLogprob, ...] = ()
