"""Memory, collectives and cost of a compiled program, and compilers for TPUs that are not attached.

Nothing is run: the figures show memory and communication, not results or speed.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from dspark_jax.errors import UserError
from dspark_jax.planning.gpus import GPUS, gpu_devices
from dspark_jax.report import mebibytes
from dspark_jax.roofline.hardware import known_device
from dspark_jax.sharding import MESH_AXES, mesh_shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# `-start` of an asynchronous pair is counted and its `-done` is not, as it has another name.
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_PRODUCT = re.compile(r"stablehlo\.dot_general .*: \(tensor<([^>]+)>, tensor<([^>]+)>\) ->")
ACCELERATORS = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}


def topology_devices(topology: str) -> list[Any]:
    """The chips of a TPU topology such as v5e:4x4, in the compiler's order; or GPUs, as H200 or H200:8.

    Raises:
        UserError: no such topology, or the compiler is not installed (extra `aot`).
    """
    kind, _, shape = topology.partition(":")
    if kind in GPUS and re.fullmatch(r"([1-9]\d*)?", shape):
        return gpu_devices(kind, int(shape or 1))
    if kind not in ACCELERATORS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"--topology is {topology!r}; a kind of TPU ({', '.join(ACCELERATORS)}) and its shape were expected, as in "
            f"v5e:4x4 or v5p:2x2x2, or one of {', '.join(GPUS)}."
        )

    # Without these the compiler queries the metadata server of the machine that it runs on.
    chips = int(np.prod([int(n) for n in shape.split("x")]))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{ACCELERATORS[kind]}-{chips}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    # A host has four chips by default, which one chip alone is not divisible by.
    host = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **host).devices)
    except Exception as error:  # the plugin's own types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"No TPU compiler for {topology} ({reason}). It comes with `pip install 'dspark-jax[aot]'`."
        ) from error


def topology_mesh(topology: str, data: int, fsdp: int, tensor: int, expert: int = 1, part: bool = False) -> Mesh:
    """The mesh over the chips of a topology.

    Args:
        topology: as in v5e:4x4.
        data, fsdp, tensor, expert: sizes of the axes; one of them may be -1, which takes the chips that remain.
        part: use only as many chips, the first ones, as the sizes name.
    Raises:
        UserError: as `topology_devices`, and where the sizes do not fit the topology.
    """
    found, sizes = topology_devices(topology), (data, fsdp, tensor, expert)

    if part and -1 not in sizes:
        found = found[: math.prod(sizes)]

    # Not `jax.make_mesh`, which orders attached devices; these exist for the compiler alone.
    devices: np.ndarray = np.array(found).reshape(mesh_shape(len(found), *sizes))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * devices.ndim)


def lowering_platform(device: Any) -> str:
    """What programs for a device are lowered for: devices say "gpu", lowering says which."""
    return "cuda" if device.platform == "gpu" else str(device.platform)


def compiled(lowered: jax.stages.Lowered, what: str, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
    """Compiles a lowered program, named by `what` in errors, with options of the compiler; UserError when it does not
    fit the device."""
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        lines = str(error).splitlines()
        # XLA's message is a screen long; the line that matters gives the bytes used and available.
        said = next((line for line in lines if "RESOURCE_EXHAUSTED" in line or "Used" in line), lines[0])
        raise UserError(f"{what} does not fit: {said.strip()[:400]}") from error


def memory_of(program: jax.stages.Compiled, counted_twice: int = 0) -> dict[str, int]:
    """Bytes on one device while the program runs, by part.

    Donated arguments and the results that replace them are the same bytes, counted as arguments.

    Args:
        program: the compiled program.
        counted_twice: bytes of an array that is passed as two arguments.
    """
    # An alias is a donated argument that a result reuses: the same bytes must not count twice.
    memory: Any = program.memory_analysis()
    arguments = memory.argument_size_in_bytes - counted_twice
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes

    return {
        "arguments": arguments,
        "new results": results,
        "temporary": memory.temp_size_in_bytes,
        "together": arguments + results + memory.temp_size_in_bytes,
    }


def figures(program: jax.stages.Compiled, device_kind: str, counted_twice: int = 0) -> dict[str, str | float]:
    """Memory, collectives and cost of a compiled program on one device, by the names that a plan prints."""
    cost: Any = program.cost_analysis() or {}
    memory: Any = program.memory_analysis()
    device = known_device(device_kind)

    return {
        **{f"{name} a device": mebibytes(size) for name, size in memory_of(program, counted_twice).items()},
        **({} if device is None else {"of a device's memory": mebibytes(device.memory_gib * 2**30)}),
        "program": mebibytes(memory.generated_code_size_in_bytes),
        # The optimised program: partitioning has inserted its collectives by then.
        **collectives(program.as_text() or ""),
        "Gflop a device, loop bodies once": cost.get("flops", 0.0) / 1e9,
        "GB moved a device, loop bodies once": cost.get("bytes accessed", 0.0) / 1e9,
    }


def collectives(program: str) -> dict[str, str]:
    """`collective_sums` as text."""
    return {name: f"{number} of {mebibytes(size)}" for name, (number, size) in collective_sums(program).items()}


def collective_sums(program: str) -> dict[str, tuple[int, int]]:
    """(number, bytes of their results) of the collectives of each kind in an optimised program, where there are any.

    A collective inside a loop is counted once, although it runs in each iteration.
    """
    counts, sizes = Counter[str](), Counter[str]()
    for line in program.splitlines():
        if found := _COLLECTIVE.search(line):
            counts[found[2]] += 1
            sizes[found[2]] += sum(size for _, size in collective_parts(line))

    return {name: (counts[name], sizes[name]) for name in COLLECTIVES if counts[name]}


def collective_parts(line: str) -> list[tuple[tuple[int, ...], int]]:
    """(dimensions, bytes) of each result of the collective on a line of a program; none for other instructions."""
    found = _COLLECTIVE.search(line)
    if not found:
        return []
    # The start of these two gives (operands, results, counters): its operands are not communicated twice.
    asynchronous = found[3] and found[2] in ("all-gather", "collective-permute")
    return shape_parts(_tuple_parts(found[1])[1] if asynchronous else found[1])


def shape_parts(shapes: str) -> list[tuple[tuple[int, ...], int]]:
    """(dimensions, bytes) of each array in XLA's text of a shape, a tuple's or one array's."""
    parts = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shapes)
    return [(tuple(int(n) for n in sizes.split(",") if n), _shape_bytes(kind, sizes)) for kind, sizes in parts]


