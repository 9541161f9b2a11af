"""A naive training step, for comparison: all logits at once, one attention under a mask over everything.

Parameters, losses and gradients are those of the real step, which avoids both (docs/algorithm.md, rule 49).

Axes: B batch, N block, K block position, T context, G kv heads, H head dim.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.drafters.backbone import Backbone
from dspark_jax.drafters.config import DSparkConfig
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.drafters.registry import kind_name
from dspark_jax.errors import UserError
from dspark_jax.planning.training import AbstractRun
from dspark_jax.sharding import split
from dspark_jax.targets.attention import Attend, KeysValues, prefix_block_attention, prefix_mask
from dspark_jax.training.objective import BlockObjective


@dataclass(frozen=True)
class OneMask:
    """All rows of all blocks attend to [context ; all rows] under one mask [N K, T + N K]."""

    context: Sequence[KeysValues]
    allowed: Array

    def __call__(self, layer: int, q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
        b, n, width, groups, size = k.shape

        # [B, G, T, H] and the rows of all blocks, [B, G, N K, H] -> [B, G, T + N K, H].
        def joined(cached: Array, own: Array) -> Array:
            return jnp.concatenate([cached, own.reshape(b, n * width, groups, size).swapaxes(1, 2)], axis=2)

        stored = self.context[layer]
        everything = KeysValues(joined(stored.keys, k), joined(stored.values, v))
        # All rows as one block, so that one mask covers every pair.
        rows = q.reshape(b, 1, n * width, *q.shape[3:])
        out = prefix_block_attention(rows, None, everything, self.allowed, None, scale=scale)

        return out.reshape(q.shape)


class NaiveBackbone(Backbone):
    """A backbone whose blocks attend under one whole mask."""

    def attending(
        self, context: Sequence[KeysValues], anchors: Int[Array, "b n"], width: int, starts: Int[Array, "b n"] | None
    ) -> Attend:
        batch, count = anchors.shape
        before = prefix_mask(anchors, context[0].keys.shape[2], width, starts=starts)
        # All K rows of a block see the same context. [B, N, T] -> [B, N K, T]
        before = jnp.repeat(before[:, :, 0], width, axis=1)
        block = jnp.arange(count * width) // width
        # Rows see their own block in both directions, and no other (docs/algorithm.md, rule 23).
        own = jnp.broadcast_to(block[:, None] == block, (batch, count * width, count * width))

        return OneMask(context, jnp.concatenate([before, own], axis=-1)[:, None])


class NaiveDSpark(DSpark):
    """DSpark on `NaiveBackbone`, with the same parameters."""

    def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.backbone = NaiveBackbone(config, rngs=rngs)


def naive_run(run: AbstractRun) -> AbstractRun:
    """The run with the naive step; UserError for kinds of drafters that have none."""
    config = run.spec.drafter
    if not isinstance(config, DSparkConfig):
        kind = kind_name(run.drafter_hf)
        raise UserError(f"A naive step is written for DSpark and DFlash drafters, not for {kind}.")

    # One chunk of all anchors: every logit at once.
    options = dataclasses.replace(run.spec.loss, anchor_chunk=config.num_anchors)
    module = nnx.eval_shape(lambda: NaiveDSpark(config, rngs=nnx.Rngs(0)))
    objective = BlockObjective(split(module)[0], config, options, DTYPES[run.spec.dtype])
    return dataclasses.replace(run, step=run.spec.step(run.states, objective=objective))
