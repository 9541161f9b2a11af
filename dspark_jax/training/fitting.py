"""A whole run: its remaining steps, the export of its drafter, its summary."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from dspark_jax.checkpoints.drafters import save_drafter, saved_whole, shared_tables
from dspark_jax.config.schema import TrainConfig
from dspark_jax.distributed import barrier, bounded_by_peers, connect, fetch, from_first, is_first, require_same
from dspark_jax.drafters.registry import Drafter, skeleton
from dspark_jax.errors import UserError
from dspark_jax.files import write_json
from dspark_jax.readers import read_object
from dspark_jax.sharding import split
from dspark_jax.storage.places import local_path, place_of, shown
from dspark_jax.storage.replica import Output, Replica, written
from dspark_jax.targets.target import Target
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.loop import train
from dspark_jax.training.object_checkpoints import AnyCheckpoints, ObjectCheckpoints
from dspark_jax.training.provenance import provenance_of
from dspark_jax.training.run import Run
from dspark_jax.training.run_folder import require_same_inputs, require_same_run, write_config, write_inputs
from dspark_jax.training.summary import best_record, require_trained, summarise

LAST, BEST = "drafter", "drafter_best"


@dataclass(frozen=True)
class Fitted:
    """A finished run.

    Attributes:
        folder: the run's.
        drafter: the exported drafter's folder, DeepSpec-native layout.
        summary: what metrics.json holds.
        found: True if the run had finished before, so that nothing was trained.
    """

    folder: Path
    drafter: Path
    summary: dict[str, Any]
    found: bool = False


def fit(config: TrainConfig) -> Fitted:
    """Trains a drafter, or continues the run in the configuration's folder to the same parameters.

    The folder gets checkpoints, records, the drafter and metrics.json, as `run_folder` lists them. A finished run is
    left unchanged, except that a missing or half-written drafter is exported again, for which steps whose checkpoint
    is damaged are trained again. Every process of a job calls this.

    Args:
        config: the whole run.
    Returns:
        The finished run.
    Raises:
        Preempted: after SIGTERM; the run is saved, and the same call continues it.
        UserError: a mistake in the configuration or its data, a run of another configuration in the folder, another
            process that writes there, a full disk, too many skipped updates in a row.
    """
    folder = local_path(config.folder)
    # The lock comes first: everything below reads the folder and acts on it.
    with only_writer(folder) as out:
        require_same_run(folder, config)
        # If one process returned while the others trained, they would wait for it in their first collective.
        finished = (folder / "metrics.json").exists()
        require_same({f"one finds the run in {folder} finished; the folder must be shared by all": finished})
        return _left_alone(config, out) if finished else _fit(config, out)


def _fit(config: TrainConfig, out: Output) -> Fitted:
    # Everything that can be refused is refused here, before the folder changes.
    run = Run.of(config)
    # Different data would not fail: processes would train on rows of different batches.
    lengths = xxh3_64_hexdigest(run.batches.source.lengths.tobytes())
    require_same({"their data are not the same": (lengths, run.total_steps, run.inputs)})

    require_same_inputs(run.folder, run.inputs)

    connect(run.step.mesh)
    target = run.tables()
    # Nothing is written before every process has compared: otherwise process 0's inputs.json would be compared with
    # itself by the slower ones.
    barrier("the run's inputs have been compared")

    if is_first():
        # First of what is written: with config.json the folder is recognised as this run's.
        write_config(run.folder, config)
        write_inputs(run.folder, run.inputs)

    with open_checkpoints(run, out) as checkpoints, bounded_by_peers():
        # Processes that continued from different steps would wait in different collectives.
        latest = checkpoints.latest
        require_same({f"they find different checkpoints in {run.folder}, which must be shared by all": latest})
        state, records = train(run, shared_tables(target), checkpoints)
        if is_first():
            # A drafter that no step changed would export without a fault and draft noise.
            require_trained(run.folder, records)

        drafter = export(run, target, state.params, LAST)
        # The best checkpoint may be an earlier one; then its parameters are read back.
        best = checkpoints.best

        if best is not None:
            kept = state if best == run.total_steps else checkpoints.restore(best, run.step.abstract)[0]
            export(run, target, kept.params, BEST)

    summary = summarise(run.name, run.total_steps, records, drafter) | best_record(records, best)
    if is_first():
        # Last of all files: its presence means that the run is finished.
        write_json(run.folder / "metrics.json", summary)

    return Fitted(run.folder, drafter, summary)


def export_run(config: TrainConfig) -> tuple[int, Path]:
    """Writes the drafter of a run's latest checkpoint, and returns (its step, the drafter's folder).

    Raises:
        UserError: the folder holds no run of this configuration, or no checkpoint; another process writes there.
    """
    folder = local_path(config.folder)
    with only_writer(folder) as out:
        if not (folder / "config.json").exists():
            raise UserError(f"{shown(folder)} holds no run to export; train it first, with train.fit.")
        return _export_run(config, out)


def export(run: Run, target: Target, params: dict, name: str) -> Path:
    """Writes the drafter to RUN/name and returns that folder; collective, and the first process writes."""
    folder, spec = run.folder / name, run.step
    graphdef, _ = split(skeleton(spec.drafter_hf))

    # `fetch` gathers split arrays: every process takes part, although one writes.
    drafter = Drafter(str(folder), spec.drafter, graphdef, fetch(params), spec.drafter_hf)
    target = replace(target, params=fetch(target.params))

    if is_first():
        save_drafter(folder, drafter, target, provenance=provenance_of(run))

    return folder


def open_checkpoints(run: Run, out: Output) -> AnyCheckpoints:
    """The run's checkpoints, kept as its configuration says; close them. In a store, its records come before them."""
    place, kept = place_of(run.folder), run.checkpoints
    if place is not None:
        return ObjectCheckpoints(place / "checkpoints", kept.keep, kept.keep_best, out.push)
    return Checkpoints(run.folder / "checkpoints", kept.keep, kept.keep_best)


