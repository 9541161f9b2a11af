"""Decodes lists of prompts with an engine made for them: `generate` and `stream`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dspark_jax.drafters.registry import Drafter
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.jobs import Job, listed_requests, make_job, require_room
from dspark_jax.serving.requests import Generation, Progress, Prompt, Request
from dspark_jax.serving.sampling import DEFAULT_SAMPLING, SamplingParams, require_mode
from dspark_jax.serving.settings import DEFAULT_ENGINE, EngineConfig, check_engine
from dspark_jax.targets.target import Target

SMALLEST = 256
"""Least positions of a slot where the engine profiles itself, so that all short prompts share one profile."""


def generate(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Prompt | Request],
    sampling: SamplingParams = DEFAULT_SAMPLING,
    engine: EngineConfig = DEFAULT_ENGINE,
) -> list[Generation]:
    """Decode every prompt.

    Args:
        target: the model that decides.
        drafter: proposes; None: plain decoding.
        prompts: texts, token ids, lists of chat messages, or Requests with settings of their own.
        sampling: settings of every prompt that has none of its own.
        engine: slots, verify policy and the rest.
    Returns:
        The generations in the order of the prompts.
    Raises:
        UserError: before anything runs, for a prompt that cannot be decoded (empty, longer than the context, wrong
            ids) or settings that don't fit.
    """
    done = [p.generation for p in stream(target, drafter, prompts, sampling, engine) if p.generation is not None]
    # Requests end in any order.
    return sorted(done, key=lambda generation: generation.index)


def stream(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Prompt | Request],
    sampling: SamplingParams = DEFAULT_SAMPLING,
    engine: EngineConfig = DEFAULT_ENGINE,
) -> Iterator[Progress]:
    """Decode every prompt and yield its new tokens, dispatch by dispatch.

    Args:
        target: the model that decides.
        drafter: proposes; None: plain decoding.
        prompts: as for `generate`.
        sampling: settings of every prompt that has none of its own.
        engine: slots, verify policy and the rest.
    Returns:
        An iterator over the requests' Progress; the last one of a request carries its Generation.
    Raises:
        UserError: as for `generate`, at the call and not at the first item.
    """
    # Not a generator function: it would check nothing until the first item is asked for.
    made = engine_for(target, drafter, prompts, sampling, engine)
    return iter(()) if made is None else drain(made)


def drain(engine: Engine) -> Iterator[Progress]:
    """Step an engine until no request is open, and yield each Progress."""
    # Requests may be submitted between two items: the loop ends once none is open.
    while not engine.idle:
        yield from engine.step()


def engine_for(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Prompt | Request],
    sampling: SamplingParams = DEFAULT_SAMPLING,
    config: EngineConfig = DEFAULT_ENGINE,
) -> Engine | None:
    """An engine as large as these requests need, with all of them submitted.

    Args:
        target: the model that decides.
        drafter: proposes; None: plain decoding.
        prompts: as for `generate`; each is submitted under its place in the list.
        sampling: settings of every prompt that has none of its own.
        config: `longest` is kept if given; `slots` is an upper bound; `queue` is ignored, since the list is finite.
    Returns:
        The engine; None for an empty list.
    Raises:
        UserError: as for `generate`.
    """
    # Tokenised here: the slots' length follows from the prompts.
    requests = listed_requests(target, prompts)
    if not requests:
        return None

    # Checked before the engine is built, which may compile and profile for minutes.
    jobs = [make_job(target, sampling, index, request) for index, request in enumerate(requests)]
    sampling = _with_mode(sampling, jobs)
    # No more slots than prompts: idle slots are computed too.
    slots, longest = min(config.slots, len(jobs)), config.longest or max(job.longest for job in jobs)

    buckets = config.buckets
    if drafter is not None and config.longest is None and config.policy == "auto":
        # A profile is of one shape: rounded up, many lists of prompts share one, and its compiled programs.
        longest = min(_rounded(longest), target.config.max_positions)
    if drafter is not None and buckets is None and config.policy == "fixed":
        # Every request always verifies one length: a bucket that no round can need would only cost compile time.
        whole = all(job.sampling.verify_length is None for job in jobs)
        buckets = (slots * (1 + (config.tree or drafter.config.block_size)),) if whole else None

    # An array's axis, so at least one place; the engine compiles for the most that a request names.
    stops = max(1, *(len(job.sampling.stop_tokens or ()) for job in jobs))
    fitted = replace(config, slots=slots, longest=longest, buckets=buckets, queue=None, stop_slots=stops)
    check_engine(fitted)
    for job in jobs:
        require_room(job, fitted)

    made = Engine(target, drafter, fitted, sampling)
    for index, request in enumerate(requests):
        made.submit(index, request)
    return made


def _with_mode(sampling: SamplingParams, jobs: Sequence[Job]) -> SamplingParams:
    """The call's settings with the mode that its requests ask for, which all of them share."""
    # Greedy requests have no say: their tokens are the same in every mode.
    asked = [job.sampling.mode for job in jobs if job.sampling.temperature > 0 and job.sampling.mode is not None]
    made = replace(sampling, mode=next(iter(asked), sampling.mode))
    for job in jobs:
        require_mode(job.sampling, made.mode, f"Request {job.index}")
    return made


def _rounded(longest: int) -> int:
    """The next power of two, from `SMALLEST` on."""
    # Above it less than twice as long: the price of a profile that is shared.
    return max(SMALLEST, 1 << (longest - 1).bit_length())
