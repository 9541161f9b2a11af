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
import threading
from asyncio import BaseEventLoop
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from dspark_jax.distributed import barrier, from_first, is_first
from dspark_jax.errors import UserError
from dspark_jax.training.array_blocks import Damaged
from dspark_jax.training.checkpoint_notes import damage, opened, require_same_arrays, sealed, steps_in, write_hashes
from dspark_jax.training.checksum import begin_early, checksums, finish_checksums
from dspark_jax.training.snapshots import Snapshots

State = TypeVar("State")
_IN_FLIGHT = 2**29
"""Bytes that are on their way to the disk at once."""


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
        self._snapshots = Snapshots()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
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

    def prepare(self, state: Any) -> threading.Thread | None:
        """Takes memory for the saves of a state like this one, in the thread that it returns; the first save waits for
        it."""
        return self._snapshots.prepare(state) if jax.process_count() == 1 else None

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
        # As they are now: the loop goes on counting.
        notes = json.loads(json.dumps({"extra": extra, "score": score}))

        # A job's processes call Orbax, whose calls are collective, where they call everything else.
        copy = self._snapshots.take(state) if jax.process_count() == 1 else None
        begun = sums = None
        if copy is None:
            with self._reported():
                begun = self._begin(step, state, notes)
        else:
            sums = begin_early(copy)

        # In a list, from which the thread takes the only reference, to free the devices' memory early.
        given = [copy]
        del copy
        self._thread = threading.Thread(target=self._guarded_write, args=(step, given, notes, begun, sums), daemon=True)
        self._thread.start()

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
        if self._thread is None:
            return

        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            with self._reported():
                raise error

    def close(self) -> None:
        """Closes the folder, after the save under way."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # The error that ends the block is reported, not the failure of a save under way on the same full disk.
        with suppress(Exception) if kind else nullcontext():
            self.close()

    def _begin(self, step: int, state: Any, notes: dict[str, Any], sums: list[jax.Array] | None = None) -> Any:
        """Orbax's response to a save of this state, once its arrays are on the host; `sums`: of `begin_early`."""
        score = notes["score"]
        content = sealed(notes | {"checksums": finish_checksums(sums, state)})
        # Orbax brings arrays to the host by itself, which a transfer guard of the caller would refuse.
        with jax.transfer_guard("allow"), _writing(state):
            return self._orbax.save_async(
                step, state, custom_metadata=content, force=True, metrics=None if score is None else {"score": score}
            )

    def _guarded_write(
        self, step: int, given: list[Any], notes: dict[str, Any], begun: Any, sums: list[jax.Array] | None
    ) -> None:
        """The thread of a save: what it raises is raised by `wait`."""
        try:
            copy = given.pop()
            response = begun or self._begin(step, copy, notes, sums)
            del copy  # the host has its bytes
            response.result()
            # Hashes of complete files alone: a folder without them was interrupted, and its checksums decide.
            if is_first():
                write_hashes(self.folder / str(step))
        except BaseException as error:
            self._error = error

    def _require_room(self, step: int, state: Any) -> None:
        """UserError, on every process of a job alike, where the disk can't hold the state."""
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


def _writing(state: Any) -> ocp.Context:
    """How Orbax writes: uncompressed, and without a whole copy of the state on the way to the disk."""
    context = ocp.Context()
    # Compression saves one byte in thirteen and takes longer than to write them all (docs/log.md).
    context.array.saving.use_compression = False
    # The largest array must fit.
    context.memory.write_concurrent_bytes = max(_IN_FLIGHT, 1 + max(x.nbytes for x in jax.tree.leaves(state)))
    return context


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


def _score(metrics: Any) -> float:
    return metrics["score"]


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-damaged")
