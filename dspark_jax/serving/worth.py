"""The speed that drafting is expected to bring, by how many requests decode at once: what `policy="auto"` decides by.

Axes: R request slots, K block position, P token rungs.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.scheduling.costs import CostTable
from dspark_jax.serving.acceptance import Accepted

SPREAD = 1.25
"""Drafting may pay for some requests where it falls short by this factor in the mean: a question of code or mathematics
is accepted further than the others are, and the guard finds the requests that pay."""
CHEAP = 1.02
"""Cost of a plain round with a drafter at hand, in plain rounds without one, up to which it may be kept at hand."""


@dataclass(frozen=True)
class Worth:
    """Drafting against plain decoding by a program that has no drafter."""

    tokens: float  # expected in a round that verifies whole blocks
    whole: float  # duration of such a round of all slots, in plain rounds
    carried: float  # duration of a plain round of the program that has a drafter, in rounds of one that has none
    speedups: tuple[float, ...]  # [R] by 1, 2, .. R decoding requests, at the best of all verify lengths
    spread: float = SPREAD  # by which a request may exceed them
    shape: str = "blocks"

    @classmethod
    def of(cls, costs: CostTable, loop: DecodeLoop, accepted: Accepted | None) -> "Worth":
        """By a measured table, as means over its contexts.

        Args:
            costs: seconds of rounds.
            loop: its slots and its block.
            accepted: drafts accepted by position. None: all of them, which bounds what drafting can bring.
        """
        rungs, verify = np.asarray(costs.tokens), np.asarray(costs.verify).mean(axis=0)
        drafting = float(np.asarray(costs.drafting).mean())
        # Tables of other servers have no plain rounds; their first rung stands for one.
        plain = float(verify[0] if costs.plain is None else np.asarray(costs.plain).mean())
        alone = plain if costs.alone is None else float(np.asarray(costs.alone).mean())

        # [K] or [N]: a round of j drafts commits so many tokens a request; plain decoding takes as many rounds.
        drafts = np.arange(1, loop.drafts + 1)
        most = np.minimum(np.arange(loop.drafts + 1), loop.block)  # no path is longer than the tree is deep
        expected = 1.0 + most if accepted is None else accepted.expected

        speedups = []
        for requests in range(1, loop.requests + 1):
            # A round runs at the first bucket that holds its tokens.
            rung = np.searchsorted(rungs, np.minimum(requests * (drafts + 1), rungs[-1]))
            speedups.append(float(np.max(expected[1:] * alone / (drafting + verify[rung]))))

        # No request exceeds the bound.
        spread = 1.0 if accepted is None else SPREAD
        whole = (drafting + float(verify[-1])) / alone
        shape = "blocks" if loop.tree is None else f"trees of {loop.drafts} nodes"
        return cls(float(expected[-1]), whole, plain / alone, tuple(speedups), spread, shape)

    @property
    def mean(self) -> float:
        """The speed over plain decoding in the mean of 1, 2, .. R decoding requests, which decode plainly where
        drafting does not pay."""
        return float(np.mean(np.maximum(self.speedups, 1.0)))

    @cached_property
    def most(self) -> int:
        """The largest number of decoding requests at which it is to be tried; 0: none."""
        # Where carrying the drafter costs plain rounds something, drafting has to earn that, in the mean of all.
        least = 1 / self.spread if self.carried <= CHEAP else self.carried
        paying = [number for number, speedup in enumerate(self.speedups, start=1) if speedup > least]
        return max(paying, default=0)

    def __str__(self) -> str:
        at, best = max(enumerate(self.speedups, start=1), key=lambda pair: pair[1])
        loads = "1 request" if at == 1 else f"{at} requests"
        return (
            f"a round of whole {self.shape} takes as long as {self.whole:.2f} plain ones and gives {self.tokens:.2f} "
            f"tokens, so that decoding is at best {best:.2f} times as fast in the mean, with {loads}"
        )
