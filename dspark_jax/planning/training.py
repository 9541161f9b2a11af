"""A training run as shapes, on devices that need not be attached: the basis of lowering, estimates and plans."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dspark_jax.checkpoints.huggingface import DTYPES, abstract_target
from dspark_jax.config.schema import DataSettings, TrainConfig
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.planning.published_targets import planned_target
from dspark_jax.sharding import AnyMesh, batch_shardings
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.target import Target
from dspark_jax.training.placement import Placement
from dspark_jax.training.spec import StepSpec
from dspark_jax.training.states import States, StoredStates
from dspark_jax.training.step import TrainState, TrainStep

SCHEDULED_STEPS = 10_000
"""Length of the learning-rate schedule; no shape depends on it."""


@dataclass(frozen=True)
class AbstractRun:
    """ShapeDtypeStructs with shardings of the arguments of a training step, and the step itself.

    Attributes:
        name, seed, data: from the configuration.
        target: described, without parameters.
        spec: what the step is made of.
        shared, batch: the step's arguments beside the state.
        step: the step that a run of this configuration compiles.
        states: source of the target's states.
        target_params: those of a target that runs in the step, else None; a hybrid run is planned as its first epoch.
    """

    name: str
    seed: int
    data: DataSettings
    target: Target
    spec: StepSpec
    shared: SharedTables
    batch: dict[str, jax.ShapeDtypeStruct]
    step: TrainStep
    states: States
    target_params: dict | None

    @classmethod
    def of(cls, config: TrainConfig, mesh: AnyMesh) -> "AbstractRun":
        """The plan of a configuration on a mesh; reads small files only. UserError as `Run.of`, where parts do not fit
        together."""
        target = planned_target(config.target)
        # The very description that a run compiles, on a mesh of devices that may not exist.
        spec = StepSpec.of(config, target, mesh, SCHEDULED_STEPS)
        batch = abstract_batch(config.data, len(spec.drafter.target_layer_ids), target.config.hidden_size)
        shardings = batch_shardings(batch, mesh, spec.placement.rules)
        # Rows lie over the batch axes, as `device_batch` puts them.
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in batch.items()}

        states: States = StoredStates(DTYPES[spec.dtype])
        target_params = None

        if config.data.source != "offline":
            placed = spec.placement.mesh, spec.placement.rules
            target_params = abstract_target(target.config, spec.dtype, *placed)[1]
            # A hybrid run's first epoch passes the states through the codec; an online run never encodes them.
            codec = config.data.codec if config.data.source == "hybrid" else None
            online = spec.target_states(target, target_params, codec)
            states, target_params = online, online.arranged(target_params)

        shared = abstract_tables(target.config, spec.dtype, spec.placement)

        return cls(
            name=config.name,
            seed=config.seed,
            data=config.data,
            target=target,
            spec=spec,
            shared=shared,
            batch=batch,
            step=spec.step(states),
            states=states,
            target_params=target_params,
        )

    @property
    def drafter_hf(self) -> dict[str, Any]:
        """config.json of the drafter."""
        return self.spec.drafter_hf

    @property
    def placement(self) -> Placement:
        """The mesh and its sharding rules."""
        return self.spec.placement

    @property
    def state(self) -> TrainState:
        """Shapes and shardings of the training state."""
        return self.spec.abstract

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.spec.accumulation_steps

    @property
    def rows_a_device(self) -> int:
        """Sequences of one micro-batch on one device."""
        # Exact: `micro_batches` refused a batch that does not divide.
        return self.data.global_batch // (self.micro_batches * self.placement.rules.row_groups(self.placement.mesh))

    def lower(self, platform: str) -> jax.stages.Lowered:
        """The step lowered for "tpu", "cuda" or "cpu", whatever is attached."""
        online = () if self.target_params is None else (self.target_params,)
        # Kernels are chosen, and a GPU's lowered, for the devices of the mesh in the context.
        mesh = self.placement.mesh
        with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
            return self.step.trace(self.state, self.shared, self.batch, *online).lower(lowering_platforms=(platform,))


def abstract_tables(config: TargetConfig, dtype: str, placement: Placement) -> SharedTables:
    """The target's embedding and head [V, D] as shapes with shardings."""
    # Embedding and head have one shape, tied or not.
    table: Any = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), DTYPES[dtype])
    shared = SharedTables.of(config, table, table)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shared, placement.tables(shared)
    )


def abstract_batch(data: DataSettings, taps: int, hidden_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """One step's batch, padded to the longest bucket; its states are those of a bfloat16 cache."""
    # The longest bucket sets the peak of memory, and is a program of its own.
    rows, length = data.global_batch, data.length_buckets[-1] if data.length_buckets else data.max_length
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "input_ids": ((rows, length), jnp.int32),
        "loss_mask": ((rows, length), jnp.uint8),
        "lengths": ((rows,), jnp.int32),
    }
    if data.packing:
        shapes["segments"] = ((rows, length), jnp.int32)

    # Other sources compute the states in the step.
    if data.source == "offline":
        shapes["features"] = ((rows, length, taps * hidden_size), jnp.bfloat16)
        shapes["last_hidden"] = ((rows, length, hidden_size), jnp.bfloat16)

    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
