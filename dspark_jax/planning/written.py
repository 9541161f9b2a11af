"""Bytes that a compiled program writes to a device's memory, in total and by writer, from the compiler's text.

A kernel's result goes to memory and is read from there by the next; what a compiler fuses is never written. Writing in
place counts what is replaced, results in on-chip memory nothing, a loop's body as often as it runs.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from dspark_jax.planning.compiled import collective_parts, shape_parts
from dspark_jax.planning.rounds import LoopText, called, name_of, opcode, trips

# Instructions that write nothing themselves. The second half of an asynchronous pair is found by its ending.
_NOTHING = {
    "parameter", "tuple", "get-tuple-element", "constant", "bitcast", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier", "iota", "domain",
}  # fmt: skip
_RESULT = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) [\w\-]+\(")
_ARRAY = re.compile(r"([a-z]\w*\[[\d,]*\])(\{[^}]*\})?")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_WORKSPACE = re.compile(r"s8\[\d+\]")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_ON_CHIP = "S(1)"


class Writer(NamedTuple):
    """An array that a program writes, all instructions of the same shape and source together.

    Attributes:
        size: bytes together.
        times: how often it is written.
        shape: as in "f32[448,151936]", several where one kernel writes several.
        source: the traced operation that the compiler names.
    """

    size: int
    times: int
    shape: str
    source: str


def writers(text: LoopText) -> list[Writer]:
    """What the entry computation writes, the largest first."""
    sizes, times = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for line, count in _run(text, text.entry, 1):
        size, shape = _written(text, line)
        if size:
            key = shape, source_of(text, line)
            sizes[key] += size * count
            times[key] += count
    return [Writer(size, times[key], *key) for key, size in sizes.most_common()]


def source_of(text: LoopText, line: str) -> str:
    """The last parts of the traced operation's name, or the instruction's own."""
    found = _SOURCE.search(line)
    return "/".join(found[1].split("/")[-3:]) if found else opcode(line)


def _run(text: LoopText, name: str, count: int) -> Iterator[tuple[str, int]]:
    """Every instruction that runs, with how often; of branches the one with most bytes."""
    for line in text.computations.get(name, []):
        kind = opcode(line)
        if kind == "while":
            yield from _run(text, called(line)[0], count * _trips(text, line))
        elif kind in ("call", "async-start"):
            yield from _run(text, called(line)[0], count)
        elif kind == "conditional":
            branches = [list(_run(text, branch, count)) for branch in text.branches(line)]
            yield from max(branches, key=lambda lines: sum(_written(text, one)[0] * n for one, n in lines))
        elif kind not in _NOTHING and not kind.endswith(("-done", "-update")):
            yield line, count


def _trips(text: LoopText, line: str) -> int:
    """How often a loop's body runs; the TPU's compiler says so in the loop's condition alone, which counts from 0."""
    if "known_trip_count" not in line and (condition := _CONDITION.search(line)):
        lines = text.computations.get(condition[1], [])
        limits = [found[1] for one in lines if (found := _LIMIT.search(one))]
        counts = any(one.lstrip().startswith("ROOT") and "direction=LT" in one for one in lines)
        if counts and len(limits) == 1:
            return int(limits[0])
    return trips(line)


def _written(text: LoopText, line: str) -> tuple[int, str]:
    """(bytes, shapes) that one instruction writes to memory."""
    kind = opcode(line)
    if parts := collective_parts(line):
        return sum(size for _, size in parts), ", ".join(f"{kind} {list(shape)}" for shape, _ in parts)

    if kind == "fusion":
        replaced = _replaced(text, called(line)[0])
    else:
        replaced = {0: _operand(text, line, 1)} if kind == "dynamic-update-slice" else {}

    arrays = _ARRAY.findall(_RESULT.match(line)[1])  # type: ignore[index]
    if kind == "copy-start":
        arrays = arrays[:1]
    elif kind == "slice-start":
        # What is sliced stands before the slice, a semaphore behind it.
        arrays = arrays[1:2]
    elif kind in ("custom-call", "fusion") and _WORKSPACE.fullmatch(arrays[-1][0]):
        # A library's, behind the results.
        arrays = arrays[:-1]

    written = [replaced.get(index, array) for index, (array, layout) in enumerate(arrays) if _ON_CHIP not in layout]
    return sum(size for array in written for _, size in shape_parts(array)), ", ".join(filter(None, written))


def _replaced(text: LoopText, name: str) -> dict[int, str]:
    """For each result of a fusion that is an array updated in place: the shape of what is replaced."""
    lines = {name_of(line): line for line in text.computations.get(name, [])}
    root = next((line for line in lines.values() if line.lstrip().startswith("ROOT ")), "")
    results = _operand_names(root) if opcode(root) == "tuple" else [name_of(root)]

    found = {}
    for index, result in enumerate(results):
        line = lines.get(result, "")
        # The update may lie behind what changes no byte.
        while opcode(line) == "bitcast":
            line = lines.get(_operand_names(line)[0], "")
        if opcode(line) == "dynamic-update-slice":
            found[index] = _array(lines.get(_operand_names(line)[1], ""))
    return found


def _operand(text: LoopText, line: str, number: int) -> str:
    wanted = _operand_names(line)[number]
    return next((_array(one) for lines in text.computations.values() for one in lines if name_of(one) == wanted), "")


def _operand_names(line: str) -> list[str]:
    return _OPERANDS.findall(line.split(f" {opcode(line)}(", 1)[1].split(")", 1)[0]) if opcode(line) else []


def _array(line: str) -> str:
    found = _ARRAY.search(line.split(" = ", 1)[-1])
    return found[1] if found else ""


def together(found: list[Writer]) -> int:
    """Bytes of all writers."""
    return sum(writer.size for writer in found)
