"""What a run's steps are fed with: states from shards, from the target in the step, or from both in turn.

A feed gives the batches in order and runs the step that takes them; the loop knows no more than that.
"""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.checkpoints.target_tables import load_rest
from dspark_jax.config.schema import TrainConfig
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.sharding import gathered
from dspark_jax.targets.target import Target
from dspark_jax.training.online import FirstEpoch, Recorder
from dspark_jax.training.run import RunPlan, make_batches
from dspark_jax.training.states import TargetStates
from dspark_jax.training.step import Placement, TrainState
from dspark_jax.training.trainer import Trainer

DeviceBatches = Generator[dict[str, jax.Array]]
Stepped = tuple[TrainState, dict[str, jax.Array]]


class Offline:
    """Batches with the states that shards hold."""

    def __init__(self, trainer: Trainer, shared: SharedTables, start: int):
        self.batches: DeviceBatches = trainer.device_batches(start)
        self._step = trainer.step()
        self._shared = shared

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> Stepped:
        """The step after the last; the state is donated."""
        return self._step(state, self._shared, batch)

    def flush(self) -> None:
        """Called before a checkpoint: what its steps leave behind beside it is on disk when this returns."""

    def close(self) -> None:
        self.batches.close()


class Online(Offline):
    """Batches of tokens; the target, laid over the run's mesh, computes their states in the step."""

    def __init__(self, trainer: Trainer, shared: SharedTables, start: int):
        self.batches = trainer.device_batches(start)
        self._shared, self._target = shared, target_params(trainer, shared)
        plan = trainer.plan
        self._step = trainer.step(target_states(plan.config, plan.target, trainer.placement, self._target))

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> Stepped:
        return self._step(state, self._shared, batch, self._target)


class Hybrid(Offline):
    """The first epoch online, its states through the cache's codec and into shards; then from these."""

    def __init__(self, trainer: Trainer, shared: SharedTables, start: int):
        super().__init__(trainer, shared, start)
        plan = trainer.plan
        self._trainer, self._at, self._switch = trainer, start, plan.batches.steps_per_epoch
        self._recorder = Recorder(cache_folder(plan), FirstEpoch.of(plan.batches), plan.config, plan.target, start)
        self._target: Any = None
        if start < self._switch:
            self._target = target_params(trainer, shared)
            codec = plan.config.data.codec
            states = target_states(plan.config, plan.target, trainer.placement, self._target, codec)
            self._recorded = trainer.step(states, record=True)
        self.batches = self._phases(start)

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> Stepped:
        self._at += 1
        if self._at > self._switch:
            return super().step(state, batch)
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
        plan, total = self._trainer.plan, self._trainer.plan.total_steps
        if start < self._switch:
            yield from self._trainer.device_batches(start, min(self._switch, total))
        if total <= self._switch:
            return
        # Asked for once the epoch's last step is under way: from here on the target is not needed.
        batches = make_batches(plan.config.data, self._recorder.finish(), plan.mesh)
        self._target = None
        stored = replace(self._trainer, plan=replace(plan, batches=batches))
        yield from stored.device_batches(max(start, self._switch))


FEEDS = {"offline": Offline, "online": Online, "hybrid": Hybrid}


def open_feed(trainer: Trainer, shared: SharedTables, start: int) -> Offline:
    """The feed that the run's data settings name, from step `start` on; close it."""
    return FEEDS[trainer.plan.config.data.source](trainer, shared, start)


def cache_folder(plan: RunPlan) -> Path:
    """Where a hybrid run keeps its cache."""
    return Path(plan.config.data.cache) if plan.config.data.cache else plan.folder / "cache"


def target_params(trainer: Trainer, shared: SharedTables) -> dict:
    """The whole target in the compute dtype over the run's mesh, with the tables that are loaded already."""
    plan = trainer.plan
    tables = {"embed_weight_vd": shared.embed, "head_weight_vd": shared.head}
    dtype = plan.config.compute_dtype
    return load_rest(plan.target, tables, dtype=dtype, mesh=plan.mesh, rules=trainer.placement.rules)


def target_states(
    config: TrainConfig, target: Target, placement: Placement, params: dict, codec: str | None = None
) -> TargetStates:
    """States of the run's layers from such parameters (or their shapes), each gathered from its storage where it is
    used."""
    return TargetStates(
        graphdef=target.graphdef,
        layer_ids=tuple(config.drafter.target_layer_ids),
        dtype=DTYPES[config.compute_dtype],
        codec=codec,
        whole=jax.tree.map(lambda x: gathered(x.sharding, placement.rules), params),
    )
