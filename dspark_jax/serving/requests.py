"""What goes into an engine and what comes out: settings, requests, generations, and the checks between."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from dspark_jax.data.chat import encode_prompt
from dspark_jax.errors import UserError
from dspark_jax.scheduling.policies import Fixed, VerifyPolicy
from dspark_jax.targets.target import Target

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class QueueFull(UserError):
    """The engine's queue holds no more requests; try again once some have ended."""


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. The sampling fields are defaults that a `Request` may replace one by one."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None  # None: the target's end-of-sequence ids
    verify_length: int | None = None  # drafts verified a round; None: the drafter's whole block
    slots: int = 8  # requests decoded at once
    rounds_per_dispatch: int = 16
    policy: VerifyPolicy = Fixed()
    buckets: tuple[int, ...] | None = None  # tokens the verify pass is compiled for; None: `bucket_ladder`
    smallest_prompt_bucket: int = 32
    prefill_chunk: int = 256  # longer prompts are prefilled in chunks of this many tokens
    prefill_budget: int = 512  # prompt tokens prefilled between two dispatches while other requests decode
    queue: int | None = None  # requests that may wait; None: any number
    return_at_once: bool = False  # a dispatch ends with the first request that does, even if nobody waits


@dataclass(frozen=True)
class Request:
    """A prompt: text as it is, token ids, or chat messages (rendered with the tokenizer's template). None: the
    DecodeConfig's value. Without a seed of its own a request draws from (config seed, its place in the list)."""

    prompt: Prompt
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_tokens: tuple[int, ...] | None = None
    verify_length: int | None = None
    thinking: bool = False  # the chat template opens with thinking, where it can


@dataclass(frozen=True)
class Timing:
    """Seconds since a request was submitted, as the host saw it, dispatch by dispatch.

    `admitted`: it left the queue; `first_token`: its first token was there; `ended`. Equal to `ended` where it never
    came so far.
    """

    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Generation:
    """An ended request. `tokens` are the new ones, the stop token included; counts are by block position."""

    index: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: str  # "stop", "length" or "cancelled"
    rounds: int
    committed: int
    verified_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    drafted: int = 0  # rounds that drafted at all
    timing: Timing = field(default=Timing(), compare=False)

    @property
    def accepted_length(self) -> float:
        """tau: committed tokens a round, the target's own token included; 0 when the first token ended the request."""
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds in a slot, prefill included; 0 for a request that never had one."""
        seconds = self.timing.ended - self.timing.admitted
        return len(self.tokens) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Progress:
    """Tokens that one dispatch added to a request; `generation` once it has ended."""

    index: int
    tokens: tuple[int, ...]
    generation: Generation | None


@dataclass(frozen=True)
class Job:
    """A request as an engine runs it: `settings` with every default filled in, `seed_words` its 64-bit seed."""

    index: int
    prompt: tuple[int, ...]
    settings: DecodeConfig
    seed_words: tuple[int, int]

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.settings.max_new_tokens


_OVERRIDES = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop_tokens", "verify_length",
)  # fmt: skip


def make_job(target: Target, config: DecodeConfig, index: int, request: Request) -> Job:
    """`request` over the defaults of `config`; UserError, in a sentence, for what this target can't decode."""
    if not isinstance(request, Request):
        raise UserError(f"Request {index} is a {type(request).__name__}; wrap its prompt in a Request.")
    overrides = {name: getattr(request, name) for name in _OVERRIDES if getattr(request, name) is not None}
    settings = replace(config, **overrides)
    prompt = tokenize_prompt(target, request.prompt, f"Request {index}", request.thinking)
    _check_types(settings, request.seed, index)
    check_request(target, prompt, settings, index)
    stops = target.stop_tokens if settings.stop_tokens is None else settings.stop_tokens
    words = (index, config.seed) if request.seed is None else (0, request.seed)
    return Job(index, prompt, replace(settings, stop_tokens=tuple(stops)), words)


def tokenize_prompt(target: Target, prompt: Prompt, who: str = "A prompt", thinking: bool = False) -> tuple[int, ...]:
    """Token ids of a prompt: ids as they are, text as it is, chat messages through the tokenizer's template."""
    if not isinstance(prompt, str):
        if not isinstance(prompt, Sequence | np.ndarray):
            raise UserError(f"{who} is a {type(prompt).__name__}; expected text, token ids or chat messages.")
        ids = [int(token) for token in prompt if isinstance(token, int | np.integer)]
        if len(ids) == len(prompt):
            return tuple(ids)
        if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt):
            raise UserError(
                f"{who} is neither text, nor a list of token ids, nor a list of {{'role', 'content'}} messages."
            )
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files; give prompts as token ids, or add tokenizer.json.")
    if not isinstance(prompt, str):
        return tuple(encode_prompt(target.tokenizer, cast(Sequence[Mapping[str, Any]], prompt), thinking).tolist())
    return tuple(target.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _check_types(settings: DecodeConfig, seed: int | None, index: int) -> None:
    def whole(value: Any) -> bool:
        return isinstance(value, int | np.integer)

    def number(value: Any) -> bool:
        return isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)

    stops, verify = settings.stop_tokens, settings.verify_length
    fits = {
        "max_new_tokens": (whole(settings.max_new_tokens), "a whole number"),
        "top_k": (whole(settings.top_k), "a whole number"),
        "verify_length": (verify is None or whole(verify), "a whole number"),
        "temperature": (number(settings.temperature), "a number"),
        "top_p": (number(settings.top_p), "a number"),
        "min_p": (number(settings.min_p), "a number"),
        "stop_tokens": (stops is None or (isinstance(stops, Sequence) and all(map(whole, stops))), "token ids"),
    }
    for name, (good, expected) in fits.items():
        if not good:
            raise UserError(f"Request {index} has {name} = {getattr(settings, name)!r}; expected {expected}.")
    if seed is not None and not whole(seed):
        raise UserError(f"Request {index} has seed = {seed!r}; expected a whole number.")


def check_request(target: Target, prompt: tuple[int, ...], settings: DecodeConfig, index: int) -> None:
    """Raises UserError for what no engine of this target can decode."""
    limit = target.config.max_positions
    if not prompt:
        raise UserError(f"Request {index} has an empty prompt; give at least one token.")
    if len(prompt) >= limit:
        raise UserError(
            f"Request {index} has a prompt of {len(prompt)} tokens; {target.name} has a context of {limit}, "
            "and at least one new token must fit. Shorten the prompt."
        )
    if len(prompt) + settings.max_new_tokens > limit:
        raise UserError(
            f"Request {index} asks for {settings.max_new_tokens} new tokens after a prompt of {len(prompt)}; "
            f"{target.name} has a context of {limit}. Ask for at most {limit - len(prompt)}."
        )
    if settings.max_new_tokens < 1:
        raise UserError(f"Request {index} asks for {settings.max_new_tokens} new tokens; ask for at least 1.")
    bad = [t for t in prompt if not 0 <= t < target.config.vocab_size]
    if bad:
        raise UserError(
            f"Request {index} has token id {bad[0]}, outside the vocabulary of {target.config.vocab_size}; "
            "tokenize it with the target's own tokenizer."
        )
    ranges = {
        "temperature": settings.temperature >= 0,
        "top_k": settings.top_k >= 0,
        "top_p": 0 <= settings.top_p <= 1,
        "min_p": 0 <= settings.min_p <= 1,
        "verify_length": settings.verify_length is None or settings.verify_length >= 0,
    }
    for name, fits in ranges.items():
        if not fits:
            raise UserError(f"Request {index} has {name} = {getattr(settings, name)}, which is out of range.")
