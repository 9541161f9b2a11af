"""Reads what a dispatch has made from the device, and adds it to the entries of its requests.

Axes: R request slots, S positions of a slot, N log-probabilities kept a token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dspark_jax.decoding.logprobs import Logprobs
from dspark_jax.decoding.state import DecodeState, RoundCounters, RoundRecord
from dspark_jax.serving.requests import Counts, Progress, TokenLogprob
from dspark_jax.serving.roster import Entry
from dspark_jax.serving.text import Decode

Recorder = Callable[[tuple[int | None, ...], RoundRecord], None]
"""Called after each dispatch with the index of the request in each slot (None for a free one) and the dispatch's numpy
records, leaves [rounds, R, ...]."""


class Made(NamedTuple):
    """The part of the state that the host reads after a dispatch, as numpy arrays."""

    tokens: Any  # [R, S]
    length: Any  # [R]
    active: Any  # [R] bool
    stopped: Any  # [R] bool
    failed: Any  # [R] bool
    counters: RoundCounters
    logprobs: Logprobs | None  # None: no request in a slot asked for them

    @classmethod
    def read(cls, state: DecodeState, entries: Sequence[Entry]) -> "Made":
        """Wait for the dispatch and read its results, `entries` being the requests in slots."""
        asked = any(entry.job.sampling.logprobs is not None for entry in entries)
        read = state.tokens, state.length, state.active, state.stopped, state.failed, state.counters
        # One transfer for everything.
        return cls(*jax.device_get((*read, state.logprobs if asked else None)))


def book(entry: Entry, made: Made | None, decode: Decode | None, now: float) -> Progress | None:
    """Add a request's new tokens to its entry, and end it if it has ended or its deadline has passed.

    Args:
        entry: waiting, in the middle of its prompt, or decoding.
        made: the dispatch's results; None: nothing was decoded.
        decode: the tokenizer's; None: requests get no text.
        now: the time of reading, by `perf_counter`.
    Returns:
        Its Progress; None if it did not decode and goes on waiting.
    """
    before = entry.seen
    reason = None if made is None or not entry.decoding else _see(entry, made, decode, now)
    # After the results: a request that ended in this very dispatch has its own reason.
    if reason is None and entry.expired(now):
        reason = "deadline"
    if reason is None and (made is None or not entry.decoding):
        return None

    generation = None if reason is None else entry.generation(reason, now)
    # At the end the held text is released too, and the last Progress reports it.
    text = entry.seen.text.said if generation is None else generation.text

    first = len(before.tokens)
    return Progress(
        entry.job.index,
        entry.seen.tokens[first:],
        text[len(before.text.said) :],
        generation,
        entry.seen.counts,
        entry.seen.logprobs[first:],
    )


def _see(entry: Entry, made: Made, decode: Decode | None, now: float) -> str | None:
    """Add the new tokens, their log-probabilities and the counts of a request that decodes.

    Returns:
        The finish reason if the request has ended, else None.
    """
    slot = entry.slot
    assert slot is not None

    # The slot's tokens: the prompt, what has been seen, in this slot or an earlier one, and the new ones.
    first, end = len(entry.job.prompt) + len(entry.seen.tokens), int(made.length[slot])
    new = made.tokens[slot, first:end].tolist()
    counters = made.counters
    counts = Counts(
        int(counters.rounds[slot]),
        int(counters.committed[slot]),
        tuple(counters.verified_at[slot].tolist()),
        tuple(counters.accepted_at[slot].tolist()),
        tuple(counters.judged_at[slot].tolist()),
        int(counters.drafted[slot]),
    )

    logprobs: tuple[TokenLogprob, ...] = ()
    if entry.job.sampling.logprobs is not None and made.logprobs is not None:
        logprobs = _token_logprobs(new, made.logprobs.between(slot, first, end), entry.job.sampling.logprobs)

    # A stop string comes first: it may lie before the stop token, the limit or the failure.
    stopped = bool(made.stopped[slot])
    if entry.see(decode, new, counts, stopped, now, logprobs) or stopped:
        return "stop"

    if made.failed[slot]:
        return "error"
    return None if made.active[slot] else "length"


def _token_logprobs(tokens: Sequence[int], stored: tuple[Any, Any, Any], most: int) -> tuple[TokenLogprob, ...]:
    """Those of a request's new tokens, with the `most` most probable ones of each place (`Logprobs.between`)."""
    chosen, top_tokens, top = stored
    places = zip(top_tokens[:, :most].tolist(), top[:, :most].tolist(), strict=True)
    tops = [tuple(zip(ids, values, strict=True)) for ids, values in places]
    return tuple(map(TokenLogprob, tokens, chosen.tolist(), tops))
