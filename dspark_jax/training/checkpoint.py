"""Checkpoints for resuming: the training state and what the run had counted, saved in the background, atomically.

A step that was being written when the process died stays under a temporary name, is never listed, and is removed when
the run continues. A checkpoint holds checksums of its arrays, and once it is written the hashes of its files
(`hashes.json`); one that is not what was saved is moved to FOLDER-damaged, with a sentence, and the run continues from
the step before it.
"""

import functools
import json
import logging
import os
import shutil
import sys
from asyncio import BaseEventLoop
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import xxhash
from orbax.checkpoint import v1 as ocp

from dspark_jax.distributed import barrier, from_first, is_first
from dspark_jax.errors import UserError
from dspark_jax.files import hash_tree, write_json
from dspark_jax.readers import read_object
from dspark_jax.training.array_blocks import Damaged
from dspark_jax.training.checksum import checksums

State = TypeVar("State")
HASHES = "hashes.json"
NOTES, SCORE = "_CHECKPOINT_METADATA", "metrics/metrics"
"""Files of a step that Orbax reads when it opens the folder."""


def abstract(state: State) -> State:
    """ShapeDtypeStructs with shardings in place of a pytree's arrays: the `like` of `restore`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


class Checkpoints:
    """The checkpoints of one run, by optimizer step; `with` waits for the writes under way.

    A checkpoint is a pytree of arrays, sharded or not, and a JSON value; the two are saved and restored together. The
    latest `keep` are kept, and of those saved with a score the `keep_best` highest.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int, keep_best: int = 0):
        # Orbax refuses relative paths.
        self.folder = Path(folder).absolute()
        # The step whose files are still being written: they are hashed once they are complete.
        self._unhashed: int | None = None
        _quiet_failed_writes()

        # Before Orbax opens the folder: it reads the notes of every step, and one bad byte in them would stop it.
        for step in steps_in(self.folder):
            self._set_aside_damaged(step, notes_alone=True)

        # A checkpoint stays if either policy keeps it: the best one may be older than the latest `keep`.
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False)
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None without one."""
        found = self._orbax.latest
        return None if found is None else found.step

    @property
    def best(self) -> int | None:
        """Step of the highest score, the latest of equals; None when none was scored."""
        # Saves without an evaluation have no score, and are no candidates.
        scored = [info for info in self._orbax.checkpoints if info.metrics is not None]
        return max(scored, key=lambda info: (_score(info.metrics), info.step)).step if scored else None

    def save(self, step: int, state: Any, extra: Any, score: float | None = None) -> None:
        """Starts saving; returns once `state` may be donated. A save still under way is waited for first.

        Args:
            step: optimizer steps taken, the checkpoint's name.
            state: a pytree of arrays.
            extra: a JSON value, saved with it.
            score: ranks the checkpoint for `best`; None: it is not ranked.
        Raises:
            UserError: this save or the one before it can't be written; earlier checkpoints stay whole.
        """
        self.wait()
        self._require_room(step, state)
        # Checksums are computed on the devices now: afterwards the state may be donated.
        notes = sealed({"extra": extra, "score": score, "checksums": checksums(state)})
        metrics = None if score is None else {"score": score}

        # Orbax brings arrays to the host by itself, which a transfer guard of the caller would refuse.
        with jax.transfer_guard("allow"), self._reported():
            # Asynchronous: it returns when the arrays are on the host, and a thread writes them.
            self._orbax.save_async(step, state, custom_metadata=notes, force=True, metrics=metrics)

        # Hashed at the next `wait`, when the thread has written the last file.
        self._unhashed = step

    def restore(self, step: int, like: State) -> tuple[State, Any]:
        """Reads one checkpoint.

        Args:
            step: which.
            like: the state's `abstract` tree; its shardings may differ from the saved ones.
        Returns:
            (state, extra) as they were saved.
        Raises:
            UserError: the checkpoint does not hold such a state, or is not what was saved.
        """
        try:
            return self._restore(step, like)
        except Damaged as error:
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} cannot be read into this drafter ({error}); remove "
                "it to continue from an earlier one, or give another run folder."
            ) from error

    def restore_latest(self, like: State) -> tuple[int, State, Any] | None:
        """(step, state, extra) of the newest checkpoint that is what was saved; None where there was none at all.

        Damaged ones are moved aside, and stderr says so.

        Raises:
            UserError: none of the checkpoints is whole; in a job of several processes, one that the hashes of its
                files call whole can't be read.
        """
        # Newest first; each damaged one is moved away until a whole one is found.
        while (step := self.latest) is not None:
            # Orbax keeps a list of the steps, which must forget the moved one.
            if self._set_aside_damaged(step):
                self._orbax.reload()
                continue

            # In a job one process may fail to read what the others can; falling back alone would split the job.
            if jax.process_count() > 1:
                return step, *self.restore(step, like)

            try:
                return step, *self._restore(step, like)
            except Damaged as error:
                self._set_aside(step, str(error))
                self._orbax.reload()

        # Starting from step 0 here would silently discard the run, so it is refused.
        if _aside(self.folder).exists():
            raise UserError(
                f"None of the checkpoints in {self.folder} is whole; restore one from a copy, or begin the run anew in "
                "another folder."
            )

        return None

    def wait(self) -> None:
        """Returns when every save is on disk; UserError as `save` raises it."""
        with self._reported():
            self._orbax.wait()

        # Hashes of complete files alone: a folder without them was interrupted, and its checksums decide.
        step, self._unhashed = self._unhashed, None
        if step is not None and is_first():
            write_hashes(self.folder / str(step))

    def close(self) -> None:
        """Closes the folder, after the save under way."""
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # The error that ends the block is reported, not the failure of a save under way on the same full disk.
        with suppress(Exception) if kind else nullcontext():
            self.close()

    def _require_room(self, step: int, state: Any) -> None:
        """UserError, on every process of a job alike, where the disk can't hold the state."""
        # An upper bound: the format compresses.
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        # Process 0's reading counts for all, so that either every process raises or none does.
        free = int(from_first(shutil.disk_usage(self.folder).free))
        if free < needed:
            raise UserError(
                f"The checkpoint of step {step} takes up to {needed / 1e6:,.3f} MB and the disk of {self.folder} has "
                f"{free / 1e6:,.3f} MB free; make room and give the same command again."
            )

    def _restore(self, step: int, like: State) -> tuple[State, Any]:
        with _readable():
            notes = self._orbax.metadata(step).custom_metadata
        content = opened(notes)
        require_same_arrays(content, like, f"step {step} in {self.folder}")

        with _readable():
            state = self._orbax.load(step, like)
        # The files' hashes cannot show that a file was decoded into the right array; the checksums can.
        if checksums(state) != content["checksums"]:
            raise Damaged("its arrays are not those that were saved")

        return state, content["extra"]

    def _set_aside_damaged(self, step: int, notes_alone: bool = False) -> bool:
        """Moves a step away if its files are not what was written, and returns whether it did."""
        # The first process reads for all of them, so that they agree.
        reason = damage(self.folder / str(step), notes_alone) if is_first() else None
        damaged = bool(from_first(reason is not None))
        if damaged:
            self._set_aside(step, reason or "as process 0 says")

        return damaged

    def _set_aside(self, step: int, reason: str) -> None:
        """Moves a step's folder away; the first process of a job does it for all."""
        if is_first():
            # An earlier damaged checkpoint of the same step makes way, so that the rename cannot fail.
            target = _aside(self.folder) / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / str(step), target)
            print(
                f"The checkpoint of step {step} in {self.folder} is damaged ({reason}); it was moved to {target}, and "
                "the run continues from the one before it.",
                file=sys.stderr,
            )

        # The others must not list the folder before the rename.
        barrier(f"the checkpoint of step {step} has been moved")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns an error of a save, raised here or in its thread, into a sentence."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise  # not the disk: another process is gone
            reason = " ".join(str(error).split())[:200]
            before = self.latest
            kept = "none was saved before it" if before is None else f"the one of step {before} is whole"
            raise UserError(
                f"A checkpoint in {self.folder} could not be written ({reason}); {kept}. Make room on the disk and "
                "give the same command again."
            ) from error


