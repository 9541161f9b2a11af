"""Trains a drafter from a target cache.

    python -m train.fit --config NAME [--option value ...]
    python -m train.fit --config NAME --export-only
    python -m train.fit --config NAME --plan [--devices 64] [--mesh data=16,fsdp=4] [--topology v5e:4x4]

A run that was stopped continues with the same command from its latest checkpoint, to the same parameters. At the end
the drafter stands in RUN/drafter (DeepSpec-native layout); --export-only writes it from the latest checkpoint.
--plan prints what a device would hold, on devices that need not be here, and trains nothing.
Several processes are one job where dspark_jax/distributed.py's variables say so; docs/tpu-pods.md has the scripts.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from dspark_jax.checkpoints.drafters import save_drafter, shared_tables
from dspark_jax.config.cli import parse_named, program, to_json
from dspark_jax.config.schema import TrainConfig
from dspark_jax.devices import announce
from dspark_jax.distributed import (
    barrier,
    bounded_by_peers,
    connect,
    fetch,
    initialize_from_environment,
    is_first,
    require_same,
)
from dspark_jax.drafters.registry import Drafter, skeleton
from dspark_jax.errors import UserError
from dspark_jax.files import write_json
from dspark_jax.sharding import split
from dspark_jax.targets.target import Target
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.guards import Preempted
from dspark_jax.training.loop import train
from dspark_jax.training.provenance import provenance_of
from dspark_jax.training.run import RunPlan, make_plan
from dspark_jax.training.run_folder import require_same_run, write_config
from dspark_jax.training.summary import best_record, summarise, table
from dspark_jax.training.trainer import Trainer

from .plan import PLAN, print_plan

EXPORT_ONLY = "--export-only"


@program
def main(argv: list[str]) -> None:
    if PLAN in argv:
        print_plan(argv, __doc__)
        return
    config = parse_named([word for word in argv if word != EXPORT_ONLY], description=__doc__)
    if not isinstance(config, TrainConfig):
        raise UserError(f"The configuration is a {type(config).__name__}; train.fit runs those of training.")
    initialize_from_environment()
    announce(config.compute_dtype)
    require_same({"they were given different configurations": to_json(config)})
    with bounded_by_peers():
        if EXPORT_ONLY in argv:
            export_latest(config)
        else:
            fit(config)
        barrier("the end of the run")


def fit(config: TrainConfig) -> None:
    """The whole run: what is left of it after earlier starts, the export, the closing table."""
    folder = Path(config.folder)
    require_same_run(folder, config)
    finished = (folder / "metrics.json").exists()
    require_same({f"one finds the run in {folder} finished; the folder must be shared by all": finished})
    if finished:
        say(f"The run in {folder} is finished; its drafter is in {folder / 'drafter'}.")
        return
    plan = make_plan(config)
    require_same(
        {"their data are not the same": (xxh3_64_hexdigest(plan.batches.source.lengths.tobytes()), plan.total_steps)}
    )
    connect(plan.mesh)
    trainer = Trainer.of(plan)
    target = trainer.target()
    if is_first():
        write_config(folder, config)
    with open_checkpoints(config) as checkpoints, bounded_by_peers():
        require_same({f"they find different checkpoints in {folder}, which must be shared by all": checkpoints.latest})
        try:
            state, records = train(trainer, shared_tables(target), checkpoints)
        except Preempted as stop:
            print(stop, file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None
        drafter = export(plan, target, state.params)
        best = checkpoints.best
        if best is not None:
            kept = state if best == plan.total_steps else checkpoints.restore(best, trainer.abstract)[0]
            export(plan, target, kept.params, "drafter_best")
    if is_first():
        summary = summarise(config.name, plan.total_steps, records, drafter) | best_record(records, best)
        write_json(folder / "metrics.json", summary)
        print(table(summary))


def open_checkpoints(config: TrainConfig) -> Checkpoints:
    settings = config.checkpoint
    return Checkpoints(Path(config.folder) / "checkpoints", settings.keep, settings.keep_best)


def export(plan: RunPlan, target: Target, params: dict, name: str = "drafter") -> Path:
    """Writes RUN/name and returns it; in a job its first process writes."""
    folder = plan.folder / name
    graphdef, _ = split(skeleton(plan.drafter_hf))
    drafter = Drafter(str(folder), plan.drafter, graphdef, fetch(params), plan.drafter_hf)
    target = replace(target, params=fetch(target.params))
    if is_first():
        save_drafter(folder, drafter, target, provenance=provenance_of(plan))
    return folder


def export_latest(config: TrainConfig) -> None:
    folder = Path(config.folder)
    require_same_run(folder, config)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no run to export; train it first, without {EXPORT_ONLY}.")
    plan = make_plan(config)
    trainer = Trainer.of(plan)
    with open_checkpoints(config) as checkpoints:
        step = checkpoints.latest
        if step is None:
            raise UserError(f"The run in {folder} has no checkpoint yet; continue it without {EXPORT_ONLY}.")
        state, _ = checkpoints.restore(step, trainer.abstract)
    say(f"Step {step} is exported to {export(plan, trainer.target(), state.params)}.")


def say(text: str) -> None:
    """Prints it once a job."""
    if is_first():
        print(text)


if __name__ == "__main__":
    main()
