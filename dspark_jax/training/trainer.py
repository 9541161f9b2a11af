"""What a run compiles and places on its devices once: the step, the frozen tables, the shape of the state."""

from bisect import bisect_left
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.checkpoints.target_tables import load_layers, load_tables
from dspark_jax.config.schema import TrainConfig
from dspark_jax.data.codecs import STATES, decode_states
from dspark_jax.data.pipeline import Batch
from dspark_jax.drafters.registry import graft_target_layers, new_params, with_draft_head, with_head_norms
from dspark_jax.errors import UserError
from dspark_jax.sharding import ShardingRules, batch_shardings
from dspark_jax.targets.target import Target
from dspark_jax.training.losses import LossOptions
from dspark_jax.training.registry import make_objective
from dspark_jax.training.run import RunPlan, micro_batches
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.states import States, StoredStates
from dspark_jax.training.step import (
    Placement,
    TrainState,
    TrainStep,
    abstract_train_state,
    init_train_state,
    make_train_step,
)

BATCH_KEYS = ("input_ids", "loss_mask", "lengths", "segments", *STATES)


def sharding_rules(config: TrainConfig) -> ShardingRules:
    """How a run lays parameters and tables over its mesh."""
    rules = ShardingRules()
    return rules.sharded_markov() if config.mesh.markov_tables == "sharded" else rules


def recipe(config: TrainConfig, total_steps: int) -> tuple[Any, Any]:
    """(optimizer, learning-rate schedule) of a run of so many steps."""
    settings = config.optimizer
    schedule = learning_rate_schedule(settings.learning_rate, total_steps, settings.warmup_ratio, settings.schedule)
    return make_optimizer(schedule, settings.betas, settings.eps, settings.weight_decay, settings.clip_norm), schedule


def loss_options(config: TrainConfig) -> LossOptions:
    loss = config.loss
    terms = loss.ce_alpha, loss.l1_alpha, loss.confidence_alpha, loss.decay_gamma
    return LossOptions(*terms, anchor_chunk=config.anchor_chunk)


def train_step(
    config: TrainConfig,
    drafter_hf: dict[str, Any],
    optimizer: Any,
    schedule: Any,
    placement: Placement,
    abstract: TrainState,
    states: States | None = None,
    record: bool = False,
) -> TrainStep:
    """The step that a run compiles; on an abstract mesh, the step that it would compile. `states`, `record`: see
    `make_train_step`; None: states that come with the batch."""
    return make_train_step(
        make_objective(drafter_hf, loss_options(config), DTYPES[config.compute_dtype]),
        optimizer,
        schedule,
        accumulation_steps=micro_batches(config.data, placement.mesh),
        placement=placement,
        abstract=abstract,
        states=states or StoredStates(DTYPES[config.compute_dtype]),
        record=record,
    )


