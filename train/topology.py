"""Compiles a run's real step for TPUs that are not here, with their own compiler: memory a chip, collectives, cost.

Compiled is not run: this says what fits and what travels, nothing of numbers or speed.
"""

import os
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from dspark_jax.errors import UserError
from dspark_jax.sharding import MESH_AXES, mesh_shape
from train.abstract_run import AbstractRun
from train.estimate import tied_bytes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ACCELERATORS = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Memory of a chip, as their makers state it."""


def topology_mesh(topology: str, data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh over the chips of a topology such as v5e:4x4.

    Raises:
        UserError: no such topology, sizes that do not fit it, or the compiler is not installed (extra `aot`).
    """
    kind, _, shape = topology.partition(":")
    if kind not in ACCELERATORS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"--topology is {topology!r}; a kind of TPU ({', '.join(ACCELERATORS)}) and its shape were expected, as in "
            "v5e:4x4 or v5p:2x2x2."
        )
    # Without these the compiler looks for the machine that it is on.
    chips = int(np.prod([int(n) for n in shape.split("x")]))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{ACCELERATORS[kind]}-{chips}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the plugin's own types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"No TPU compiler for {topology} ({reason}). It comes with `pip install 'dspark-jax[aot]'`."
        ) from error
    devices: np.ndarray = np.array(described.devices).reshape(mesh_shape(len(described.devices), data, fsdp, tensor))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * devices.ndim)


def compile_for(run: AbstractRun, topology: str) -> dict[str, Any]:
    """What the compiled step takes of one chip; UserError when the compiler finds no room for it."""
    try:
        compiled = run.lower("tpu").compile()
    except jax.errors.JaxRuntimeError as error:
        lines = str(error).splitlines()
        said = next((line for line in lines if "RESOURCE_EXHAUSTED" in line or "Used" in line), lines[0])
        raise UserError(f"The step does not fit this topology: {said.strip()[:400]}") from error
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    kind = run.placement.mesh.devices.flat[0].device_kind
    arguments = memory.argument_size_in_bytes - tied_bytes(run)
    # Donated arguments and their results are the same bytes.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "configuration": run.config.name,
        "chips": f"{run.placement.mesh.size} x {kind}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in run.placement.mesh.shape.items()),
        "micro-batches": run.micro_batches,
        "arguments a chip": mebibytes(arguments),
        "new results a chip": mebibytes(results),
        "temporary a chip": mebibytes(memory.temp_size_in_bytes),
        "together a chip": mebibytes(arguments + results + memory.temp_size_in_bytes),
        "of a chip's memory": mebibytes(HBM_GIB[topology.partition(":")[0]] * 2**30),
        "program": mebibytes(memory.generated_code_size_in_bytes),
        **collectives(compiled.as_text() or ""),
        "Gflop a chip, loop bodies once": cost.get("flops", 0.0) / 1e9,
        "GB moved a chip, loop bodies once": cost.get("bytes accessed", 0.0) / 1e9,
    }


def collectives(program: str) -> dict[str, str]:
    """Instructions of every kind of collective in an optimised program, and the bytes of their results. Those in a loop
    are counted once, though it runs them every time."""
    counts, sizes = Counter[str](), Counter[str]()
    for shapes, name in re.findall(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", program):
        counts[name] += 1
        sizes[name] += sum(_shape_bytes(*part) for part in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shapes))
    return {name: f"{counts[name]} of {mebibytes(sizes[name])}" for name in COLLECTIVES if counts[name]}


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _shape_bytes(kind: str, dimensions: str) -> int:
    bits = int(re.sub(r"\D", "", kind)[:2] or 8) if kind != "pred" else 8
    return int(np.prod([int(n) for n in dimensions.split(",") if n], dtype=np.int64)) * bits // 8
