"""Trains a drafter from a target cache.

    python -m train.fit --config NAME [--option value ...]
    python -m train.fit --config NAME --export-only
    python -m train.fit --config NAME --plan [--devices 64] [--mesh data=16,fsdp=4] [--topology v5e:4x4]

A run that was stopped continues with the same command from its latest checkpoint, to the same parameters. At the end
the drafter stands in RUN/drafter (DeepSpec-native layout); --export-only writes it from the latest checkpoint.
--plan prints what a device would hold, on devices that need not be here, and trains nothing.
"""

import signal
import sys
from pathlib import Path

from configs.cli import parse_named, program
from configs.schema import TrainConfig
from dspark_jax.checkpoints.drafters import save_drafter, shared_tables
from dspark_jax.drafters.registry import LoadedDrafter, skeleton
from dspark_jax.errors import UserError
from dspark_jax.sharding import split
from dspark_jax.targets.target import Target
from dspark_jax.training.checkpoint import Checkpoints
from train.dry_run import PLAN, print_plan
from train.guards import Preempted
from train.loop import train
from train.plan import RunPlan, make_plan
from train.provenance import provenance_of
from train.report import best_record, summarise, table
from train.run_folder import require_same_run, write_config
from train.sidecar import write_json
from train.trainer import Trainer

EXPORT_ONLY = "--export-only"


@program
def main(argv: list[str]) -> None:
    if PLAN in argv:
        print_plan(argv, __doc__)
        return
    config = parse_named([word for word in argv if word != EXPORT_ONLY], description=__doc__)
    if not isinstance(config, TrainConfig):
        raise UserError(f"The configuration is a {type(config).__name__}; train.fit runs those of training.")
    if EXPORT_ONLY in argv:
        print(export_latest(config))
    else:
        fit(config)


def fit(config: TrainConfig) -> None:
    """The whole run: what is left of it after earlier starts, the export, the closing table."""
    folder = Path(config.folder)
    require_same_run(folder, config)
    if (folder / "metrics.json").exists():
        print(f"The run in {folder} is finished; its drafter is in {folder / 'drafter'}.")
        return
    plan = make_plan(config)
    trainer = Trainer.of(plan)
    target = trainer.target()
    write_config(folder, config)
    with open_checkpoints(config) as checkpoints:
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
    summary = summarise(config.name, plan.total_steps, records, drafter) | best_record(records, best)
    write_json(folder / "metrics.json", summary)
    print(table(summary))


def open_checkpoints(config: TrainConfig) -> Checkpoints:
    settings = config.checkpoint
    return Checkpoints(Path(config.folder) / "checkpoints", settings.keep, settings.keep_best)


def export(plan: RunPlan, target: Target, params: dict, name: str = "drafter") -> Path:
    """Writes RUN/name and returns it."""
    folder = plan.folder / name
    graphdef, _ = split(skeleton(plan.drafter_hf))
    drafter = LoadedDrafter(str(folder), plan.drafter, graphdef, params, plan.drafter_hf)
    save_drafter(folder, drafter, target, provenance=provenance_of(plan))
    return folder


def export_latest(config: TrainConfig) -> str:
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
    return f"Step {step} is exported to {export(plan, trainer.target(), state.params)}."


if __name__ == "__main__":
    main()
