"""The optimizer step of the embedded target: Muon and AdamW on the cross-entropy of weighted labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.joined import apart, together

from .packing import Rows

Params = Any
MATRICES = ("dp", "dc", "pd", "df", "fd")
"""Axis letters of the matrices of attention and MLP, each by itself (targets/joined.py)."""


class State(NamedTuple):
    """Device state of a run; a step donates it and returns its successor."""

    params: Params
    optimizer: optax.OptState


def make_optimizer(weight_decay: float, config: TargetConfig) -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for embedding and norms, both at rate 1: the step applies the clock's rate.

    Muon's updates are scaled to the usual RMS of AdamW's (0.2), so that one rate suits both.
    """
    both = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            learning_rate=1.0,
            weight_decay=weight_decay,
            adam_b1=0.9,
            adam_b2=0.95,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        ),
    )

    # Queries, keys and values, gate and up lie in one array each, but are orthogonalised as the matrices that they are.
    def update(gradients: Params, state: Any, params: Params) -> tuple[Params, Any]:
        made, state = both.update(apart(gradients, config), state, apart(params, config))
        return together(made, config, gradients), state

    return optax.GradientTransformation(lambda params: both.init(apart(params, config)), update)


def _matrices(params: Params) -> Params:
    """Input and output axis of the layers' matrices, by the axis letters at the end of their names; None: AdamW."""

    def of(path: Any, _: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        # Heads lie side by side in one axis: Muon orthogonalises a projection as one matrix.
        named = str(path[-1].key).rsplit("_", 1)[-1]
        return optax.contrib.MuonDimensionNumbers((0,), (1,)) if named in MATRICES else None

    return jax.tree_util.tree_map_with_path(of, params)


def make_loss(graphdef: nnx.GraphDef, packed: bool = True) -> Callable[[Params, Rows], jax.Array]:
    """Makes (params, rows) -> float32 scalar: cross-entropy averaged with the rows' weights.

    `packed` False: each row is one conversation, for models that refuse segments."""

    def loss(params: Params, rows: Rows) -> jax.Array:
        model = nnx.merge(graphdef, params)
        attend = CausalRows(jnp.asarray(rows.segments) if packed else None)
        logits = model.logits(model(rows.tokens, rows.positions, attend).hidden)
        right = jnp.take_along_axis(logits, rows.labels[..., None], axis=-1)[..., 0]
        entropy = jax.nn.logsumexp(logits, axis=-1) - right
        # By the batch's own weights: rows are packed to different degrees.
        return jnp.sum(entropy * rows.weights) / jnp.maximum(jnp.sum(rows.weights), 1e-6)

    return loss


def make_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """Makes the jitted (state, rows, learning rate) -> (state, loss); the old state is donated."""
    loss = make_loss(graphdef)

    def step(state: State, rows: Rows, learning_rate: jax.Array) -> tuple[State, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state.params, rows)
        # Updates come with their sign, at rate 1.
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        # The rate is an argument, as it follows the clock: no schedule is compiled in.
        params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
        return State(params, optimizer_state), value

    return jax.jit(step, donate_argnums=0)
