"""Checkpoints for resuming: the training state and what the run had counted, saved in the background, atomically.

A step that was being written when the process died stays under a temporary name, is never listed, and is removed when
the run continues.
"""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from dspark_jax.errors import UserError

State = TypeVar("State")


def abstract(state: State) -> State:
    """ShapeDtypeStructs with shardings in place of the arrays of a pytree: what `restore` needs to know."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


class Checkpoints:
    """The checkpoints of one run, by optimizer step; `with` waits for the writes under way.

    A checkpoint is a pytree of arrays, sharded or not, and a JSON value beside it; both or neither are there.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        self.folder = Path(folder).absolute()
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        found = self._orbax.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, extra: Any) -> None:
        """Starts saving; returns once `state` may be donated. A save still under way is waited for first."""
        frozen = json.loads(json.dumps(extra))  # it is written later, and the caller's value may change until then
        # Orbax brings arrays to the host by itself, which a transfer guard of the caller would refuse.
        with jax.transfer_guard("allow"):
            self._orbax.save_async(step, state, custom_metadata=frozen, force=True)

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
        """Returns when every save is on disk."""
        self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
