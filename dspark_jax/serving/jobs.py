"""Prepares requests for an engine: tokenises prompts, fills in settings, and checks everything.

All checks are made here, before a request is queued: a bad value that reached the compiled loop would fail the dispatch
of all other requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dspark_jax.data.chat import encode_prompt
from dspark_jax.errors import UserError
from dspark_jax.serving.requests import Prompt, Request
from dspark_jax.serving.sampling import SamplingParams, is_unicode, number_between, seed_words, whole_number
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

LONGEST_DEADLINE = 1e9
"""Seconds; longer ones are taken for a mistake in the unit."""


@dataclass(frozen=True)
class Job:
    """A checked request, as an engine runs it."""

    index: int
    prompt: tuple[int, ...]  # token ids
    sampling: SamplingParams  # with its stop tokens filled in
    seed_words: tuple[int, int]  # (high, low) words of the 64-bit seed
    longest: int  # positions, prompt included, at which the request ends
    given: int  # tokens of the prompt as submitted: penalties count those behind them as output
    deadline: float | None = None  # seconds from submission on
    priority: int = 0
    anchor: int | None = None  # the token behind the prompt, of a request that goes on; None: it is drawn

    def after(self, tokens: Sequence[int]) -> "Job":
        """The rest of the request after `tokens` have been decoded: all but the last, its anchor, join the prompt, and
        `longest` stays."""
        if not tokens:
            return self
        # `given` stays as well, so that penalties still count these tokens as output.
        return replace(self, prompt=(*self.prompt, *tokens[:-1]), anchor=tokens[-1])


def make_job(target: Target, sampling: SamplingParams, index: int, request: Request) -> Job:
    """Check a request and prepare it for an engine.

    Args:
        target: the model that decides.
        sampling: settings of a request that has none of its own.
        index: a whole number that names the request.
        request: a prompt of any form, with or without settings.
    Raises:
        UserError: a request that this target cannot decode, in a sentence that names it.
    """
    # bool is a subclass of int, so it has to be excluded by name.
    if isinstance(index, bool | np.bool_) or not isinstance(index, int | np.integer):
        raise UserError(f"A request was given the index {index!r}; expected a whole number.")
    index, who = int(index), f"Request {index}"
    if not isinstance(request, Request):
        raise UserError(f"{who} is a {type(request).__name__}; wrap its prompt in a Request.")

    # Settings of a request's own keep their seed as it is; under shared ones each index gets its own.
    own = request.sampling is not None
    if own and not isinstance(request.sampling, SamplingParams):
        raise UserError(f"{who} has sampling = {request.sampling!r:.80}; expected SamplingParams.")

    # After the checks that cost nothing.
    prompt = tokenize_prompt(target, request.prompt, who, request.thinking)
    settings = (request.sampling or sampling).checked(target.config.vocab_size, who)
    if settings.stop and target.tokenizer is None:
        raise UserError(f"{who} has stop texts, but {target.name} has no tokenizer files; give stop_tokens instead.")
    _require_fit(target, prompt, settings, who)

    # None means the target's own stop tokens, while () means none at all.
    ends = () if settings.ignore_eos else target.stop_tokens
    settings = replace(settings, stop_tokens=tuple(ends if settings.stop_tokens is None else settings.stop_tokens))

    deadline = request.deadline
    return Job(
        index,
        prompt,
        settings,
        seed_words(settings, index, own),
        longest=len(prompt) + settings.max_new_tokens,
        given=len(prompt),
        deadline=None if deadline is None else number_between(who, "deadline", deadline, 0.0, LONGEST_DEADLINE),
        priority=whole_number(who, "priority", request.priority, 0, 1),
    )


def require_room(job: Job, config: EngineConfig) -> None:
    """Check a request against the shapes of an engine's compiled loop, as if it were alone.

    Raises:
        UserError: more positions, pages, stop tokens, biases or log-probabilities than this engine holds.
    """
    longest, sampling = config.longest or 0, job.sampling
    who = f"Request {job.index}"
    if job.longest > longest:
        raise UserError(
            f"{who} needs {job.longest} positions (a prompt of {len(job.prompt)} tokens and up to "
            f"{sampling.max_new_tokens} new ones); this engine holds {longest}. Shorten it or raise the limit."
        )

    # The last token is never run: its position is not kept.
    pages = -(-(job.longest - 1) // config.page)
    if config.cache_pages and pages > config.cache_pages:
        raise UserError(
            f"{who} needs {pages} pages of the cache ({job.longest} positions, {config.page} a page); this engine has "
            f"{config.cache_pages}. Shorten it or raise cache_pages."
        )

    # Each is an axis of the compiled loop.
    asked = (
        (f"names {len(sampling.stop_tokens or ())} stop tokens", len(sampling.stop_tokens or ()), config.stop_slots),
        (f"biases {len(sampling.logit_bias)} tokens", len(sampling.logit_bias), config.bias_slots),
        (f"asks for {sampling.logprobs} log-probabilities a token", sampling.logprobs or 0, config.max_logprobs),
    )
    for what, count, most in asked:
        if count > most:
            raise UserError(f"{who} {what}; this engine holds {most}.")


def listed_requests(target: Target, prompts: Sequence[Prompt | Request]) -> list[Request]:
    """The prompts of a call as requests, tokenised.

    Raises:
        UserError: anything but a list of prompts, such as one bare text, or a prompt that cannot be tokenised.
    """
    # A text is a sequence too, of one prompt a character, which is never meant.
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Sequence | np.ndarray):
        raise UserError(
            f"prompts is a {type(prompts).__name__}; expected a list of prompts: put a single one in a list."
        )

    requests = [p if isinstance(p, Request) else Request(p) for p in prompts]
    return [
        replace(request, prompt=tokenize_prompt(target, request.prompt, f"Request {i}", request.thinking))
        for i, request in enumerate(requests)
    ]


def tokenize_prompt(target: Target, prompt: Prompt, who: str = "A prompt", thinking: bool = False) -> tuple[int, ...]:
    """Token ids of a prompt: ids unchanged, text without special tokens, chat messages through the chat template.

    Args:
        target: its tokenizer is used.
        prompt: text, token ids or chat messages.
        who: names the prompt in errors.
        thinking: value of the chat template's switch.
    Raises:
        UserError: a prompt of another form, or text that is not valid Unicode.
    """
    if not isinstance(prompt, str):
        listed = isinstance(prompt, Sequence | np.ndarray) and getattr(prompt, "ndim", 1) > 0
        if isinstance(prompt, bytes | bytearray | Mapping) or not listed:
            raise UserError(f"{who} is a {type(prompt).__name__}; expected text, token ids or a list of chat messages.")
        # Ids need no tokenizer; an empty list counts as ids and is refused as an empty prompt later.
        whole = [isinstance(t, int | np.integer) and not isinstance(t, bool | np.bool_) for t in prompt]
        if all(whole):
            return tuple(map(int, prompt))  # type: ignore[arg-type]
        if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt):
            raise UserError(
                f"{who} is neither text, nor a list of token ids, nor a list of {{'role', 'content'}} messages."
            )

    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files; give prompts as token ids, or add tokenizer.json.")

    if isinstance(prompt, str):
        _require_unicode(prompt, who)
        return tuple(target.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    try:
        return tuple(encode_prompt(target.tokenizer, [_joined(turn) for turn in prompt], thinking).tolist())
    except UserError as error:
        # Sentences about messages and templates do not name the request yet.
        raise UserError(f"{who}: {error}") from None


def _joined(turn: Any) -> dict[str, Any]:
    """The message with its content as one text: chat APIs send lists of parts, whose texts are joined."""
    content = turn["content"]
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        return dict(turn)

    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"a message has content of the kind {kind!r:.40}; only parts of text can be read.")

    return {**turn, "content": "".join(part["text"] for part in content)}


def _require_unicode(text: str, who: str) -> None:
    if not is_unicode(text):
        raise UserError(f"{who} holds a lone surrogate, which is half a character; expected Unicode text.")


def _require_fit(target: Target, prompt: tuple[int, ...], sampling: SamplingParams, who: str) -> None:
    limit = target.config.max_positions
    if not prompt:
        raise UserError(f"{who} has an empty prompt; give at least one token.")

    if len(prompt) >= limit:
        raise UserError(
            f"{who} has a prompt of {len(prompt)} tokens; {target.name} has a context of {limit}, "
            "and at least one new token must fit. Shorten the prompt."
        )

    if len(prompt) + sampling.max_new_tokens > limit:
        raise UserError(
            f"{who} asks for {sampling.max_new_tokens} new tokens after a prompt of {len(prompt)}; "
            f"{target.name} has a context of {limit}. Ask for at most {limit - len(prompt)}."
        )
    # An id out of range would be clamped by the gather on the device, silently.
    bad = next((t for t in prompt if not 0 <= t < target.config.vocab_size), None)
    if bad is not None:
        raise UserError(
            f"{who} has token id {bad}, outside the vocabulary of {target.config.vocab_size}; "
            "tokenize it with the target's own tokenizer."
        )
