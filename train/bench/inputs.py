"""Inputs for timing a training step: random arrays in a run's shapes, or the first batch of its cache."""

from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.checkpoints.drafters import shared_tables
from dspark_jax.config.schema import TrainConfig
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.errors import UserError
from dspark_jax.planning.training import AbstractRun
from dspark_jax.training.feeds import first_batch
from dspark_jax.training.run import Run
from dspark_jax.training.step import TrainState, init_train_state

Borrowed = tuple[Any, ...]  # the step's arguments after the state


def random_inputs(run: AbstractRun) -> tuple[TrainState, Borrowed]:
    """A fresh state, random tables, full rows of supervised random tokens, and a random target if the step has one."""
    # Random weights of the usual scale: products of zeros could be faster, and logits must not overflow.
    spread = run.target.config.initializer_range

    def fill(tree: Any, seed: int) -> Any:
        """Random weights of the initial scale; norms are 1."""
        leaves, structure = jax.tree.flatten(tree)

        def make(key: jax.Array) -> list[jax.Array]:
            keys = jax.random.split(key, len(leaves))
            return [
                spread * jax.random.normal(k, x.shape, x.dtype) if x.ndim > 1 else jnp.ones(x.shape, x.dtype)
                for k, x in zip(keys, leaves, strict=True)
            ]

        # Made on the devices, each its own shard: no host could hold a large target.
        made = jax.jit(make, out_shardings=[x.sharding for x in leaves])(jax.random.key(seed))
        return jax.tree.unflatten(structure, made)

    target = () if run.target_params is None else (fill(run.target_params, 1),)
    shared, config = run.shared, run.target.config
    embed, head = fill([shared.embed, shared.head], 2)
    tables = SharedTables.of(config, embed, embed if config.tie_word_embeddings else head)

    return initial_state(run), (tables, random_batch(run), *target)


def random_batch(run: AbstractRun) -> dict[str, jax.Array]:
    def value(name: str, x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        # Full rows, all supervised: the most work that a batch of this shape can be.
        if name == "input_ids":
            return jax.random.randint(key, x.shape, 0, run.target.config.vocab_size, x.dtype)
        if name == "lengths":
            return jnp.full(x.shape, run.batch["input_ids"].shape[1], x.dtype)
        if jnp.issubdtype(x.dtype, jnp.integer):  # loss_mask; one segment
            return jnp.ones(x.shape, x.dtype)
        return jax.random.normal(key, x.shape, x.dtype)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(run.batch))
        return {name: value(name, x, k) for (name, x), k in zip(run.batch.items(), keys, strict=True)}

    shardings = {name: x.sharding for name, x in run.batch.items()}
    return jax.jit(make, out_shardings=shardings)(jax.random.key(run.data.seed))


def cached_inputs(run: AbstractRun, config: TrainConfig) -> tuple[TrainState, Borrowed]:
    """A fresh state, the target's own tables and the first batch of the configuration's cache."""
    if run.data.source != "offline" or not run.data.cache:
        raise UserError("A batch of a cache needs data.source offline and data.cache; name one, or leave out --batch.")
    whole = Run.of(config)
    return initial_state(run), (shared_tables(whole.tables()), first_batch(whole))


def initial_state(run: AbstractRun) -> TrainState:
    return init_train_state(run.drafter_hf, run.spec.optimizer, run.seed, run.placement)
