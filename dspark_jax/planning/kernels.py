"""The kernels of a round in the text of the CUDA compiler: how many there are, and which weights they write out again.

Kernels of a few microseconds each bound a round of a small batch as much as its bytes do; a weight that is joined,
widened or laid out anew inside the loop is read, written and read again in every round.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from dspark_jax.decoding.sampling import SCOPE
from dspark_jax.planning.rounds import LoopText, called, name_of, opcode, result_of, trips

# What starts nothing on the device.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "constant", "bitcast", "after-all", "partition-id", "replica-id",
    "copy-done", "async-done", "add-dependency", "opt-barrier",
}  # fmt: skip
_MOVES = {
    "copy",
    "transpose",
    "bitcast",
    "parameter",
    "reshape",
    "convert",
    "concatenate",
    "get-tuple-element",
    "tuple",
}
_THUNK = re.compile(r"( *)\d+: (k\w+)")
LEAST = 2**18
"""Elements of a weight from which writing it out again is counted."""


@dataclass(frozen=True)
class RoundKernels:
    """One round: kernels that it starts, and bytes of weights that they write joined, widened, or laid out anew."""

    kernels: int = 0
    joined: int = 0
    widened: int = 0
    laid_out: int = 0

    def __add__(self, more: "RoundKernels") -> "RoundKernels":
        return RoundKernels(
            self.kernels + more.kernels, self.joined + more.joined, self.widened + more.widened,
            self.laid_out + more.laid_out,
        )  # fmt: skip

    def times(self, count: int) -> "RoundKernels":
        return RoundKernels(*(count * n for n in (self.kernels, self.joined, self.widened, self.laid_out)))


def round_kernels(text: LoopText, weights: Collection[tuple[int, ...]], greedy: bool) -> RoundKernels:
    """The costliest pass of a loop that the entry runs; of branches the one with most kernels.

    Args:
        text: the optimised program.
        weights: shapes of the parameters; only arrays of as many elements are taken for weights.
        greedy: whether sampling takes its first branch.
    """
    sizes = {math.prod(shape) for shape in weights} - set(range(LEAST))
    whiles = [line for line in text.reached(text.entry) if opcode(line) == "while"]
    return max((_cost(text, called(line)[0], sizes, greedy) for line in whiles), key=_count, default=RoundKernels())


def _cost(text: LoopText, name: str, sizes: set[int], greedy: bool) -> RoundKernels:
    total = RoundKernels()
    for line in text.computations.get(name, []):
        kind = opcode(line)
        if kind == "conditional":
            costs = [_cost(text, branch, sizes, greedy) for branch in text.branches(line)]
            total += costs[0] if greedy and f"/{SCOPE}/" in line else max(costs, key=_count)
        elif kind == "while":
            total += _cost(text, called(line)[0], sizes, greedy).times(trips(line))
        elif kind == "call":
            total += _cost(text, called(line)[0], sizes, greedy)
        elif kind not in _FREE:
            total += replace(_rewritten(text, name, line, sizes), kernels=1)
    return total


def _count(cost: RoundKernels) -> int:
    return cost.kernels


def _rewritten(text: LoopText, name: str, line: str, sizes: set[int]) -> RoundKernels:
    """The bytes of weights that one kernel writes out again, if moving them is all that it does."""
    # A fusion is looked into; any other instruction is looked at by itself.
    inside = text.computations.get(called(line)[0], []) if opcode(line) == "fusion" else [line]
    kinds = {opcode(inner) for inner in inside}
    if not kinds <= _MOVES or not kinds & {"copy", "transpose", "convert", "concatenate"}:
        return RoundKernels()

    written = sum(size for _, size in result_of(line))
    read = [math.prod(shape) for shape in _operand_shapes(text.computations[name], line)]
    if not read or not all(count in sizes for count in read):
        return RoundKernels()
    if "concatenate" in kinds:
        return RoundKernels(joined=written)
    return RoundKernels(widened=written) if "convert" in kinds else RoundKernels(laid_out=written)


def _operand_shapes(lines: list[str], line: str) -> list[tuple[int, ...]]:
    """Shapes of an instruction's operands, by the instructions of its computation that make them."""
    operands = line.split(f" {opcode(line)}(", 1)[1].split(")", 1)[0]
    names = set(re.findall(r"%([\w.\-]+)", operands))
    return [shape for other in lines if name_of(other) in names for shape, _ in result_of(other)]


def captured(thunks: str) -> tuple[int, int]:
    """(kernels and copies in command buffers, all of them) in the CUDA compiler's sequence of thunks.

    What lies in a command buffer is launched as one CUDA graph. `thunks`: the file *.thunk_sequence_after_thunk_passes
    that XLA writes with --xla_dump_to; a buffer's commands are indented below it.
    """
    inside, found, buffer = 0, 0, -1
    for line in thunks.splitlines():
        thunk = _THUNK.match(line)
        if not thunk:
            continue
        depth = len(thunk[1])
        buffer = buffer if 0 <= buffer < depth else -1

        if thunk[2] == "kCommandBuffer":
            buffer = depth
        elif thunk[2] not in ("kWhile", "kConditional", "kSequential"):
            found, inside = found + 1, inside + (buffer >= 0)
    return inside, found
