"""The initial parameters of a run: random, copies of target layers, or those of an earlier drafter."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.target_tables import load_layers
from dspark_jax.data.codecs import STATES, decode_states
from dspark_jax.drafters.registry import graft_target_layers, new_params, with_draft_head, with_head_norms
from dspark_jax.errors import UserError
from dspark_jax.training.run import Run
from dspark_jax.training.step import TrainState, init_train_state


def initial_state(run: Run) -> TrainState:
    """The training state at step 0, each device making its own part; UserError where the given start does not fit."""
    # An earlier drafter and copied layers exclude one another; the configuration was checked for that.
    spec, start = run.step, None
    if run.init_drafter:
        start = earlier_params(run)
    elif run.init_layers:
        start = grafted_params(run)

    # A pruned head is rows of the target's head, frozen; an earlier drafter brings its own.
    if getattr(spec.drafter, "draft_vocabulary", None) is not None and not run.init_drafter:
        fresh = start or new_params(spec.drafter_hf, jax.random.key(run.seed))
        start = with_draft_head(spec.drafter_hf, fresh, shared_tables(run.tables()).head)

    return init_train_state(spec.drafter_hf, spec.optimizer, run.seed, spec.placement, start)


def earlier_params(run: Run) -> dict:
    """The parameters of `drafter.init_drafter`; UserError when it is not of this run's shape and vocabulary."""
    spec, name = run.step, run.init_drafter
    # In float32, as the optimizer keeps its masters, whatever the file's dtype; codes cannot be trained.
    tables = replace(run.tables(), config=run.target.config.widened)
    loaded = load_drafter(name, tables, dtype="float32", mesh=spec.mesh, rules=spec.placement.rules)
    expected = jax.tree.map(lambda x: x.shape, spec.abstract.params)

    # Equal shapes prove neither an equal vocabulary, compared by its ids, nor anchors that both predict or both wait.
    names = ("block_size", "draft_vocabulary", "sample_from_anchor")
    same = all(getattr(loaded.config, name, None) == getattr(spec.drafter, name, None) for name in names)
    if not same or jax.tree.map(jnp.shape, loaded.params) != expected:
        raise UserError(
            f"The drafter in {name} has not the layers, heads, block or draft vocabulary of this run; give one "
            "that was trained with its settings, or leave out drafter.init_drafter."
        )

    return loaded.params


def grafted_params(run: Run) -> dict:
    """Fresh parameters with draft layers copied from target layers and context features equal to the last tap.

    A short run would not learn such attention and MLPs from random parameters.
    """
    spec = run.step
    # The named layers alone are read, not the target.
    layers, final_norm = load_layers(run.target, run.init_layers, mesh=spec.mesh, rules=spec.placement.rules)
    params = new_params(spec.drafter_hf, jax.random.key(run.seed))
    chosen, dims = [layers[i] for i in run.init_layers], spec.drafter.backbone

    # The target's layers have no norms of q and k to copy: theirs are fitted to the magnitudes of real states.
    if dims.query_key_norm and not run.target.config.query_key_norm:
        rows = last_tap_rows(run)
        heads = [layer.head_dim for layer in dims.layers]
        chosen = [with_head_norms(c, rows, h, dims.rms_norm_eps) for c, h in zip(chosen, heads, strict=True)]

    return graft_target_layers(spec.drafter_hf, params, chosen, final_norm)


def last_tap_rows(run: Run, batch: Mapping[str, np.ndarray] | None = None) -> jax.Array:
    """[N, D] float32: outputs of the last tapped layer at the N real positions of a batch.

    Args:
        run: with stored states.
        batch: None for the run's first.
    Raises:
        UserError: the batch has no states, as in runs whose target computes them in the step.
    """
    if batch is None:
        # The first batch is as good as any, and the same in every process.
        with run.batches.iterate(0, 1) as batches:
            batch = next(iter(batches))

    if not set(STATES) & set(batch):
        raise UserError(
            "Copies of layers that have no norms of q and k are fitted on stored states, and data.source "
            f"{run.data.source} has none before the run; use data.source offline, or leave out "
            "drafter.init_target_layers."
        )

    features = decode_states({name: batch[name] for name in STATES if name in batch}, np.float32, np)["features"]
    real = np.arange(features.shape[1]) < np.asarray(batch["lengths"])[:, None]

    # Taps are concatenated in ascending order of their layers, so the last D features are the last tap's.
    return jnp.asarray(features[real][:, -run.target.config.hidden_size :])
