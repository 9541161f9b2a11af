"""A training run as shapes, on devices that need not be attached: the start of lowering, estimates and plans."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.checkpoints.huggingface import DTYPES, target_skeleton
from dspark_jax.config.schema import TrainConfig
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.planning.published_targets import planned_target
from dspark_jax.sharding import AnyMesh, batch_shardings, parameter_shardings, split
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.target import Target
from dspark_jax.training.feeds import target_states
from dspark_jax.training.run import drafter_config, micro_batches
from dspark_jax.training.states import States, StoredStates
from dspark_jax.training.step import Placement, TrainState, TrainStep, abstract_train_state
from dspark_jax.training.trainer import recipe, sharding_rules, train_step

SCHEDULED_STEPS = 10_000
"""Of the learning-rate schedule: a constant of the program, which no shape depends on."""


@dataclass(frozen=True)
class AbstractRun:
    """ShapeDtypeStructs with shardings of everything that a training step takes, and the step itself.

    `target_params` are the target's where it runs in the step; a hybrid run is planned as its first epoch.
    """

    config: TrainConfig
    target: Target
    drafter_hf: dict[str, Any]
    placement: Placement
    state: TrainState
    shared: SharedTables
    batch: dict[str, jax.ShapeDtypeStruct]
    step: TrainStep
    states: States
    target_params: dict | None

    @classmethod
    def of(cls, config: TrainConfig, mesh: AnyMesh) -> "AbstractRun":
        """Reads small files only; UserError for whatever does not fit together, as `make_plan` has it."""
        micro_batches(config.data, mesh)
        target = planned_target(config.target)
        drafter_hf = drafter_config(config, target)
        optimizer, schedule = recipe(config, SCHEDULED_STEPS)
        placement = Placement(mesh, sharding_rules(config))
        state = abstract_train_state(drafter_hf, optimizer, placement)
        shared = abstract_tables(target.config, config.compute_dtype, placement)
        batch = abstract_batch(config, target.config)
        shardings = batch_shardings(batch, mesh, placement.rules)
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in batch.items()}
        states: States = StoredStates(DTYPES[config.compute_dtype])
        target_params = None
        if config.data.source != "offline":
            target_params = abstract_target_params(target.config, config.compute_dtype, placement)
            codec = config.data.codec if config.data.source == "hybrid" else None
            states = target_states(config, target, placement, target_params, codec)
        step = train_step(config, drafter_hf, optimizer, schedule, placement, state, states)
        return cls(config, target, drafter_hf, placement, state, shared, batch, step, states, target_params)

    @property
    def micro_batches(self) -> int:
        return micro_batches(self.config.data, self.placement.mesh)

    def lower(self, platform: str) -> jax.stages.Lowered:
        """The step lowered for tpu, cuda or cpu, whatever is here."""
        online = () if self.target_params is None else (self.target_params,)
        return self.step.trace(self.state, self.shared, self.batch, *online).lower(lowering_platforms=(platform,))


def abstract_tables(config: TargetConfig, dtype: str, placement: Placement) -> SharedTables:
    table: Any = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), DTYPES[dtype])
    shared = SharedTables.of(config, table, table)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shared, placement.tables(shared)
    )


def abstract_target_params(config: TargetConfig, dtype: str, placement: Placement) -> dict:
    skeleton = target_skeleton(config)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, DTYPES[dtype], sharding=s),
        split(skeleton)[1],
        parameter_shardings(skeleton, placement.mesh, placement.rules),
    )


def abstract_batch(config: TrainConfig, target: TargetConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One step's batch at its longest; the states that it brings are those of a bfloat16 cache."""
    data, width = config.data, len(config.drafter.target_layer_ids) * target.hidden_size
    rows, length = data.global_batch, data.length_buckets[-1] if data.length_buckets else data.max_length
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "input_ids": ((rows, length), jnp.int32),
        "loss_mask": ((rows, length), jnp.uint8),
        "lengths": ((rows,), jnp.int32),
    }
    if data.packing:
        shapes["segments"] = ((rows, length), jnp.int32)
    if data.source == "offline":
        shapes["features"] = ((rows, length, width), jnp.bfloat16)
        shapes["last_hidden"] = ((rows, length, target.hidden_size), jnp.bfloat16)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
