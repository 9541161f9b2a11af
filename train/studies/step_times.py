"""Times the training step of an earlier checkout and of this one, in turns, by the clock and in CPU time.

    git worktree add ../before COMMIT
    python -m train.studies.step_times --before ../before --name embedded
    python -m train.studies.step_times --before ../before --name real --config smollm2_135m_dspark

Either checkout has a process of its own, which compiles its step once and then waits for its turn; inputs are those of
`train.bench`, and so are the other options. Medians over the turns, and of the ratios of neighbouring turns. CPU
seconds are those of all threads of the process: what a step costs, where other work on the machine lengthens the
clock's.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.compilation import checkout_environment
from dspark_jax.config.cli import divide_options, parse, program
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output
from dspark_jax.programs import earlier_checkout, module_name
from dspark_jax.report import listing


@dataclass(frozen=True)
class StepTimesSettings:
    """Compares the seconds of a training step with those of an earlier checkout."""

    before: str = ""
    """The other checkout of this repository."""
    name: str = "embedded"
    """The row of the results."""
    turns: int = 8
    """Turns of either checkout."""
    steps: int = 2
    """Steps of a turn."""
    result: Path = Path("docs/results/step_times.json")
    """The figures; rows of other names stay in it."""


@program
def main(argv: list[str]) -> None:
    mine, rest = divide_options(argv, StepTimesSettings)
    settings = parse(StepTimesSettings, mine)
    if settings.turns < 1 or settings.steps < 1:
        raise UserError("There is nothing to time: --turns and --steps must be 1 or more.")
    checkouts = earlier_checkout(settings.before), Path.cwd()
    make_output(settings.result.parent)

    sides = [started(checkout, rest) for checkout in checkouts]
    try:
        turns = [(turn(sides[0], settings.steps), turn(sides[1], settings.steps)) for _ in range(settings.turns)]
    finally:
        for side in sides:
            side.kill()
            side.wait()

    clock, processors = ([(old[i], new[i]) for old, new in turns] for i in range(2))
    row = {
        **figures(clock),
        "cpu": figures(processors),
        "command": " ".join(["train.studies.step_times", *argv]),
        "machine": machine(),
    }
    add_results(settings.result, {settings.name: row})
    names = "before", "after", "ratio", "least", "most"
    print(listing({name: f"{row[name]:.4f}, CPU {row['cpu'][name]:.4f}" for name in names}))
    print(settings.result)


def figures(turns: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians of (before, after) seconds a step, and of after over before with its least and most."""
    before, after = zip(*turns, strict=True)
    ratios = [new / old for old, new in turns]
    return {
        "before": statistics.median(before),
        "after": statistics.median(after),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "turns": len(turns),
    }


def started(checkout: Path, options: list[str]) -> subprocess.Popen[str]:
    """A process of a checkout whose step is compiled and warm."""
    wanted = json.dumps({"bench": module_name("train.bench.__main__"), "options": options})
    side = subprocess.Popen(
        [sys.executable, "-c", STEPS, wanted],
        cwd=checkout,
        env=checkout_environment(checkout),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    answer(side, checkout)
    return side


def turn(side: subprocess.Popen[str], steps: int) -> tuple[float, float]:
    """(seconds, CPU seconds) a step of one turn."""
    assert side.stdin is not None
    side.stdin.write(f"{steps}\n")
    side.stdin.flush()
    return answer(side)


def answer(side: subprocess.Popen[str], checkout: Path | str = "a checkout") -> tuple[float, float]:
    """The two numbers that a process says next; UserError where it has ended."""
    assert side.stdout is not None
    for said in side.stdout:
        # A program's own words on the same pipe are passed over.
        if said.startswith("seconds "):
            clock, processors = said.split()[1:]
            return float(clock), float(processors)
    raise UserError(f"The step of {checkout} did not run; its own words are above.")


# Runs in either checkout, so it names what both have alone.
STEPS = """
import importlib, json, sys, time
import jax
wanted = json.loads(sys.argv[1])
from dspark_jax import compilation
if hasattr(compilation, "share_equal_parts"):
    compilation.share_equal_parts()
bench = importlib.import_module(wanted["bench"])
from dspark_jax.planning.training import AbstractRun
from dspark_jax.sharding import make_mesh
config = bench.configuration(bench.BenchOptions(), wanted["options"])
run = AbstractRun.of(config, make_mesh(*config.mesh.sizes))
state, borrowed = bench.random_inputs(run)
step = run.step.lower(state, *borrowed).compile()
def seconds(count):
    global state
    began = time.perf_counter(), time.process_time()
    for _ in range(count):
        state, metrics = step(state, *borrowed)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - began[0]) / count, (time.process_time() - began[1]) / count
print("seconds", *seconds(2), flush=True)
for line in sys.stdin:
    print("seconds", *seconds(int(line)), flush=True)
"""


if __name__ == "__main__":
    main()
