"""The objective of a training step: the blocks of a batch, their sums, the loss and the metrics."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from dspark_jax.drafters.config import BlockConfig, float32_parameter
from dspark_jax.drafters.protocol import BlockDrafter, SharedTables
from dspark_jax.training.anchors import Blocks, make_blocks, sample_anchors
from dspark_jax.training.losses import Batch, block_sums
from dspark_jax.training.metrics import anchor_sums, loss_metrics
from dspark_jax.training.terms import EPSILON, LossOptions, Sums

LOOKED_UP = ("markov_head", "w1_vr")
"""The table whose rows are cast after their lookup."""


class Plan(NamedTuple):
    """The part of a step that follows from masks and anchors alone.

    Attributes:
        rows: a pytree whose leaves have the batch row first, so that it can be cut into micro-batches.
        denominator: [] float32, of the loss, over the whole global batch.
        sums: figures of the whole global batch.
        supervised: [] float32, the summed weight of supervised slots; 0 means that the batch has no supervision.
    """

    rows: Any
    denominator: Array
    sums: Sums
    supervised: Array


class Objective(Protocol):
    """The training strategy of a kind of drafter, all that the step knows of it.

    Denominators come from the plan of the whole global batch and all sums are additive over rows, so micro-batches and
    devices do not change the loss (docs/algorithm.md, rule 44). `compute_dtype`: that of `cast_params`.
    """

    @property
    def compute_dtype(self) -> Any: ...

    def plan(self, batch: Batch, key: Array) -> Plan:
        """Draws the blocks of the global batch."""
        ...

    def sums(self, params: dict, shared: SharedTables, batch: Batch, rows: Any) -> Sums:
        """Additive sums over the rows of a micro-batch, differentiable in float32 `params`."""
        ...

    def loss(self, sums: Sums, denominator: Array) -> Array:
        """[] float32: the loss, or a micro-batch's share of it."""
        ...

    def metrics(self, sums: Sums, length: int) -> dict[str, Array]:
        """Scalars of a record; `length` is the padded T."""
        ...


def cast_params(params: dict, dtype: Any) -> dict:
    """Parameters in the compute dtype, except those that stay float32 in decoding too and those looked up by rows."""
    # A parameter in float32 while decoding must be trained in float32, or the two would disagree.
    # The confidence head is the case: its logits are compared and multiplied (docs/algorithm.md, rule 35).
    flat = flatten_dict(params)
    return unflatten_dict(
        {p: x if float32_parameter(p) or p == LOOKED_UP else x.astype(dtype) for p, x in flat.items()}
    )


@dataclass(frozen=True, eq=False)
class BlockObjective:
    """The losses of docs/algorithm.md, rules 37 to 46 and 118 to 120. Trains any `BlockDrafter`, with heads or without.

    A batch has `input_ids`, `loss_mask` [B, T], `features` [B, T, m D], `last_hidden` [B, T, D], and `segments` [B, T]
    where rows are packed; other entries are ignored.
    """

    graphdef: nnx.GraphDef
    config: BlockConfig
    options: LossOptions
    compute_dtype: Any = jnp.float32

    def plan(self, batch: Batch, key: Array) -> Plan:
        """Samples anchors and derives their blocks."""
        # `plan_at` takes anchors as given, so that a comparison can fix them (docs/algorithm.md, rule 98).
        anchors, keep = sample_anchors(key, batch["loss_mask"], self.config.num_anchors, batch.get("segments"))
        return self.plan_at(batch, anchors, keep)

    def plan_at(self, batch: Batch, anchors: Array, keep: Array) -> Plan:
        """The plan of given anchors [B, N]."""
        # Anchors need no gradient, and neither does anything made of masks: a plan is constants to the loss.
        size, gamma = self.config.block_size, self.options.decay
        mask, segments = batch["loss_mask"], batch.get("segments")
        blocks = make_blocks(batch["input_ids"], mask, anchors, keep, size, gamma, segments)
        # Taken over the global batch, before rows are split: denominators are never local (docs/algorithm.md, rule
        # 44).
        weight = jnp.sum(blocks.weights)

        return Plan(blocks, weight + EPSILON, anchor_sums(blocks, mask, segments), weight)

    def build(self, params: dict) -> BlockDrafter:
        """The drafter of parameters in the compute dtype."""
        return nnx.merge(self.graphdef, params)

    def cast(self, params: dict) -> dict:
        """Parameters in the compute dtype."""
        return cast_params(params, self.compute_dtype)

    def sums(self, params: dict, shared: SharedTables, batch: Batch, rows: Blocks) -> Sums:
        """The sums of `losses.block_sums` over the rows of a micro-batch."""
        # The cast is inside the differentiated function, so gradients arrive in the masters' float32.
        return block_sums(self.build, self.cast, params, shared, batch, rows, self.options)

    def loss(self, sums: Sums, denominator: Array) -> Array:
        """[] float32, the sum of the terms of rules 41 and 118."""
        return self.options.total(sums, denominator)

    def metrics(self, sums: Sums, length: int) -> dict[str, Array]:
        """The figures of `metrics.loss_metrics`."""
        return loss_metrics(sums, self.options, length, self.config.num_anchors)
