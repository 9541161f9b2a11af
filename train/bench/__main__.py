"""Times the drafter's training step alone, with its theoretical floor and the memory it needs.

    python -m train.bench                                          the embedded drafter, or Qwen3-4B's on an accelerator
    python -m train.bench --preset qwen3_4b [--results FILE]       T 4096, N 512, blocks of 7, bfloat16, random weights
    python -m train.bench --config NAME [--option value ...]       any configuration
    python -m train.bench --config NAME --batch cache              a batch of its cache instead of a random one
    python -m train.bench --preset qwen3_4b --show floor --device "NVIDIA H200"      the floor by term; nothing runs
    python -m train.bench --preset qwen3_4b --show memory          compiled, not run; the naive one beside it

The step is that of train.fit, with its state donated. Compilation and the first steps are left out; each of several
runs is a few steps in a row, waited for at the end. Figures are the median over runs and their spread.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from dspark_jax.config.cli import divide_options, load_config, parse, parse_training, program
from dspark_jax.config.schema import TrainConfig
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.planning.compiled import compiled, memory_of
from dspark_jax.planning.estimate import passed_twice
from dspark_jax.planning.floor import step_floor
from dspark_jax.planning.training import AbstractRun
from dspark_jax.report import gibibytes, listing
from dspark_jax.roofline.hardware import Term, floor_seconds, known_device, peak_flops, terms_table, total
from dspark_jax.sharding import make_mesh

from .inputs import cached_inputs, random_inputs
from .naive import naive_run


@dataclass(frozen=True)
class BenchOptions:
    """Options of the measurement, beside those of the configuration."""

    preset: Literal["auto", "embedded", "qwen3_4b"] = "auto"
    """Where no --config is named: embedded_dspark as it is, or one sequence a device of qwen3_4b_dspark; auto: the
    first on a CPU, the second elsewhere."""
    show: Literal["time", "floor", "memory"] = "time"
    """time: run the step; floor: count its operations and bytes; memory: compile it and the naive one."""
    batch: Literal["random", "cache"] = "random"
    """Random states and tokens, or the first batch of the run."""
    device: str = ""
    """Device kind whose peaks set the floor, such as "NVIDIA H200"; empty: this machine's device."""
    runs: int = 7
    """Timed runs."""
    steps_per_run: int = 0
    """Steps of a timed run; 0: as many as take about a second."""
    warm_up: int = 2
    """Steps after compilation that are not timed."""
    results: Path | None = None
    """JSON file of the figures."""

    def __post_init__(self) -> None:
        if self.runs < 1 or self.steps_per_run < 0 or self.warm_up < 1:
            raise UserError("There is nothing to measure: --runs and --warm-up must be 1 or more.")


@program
def main(argv: list[str]) -> None:
    # Two sets of options in one command line: those of the measurement, and any of a configuration.
    mine, rest = divide_options(argv, BenchOptions)
    options = parse(BenchOptions, mine)
    config = configuration(options, rest)
    # Refused now rather than after the measurement.
    if options.results is not None:
        make_output(options.results.parent)

    announce(config.compute_dtype)
    mesh = make_mesh(*config.mesh.sizes)
    # Shapes are enough for the floor and for memory; arrays are made only where the step is timed.
    run = AbstractRun.of(config, mesh)
    kind = options.device or jax.devices()[0].device_kind
    terms = floor_terms(run)
    figures: dict[str, Any] = shapes(run) | {"device": f"{mesh.size} x {kind}"}

    if options.show == "memory":
        figures |= memory_figures(run)
    elif options.show == "time":
        figures |= measure(run, config, options, terms)

    print(listing({name: shown(value) for name, value in figures.items()}))
    if terms is not None and options.show != "memory":
        print(f"\nThe floor of a step on one device\n{terms_table(terms, known_device(kind))}")
        figures["terms"] = [dataclasses.asdict(term) for term in terms]
    if options.results is not None:
        write_json(options.results, figures | {"machine": machine()})


def configuration(options: BenchOptions, rest: list[str]) -> TrainConfig:
    """The configuration named by `--config`, or the preset; the other options apply to either."""
    if any(word == "--config" or word.startswith("--config=") for word in rest) or {"-h", "--help"} & set(rest):
        return parse_training(rest, "train.bench", __doc__)
    return parse(preset(options.preset), rest, description=__doc__)


def preset(name: str) -> TrainConfig:
    if name == "embedded" or (name == "auto" and jax.default_backend() == "cpu"):
        return load_config("embedded_dspark")
    config: TrainConfig = load_config("qwen3_4b_dspark")
    # One sequence a device: the step's cost a sequence, in the least memory.
    data = dataclasses.replace(config.data, global_batch=jax.device_count(), accumulation_steps=1)
    return dataclasses.replace(config, data=data)


