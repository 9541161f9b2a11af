"""Checkpoints in an object store: one object a process, written from memory, and a marker that makes them a checkpoint.

    checkpoints/STEP/ATTEMPT-00000.bin    the bytes of the array parts that process 0 holds, one after the other
    checkpoints/STEP/ATTEMPT-00000.json   where each of them lies, and its hash
    checkpoints/STEP/checkpoint.json      last: the notes, sealed, and which attempt is the checkpoint

Every process sends what its own devices hold, so no machine needs the others' parts or a disk, and restoring reads the
ranges that a device needs, on any mesh and number of processes. A step without a marker was interrupted and is removed.
"""

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
import xxhash

from dspark_jax.distributed import barrier, from_first, is_first
from dspark_jax.errors import UserError
from dspark_jax.readers import parse_json
from dspark_jax.storage import objects
from dspark_jax.storage.objects import Missing
from dspark_jax.storage.places import Place
from dspark_jax.training.array_blocks import Damaged, Held, Part, held_here, placed, read_blocks
from dspark_jax.training.checkpoint import Checkpoints, State
from dspark_jax.training.checkpoint_notes import opened, require_same_arrays, sealed
from dspark_jax.training.checksum import begin_checksums, begin_early, checksums, finish_checksums
from dspark_jax.training.snapshots import Snapshots

MARKER, ASIDE = "checkpoint.json", "checkpoint.damaged.json"
_STRAGGLER_SECONDS = 600
_READERS = 8


