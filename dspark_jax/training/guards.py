"""What ends a run before its time: updates that are not finite, and a machine that is taken away."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from dspark_jax.distributed import is_first
from dspark_jax.errors import UserError
from dspark_jax.files import write_json
from dspark_jax.training.run import RunPlan


class Preempted(Exception):
    """The run was asked to end, and is saved."""

    def __init__(self, step: int):
        super().__init__(f"Stopped by SIGTERM after step {step}, which is saved; the same command continues there.")
        self.step = step


class Preemption:
    """Notes SIGTERM, so that the loop can save and leave between two steps. With several processes all of them agree on
    the step, whichever was told."""

    def __init__(self) -> None:
        self._told = False
        self._before: Any = None

    def requested(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:  # else jax.distributed listens for it
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True


def updated(metrics: dict[str, jax.Array]) -> bool:
    """Whether a step changed the parameters; waits for it."""
    return not int(jax.device_get(metrics["skipped"]))


class SkipGuard:
    """Counts the updates that were skipped one after the other; one more than the limit stops the run.

    The device decides by itself whether an update is skipped; this looks at steps that have ended, and costs no wait.
    """

    def __init__(self, plan: RunPlan):
        self.plan = plan
        self.streak: list[int] = []

    def watch(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Raises UserError, after writing RUN/nonfinite.json, when step `step` was one skip too many."""
        if updated(metrics):
            self.streak.clear()
            return
        self.streak.append(step)
        limit = self.plan.config.optimizer.max_skipped
        if len(self.streak) > limit:
            path = self._report()
            raise UserError(
                f"Loss or gradient was not finite in {len(self.streak)} steps in a row, up to step {step + 1}, so the "
                f"run stopped; its last checkpoint, made of good steps alone, is kept. {path} names the samples of "
                "these steps; lower the learning rate or leave such samples out."
            )

    def _report(self) -> Path:
        path, batches = self.plan.folder / "nonfinite.json", self.plan.batches
        if is_first():
            steps = [{"step": s + 1, "sample_ids": batches.sample_ids_at(s)} for s in self.streak]
            write_json(path, {"cache": self.plan.config.data.cache, "steps": steps})
        return path