@dataclass(frozen=True)
class Trainer:
    """A plan, and what every part of its run agrees on."""

    plan: RunPlan
    optimizer: Any
    schedule: Any
    placement: Placement
    abstract: TrainState

    @classmethod
    def of(cls, plan: RunPlan) -> "Trainer":
        optimizer, schedule = recipe(plan.config, plan.total_steps)
        placement = Placement(plan.mesh, sharding_rules(plan.config))
        return cls(plan, optimizer, schedule, placement, abstract_train_state(plan.drafter_hf, optimizer, placement))

    def target(self) -> Target:
        """The target with its embedding and head in the compute dtype, and nothing else."""
        dtype = self.plan.config.compute_dtype
        return load_tables(self.plan.target, dtype=dtype, mesh=self.plan.mesh, rules=self.placement.rules)

    def initial(self) -> TrainState:
        settings = self.plan.config.drafter
        start = None
        if settings.init_drafter:
            start = self.earlier()
        elif settings.init_target_layers:
            start = self.grafted()
        if getattr(self.plan.drafter, "draft_vocabulary", None) is not None and not settings.init_drafter:
            fresh = start or new_params(self.plan.drafter_hf, jax.random.key(self.plan.config.seed))
            start = with_draft_head(self.plan.drafter_hf, fresh, shared_tables(self.target()).head)
        return init_train_state(self.plan.drafter_hf, self.optimizer, self.plan.config.seed, self.placement, start)

    def earlier(self) -> dict:
        """The parameters of `drafter.init_drafter`; UserError when it is not of this run's shape and vocabulary."""
        name, plan = self.plan.config.drafter.init_drafter, self.plan.drafter
        loaded = load_drafter(name, self.target(), dtype="float32", mesh=self.plan.mesh, rules=self.placement.rules)
        expected = jax.tree.map(lambda x: x.shape, self.abstract.params)
        alike = jax.tree.map(jnp.shape, loaded.params) == expected and loaded.config.block_size == plan.block_size
        if not alike or getattr(loaded.config, "draft_vocabulary", None) != getattr(plan, "draft_vocabulary", None):
            raise UserError(
                f"The drafter in {name} has not the layers, heads, block or draft vocabulary of this run; give one "
                "that was trained with its settings, or leave out drafter.init_drafter."
            )
        return loaded.params

    def grafted(self) -> dict:
        """Fresh parameters whose draft layers are copies of target layers, and whose context features start as what the
        last tap holds: attention and MLPs that a short run would not learn by itself."""
        ids = self.plan.config.drafter.init_target_layers
        layers, final_norm = load_layers(self.plan.target, ids, mesh=self.plan.mesh, rules=self.placement.rules)
        params = new_params(self.plan.drafter_hf, jax.random.key(self.plan.config.seed))
        chosen = [layers[i] for i in ids]
        dims = self.plan.drafter.backbone
        if dims.query_key_norm and not self.plan.target.config.query_key_norm:
            rows = self.last_tap_rows()
            chosen = [with_head_norms(layer, rows, dims.rms_norm_eps) for layer in chosen]
        return graft_target_layers(self.plan.drafter_hf, params, chosen, final_norm)

    def last_tap_rows(self, batch: Batch | None = None) -> jax.Array:
        """[N, D]: what the last tapped layer left at the real positions of a batch; None: of the run's first.

        Raises:
            UserError: the batch has no states, as in runs whose target computes them in the step.
        """
        if batch is None:
            with self.plan.batches.iterate(0, 1) as batches:
                batch = next(iter(batches))
        if not set(STATES) & set(batch):
            raise UserError(
                "Copies of layers that have no norms of q and k are fitted on stored states, and data.source "
                f"{self.plan.config.data.source} has none before the run; use data.source offline, or leave out "
                "drafter.init_target_layers."
            )
        features = decode_states({name: batch[name] for name in STATES if name in batch}, np.float32, np)["features"]
        real = np.arange(features.shape[1]) < np.asarray(batch["lengths"])[:, None]
        return jnp.asarray(features[real][:, -self.plan.target.config.hidden_size :])

    def step(self, states: States | None = None, record: bool = False) -> TrainStep:
        recipe = (self.optimizer, self.schedule, self.placement, self.abstract)
        return train_step(self.plan.config, self.plan.drafter_hf, *recipe, states, record)

    def device_batch(self, batch: Batch) -> dict[str, jax.Array]:
        """This host's rows of a batch as global arrays, rows over the mesh."""
        rows, here = self.plan.batches.global_batch, self.plan.batches.rows
        kept = {key: batch[key] for key in BATCH_KEYS if key in batch}
        shardings = batch_shardings(kept, self.plan.mesh, self.placement.rules)

        def part(value: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            first = start if here is None else bisect_left(here, start)
            return value[first : first + stop - start]

        with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a step needs
            return {
                key: jax.make_array_from_callback((rows, *value.shape[1:]), shardings[key], partial(part, value))
                for key, value in kept.items()
            }

    def device_batches(self, start: int, stop: int | None = None) -> Generator[dict[str, jax.Array]]:
        """Batches from step `start` up to `stop` (None: the last), read and padded by threads ahead of the loop."""
        with self.plan.batches.iterate(start, self.plan.total_steps if stop is None else stop) as batches:
            for batch in batches:
                yield self.device_batch(batch)
