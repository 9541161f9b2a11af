"""Checkpoints for resuming: the training state and what the run had counted, saved in the background, atomically.

A step that was being written when the process died stays under a temporary name, is never listed, and is removed when
the run continues.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from dspark_jax.errors import UserError

State = TypeVar("State")


def _score(metrics: Any) -> float:
    return metrics["score"]


def abstract(state: State) -> State:
    """ShapeDtypeStructs with shardings in place of the arrays of a pytree: what `restore` needs to know."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


class Checkpoints:
    """The checkpoints of one run, by optimizer step; `with` waits for the writes under way.

    A checkpoint is a pytree of arrays, sharded or not, and a JSON value beside it; both or neither are there. The
    latest `keep` are kept, and of those saved with a score the `keep_best` highest.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int, keep_best: int = 0):
        self.folder = Path(folder).absolute()
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False)
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        found = self._orbax.latest
        return None if found is None else found.step

    @property
    def best(self) -> int | None:
        """Step of the highest score, the latest of equals; None when none was scored."""
        scored = [info for info in self._orbax.checkpoints if info.metrics is not None]
        return max(scored, key=lambda info: (_score(info.metrics), info.step)).step if scored else None

    def save(self, step: int, state: Any, extra: Any, score: float | None = None) -> None:
        """Starts saving; returns once `state` may be donated. A save still under way is waited for first.

        Raises UserError when this or the save before it can't be written; what was saved earlier stays whole.
        """
        frozen = json.loads(json.dumps(extra))  # it is written later, and the caller's value may change until then
        metrics = None if score is None else {"score": score}
        # Orbax brings arrays to the host by itself, which a transfer guard of the caller would refuse.
        with jax.transfer_guard("allow"), self._reported():
            self._orbax.save_async(step, state, custom_metadata=frozen, force=True, metrics=metrics)

    def restore(self, step: int, like: State) -> tuple[State, Any]:
        """(state, extra) of a step. `like`: the state's `abstract` tree; its shardings may differ from the saved ones.

        UserError when the checkpoint does not hold such a state.
        """
        try:
            state = self._orbax.load(step, like)
            return state, self._orbax.metadata(step).custom_metadata
        except (ValueError, KeyError, TypeError, FileNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} cannot be read into this drafter ({reason}); remove "
                "it to continue from an earlier one, or give another run folder."
            ) from error

    def wait(self) -> None:
        """Returns when every save is on disk; UserError as `save` raises it."""
        with self._reported():
            self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """What the writing of a save raises, here or in its thread, as a sentence."""
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
