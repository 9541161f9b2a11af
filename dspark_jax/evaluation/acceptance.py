"""Acceptance counted over real speculative decoding, the measure of a drafter in training and inference.

Axes: K block position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspark_jax.drafters.registry import Drafter
from dspark_jax.serving.generate import generate
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

COUNTS = ("rounds", "committed", "verified", "accepted", "judged")
"""The fields of `Acceptance` from which `counted` makes the others."""


@dataclass(frozen=True)
class Acceptance:
    """Counts of a set of generations (docs/algorithm.md, rule 12).

    Attributes:
        rounds: draft-verify-accept rounds.
        committed: tokens committed by them, the prefill's first token not included.
        tau: committed tokens a round.
        verified: [K] drafts verified at each position.
        accepted: [K] drafts accepted at each position.
        judged: [K] drafts verified at each position in rounds that accepted all before them.
        unconditional: [K] share of rounds verifying x_k in which x_1..x_k were all accepted; nan where there is none.
        conditional: [K] share of the judged x_k that were accepted; nan where there is none. Exact under any policy:
            a round that stopped short of x_k, by its schedule or by a rejection, says nothing of x_k.
    """

    rounds: int
    committed: int
    tau: float
    verified: tuple[int, ...]
    accepted: tuple[int, ...]
    judged: tuple[int, ...]
    unconditional: tuple[float, ...]
    conditional: tuple[float, ...]

    @classmethod
    def of(cls, generations: Sequence[Generation]) -> "Acceptance":
        """Counts of all rounds of the generations."""
        # The longest: generations of plain decoding have no positions, and MTP's have one.
        block = max((len(g.verified_at) for g in generations), default=0)
        return cls.counted(
            sum(g.rounds for g in generations),
            sum(g.committed for g in generations),
            _total([g.verified_at for g in generations], block),
            _total([g.accepted_at for g in generations], block),
            _total([g.judged_at for g in generations], block),
        )

    @classmethod
    def pooled(cls, parts: Sequence["Acceptance"]) -> "Acceptance":
        """Several sets of generations counted as one."""
        # Counts are added and rates formed anew: a mean of rates would weigh a short part like a long one.
        block = max((len(part.verified) for part in parts), default=0)
        return cls.counted(
            sum(part.rounds for part in parts),
            sum(part.committed for part in parts),
            _total([part.verified for part in parts], block),
            _total([part.accepted for part in parts], block),
            _total([part.judged for part in parts], block),
        )

    @classmethod
    def counted(
        cls, rounds: int, committed: int, verified: np.ndarray, accepted: np.ndarray, judged: np.ndarray
    ) -> "Acceptance":
        """Rates of summed counts; the arrays are [K]."""
        counts = tuple(verified.tolist()), tuple(accepted.tolist()), tuple(judged.tolist())
        # Answers that end with the prefill's token have no rounds: their accepted length is 0, and no error.
        tau = committed / max(rounds, 1)
        return cls(rounds, committed, tau, *counts, _rates(accepted, verified), _rates(accepted, judged))


def _total(counts: Sequence[tuple[int, ...]], block: int) -> np.ndarray:
    """Sums by position, [block]; generations without a block (plain decoding, no round at all) count as zeros."""
    # Blocks of different lengths are added position by position.
    total = np.zeros(block, np.int64)
    for count in counts:
        total[: len(count)] += np.asarray(count, np.int64)
    return total


def _rates(good: np.ndarray, tried: np.ndarray) -> tuple[float, ...]:
    # nan and not 0: at a position that no round reached nothing was measured.
    return tuple(float(g / t) if t else float("nan") for g, t in zip(good, tried, strict=True))


def seeded(prompts: Sequence[EncodedPrompt], sampling: SamplingParams) -> list[Request]:
    """Requests with consecutive seeds from that of `sampling` on, so that they do not depend on the engine."""
    # A seed for each: with a common one, the answers to similar prompts would draw the same numbers.
    first = sampling.seed or 0
    return [Request(prompt.tokens, replace(sampling, seed=first + i)) for i, prompt in enumerate(prompts)]


def acceptance_by_domain(
    target: Target, drafter: Drafter, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, engine: EngineConfig
) -> dict[str, Acceptance]:
    """Decodes all prompts together and counts acceptance by domain.

    A prompt's random numbers depend on its place alone, not on the drafter. Calls with drafters of one structure and
    the same prompts and settings share compiled programs.

    Args:
        target: the model that verifies.
        drafter: under measurement.
        prompts: with their domains.
        sampling: of all requests; its seed is the first one's.
        engine: slots and policy.

    Returns:
        Acceptance by domain, in order of first appearance.
    """
    # All domains in one call, so that slots stay full where a domain has few prompts.
    made = generate(target, drafter, seeded(prompts, sampling), engine=engine)
    domains = dict.fromkeys(prompt.domain for prompt in prompts)
    return {
        domain: Acceptance.of([g for g, prompt in zip(made, prompts, strict=True) if prompt.domain == domain])
        for domain in domains
    }


def macro_tau(by_domain: Mapping[str, Acceptance]) -> float:
    """The mean of the domains' accepted lengths, each domain with equal weight."""
    return float(np.mean([acceptance.tau for acceptance in by_domain.values()]))
