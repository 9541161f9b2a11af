"""Cuts prompts into chunks of compiled widths, and builds the arrays that take a chunk to the device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.decoding.penalties import Penalties
from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.decoding.sampling import SamplingArrays
from dspark_jax.decoding.state import Admission
from dspark_jax.serving.jobs import Job
from dspark_jax.serving.roster import Entry
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig


def prompt_bucket(config: EngineConfig, size: int, start: int, tokens: int) -> int:
    """Compiled width of a prompt's next chunk: the smallest width times a power of two, at most a chunk, and no wider
    than the slot has room for.

    Args:
        config: smallest_prompt_bucket and prefill_chunk.
        size: positions of a slot.
        start: position of the chunk.
        tokens: prompt tokens left from there on.
    """
    # Powers of two: few widths to compile, and above the smallest one less than half of a chunk is padding.
    bucket = config.smallest_prompt_bucket
    while bucket < min(tokens, config.prefill_chunk):
        bucket *= 2

    # Clamped last: a chunk's junk must not wrap over what the slot holds, and one token is sampled behind it.
    return min(bucket, config.prefill_chunk, size - 1 - start)


class ChunkPlan(NamedTuple):
    """The chunks to prefill before the next dispatch.

    Attributes:
        fresh: (width, slots, rows) of prompts that begin, those in `slots` together in a program of so many rows.
        later: (slot, width) of prompts that go on.
        spent: tokens, padding included.
    """

    fresh: list[tuple[int, list[int], int]]
    later: list[tuple[int, int]]
    spent: int


def plan_chunks(
    config: EngineConfig, size: int, seats: Mapping[int, Entry], budget: int | None, keeps: bool = False
) -> ChunkPlan:
    """The next chunk of each prompt that is not whole yet, in the order of the requests' turns.

    Args:
        config: widths of chunks.
        size: positions of a slot.
        seats: the requests by slot.
        budget: the most tokens in all; None: no bound. A first chunk that is wider still runs, or its prompt never
            would.
        keeps: whether whole chunks are kept for other prompts.
    """
    fresh: dict[int, list[int]] = {}
    later: list[tuple[int, int]] = []
    apart: list[tuple[int, list[int], int]] = []
    spent = 0

    # By turn and not by slot: requests of priority 0 are prefilled first, then those that came first.
    for slot in sorted((s for s, entry in seats.items() if not entry.decoding), key=lambda s: seats[s].turn):
        entry = seats[slot]
        width = prompt_bucket(config, size, entry.prefilled, entry.left_to_prefill)
        # Stop at the first that does not fit: a smaller chunk of a later request would overtake it.
        if budget is not None and spent and spent + width > budget:
            break

        spent += width

        if entry.prefilled:
            later.append((slot, width))
        # A chunk that is kept is always computed alone, so that it holds the very bits that its next prompt would
        # compute.
        elif keeps and entry.left_to_prefill >= config.prefill_chunk:
            apart.append((width, [slot], 1))
        else:
            fresh.setdefault(width, []).append(slot)

    for width, slots in fresh.items():
        # Two compiled shapes a bucket, one prompt or a full house: more would only cost compile time.
        together = len(slots) * 2 > config.slots
        apart += [(width, slots, config.slots)] if together else [(width, [slot], 1) for slot in slots]
    return ChunkPlan(apart, later, spent)


def next_chunk(loop: DecodeLoop, width: int, entering: Sequence[tuple[int, Job, int]]) -> Admission:
    """An Admission of numpy arrays: for each (slot, job, start) the prompt's tokens from `start` on, up to `width`."""
    jobs = [job for _, job, _ in entering]
    settings = [job.sampling for job in jobs]

    def column(values: Any, dtype: Any = np.int32) -> Any:
        return np.asarray(values, dtype)

    # [A], [A, T] and [A, E]: rows are padded on the right, stop tokens with -1, which no token equals.
    starts, counts = column([start for _, _, start in entering]), column([0] * len(jobs))
    tokens = column(np.zeros((len(jobs), width)))
    stops = column(np.full((len(jobs), loop.stop_slots), -1))
    # [A, E]: unused places add a bias of 0 to token 0.
    biased, biases = (column(np.zeros((len(jobs), loop.bias_slots)), kind) for kind in (np.int32, np.float32))

    for row, (job, start) in enumerate(zip(jobs, starts, strict=True)):
        chunk = job.prompt[start : start + width]
        tokens[row, : len(chunk)], counts[row] = chunk, len(chunk)
        stops[row, : len(job.sampling.stop_tokens or ())] = job.sampling.stop_tokens or ()
        for place, (token, bias) in enumerate(dict(job.sampling.logit_bias).items()):
            biased[row, place], biases[row, place] = token, bias

    # A cap above the drafts of a round means all of them.
    most = loop.drafts
    return Admission(
        slots=column([slot for slot, _, _ in entering]),
        tokens=tokens,
        starts=starts,
        counts=counts,
        final=starts + counts == [len(job.prompt) for job in jobs],
        limit=column([job.longest for job in jobs]),
        stop_tokens=stops,
        verify_cap=column([most if s.verify_length is None else min(s.verify_length, most) for s in settings]),
        # uint32 words, since the seed has 64 bits and the device's integers 32.
        keys=column([job.seed_words for job in jobs], np.uint32),
        sampling=sampling_arrays(settings),
        # `given` and not the prompt's length: a resumed request's earlier tokens are output (docs/algorithm.md, rule
        # 113).
        penalties=Penalties(
            column([s.presence_penalty for s in settings], np.float32),
            column([s.frequency_penalty for s in settings], np.float32),
            column([s.repetition_penalty for s in settings], np.float32),
            prompt=column([job.given for job in jobs]),
            bias_tokens=biased,
            bias=biases,
        ),
        wants_logprobs=column([s.logprobs is not None for s in settings], bool),
        anchor=column([-1 if job.anchor is None else job.anchor for job in jobs]),
    )


def sampling_arrays(settings: Sequence[SamplingParams]) -> SamplingArrays:
    """The settings of a law as numpy arrays, a row each."""

    def column(values: Any, dtype: Any = np.float32) -> Any:
        return np.asarray(values, dtype)

    return SamplingArrays(
        column([s.temperature for s in settings]),
        column([min(s.top_k, 2**31 - 1) for s in settings], np.int32),  # any int is legal, int32 is compiled
        column([s.top_p for s in settings]),
        column([s.min_p for s in settings]),
    )


def blank_chunk(loop: DecodeLoop, rows: int, width: int) -> Admission:
    """A chunk to compile with: one token for slot 0, never final, so that the slot stays inactive."""
    job = Job(0, (0,), SamplingParams(max_new_tokens=1), (0, 0), longest=1, given=1)
    batch = next_chunk(loop, width, [(0, job, 0)] * rows)
    return batch._replace(final=batch.final & False)


def chunk_widths(config: EngineConfig, size: int, longest: int) -> tuple[set[int], set[int]]:
    """(widths of first chunks, widths of later chunks) that prompts of up to `longest` tokens can need."""
    # Every length is tried instead of listing widths, as the clamp to the slot adds widths.
    chunk = config.prefill_chunk
    first: set[int] = set()
    later: set[int] = set()
    for length in range(1, longest + 1):
        first.add(prompt_bucket(config, size, 0, length))
        if length > chunk:
            # The last chunk holds the remainder; those between it and the first are whole.
            last = (length - 1) // chunk * chunk
            later.add(prompt_bucket(config, size, last, length - last))
            later |= {chunk} if last > chunk else set()

    return first, later
