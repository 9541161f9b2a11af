"""Early stopping: updates that are skipped too often, and preemption by SIGTERM."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from dspark_jax.data.pipeline import Batches
from dspark_jax.distributed import is_first
from dspark_jax.errors import UserError
from dspark_jax.files import write_json


class Preempted(Exception):
    """Raised after SIGTERM, once the run is saved."""

    def __init__(self, step: int):
        super().__init__(f"Stopped by SIGTERM after step {step}, which is saved; the same command continues there.")
        self.step = step


class Preemption:
    """Records SIGTERM, so that the loop can save and stop between two steps. The processes of a job agree on the step,
    whichever of them received the signal."""

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`; in a job, every process must ask at every step."""
        if jax.process_count() == 1:
            return self._requested

        # Every process must ask at every step: the answer is a step that none of them has passed.
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:  # otherwise jax.distributed handles it
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Only a flag: a signal can arrive in the middle of a step or of a save.
        self._requested = True


def updated(metrics: dict[str, jax.Array]) -> bool:
    """Whether a step changed the parameters; waits for the step to end."""
    return not int(jax.device_get(metrics["skipped"]))


class SkipGuard:
    """Counts consecutive skipped updates; one more than the limit stops the run.

    The device decides whether an update is skipped. The guard reads steps that have already ended, so it costs no wait.
    """

    def __init__(self, folder: Path, limit: int, batches: Batches, cache: str):
        """Starts without skipped updates.

        Args:
            folder: of the run, where a report is written.
            limit: consecutive skipped updates that are tolerated.
            batches: give the sample ids of a step.
            cache: the samples' source, named in the report.
        """
        self.folder, self.limit, self.batches, self.cache = folder, limit, batches, cache
        self.streak: list[int] = []

    def watch(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Raises UserError, after writing a report, when step `step` was one skip too many."""
        if updated(metrics):
            self.streak.clear()
            return

        # Steps and not a count: the report names the samples of each.
        self.streak.append(step)
        if len(self.streak) <= self.limit:
            return

        # The cause of the last skip words the sentence: missing supervision and non-finite numbers need different
        # cures.
        several = (
            f"in {len(self.streak)} steps in a row, up to step {step + 1}, so the run stopped; its last checkpoint"
        )
        if int(jax.device_get(metrics["unsupervised"])):
            path = self._report("unsupervised.json")
            raise UserError(
                f"There was no supervised token to learn from {several} is kept. {path} names the samples of these "
                "steps; raise data.max_length, or leave conversations without an answer out."
            )

        path = self._report("nonfinite.json")
        raise UserError(
            f"Loss or gradient was not finite {several}, made of good steps alone, is kept. {path} names the samples "
            "of these steps; lower the learning rate or leave such samples out."
        )

    def _report(self, name: str) -> Path:
        path = self.folder / name
        if is_first():
            steps = [{"step": s + 1, "sample_ids": self.batches.sample_ids_at(s)} for s in self.streak]
            write_json(path, {"cache": self.cache, "steps": steps})

        return path