@contextmanager
def _readable() -> Iterator[None]:
    """Turns whatever a reader raises on a damaged file into `Damaged`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            raise  # not the files: another process is gone
        raise Damaged(" ".join(str(error).split())[:200]) from error


@functools.cache
def _quiet_failed_writes() -> None:
    """Suppresses the tracebacks that threads of the storage libraries print when a write fails; `_reported` turns the
    error itself into one sentence."""
    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)

    # The first failed write ends Orbax's event loop. TensorStore's threads report the other writes to that loop when
    # they end, and print that it is closed.
    shown = sys.unraisablehook

    def hook(raised: Any) -> None:
        # The outermost frame: where Python code makes the call, its own frame comes before this one.
        frame = raised.exc_traceback and raised.exc_traceback.tb_frame
        if frame is None or frame.f_code is not BaseEventLoop.call_soon_threadsafe.__code__:
            shown(raised)

    sys.unraisablehook = hook


# -- The notes beside the arrays -------------------------------------------------------------------------------------


def sealed(notes: dict[str, Any]) -> dict[str, Any]:
    """A copy of JSON notes with the hash of all of them, as they will be read back."""
    # Through JSON first: tuples come back as lists, and the hash must be that of what is read.
    plain = json.loads(json.dumps(notes))
    return plain | {"seal": _seal(plain)}


def opened(notes: Any) -> dict[str, Any]:
    """The notes that `sealed` made, without the seal; Damaged where they are not whole."""
    if not isinstance(notes, dict) or "seal" not in notes:
        raise Damaged("its notes have no seal")

    # Orbax reads the notes without checking them, hence a seal of our own.
    # The seal is over everything but itself.
    plain = {name: value for name, value in notes.items() if name != "seal"}
    if notes["seal"] != _seal(plain):
        raise Damaged("its notes are not those that were saved")

    return plain


def require_same_arrays(content: dict[str, Any], like: Any, where: str) -> None:
    """UserError unless a checkpoint, whose opened notes are `content`, holds as many arrays as the state `like`."""
    # The notes are sealed, so no damage makes the difference: an earlier version kept its parameters otherwise.
    found, expected = len(content["checksums"]), len(jax.tree.leaves(like))
    if found != expected:
        raise UserError(
            f"The checkpoint of {where} holds {found} arrays, the state of this run {expected}: the run was begun with "
            "another version of dspark_jax. Continue it with that version, or begin anew in another folder with "
            "--run-dir."
        )


def steps_in(folder: Path) -> list[int]:
    """The steps that a folder has checkpoints of, ascending."""
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def write_hashes(checkpoint: Path) -> None:
    """Records the hashes of a finished checkpoint's files; nothing where it is gone again. UserError on a full disk."""
    if checkpoint.is_dir():
        write_json(checkpoint / HASHES, hash_tree(checkpoint, lambda name: name != HASHES))


