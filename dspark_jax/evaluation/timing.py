"""Timed decoding. Figures are medians over alternating runs, since the speed of machines drifts."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_jax.drafters.registry import Drafter
from dspark_jax.evaluation.acceptance import seeded
from dspark_jax.serving.chunks import sampling_arrays
from dspark_jax.serving.generate import drain, engine_for, generate
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams, seed_words
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
        # The engine is made within the call; its programs are compiled in the first one and shared by all others.
        start = time.perf_counter()
        # The call's own settings too: greedy requests do not say in which mode their engine verifies.
        generations = generate(self.target, self.drafter, requests, self.sampling, engine=self.engine)
        return Timed(tuple(generations), time.perf_counter() - start)


class Passes:
    """Passes of one way over the same prompts by one engine, made here: what an engine takes to be made counts in
    none."""

    def __init__(self, way: Decoder, prompts: Sequence[EncodedPrompt]) -> None:
        """Args:
            way: of decoding; its engine must keep no prefixes, or later passes would have less to prefill.
            prompts: one or more.
        Raises:
            UserError: as for `generate`.
        """
        self._requests = seeded(prompts, way.sampling)
        made = engine_for(way.target, way.drafter, self._requests, way.sampling, way.engine)
        assert made is not None, "of an empty list of prompts alone"
        self._engine = made

    def __call__(self) -> Timed:
        start = time.perf_counter()
        # The first pass finds them submitted already: by them the engine was made as large as it is.
        if self._engine.idle:
            for index, request in enumerate(self._requests):
                self._engine.submit(index, request)
        done = [progress.generation for progress in drain(self._engine) if progress.generation is not None]
        return Timed(tuple(sorted(done, key=lambda generation: generation.index)), time.perf_counter() - start)


def alternate(decoders: Mapping[str, Callable[[], Timed]], times: int) -> dict[str, list[Timed]]:
    """Runs each decoder once to compile, then all in turn, `times` times, reversing the order each time."""
    # Compilation takes longer than most passes, and would all fall on the first of the timed ones.
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
    """First position at which two outputs that ought to be equal differ, and how close the target's decision is there:
    the gap of its two best logits, or of the two best of its race, in nats."""

    prompt: str
    position: int
    gap: float


def differences(
    target: Target,
    prompts: Sequence[EncodedPrompt],
    plain: Sequence[Generation],
    other: Sequence[Generation],
    sampling: Sequence[SamplingParams] | None = None,
) -> list[Difference]:
    """Prompts whose outputs differ; the gap tells a near-tie, where it is tiny, from a fault.

    Args:
        target: decides.
        prompts: as given to both.
        plain, other: their outputs.
        sampling: each prompt's own settings, for outputs of coupled decoding; None: greedy ones.
    """
    found = []
    for i, (prompt, a, b) in enumerate(zip(prompts, plain, other, strict=True)):
        if a.tokens == b.tokens:
            continue
        # One output may be a prefix of the other.
        shared = zip(a.tokens, b.tokens, strict=False)
        at = next((i for i, (x, y) in enumerate(shared) if x != y), min(len(a.tokens), len(b.tokens)))
        scores = _decision(target, prompt.tokens + a.tokens[:at], None if sampling is None else sampling[i])
        # Measured where the texts part, which is the only decision that both made on the same prefix.
        second, first = np.sort(scores)[-2:]
        found.append(Difference(prompt.id, at, float(first - second)))

    return found


def _decision(target: Target, tokens: Sequence[int], sampling: SamplingParams | None) -> np.ndarray:
    """[V] the numbers whose largest decides the token after `tokens`: logits, or the logarithms of a coupled race."""
    import jax.numpy as jnp

    from dspark_jax.decoding.sampling import coupled_waits, race_odds
    from dspark_jax.targets.attention import CausalRows

    model = target.model(target.params)
    # One uncached pass over the shared prefix: the law that both programs should have used.
    ids = jnp.asarray([tokens])
    out = model(ids, jnp.arange(ids.shape[1])[None], CausalRows())
    logits = model.logits(out.hidden[:, -1])
    if sampling is None or sampling.temperature == 0:
        return np.asarray(logits[0])

    # Coupled draws are a race between exponential waits (docs/algorithm.md, rule 110): its odds decide, not the
    # logits.
    settings = sampling_arrays([sampling])
    keys = jnp.asarray([seed_words(sampling, 0, own=True)], jnp.uint32)
    waits = coupled_waits(keys, jnp.asarray([[len(tokens)]]), logits.shape[-1], settings)
    return np.log(np.asarray(race_odds(logits, waits[:, 0], settings)[0]) + np.finfo(np.float32).tiny)
