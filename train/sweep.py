"""Runs every point of a sweep, one process each, and compares them.

    python -m train.sweep configs/sweeps/depth.py [--option value ...]
    ... --jobs 2                   two points at a time
    ... --index 3 --count 8        this job's points of an array of eight; any of them may write the summary
    ... --list                     the points and what they change; nothing is run

Options of the training configuration apply to every point. The same command continues a stopped sweep: finished points
are skipped, unfinished ones continue from their checkpoints, failing ones are tried twice and reported. OUTPUT/NAME is
the run of a point, OUTPUT/logs holds its output, OUTPUT/summary.json and summary.png the results.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from dspark_jax.config.cli import divide_options, parse, program
from dspark_jax.config.schema import TrainConfig
from dspark_jax.config.sweep import Sweep, load_sweep, part
from dspark_jax.errors import UserError
from dspark_jax.files import write_json
from dspark_jax.storage.places import place_of
from dspark_jax.training.point_processes import Point, Runner, report_failures
from dspark_jax.training.run_folder import require_same_run
from dspark_jax.training.sweep_report import summary_plot, summary_rows, summary_table


@dataclass(frozen=True)
class SweepSettings:
    """Runs every point of a sweep."""

    output: str = ""
    """Folder of the points and the summary; empty: runs/sweeps/NAME."""
    jobs: int = 1
    """Points run at once, each on its share of the cores."""
    index: int | None = None
    """Part of the points that this process runs, counted from 0; None: all."""
    count: int = 1
    """Parts that the points are dealt into."""
    list: bool = False
    """Print the points and run nothing."""
    point: str = ""
    """Run this one point in this process."""


@program
def main(argv: list[str]) -> None:
    mine, rest = divide_options(argv, SweepSettings)
    # The sweep's file is the only positional argument; what follows belongs to the training configuration.
    file = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    if {"-h", "--help"} & set(argv):
        parse(SweepSettings, ["--help"], description=__doc__)

    settings, sweep = parse(SweepSettings, mine), load_sweep(file)
    configs = resolve(sweep, settings, rest)
    if settings.list:
        print("\n".join(configs))
    elif settings.point:
        run_point(configs, settings.point)
    else:
        run_sweep(sweep, settings, configs, argv)


def resolve(sweep: Sweep, settings: SweepSettings, options: list[str]) -> dict[str, TrainConfig]:
    """Configurations by point, each run in a folder below the sweep's; UserError for a run folder given by option."""
    # The options change the base, on which every point is then a difference.
    base = parse(sweep.base, options)
    if base.run_dir != sweep.base.run_dir:
        raise UserError("Each point of a sweep has a run folder of its own; name the folder of them all with --output.")
    folder = sweep_folder(sweep, settings)
    points = sweep.points(base)
    return {name: replace(config, name=name, run_dir=str(folder / name)) for name, config in points.items()}


def sweep_folder(sweep: Sweep, settings: SweepSettings) -> Path:
    # The summary is drawn from the files of all points, which a job of another machine may have written.
    if place_of(settings.output) is not None:
        raise UserError(f"--output is {settings.output}; a sweep needs a folder that all of its machines mount.")
    return Path(settings.output or f"runs/sweeps/{sweep.name}")


def run_point(configs: dict[str, TrainConfig], name: str) -> None:
    """Trains one point in this process."""
    if name not in configs:
        raise UserError(f"The sweep has no point {name!r}; its points are {', '.join(configs)}.")
    # Imported here, so that the program that only starts the points needs no jax.
    from dspark_jax.training.fitting import fit
    from dspark_jax.training.summary import table

    print(table(fit(configs[name]).summary))


def run_sweep(sweep: Sweep, settings: SweepSettings, configs: dict[str, TrainConfig], argv: list[str]) -> None:
    """Runs this job's points as processes, then writes the summary of all that are finished."""
    # All of them before the first starts: a sweep of hours must not fail in its last point.
    for config in configs.values():
        require_same_run(Path(config.folder), config)

    folder = sweep_folder(sweep, settings)
    points = {
        name: Point(name, ("train.sweep", *argv, "--point", name), Path(config.folder) / "metrics.json")
        for name, config in configs.items()
    }
    runner = Runner(folder / "logs", settings.jobs)
    failed = runner.run([points[name] for name in part(list(points), settings.index, settings.count)])
    # From all finished points, those of other jobs of the array included.
    rows = summary_rows(sweep, {name: point.read() for name, point in points.items() if point.done})
    write_json(folder / "summary.json", {"name": sweep.name, "metric": sweep.metric, "points": rows, "failed": failed})
    summary_plot(folder / "summary.png", sweep, rows)
    print(summary_table(sweep, rows, len(points)))
    report_failures(failed, runner.logs)


if __name__ == "__main__":
    main()