def _small(name: str) -> bool:
    """Whether a file of a run is copied with its folder: checkpoints and caches have ways of their own."""
    return not name.startswith(("checkpoints/", "cache/"))


@contextmanager
def only_writer(folder: Path) -> Iterator[Output]:
    """Holds the run's folder for this job; UserError on every process where another job writes there."""
    # Process 0 holds the lock for the job. A refusal is shared before it is raised, so that no process waits for one
    # that has left.
    with ExitStack() as stack:
        out, refusal = Output.here(folder), None
        if is_first():
            try:
                out = stack.enter_context(written(folder, "the run", wanted=_small, last=("metrics.json",)))
            except UserError as error:
                refusal = error

        if from_first(refusal is not None):
            raise refusal or UserError(f"Process 0 cannot write the run in {shown(folder)}; its own sentence says why.")

        # On other machines the folder is what the first process found, too.
        if not is_first() and (place := place_of(folder)) is not None:
            Replica(place, folder, _small).pull()
        yield out


def _left_alone(config: TrainConfig, out: Output) -> Fitted:
    """The result of a finished run; a drafter that is missing or not whole is exported again."""
    folder = local_path(config.folder)
    summary = read_object(folder / "metrics.json", expected="a run's summary (a run without one goes on)")
    best = summary.get("best_step")
    # The summary is written after the exports: what is missing was removed since, or its export anew was interrupted.
    lost = [name for name in (LAST, BEST) if not saved_whole(folder / name)]

    if LAST in lost or (BEST in lost and best is not None):
        step, _ = _export_run(config, out)
        # The last checkpoint was damaged, so what was exported is not the finished run's drafter yet.
        if step != summary.get("steps"):
            return _fit(config, out)

    return Fitted(folder, folder / LAST, summary, found=True)


def _export_run(config: TrainConfig, out: Output) -> tuple[int, Path]:
    require_same_run(local_path(config.folder), config)
    run = Run.of(config)
    require_same_inputs(run.folder, run.inputs)
    target = run.tables()

    with open_checkpoints(run, out) as checkpoints:
        # The same way back as a continued run's, so that a damaged checkpoint is passed over here too.
        restored = checkpoints.restore_latest(run.step.abstract)
        if restored is None:
            raise UserError(f"The run in {run.folder} has no checkpoint to export; continue it with train.fit.")

        step, state, _ = restored
        drafter = export(run, target, state.params, LAST)
        if (best := checkpoints.best) is not None:
            kept = state if best == step else checkpoints.restore(best, run.step.abstract)[0]
            export(run, target, kept.params, BEST)

    return step, drafter
