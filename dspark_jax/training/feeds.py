"""Batch sources of a run: states from shards (offline), from the target in the step (online), or both (hybrid).

A feed yields batches in order and runs the step that takes them, so the loop does not depend on the source.
"""

from bisect import bisect_left
from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np

from dspark_jax.checkpoints.huggingface import resolve_folder
from dspark_jax.checkpoints.target_tables import load_rest
from dspark_jax.data.codecs import STATES
from dspark_jax.data.pipeline import Batch, Batches
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.files import weights_hash
from dspark_jax.sharding import batch_shardings
from dspark_jax.training.online import FirstEpoch, Recorder
from dspark_jax.training.placement import Placement
from dspark_jax.training.run import Run
from dspark_jax.training.states import TargetStates
from dspark_jax.training.step import TrainState

DeviceBatches = Generator[dict[str, jax.Array]]
Stepped = tuple[TrainState, dict[str, jax.Array]]
BATCH_KEYS = ("input_ids", "loss_mask", "lengths", "segments", *STATES)


class Offline:
    """Batches whose states are read from a cache's shards."""

    def __init__(self, run: Run, shared: SharedTables, start: int):
        # A generator: nothing is read before the first batch is asked for.
        self.batches: DeviceBatches = device_batches(run.batches, run.step.placement, start, run.total_steps)
        self._step = run.step.step()
        self._shared = shared

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> Stepped:
        """Takes the next step on `batch`; the state is donated."""
        return self._step(state, self._shared, batch)

    def flush(self) -> None:
        """Called before a checkpoint: on return, records that earlier steps produced are on disk."""

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self.batches.close()


class Online(Offline):
    """Batches of tokens; the target, laid over the run's mesh, computes their states in the step."""

    def __init__(self, run: Run, shared: SharedTables, start: int):
        # Not `super().__init__`: that would build the step of stored states.
        self.batches = device_batches(run.batches, run.step.placement, start, run.total_steps)
        states, self._target = target_in_step(run, shared)
        self._shared, self._step = shared, run.step.step(states)

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> Stepped:
        return self._step(state, self._shared, batch, self._target)


class Hybrid(Offline):
    """The first epoch online, its states encoded by the cache's codec and written to shards; later epochs from these.

    The states of the first epoch pass through the codec before the loss sees them, so that every epoch trains on the
    same values.
    """

    def __init__(self, run: Run, shared: SharedTables, start: int):
        super().__init__(run, shared, start)
        self._run, self._at, self._switch = run, start, run.batches.steps_per_epoch

        # The order of the epoch is the order of the cache's records, so it has to be known before the first is
        # written.
        epoch = FirstEpoch.of(run.batches)
        spec = epoch.spec(run.data, run.target, run.step.drafter.target_layer_ids)
        # Another dtype or other weights would give other states under the same name.
        made = {"weights_xxh3": weights_hash(resolve_folder(run.target.name)), "compute_dtype": run.step.dtype}
        self._recorder = Recorder(run.cache, epoch, spec, made, start)

        # A run that resumes after the first epoch needs neither the target nor its step.
        self._target: Any = None

        if start < self._switch:
            states, self._target = target_in_step(run, shared, run.data.codec)
            self._recorded = run.step.step(states, record=True)

        self.batches = self._phases(start)

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> Stepped:
        # `_at` counts the steps taken, which the recorder and the switch between the phases go by.
        self._at += 1
        if self._at > self._switch:
            return super().step(state, batch)

        # Counted before the step runs: the step just taken is `_at - 1`.
        state, metrics, stored = self._recorded(state, self._shared, batch, self._target)
        self._recorder.take(self._at - 1, stored)

        return state, metrics

    def flush(self) -> None:
        if self._at <= self._switch:
            self._recorder.flush()

    def close(self) -> None:
        super().close()
        self._recorder.close()

    def _phases(self, start: int) -> DeviceBatches:
        run, placement = self._run, self._run.step.placement

        if start < self._switch:
            # The last step of the epoch takes rows of the second one too, which are computed and not recorded.
            yield from device_batches(run.batches, placement, start, min(self._switch, run.total_steps))

        if run.total_steps <= self._switch:
            return

        # Reached while the epoch's last step runs; the target is not needed after it.
        # The same rows in the same order as the first epoch's source gave, now with states.
        stored = run.on(self._recorder.finish())
        self._target = None
        yield from device_batches(stored.batches, placement, max(start, self._switch), run.total_steps)


FEEDS = {"offline": Offline, "online": Online, "hybrid": Hybrid}


def open_feed(run: Run, shared: SharedTables, start: int) -> Offline:
    """The feed that the run's data settings name, from step `start` on; close it."""
    return FEEDS[run.data.source](run, shared, start)


# -- Batches on devices ----------------------------------------------------------------------------------------------


def device_batches(batches: Batches, placement: Placement, start: int, stop: int) -> DeviceBatches:
    """Batches of the steps from `start` up to `stop`, read and padded by threads ahead of the loop."""
    with batches.iterate(start, stop) as rows:
        for batch in rows:
            yield device_batch(batch, batches, placement)


def device_batch(batch: Batch, batches: Batches, placement: Placement) -> dict[str, jax.Array]:
    """This host's rows of a batch as global arrays, rows over the mesh."""
    # `here`: the rows of the global batch that this process's devices hold; None where it holds all.
    rows, here = batches.global_batch, batches.rows
    # The device gets only what a step reads.
    kept = {key: batch[key] for key in BATCH_KEYS if key in batch}
    shardings = batch_shardings(kept, placement.mesh, placement.rules)

    def part(value: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        # jax asks by global row numbers; this host holds the rows `here` of the batch, ascending.
        first = start if here is None else bisect_left(here, start)
        return value[first : first + stop - start]

    with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a step needs
        return {
            key: jax.make_array_from_callback((rows, *value.shape[1:]), shardings[key], partial(part, value))
            for key, value in kept.items()
        }


def first_batch(run: Run) -> dict[str, jax.Array]:
    """The batch of the run's first step."""
    with closing(device_batches(run.batches, run.step.placement, 0, 1)) as batches:
        return next(batches)


# -- The target in the step ------------------------------------------------------------------------------------------


def target_in_step(run: Run, shared: SharedTables, codec: str | None = None) -> tuple[TargetStates, dict]:
    """The source of states for a step in which the target runs, and the target in the compute dtype over the run's
    mesh, with the tables that are loaded already.

    `codec`: how a cache stores the states; None: as they are computed.
    """
    tables = {"embed_weight_vd": shared.embed, "head_weight_vd": shared.head}
    spec = run.step
    params = load_rest(run.target, tables, dtype=spec.dtype, mesh=spec.mesh, rules=spec.placement.rules)
    states = spec.target_states(run.target, params, codec)
    return states, states.arranged(params)
