"""The cost of one round in the text of a compiled decode loop: what devices exchange, and what a dispatch copies first.

A program's text holds every branch of a round. A greedy round takes the first branch wherever sampling has one, and a
sampled round may take any; of verify buckets either may take the largest.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dspark_jax.decoding.cuts import PASSES
from dspark_jax.decoding.sampling import SCOPE
from dspark_jax.errors import UserError
from dspark_jax.planning.compiled import collective_parts, shape_parts

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_PAIR = re.compile(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# What moves data and computes nothing.
_MOVES = {"copy", "transpose", "bitcast", "parameter", "reshape", "copy-start", "copy-done"}


@dataclass(frozen=True)
class Exchanged:
    """Bytes that collectives give each device in one round: rows [.., D] of the layers, and all others."""

    rows: int = 0
    others: int = 0

    def __add__(self, more: "Exchanged") -> "Exchanged":
        return Exchanged(self.rows + more.rows, self.others + more.others)

    def times(self, count: int) -> "Exchanged":
        """The sum of so many rounds of it."""
        return Exchanged(self.rows * count, self.others * count)

    @property
    def together(self) -> int:
        """Both."""
        return self.rows + self.others


@dataclass(frozen=True)
class LoopText:
    """The optimised text of a decode loop, its instructions by computation.

    Attributes:
        computations: lines of each.
        entry: the name of the one that the program begins with.
        hidden: D, by which the layers' rows are told from other arrays.
    """

    computations: dict[str, list[str]]
    entry: str
    hidden: int

    @classmethod
    def of(cls, text: str, hidden: int) -> "LoopText":
        """The parts of a program's text; UserError where it is not the text of a compiled program."""
        computations: dict[str, list[str]] = {}
        entry, lines = "", []

        for line in text.splitlines():
            if header := _HEADER.match(line):
                lines = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif _INSTRUCTION.match(line):
                lines.append(line)
        if not entry:
            begins = " ".join(text.split())[:60]
            raise UserError(f"No ENTRY in the text {begins!r}; the optimised text of a compiled program was expected.")
        return cls(computations, entry, hidden)

    def round(self, greedy: bool) -> Exchanged:
        """What one speculative round exchanges: the costliest pass of a loop that the entry runs.

        Log-probabilities, which few requests ask for, are left out.
        """
        whiles = [line for line in self.reached(self.entry) if opcode(line) == "while"]
        bodies = [self._cost(called(line)[0], greedy) for line in whiles]
        return max(bodies, key=_together, default=Exchanged())

    def entry_copies(self) -> int:
        """Bytes that the program copies or lays out anew before, between and after its loops, once a dispatch.

        Asynchronous copies are left out: they prefetch into on-chip memory.
        """
        return sum(_result_bytes(line) for line in self.computations[self.entry] if self._moves(line))

    def _moves(self, line: str) -> bool:
        if opcode(line) == "fusion":
            inside = {opcode(inner) for inner in self.computations.get(called(line)[0], [])}
            return inside <= _MOVES and bool(inside & {"copy", "transpose"})
        return opcode(line) in ("copy", "transpose")

    def reached(self, name: str) -> Iterator[str]:
        """The instructions of a computation, and of those that it calls."""
        for line in self.computations[name]:
            yield line
            if opcode(line) == "call":
                yield from self.reached(called(line)[0])

    def _cost(self, name: str, greedy: bool) -> Exchanged:
        total = Exchanged()

        for line in self.computations.get(name, []):
            kind = opcode(line)
            if parts := collective_parts(line):
                rows = sum(size for shape, size in parts if self.hidden in shape)
                total += Exchanged(rows, sum(size for _, size in parts) - rows)
            elif kind == "conditional":
                total += self._branch(line, greedy)
            elif kind == "while":
                total += self._cost(called(line)[0], greedy).times(trips(line))
            elif kind in ("call", "fusion", "async-start"):
                total += self._cost(called(line)[0], greedy)
        return total

    def branches(self, line: str) -> list[str]:
        """The computations of a conditional, the first condition's first."""
        # XLA writes a condition of two branches either way round.
        pair, listed = _PAIR.search(line), _BRANCHES.search(line)
        return [pair[2], pair[1]] if pair else re.findall(r"[\w.\-]+", listed[1] if listed else "")

    def _branch(self, line: str, greedy: bool) -> Exchanged:
        costs = [self._cost(name, greedy) for name in self.branches(line)]
        return costs[0] if greedy and f"/{SCOPE}/" in line else max(costs, key=_together)


def opcode(line: str) -> str:
    """An instruction's operation; empty for other lines."""
    found = _INSTRUCTION.match(line)
    return found[3] if found else ""


def called(line: str) -> list[str]:
    """The computations that an instruction runs, branches aside."""
    return _CALLED.findall(line)


def trips(line: str) -> int:
    """How often a loop's body runs."""
    if "/logprobs/" in line:
        return 0
    known = _TRIPS.search(line)
    # A search for thresholds runs until it has found them, which takes as many passes as a number has digits.
    return int(known[1]) if known else PASSES if f"/{SCOPE}/" in line else 1


def name_of(line: str) -> str:
    """An instruction's name; empty for other lines."""
    found = _INSTRUCTION.match(line)
    return found[1] if found else ""


def result_of(line: str) -> list[tuple[tuple[int, ...], int]]:
    """(dimensions, bytes) of each array that an instruction makes."""
    found = _INSTRUCTION.match(line)
    return shape_parts(found[2]) if found else []


def _result_bytes(line: str) -> int:
    return sum(size for _, size in result_of(line))


def _together(cost: Exchanged) -> int:
    return cost.together
