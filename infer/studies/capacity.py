"""Times rounds by the capacity of a slot, at a fixed number of positions held: do they cost what is held?

    python -m infer.studies.capacity --target assets/embedded_target --drafter assets/embedded_drafter

Rounds of whole blocks and plain rounds, at every capacity in turn; figures are medians, and ratios over the smallest
capacity. With --cpu-seconds the process's own clock counts. Writes docs/results/capacity.json.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.report import table
from dspark_jax.scheduling.policies import LookAhead
from dspark_jax.serving.assembly import CACHE_MULTIPLE, loop_and_params
from dspark_jax.serving.profiling import ALONE, Effort, time_points
from dspark_jax.serving.settings import EngineConfig

MOST_DRAFTS = 16
"""Tokens that a round commits at most, for the check of capacities."""


@dataclass(frozen=True)
class CapacitySettings:
    """Times rounds by the capacity of a slot."""

    target: str
    """Folder, GGUF file or hub id of the target."""
    drafter: str
    """Folder of the drafter."""
    held: int = 256
    """Positions that every slot holds."""
    capacities: tuple[int, ...] = (512, 2048, 8192)
    """Positions of a slot, multiples of 64; the first is what the others are compared with."""
    slots: int = 1
    rounds: int = 8
    """Rounds of a dispatch."""
    repeats: int = 15
    cpu_seconds: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    results: Path = Path("docs/results/capacity.json")


@program
def main(argv: list[str]) -> None:
    settings = parse(CapacitySettings, argv, description=__doc__)
    # Room for the rounds of a dispatch, should every draft be accepted.
    reach = settings.held + (settings.rounds + 1) * MOST_DRAFTS
    if min(settings.repeats, settings.rounds, settings.slots) < 1:
        raise UserError("Repeats, rounds and slots must be 1 or more.")
    if any(size % CACHE_MULTIPLE or size < reach for size in settings.capacities):
        raise UserError(
            f"The capacities are {list(settings.capacities)}; expected multiples of {CACHE_MULTIPLE}, at least "
            f"{reach}, which the rounds may reach."
        )

    make_output(settings.results.parent)
    announce(settings.dtype)
    found = measured(settings)
    write_json(settings.results, {**found, "settings": asdict(settings), "machine": machine()})
    rows = [
        [size, *(f"{1e3 * row[kind]['seconds']:.3f} ({row[kind]['ratio']:.2f})" for kind in ("plain", "whole"))]
        for size, row in found["capacities"].items()
    ]
    print(table(["positions", "plain round, ms (ratio)", "whole block"], rows))


def measured(settings: CapacitySettings) -> dict[str, Any]:
    """Medians of a round's seconds by capacity, and ratios over the first."""
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype)
    clock = time.process_time if settings.cpu_seconds else time.perf_counter
    width = drafter.config.block_size + 1
    buckets = (settings.slots, settings.slots * width)
    points = {"plain": ALONE, "whole": len(buckets) - 1}

    times: dict[tuple[int, str], list[float]] = {(size, kind): [] for size in settings.capacities for kind in points}
    for repeat in range(settings.repeats):
        # Forwards and backwards by turns, so that a drifting clock rate does not favour a capacity.
        for size in settings.capacities if repeat % 2 else settings.capacities[::-1]:
            # The loop rounds `longest` and a block up to whole multiples, here to the capacity itself.
            config = EngineConfig(settings.slots, size - width, buckets=buckets)
            loop, params = loop_and_params(target, drafter, config, LookAhead())
            effort, shares = Effort(settings.rounds, 1), (settings.held / loop.size,)
            timed = time_points(loop, params, tuple(points.values()), 0.0, shares, effort, clock=clock)
            for kind, point in points.items():
                times[size, kind] += timed.rounds[0, point]

    middle = {point: float(np.median(seen)) for point, seen in times.items()}
    first = settings.capacities[0]
    rows = {
        str(size): {
            kind: {"seconds": middle[size, kind], "ratio": middle[size, kind] / middle[first, kind]} for kind in points
        }
        for size in settings.capacities
    }
    return {"held": settings.held, "capacities": rows}


if __name__ == "__main__":
    main()