def copies(program: str, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """The instructions of an optimised program that copy an array of one of these per-device shapes.

    The entry computation is left out: its copies happen once a call, not once a round.
    """
    # Shapes as XLA prints them, so that a line can be compared without parsing its type.
    wanted = {",".join(map(str, shape)) for shape in shapes}
    entry, found = False, []

    for line in program.splitlines():
        # A computation's header begins in the first column, its instructions are indented.
        if line and not line[0].isspace():
            entry = line.startswith("ENTRY")

        copy = re.search(r"= \(?\w+\[([\d,]*)\]\S* copy(?:-start)?\(", line)
        if copy and not entry and copy.group(1) in wanted:
            found.append(line.strip())

    return found


def wide_products(lowered: str, least: int = 2**20) -> tuple[int, int]:
    """(products in float32 whose larger operand takes `least` bytes so, all products) of a program's StableHLO text.

    A body that runs many times is counted once. Shapes are those before partitioning.
    """
    # Where one operand is float32 the other is widened, in the text or by the compiler.
    products = [[kind.split("x") for kind in operands] for operands in _PRODUCT.findall(lowered)]
    wide = [operands for operands in products if "f32" in (kind[-1] for kind in operands)]
    large = [operands for operands in wide if max(4 * math.prod(map(int, kind[:-1])) for kind in operands) >= least]
    return len(large), len(products)


def _tuple_parts(shape: str) -> list[str]:
    """The parts of a tuple's shape in XLA's text, themselves perhaps tuples: "(f32[2], (s32[], s32[]))" has two."""
    parts, depth = [""], 0
    for letter in shape.strip()[1:-1]:
        # Dimensions and layouts have commas too, within brackets or braces.
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter

    return parts


def _shape_bytes(kind: str, dimensions: str) -> int:
    # The first number in the name of an XLA type is its size in bits: bf16, s32, f8e4m3fn, c128. A pred, which has
    # none, takes a byte; a token takes nothing.
    size = re.search(r"\d+", kind)
    bits = int(size[0]) if size else 8 * (kind == "pred")
    return int(np.prod([int(n) for n in dimensions.split(",") if n], dtype=np.int64)) * bits // 8
