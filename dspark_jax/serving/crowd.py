"""When an engine with a drafter decodes by a program that has none: while more requests decode than drafting pays for.

The choice follows from numbers of requests alone, which no draft of a coming round can change, so it is as causal as
any policy's (docs/algorithm.md, rule 76).
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from dspark_jax.serving.roster import Entry

PATIENCE = 4
"""Crowded dispatches before the drafter is left out: a short burst does not cost the other requests their drafts."""


@dataclass
class Crowd:
    """Counts the requests that decode, dispatch by dispatch.

    Attributes:
        most: requests for which drafting may pay; from the number of slots on, the drafter is never left out for it.
        always_drafts: whether the policy would draft for plain requests too, which then are better off without it.
    """

    most: int
    always_drafts: bool = False
    _crowded: int = field(default=0, init=False)  # dispatches in a row

    def alone(self, seated: Collection[Entry], recorded: bool = False) -> bool:
        """Whether the next dispatch runs without the drafter. If so, the requests in it draft no more (`run_alone`).

        Args:
            seated: the requests in slots.
            recorded: whether the dispatch's rounds are recorded, which a crowd must not change.
        """
        decoding = [entry for entry in seated if entry.decoding]
        # Requests for which nothing can be drafted any more would only pay for the drafter's being at hand.
        alone = all(entry.undrafted or (self.always_drafts and entry.plain) for entry in decoding)
        if not recorded:
            self._crowded = self._crowded + 1 if len(decoding) > self.most else 0
            alone |= self._crowded > PATIENCE

        for entry in decoding:
            entry.undrafted |= alone
        return alone
