"""Plain decoding with the drafter left out, for as long as drafts do not pay, and the way back.

A drafter costs something by being there: every prompt and every token goes through its context projections. Where
nobody has drafted for long, an engine stops that: prompts enter without the drafter's context, and rounds keep their
tokens from it. Every dispatch still asks the policy, with today's load, whether it would draft again; then `recall`
(decoding/prefill.py) makes up what the drafter has missed before a request drafts.
"""

from collections import deque
from dataclasses import dataclass, field

SELDOM = 16
"""Drafting in one round of so many, as probes do, is as good as none."""


@dataclass
class DraftRest:
    """Whether the drafter is left out: after `after` rounds of which hardly one drafted. Lives on the host."""

    after: int
    resting: bool = False
    _needed: int = field(init=False)
    _seen: deque[tuple[int, int]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self._needed = self.after

    def saw(self, rounds: int, drafted: int) -> None:
        """A dispatch of so many rounds, so many of which drafted."""
        self._seen.append((rounds, drafted))
        while sum(rounds for rounds, _ in self._seen) - self._seen[0][0] >= self._needed:
            self._seen.popleft()
        total, drafts = (sum(column) for column in zip(*self._seen, strict=True))
        if 2 * drafts > total:
            self._needed = self.after
        self.resting = total >= self._needed and SELDOM * drafts <= total

    def wake(self) -> None:
        """Drafts may pay again. If they don't after all, it takes a quarter of the rounds to see that."""
        self._seen.clear()
        self._needed, self.resting = max(1, self.after // 4), False
