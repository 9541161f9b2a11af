"""The measured costs of rounds: their file, the cost table that policies read, the ladder of buckets they call for.

`profiling.py` measures them. Axes: C context probes, P token rungs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.errors import UserError
from dspark_jax.readers import (
    SEAL,
    Schema,
    check_fields,
    check_seal,
    integer,
    list_of,
    number,
    object_of,
    read_object,
    sealed,
)
from dspark_jax.scheduling.costs import CostTable

RUNG_WORTH = 0.01
"""Relative saving below which a further rung of the ladder is not worth compiling."""
LARGEST_SPREAD = 0.5
"""Spread over duration that tells of other work, where most times have it: it is 0.01 to 0.2 on an idle machine."""


@dataclass(frozen=True)
class Profile:
    """Measured costs: lower quartiles in seconds, and interquartile ranges (`spread`)."""

    key: dict[str, Any]  # where and of what: device kind, dtype, shapes; see `profile_key`
    tokens: tuple[int, ...]  # [P] ascending
    contexts: tuple[float, ...]  # [C] committed positions
    rounds: tuple[tuple[float, ...], ...]  # [C][P] with drafting, except for the first rung, which is plain
    rounds_spread: tuple[tuple[float, ...], ...]
    drafting: tuple[float, ...]  # [C] the draft pass alone
    drafting_spread: tuple[float, ...]
    alone: tuple[float, ...]  # [C] a plain round of the program that carries no drafter
    alone_spread: tuple[float, ...]
    dispatch: float  # overhead of a dispatch, which the figures above do not include

    @property
    def steady(self) -> bool:
        """Whether the times are this machine's rather than those of what else it did: spreads are small beside them."""
        times = np.concatenate([np.ravel(self.rounds), self.drafting, self.alone])
        spreads = np.concatenate([np.ravel(self.rounds_spread), self.drafting_spread, self.alone_spread])
        return bool(np.mean(spreads < LARGEST_SPREAD * times) > 0.5)

    def cost_table(self) -> CostTable:
        """The costs as policies read them, made monotone: timings are noisy, but no pass is cheaper for being wider.

        The pass over the anchors alone cannot be measured in a round that drafts. It is extrapolated from the second
        rung, with the mean cost of a token between the second and the last rung, and is at least a plain round.
        """
        drafting, rounds = np.array(self.drafting), np.array(self.rounds)
        plain = rounds[:, 0]

        # A ladder of one rung: there is no line to extrapolate on.
        if len(self.tokens) == 1:
            return CostTable.of(self.tokens, rounds, drafting, self.contexts, plain, self.dispatch, self.alone)

        # [C, P - 1]: drafting is a cost of its own, and noise must not leave a verify pass of nothing.
        wide = np.stack([monotone(row) for row in np.maximum(rounds[:, 1:] - drafting[:, None], 1e-3 * plain[:, None])])

        # [C]: the first rung, on the line through the others.
        tokens = np.array(self.tokens, float)
        slope = (wide[:, -1] - wide[:, 0]) / max(tokens[-1] - tokens[1], 1.0)
        first = np.clip(wide[:, 0] - slope * (tokens[1] - tokens[0]), np.minimum(plain, wide[:, 0]), wide[:, 0])

        verify = np.concatenate([first[:, None], wide], axis=1)
        return CostTable.of(self.tokens, verify, drafting, self.contexts, plain, self.dispatch, self.alone)

    def serving(self) -> dict[str, Any]:
        """`sps.json` as servers read it (docs/algorithm.md, rule 95). A server looks up the largest listed count not
        above its batch, so each step of the staircase is listed by its first token count. A step includes drafting."""
        table = self.cost_table()
        # Averaged over the contexts: the servers' format has no axis for them.
        seconds = np.asarray(table.verify).mean(axis=0) + np.asarray(table.drafting).mean()
        starts = [1, *(n + 1 for n in self.tokens[:-1])]

        return {
            "sample_batch_tokens": starts,
            "sample_steps_per_sec": [float(1 / s) for s in seconds],
            "max_batch_tokens": self.tokens[-1],
        }

    def save(self, path: Path) -> None:
        """Write `sps.json`: the servers' fields, and the sealed profile beside them."""
        write_json(path, {**self.serving(), "profile": sealed(asdict(self))})

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Read a file that `save` wrote.

        Raises:
            UserError: a file that is missing, was changed, or was not written by `save`.
        """
        content = read_object(path, expected="a profile that infer.profile measured").get("profile")
        if not isinstance(content, dict) or set(content) - {SEAL} != set(cls.__dataclass_fields__):
            raise UserError(f"{path} holds no profile of this program; measure one with infer.profile.")

        where, cure = f"{path}, under profile,", "measure one with infer.profile"
        check_fields(content, _FIELDS, where, cure=cure)
        check_seal(content, where, cure=cure)
        content.pop(SEAL, None)

        # JSON has lists where the dataclass has tuples, at one or two levels.
        rows: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content.items()}
        rows |= {name: tuple(map(tuple, rows[name])) for name in ("rounds", "rounds_spread")}
        made = cls(**rows)

        # The schema knows no lengths: every grid and line must fit the probes and rungs.
        tokens, contexts = len(made.tokens), len(made.contexts)
        grids = (made.rounds, made.rounds_spread)
        lines = (made.drafting, made.drafting_spread, made.alone, made.alone_spread)
        whole = all([len(row) for row in grid] == [tokens] * contexts for grid in grids)
        if not whole or any(len(line) != contexts for line in lines) or list(made.tokens) != sorted(set(made.tokens)):
            raise UserError(
                f"{where} does not hold a time for each of its {contexts} contexts and {tokens} increasing token "
                f"counts; {cure}."
            )

        return made


_TIMES = list_of(number(0), least=1)
_FIELDS: Schema = {
    "key": object_of(),
    "tokens": list_of(integer(1), least=1),
    "contexts": _TIMES,
    "rounds": list_of(list_of(number(above=0), least=1), least=1),
    "rounds_spread": list_of(_TIMES, least=1),
    "drafting": _TIMES,
    "drafting_spread": _TIMES,
    "alone": list_of(number(above=0), least=1),
    "alone_spread": _TIMES,
    "dispatch": number(0),
}


def monotone(values: np.ndarray) -> np.ndarray:
    """The closest sequence, in least squares, that never falls (pool adjacent violators)."""
    # Blocks of (mean, count): a block above its successor is merged with it, until the means ascend.
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append(((a * n + b * m) / (n + m), n + m))

    return np.array([value for value, count in blocks for _ in range(count)])


def choose_ladder(tokens: Sequence[int], seconds: Sequence[float], rungs: int = 4) -> tuple[int, ...]:
    """Choose token counts to compile the verify pass for: those with the least mean cost if every count between the
    first and the last is equally likely and runs at the next rung. A rung that saves less than `RUNG_WORTH` is left
    out, since each is one more program to compile.

    Args:
        tokens: measured counts, ascending.
        seconds: of a pass at each.
        rungs: the most that are chosen.
    Returns:
        Counts among `tokens`, the first and last included.
    """
    cost = monotone(np.asarray(seconds, float))

    # Dynamic programme over (last rung, rungs used) -> (cost, path): counts above rung i and up to rung j run at j.
    count = len(tokens)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, (0,))}

    for used in range(2, min(rungs, count) + 1):
        for last in range(1, count):
            ways = [
                (best[first, used - 1][0] + (tokens[last] - tokens[first]) * cost[last], best[first, used - 1][1])
                for first in range(last)
                if (first, used - 1) in best
            ]
            if ways:
                total, path = min(ways)
                best[last, used] = total, (*path, last)

    # All paths to the last count, the penalty of one rung more weighed against its saving.
    ends = [best[count - 1, used] for used in range(1, rungs + 1) if (count - 1, used) in best]
    if not ends:
        return tuple(tokens)
    return tuple(tokens[i] for i in min(ends, key=lambda end: end[0] * (1 + RUNG_WORTH * len(end[1])))[1])