class ObjectCheckpoints:
    """The checkpoints of one run at a place, with the interface of `checkpoint.Checkpoints`.

    Args:
        place: RUN/checkpoints.
        keep: latest ones kept; `keep_best`: kept besides, those of the highest scores.
        before_marker: called by the first process's thread before a marker is written: what it brings to the store is
            there when the checkpoint is.
    """

    def __init__(self, place: Place, keep: int, keep_best: int = 0, before_marker: Callable[[], None] = lambda: None):
        self.place, self._keep, self._keep_best, self._before = place, keep, keep_best, before_marker
        self._thread: threading.Thread | None = None
        self._snapshots = Snapshots()
        self._error: UserError | None = None
        # Parts of a killed attempt at the same step have other names, and can't be taken for this one's.
        self._attempt = f"{int(from_first(random.SystemRandom().getrandbits(32))):08x}"
        # The checkpoints there are, with their scores.
        self._scores: dict[int, float | None] = {}
        self._open()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None without one."""
        return max(self._scores, default=None)

    @property
    def best(self) -> int | None:
        """Step of the highest score, the latest of equals; None when none was scored."""
        scored = self._scored()
        return scored[-1] if scored else None

    def prepare(self, state: Any) -> threading.Thread | None:
        """Takes memory for the saves of a state like this one, as `Checkpoints.prepare`."""
        return self._snapshots.prepare(state)

    def save(self, step: int, state: Any, extra: Any, score: float | None = None) -> None:
        """Starts saving, as `Checkpoints.save`: it returns once the devices have copied the state, or the host has."""
        self.wait()
        # Copied now: the thread reads it while the loop goes on counting.
        notes = json.loads(json.dumps({"extra": extra, "score": score}))
        copy = self._snapshots.take(state)
        with jax.transfer_guard("allow"):
            # Without a copy now, before the state is donated.
            begun = begin_checksums(state) if copy is None else begin_early(copy)
            # Without room on the devices the loop waits for the host's copies.
            held = held_here(state, copied=False) if copy is None else None

        # In a list, from which the thread takes the only reference, to free the devices' memory early.
        given = [copy]
        del copy
        arguments = (step, given, held, notes, begun)
        self._thread = threading.Thread(target=self._guarded_write, args=arguments, daemon=True)
        self._thread.start()
        self._saving = step, score

    def restore(self, step: int, like: State) -> tuple[State, Any]:
        """(state, extra) of one checkpoint, as `Checkpoints.restore`."""
        try:
            return self._restore(step, like)
        except Damaged as error:
            raise UserError(
                f"The checkpoint of step {step} in {self.place} cannot be read into this drafter ({error}); remove it "
                "to continue from an earlier one, or give another run folder."
            ) from error

    def restore_latest(self, like: State) -> tuple[int, State, Any] | None:
        """(step, state, extra) of the newest checkpoint that is what was saved, as `Checkpoints.restore_latest`."""
        # Newest first; each damaged one loses its marker until a whole one is found.
        while (step := self.latest) is not None:
            # In a job one process may fail to read what the others can; falling back alone would split the job.
            if jax.process_count() > 1:
                return step, *self.restore(step, like)
            try:
                return step, *self._restore(step, like)
            except Damaged as error:
                self._set_aside(step, str(error))

        # Starting from step 0 here would silently discard the run, so it is refused.
        if any(name.endswith(ASIDE) for name in objects.listing(self.place)):
            raise UserError(
                f"None of the checkpoints in {self.place} is whole; restore one from a copy, or begin the run anew in "
                "another folder."
            )
        return None

    def wait(self) -> None:
        """Returns when the save under way is in the store; UserError where it could not be written."""
        if self._thread is None:
            return

        self._thread.join()
        self._thread = None
        # The first process has waited for the others' parts: its success is that of all.
        failed = bool(from_first(self._error is not None)) or self._error is not None
        if failed:
            before = self.latest
            kept = "none was saved before it" if before is None else f"the one of step {before} is whole"
            reason = self._error or "process 0 could not write its marker"
            raise UserError(f"A checkpoint in {self.place} could not be written; {kept}. {reason}")

        step, score = self._saving
        self._scores[step] = score
        self._scores = {kept: self._scores[kept] for kept in self._kept()}

    def close(self) -> None:
        """Waits for the save under way."""
        self.wait()

    def __enter__(self) -> "ObjectCheckpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # The error that ends the block is reported, not the failure of a save under way.
        with suppress(Exception) if kind else nullcontext():
            if self._thread is not None:
                self._thread.join()
            if not kind:
                self.close()

    # -- Opening and removing ----------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Lists what is there; the first process removes what a killed one has left, and sets torn markers aside."""
        names = objects.listing(self.place)
        for name in names:
            # A step is what has a marker; all else under its number was interrupted.
            step, _, file = name.partition("/")
            if file != MARKER or not step.isdigit():
                continue
            try:
                self._scores[int(step)] = self._marker(int(step))["score"]
            except Damaged as error:
                self._set_aside(int(step), str(error))

        if is_first():
            # What was set aside stays, to be looked at.
            kept = {*map(str, self._scores), *(name.partition("/")[0] for name in names if name.endswith(ASIDE))}
            steps = {name: name.partition("/")[0] for name in names}
            # Nothing but steps: what else may lie here is none of ours.
            objects.remove([self.place / name for name, step in steps.items() if step.isdigit() and step not in kept])
        barrier("the checkpoints have been looked at")

    def _marker(self, step: int) -> dict[str, Any]:
        try:
            return opened(parse_json(objects.read(self.place / str(step) / MARKER), "a checkpoint's notes"))
        except UserError as error:
            raise Damaged(str(error).rstrip(".")) from error

    def _set_aside(self, step: int, reason: str) -> None:
        """Takes a step's marker away, so that it is no checkpoint; its objects stay."""
        self._scores.pop(step, None)
        if not is_first():
            return
        folder = self.place / str(step)
        with suppress(Missing):
            objects.write(folder / ASIDE, objects.read(folder / MARKER))
        objects.remove([folder / MARKER])
        print(
            f"The checkpoint of step {step} in {self.place} is damaged ({reason}); its marker is now {ASIDE}, and the "
            "run continues from the one before it.",
            file=sys.stderr,
        )

    def _scored(self) -> list[int]:
        """Steps with a score, the best last."""
        scored = [(score, step) for step, score in self._scores.items() if score is not None]
        return [step for _, step in sorted(scored)]

    def _kept(self) -> set[int]:
        best = self._scored()[-self._keep_best :] if self._keep_best else []
        return {*sorted(self._scores)[-self._keep :], *best}

    # -- Writing -----------------------------------------------------------------------------------------------------

    def _guarded_write(
        self,
        step: int,
        given: list[Any],
        held: list[Held] | None,
        notes: dict[str, Any],
        begun: list[jax.Array] | None,
    ) -> None:
        try:
            copy = given.pop()
            held = held_here(copy, copied=True) if held is None else held
            sums = finish_checksums(begun, copy)
            # The host has its bytes.
            del copy
            self._write(step, held)
            if is_first():
                self._finish(step, notes | {"checksums": sums})
        except UserError as error:
            self._error = error
        except BaseException as error:  # a thread has no caller to raise to
            self._error = UserError(f"{type(error).__name__}: {error}")

    def _write(self, step: int, held: list[Held]) -> None:
        process, table = jax.process_index(), list[dict[str, Any]]()
        mine = self.place / str(step) / f"{self._attempt}-{process:05d}"

        def pieces() -> Iterator[memoryview]:
            offset = 0
            for leaf, start, array in held:
                data = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
                part = Part(leaf, start, list(array.shape), process, offset, len(data), xxhash.xxh3_128_hexdigest(data))
                table.append(asdict(part))
                offset += len(data)
                # In slices of one request, so that no array is held a second time.
                for at in range(0, len(data), objects.PART_BYTES):
                    yield data[at : at + objects.PART_BYTES]

        objects.write(Place(mine.scheme, mine.bucket, f"{mine.key}.bin"), pieces())
        # The table after the bytes: where it is, they are.
        objects.write(Place(mine.scheme, mine.bucket, f"{mine.key}.json"), json.dumps(table).encode())

    def _finish(self, step: int, notes: dict[str, Any]) -> None:
        """Waits for all parts, writes the marker, and removes the steps that are no longer kept."""
        folder, count = self.place / str(step), jax.process_count()
        tables = {f"{self._attempt}-{process:05d}.json" for process in range(count)}
        deadline = time.monotonic() + _STRAGGLER_SECONDS
        # By listing, not by a barrier: this is a thread, and collectives belong to the loop.
        while missing := tables - objects.listing(folder).keys():
            if time.monotonic() > deadline:
                raise UserError(f"{min(missing)} of step {step} was not written within {_STRAGGLER_SECONDS} s.")
            time.sleep(0.2)

        # What the checkpoint refers to is in the store before the checkpoint is.
        self._before()
        marker = sealed(notes | {"attempt": self._attempt, "processes": count})
        objects.write(folder / MARKER, json.dumps(marker).encode())

        # Removed only now, and the marker of each first: half of a checkpoint is none.
        self._scores = self._scores | {step: notes["score"]}
        gone = set(self._scores) - self._kept()
        for old in gone:
            names = objects.listing(self.place / str(old))
            objects.remove([self.place / str(old) / name for name in sorted(names, key=lambda name: name != MARKER)])
        self._scores = {kept: self._scores[kept] for kept in set(self._scores) - gone}

    # -- Reading -----------------------------------------------------------------------------------------------------

    def _restore(self, step: int, like: State) -> tuple[State, Any]:
        notes = self._marker(step)
        require_same_arrays(notes, like, f"step {step} in {self.place}")
        folder, attempt = self.place / str(step), notes["attempt"]
        parts: dict[str, list[Part]] = {}
        try:
            for process in range(notes["processes"]):
                table = parse_json(objects.read(folder / f"{attempt}-{process:05d}.json"), "a table of parts")
                for row in table:
                    parts.setdefault(row["leaf"], []).append(Part(**row))
        except (Missing, TypeError, KeyError) as error:
            raise Damaged(f"its tables cannot be read, {error}") from error

        leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        with ThreadPoolExecutor(_READERS) as pool, jax.transfer_guard("allow"):
            # Blocks are read ahead of the transfers, eight arrays at a time.
            read = [
                pool.submit(read_blocks, folder, attempt, parts.get(name, []), shape)
                for name, (_, shape) in zip(names, leaves, strict=True)
            ]
            arrays = [placed(shape, blocks.result()) for (_, shape), blocks in zip(leaves, read, strict=True)]

        state = jax.tree.unflatten(treedef, arrays)
        if checksums(state) != notes["checksums"]:
            raise Damaged("its arrays are not those that were saved")
        return state, notes["extra"]


AnyCheckpoints = Checkpoints | ObjectCheckpoints
"""The checkpoints of a run on a disk, or in a store."""
