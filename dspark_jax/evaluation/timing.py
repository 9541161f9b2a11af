"""Timed decoding. Figures are medians over alternating runs, since the speed of machines drifts."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_jax.drafters.registry import Drafter
from dspark_jax.evaluation.acceptance import seeded
from dspark_jax.serving.generate import generate
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target


@dataclass(frozen=True)
class Timed:
    """One pass over a set of prompts: its generations in order and its wall-clock seconds, prefill included."""

    generations: tuple[Generation, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(g.tokens) for g in self.generations)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Decoder:
    """A way of decoding: the target alone, or with a drafter. A request's seed follows from its place in the set."""

    target: Target
    drafter: Drafter | None
    sampling: SamplingParams
    engine: EngineConfig

    def __call__(self, prompts: Sequence[EncodedPrompt]) -> Timed:
        requests = seeded(prompts, self.sampling)
        start = time.perf_counter()
        generations = generate(self.target, self.drafter, requests, engine=self.engine)
        return Timed(tuple(generations), time.perf_counter() - start)


def alternate(decoders: Mapping[str, Callable[[], Timed]], times: int) -> dict[str, list[Timed]]:
    """Runs each decoder once to compile, then all in turn, `times` times, reversing the order each time."""
    for decode in decoders.values():
        decode()

    runs: dict[str, list[Timed]] = {name: [] for name in decoders}
    for i in range(times):
        # Reversed in every other round: a decoder does not always run after the same one.
        names = list(decoders) if i % 2 == 0 else list(decoders)[::-1]
        for name in names:
            runs[name].append(decoders[name]())

    return runs


def median_speed(runs: Sequence[Timed]) -> float:
    """Median of tokens per second."""
    return statistics.median(run.tokens_per_second for run in runs)


def median_ratio(fast: Sequence[Timed], slow: Sequence[Timed]) -> float:
    """Median of the pairwise ratios of tokens per second."""
    # Pairs of one round: what slows the machine for a while slows both.
    pairs = zip(fast, slow, strict=True)
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)


@dataclass(frozen=True)
class Difference:
    """First position at which two greedy outputs differ, and the target's top-2 logit gap there."""

    prompt: str
    position: int
    gap: float


def differences(
    target: Target, prompts: Sequence[EncodedPrompt], plain: Sequence[Generation], other: Sequence[Generation]
) -> list[Difference]:
    """Prompts whose outputs differ; the gap tells a near-tie, where it is tiny, from a fault."""
    found = []
    for prompt, a, b in zip(prompts, plain, other, strict=True):
        if a.tokens == b.tokens:
            continue
        # One output may be a prefix of the other.
        shared = zip(a.tokens, b.tokens, strict=False)
        at = next((i for i, (x, y) in enumerate(shared) if x != y), min(len(a.tokens), len(b.tokens)))
        found.append(Difference(prompt.id, at, _top2_gap(target, prompt.tokens + a.tokens[:at])))

    return found


def _top2_gap(target: Target, tokens: Sequence[int]) -> float:
    import jax.numpy as jnp

    from dspark_jax.targets.attention import CausalRows

    model = target.model(target.params)
    ids = jnp.asarray([tokens])
    out = model(ids, jnp.arange(ids.shape[1])[None], CausalRows())
    second, first = np.sort(np.asarray(model.logits(out.hidden[:, -1])[0]))[-2:]

    return float(first - second)