def shapes(run: AbstractRun) -> dict[str, Any]:
    drafter = run.spec.drafter
    return {
        "configuration": run.name,
        "target": run.target.name,
        "sequences a step": run.data.global_batch,
        "micro-batches": run.micro_batches,
        "tokens a sequence": run.batch["input_ids"].shape[1],
        "anchors x block": f"{anchors(run)} x {drafter.block_size}",
        "drafter parameters": parameters(run),
        "dtype": run.spec.dtype,
        "mesh": " x ".join(f"{axis} {size}" for axis, size in run.placement.mesh.shape.items()),
    }


def anchors(run: AbstractRun) -> int:
    """Anchors of a sequence; the number of its positions for kinds that sample no anchors."""
    return getattr(run.spec.drafter, "num_anchors", run.batch["input_ids"].shape[1])


def parameters(run: AbstractRun) -> int:
    return sum(x.size for x in jax.tree.leaves(run.state.params))


def floor_terms(run: AbstractRun) -> list[Term] | None:
    """Floor terms of one device: its share of the sequences, the target's pass where it runs in the step, and the whole
    update.

    None where the tensor axis divides the work on a sequence, and for kinds of drafters and of targets in the step that
    are not counted.
    """
    # A floor that leaves out part of the work would be called beaten.
    if run.placement.mesh.shape["tensor"] > 1:
        return None
    return step_floor(run)


def measure(run: AbstractRun, config: TrainConfig, options: BenchOptions, terms: list[Term] | None) -> dict[str, Any]:
    """Runs the step and returns its figures; `config` is the run's, for a batch of its cache."""
    state, borrowed = random_inputs(run) if options.batch == "random" else cached_inputs(run, config)
    step = compiled(run.step.lower(state, *borrowed), "The step")
    seconds, metrics = timed_runs(step, state, borrowed, options)

    mesh = run.placement.mesh
    # The batch's shape, not the plan's: a cached batch may be shorter than the longest bucket.
    rows, length = borrowed[1]["input_ids"].shape
    found = statistics.median(seconds)

    figures: dict[str, Any] = {
        "steps timed": f"{len(seconds)} runs of {metrics['steps a run']}",
        "seconds a step": found,
        "least and most": [min(seconds), max(seconds)],
        "tokens/s": rows * length / found,
        "skipped updates": metrics["skipped"],
        **{f"{name}, compiled": gibibytes(size) for name, size in memory_of(step, passed_twice(run)).items()},
    }

    stats: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        figures["peak on the device"] = gibibytes(stats["peak_bytes_in_use"])

    # MFU counts useful operations only; recomputation is shown apart.
    if terms is not None:
        work, device = total(terms), known_device(mesh.devices.flat[0].device_kind)
        peak = peak_flops(mesh.devices.flat[0].device_kind, run.spec.dtype)
        figures |= {
            "TFLOP/s a device": work.flops / found / 1e12,
            "TFLOP/s with recomputation": (work.flops + work.again) / found / 1e12,
            "MFU": "not known" if peak is None else work.flops / found / peak,
            "floor / time": "not known" if peak is None or device is None else floor_seconds(terms, device) / found,
        }

    return figures


def timed_runs(step: Any, state: Any, borrowed: tuple, options: BenchOptions) -> tuple[list[float], dict[str, Any]]:
    """Returns (seconds a step in each run, {steps a run, updates skipped}). The state is donated."""
    metrics: Any = None
    for _ in range(options.warm_up):
        state, metrics = step(state, *borrowed)

    # Compilation and warm-up have ended before the first clock is read.
    jax.block_until_ready((state, metrics))
    # Where no number is given, the first run of one step only sets it and is not recorded.
    count = options.steps_per_run
    seconds: list[float] = []

    while len(seconds) < options.runs:
        start = time.perf_counter()
        for _ in range(count or 1):
            state, metrics = step(state, *borrowed)

        jax.block_until_ready((state, metrics))
        spent = (time.perf_counter() - start) / (count or 1)
        if count:
            seconds.append(spent)

        # Runs of about a second: shorter ones would measure the call, and longer ones cost time for nothing.
        count = count or min(100, max(1, round(1.0 / spent)))

    return seconds, {"steps a run": count, "skipped": int(metrics["skipped"])}


def memory_figures(run: AbstractRun) -> dict[str, Any]:
    """Compiled memory on one device, of the step and of the naive step."""
    platform_name = jax.default_backend()
    found: dict[str, Any] = {}
    # Compiled and not run: the naive step may need more memory than there is.
    for name, one in (("step", run), ("naive step", naive_run(run))):
        start = time.perf_counter()
        memory = memory_of(compiled(one.lower(platform_name), f"The {name}"), passed_twice(run))
        found |= {f"{name}: {part}": gibibytes(size) for part, size in memory.items()}
        found[f"{name}: seconds to compile"] = time.perf_counter() - start

    return found


def shown(value: Any) -> Any:
    if isinstance(value, list):
        return " to ".join(f"{x:.4g}" for x in value)
    return f"{value:,.4g}" if isinstance(value, float) and value < 1000 else value


if __name__ == "__main__":
    main()