def damage(checkpoint: Path, notes_alone: bool = False) -> str | None:
    """Why a checkpoint's files are not what was written, as a clause; None where they are.

    Args:
        checkpoint: the folder of one step.
        notes_alone: leave the arrays' files unread.
    """
    try:
        notes = opened(_read_json(checkpoint / NOTES).get("custom_metadata"))
        scores = {} if notes["score"] is None else _read_json(checkpoint / SCORE)
        if scores.get("score") != notes["score"]:
            raise Damaged("its score is not the one that was saved")
        # A process that was killed right after a save has left no hashes; the arrays' checksums are compared then.
        recorded = _read_json(checkpoint / HASHES) if (checkpoint / HASHES).exists() else {}
    except Damaged as error:
        return str(error)

    # Opening the folder needs the notes alone, and must not read gigabytes of arrays for them.
    compared = {NOTES, SCORE} & set(recorded) if notes_alone else set(recorded)
    found = hash_tree(checkpoint, lambda name: name in compared)
    wrong = sorted(name for name in compared if found.get(name) != recorded[name])

    return f"{wrong[0]} is not what was written" if wrong else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError as error:
        raise Damaged(str(error).rstrip(".")) from error


def _seal(plain: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())


def _score(metrics: Any) -> float:
    return metrics["score"]


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-damaged")
