"""Measures what an accelerator is for, in parts ordered by worth, and writes the file of figures after each of them.

    python -m infer.accelerator --minutes 25 --output docs/results/accelerator-h200.json
    python -m infer.accelerator --shapes tiny --output docs/results/accelerator-cpu.json       a minute on a CPU

Random weights in the shapes of Qwen3-4B and 8B, so that nothing is downloaded. Each part runs in a process of its own:
one that fails, hangs or does not fit leaves a sentence in the file and the others as they are. When the time is up, or
after a stop, the same command goes on with the parts that are missing; on another machine it is refused.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dspark_jax.compilation import Compilations
from dspark_jax.config.cli import parse, program
from dspark_jax.errors import UserError
from dspark_jax.files import make_output
from dspark_jax.programs import program_command
from dspark_jax.report import table

from .pairs import SHAPES
from .report import OtherMachine, Report, sentence

LEAST_SECONDS = 30.0
"""What is left of the time when no further part is begun."""


@dataclass(frozen=True)
class AcceleratorSettings:
    """Measures an accelerator."""

    output: Path
    """JSON file of the figures; a run that finds some there goes on with what is missing."""
    minutes: float = 25.0
    """Time for all parts together; compilation is most of it."""
    shapes: tuple[Literal["4b", "8b", "tiny"], ...] = ("4b", "8b")
    """Pairs by the shapes of their weights; tiny: for a CPU."""
    parts: tuple[str, ...] = ()
    """The parts to run, such as plain-4b; none given: all that are missing."""
    one_process: bool = False
    """Run the parts in this process, and not each in its own."""


@program
def main(argv: list[str]) -> None:
    settings = parse(AcceleratorSettings, argv, description=__doc__)
    make_output(settings.output.parent)
    report = Report.continued(settings.output, 60 * settings.minutes)
    parts = parts_of(settings)
    if unknown := set(settings.parts) - set(parts):
        raise UserError(f"There is no part {', '.join(sorted(unknown))}; known are {', '.join(parts)}.")

    report.about["settings"] = {name: str(value) for name, value in asdict(settings).items()}
    wanted = list(settings.parts or parts)
    # The device is looked at in every run that begins others, also where it is known: it may be another one.
    for name in wanted if settings.one_process else dict.fromkeys(["device", *wanted]):
        late = report.left < LEAST_SECONDS and not settings.one_process
        if report.done(name) and (late or name != "device"):
            continue
        if late:
            report.add(name, left_out="No time was left; the same command measures it.")
            continue
        started = time.monotonic()
        print(f"{name} ({report.left / 60:.0f} minutes left)", file=sys.stderr, flush=True)
        run_here(report, name, parts[name]) if settings.one_process else run_apart(report, name, settings)
        report.add(name, part_seconds=round(time.monotonic() - started, 1))

    # Of some parts alone, where only those were asked for: so do the processes of a whole run.
    print(shown(report, wanted))
    print(f"figures in {settings.output}")


def parts_of(settings: AcceleratorSettings) -> Mapping[str, Callable[[Report, str], None]]:
    """The parts by name, the most worth knowing first."""
    # Imported late, for --help; nothing there touches a device at import, since an accelerator may serve one process.
    from . import attention, checks, decoding

    shapes = {name: SHAPES[name] for name in settings.shapes}
    first = shapes[settings.shapes[0]]
    found: dict[str, Callable[[Report, str], None]] = {"device": device}
    names = list(shapes)
    for at, name in enumerate(names):
        shape = shapes[name]
        found[f"plain-{name}"] = partial(decoding.plain_steps, shape=shape)
        found[f"rounds-{name}"] = partial(decoding.rounds, shape=shape)
        # Of the first shape alone: the others differ by their sizes.
        if at == 0:
            found["logits"] = checks.logits
            found["greedy"] = partial(checks.greedy, shape=first)
            found["attention"] = partial(attention.attention, shape=first)
            found["training"] = partial(checks.training, shape=first)
            found["head"] = partial(decoding.sequential_head, shape=first)
            found["scheduler"] = partial(decoding.scheduler, shape=first)
            found["golden"] = partial(checks.golden, shape=first)
        found[f"simulated-{name}"] = partial(decoding.simulated, source=f"rounds-{name}")
    return found


def device(report: Report, part: str) -> None:
    """What the figures were measured on."""
    import jax

    from dspark_jax.devices import machine

    report.measured_on(machine())
    limits = jax.local_devices()[0].memory_stats() or {}
    memory = {name: limits[name] for name in ("bytes_limit", "bytes_reservable_limit") if name in limits}
    report.add(part, platform=jax.default_backend(), devices=jax.device_count(), **memory)


def run_here(report: Report, name: str, measure: Callable[[Report, str], None]) -> None:
    """Run a part in this process; a failure becomes a sentence in the report."""
    # What an earlier attempt said, which until here marks the part as one to do; its figures stay.
    for word in ("failed", "left_out", "unfinished"):
        report.parts.get(name, {}).pop(word, None)
    with Compilations() as seen:
        try:
            measure(report, name)
        except OtherMachine:
            raise
        except (Exception, SystemExit) as error:
            report.add(name, failed=sentence(error))
    report.add(name, compile_seconds_in_all=round(seen.seconds, 1), programs_compiled_in_all=seen.compiled)


def run_apart(report: Report, name: str, settings: AcceleratorSettings) -> None:
    """Run a part in a process of its own, which writes to a file beside the report."""
    own = report.path.with_suffix(f".{name}.json")
    report.save()
    own.write_bytes(report.path.read_bytes())
    words = ["--output", own, "--minutes", report.left / 60, "--shapes", *settings.shapes, "--parts", name]
    command = program_command("infer.accelerator", *words, "--one-process")
    problem, refused = "", False
    try:
        done = subprocess.run(command, timeout=report.left + LEAST_SECONDS, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            problem = f"The process ended with exit code {done.returncode}: {said[-1][:300] if said else ''}"
            # A part's own faults are in its figures, so that this is the machine's.
            refused = name == "device" and done.returncode == 2 and bool(said)
    except subprocess.TimeoutExpired:
        problem = "The process did not end in time and was stopped."
    # What it has written counts, however it ended.
    report.take(own)
    own.unlink(missing_ok=True)
    if refused:
        raise OtherMachine(said[-1])
    if problem:
        report.add(name, failed=problem)


def shown(report: Report, parts: Iterable[str]) -> str:
    """The parts as a table: a line for each group of figures, and one for those without a group."""
    rows = []
    for part in parts:
        groups = {name: value for name, value in report.parts.get(part, {}).items() if isinstance(value, Mapping)}
        alone = {name: value for name, value in report.parts.get(part, {}).items() if name not in groups}
        rows += [[part, name, line_of(value)] for name, value in ({"": alone} | groups).items()]
    return table(["part", "", "figures"], rows)


def line_of(figures: Mapping[str, Any]) -> str:
    """Figures in one line, seconds as milliseconds; of a group its own seconds alone."""
    words = []
    for name, value in figures.items():
        group = isinstance(value, Mapping) and "seconds" in value
        value = value["seconds"] if group else value
        if group or name == "seconds" or name.endswith(("_seconds", "seconds a step")):
            words.append(f"{name.removesuffix('_seconds')} {1e3 * value:.3f} ms")
        elif isinstance(value, int | float | str):
            words.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)


if __name__ == "__main__":
    main()
