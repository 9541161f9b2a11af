"""Whole lists of prompts through an engine of their own: `generate` and `stream`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dspark_jax.drafters.registry import Drafter
from dspark_jax.scheduling.policies import Fixed
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import DecodeConfig, Generation, Progress, Prompt, Request, tokenize_prompt
from dspark_jax.targets.target import Target

DEFAULTS = DecodeConfig()


def stream(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Prompt | Request],
    config: DecodeConfig = DEFAULTS,
) -> Iterator[Progress]:
    """Yields what each request gained, dispatch by dispatch; the last Progress of a request carries its Generation."""
    requests = [p if isinstance(p, Request) else Request(p) for p in prompts]
    if not requests:
        return
    longest = 1
    for index, request in enumerate(requests):
        new = config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        longest = max(longest, len(tokenize_prompt(target, request.prompt, f"Request {index}", request.thinking)) + new)
    if config.buckets is None and isinstance(config.policy, Fixed):
        # Every request always verifies one length: a bucket that no round can need would only cost compile time.
        caps = {config.verify_length if r.verify_length is None else r.verify_length for r in requests}
        if caps == {None} and drafter is not None:
            config = replace(config, buckets=(min(config.slots, len(requests)) * (drafter.config.block_size + 1),))
    stops = [len(r.stop_tokens or config.stop_tokens or target.stop_tokens) for r in requests]
    slots = min(config.slots, len(requests))
    engine = Engine(target, drafter, replace(config, slots=slots, queue=None), longest, max(1, *stops))
    for index, request in enumerate(requests):
        engine.submit(index, request)
    while not engine.idle:
        yield from engine.step()


def generate(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Prompt | Request],
    config: DecodeConfig = DEFAULTS,
) -> list[Generation]:
    """Decodes every prompt and returns the generations in order. `drafter` None: plain decoding.

    Raises UserError before anything runs when a prompt can't be decoded (empty, longer than the context, wrong ids).
    """
    done = [p.generation for p in stream(target, drafter, prompts, config) if p.generation is not None]
    return sorted(done, key=lambda generation: generation.index)
