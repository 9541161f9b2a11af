"""Anchor sampling, and the block of labels that follows each anchor.

Axes: B batch row, T position (padded), N anchor block, K block position.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.targets.attention import segment_starts


class Blocks(NamedTuple):
    """The blocks of a batch as the losses need them, derived from tokens, mask and anchors."""

    anchors: Int[Array, "b n"]  # 0 for dummies
    keep: Bool[Array, "b n"]  # False: a dummy that fills the row up to N
    starts: Int[Array, "b n"] | None  # of packed rows: where each anchor's sequence begins
    previous: Int[Array, "b n k"]  # x_{k-1}: the anchor's token, then the labels before
    labels: Int[Array, "b n k"]  # token at anchor + 1 + k, clamped to the row
    sources: Int[Array, "b n k"]  # position whose target hidden state predicts the label
    supervised: Bool[Array, "b n k"]
    weights: Float[Array, "b n k"]


def eligible_anchors(loss_mask: Array, segments: Int[Array, "b t"] | None = None) -> Bool[Array, "b t1"]:
    """Position i < T - 1 may be an anchor iff it and i + 1, of one sequence, are supervised (docs/algorithm.md, rule
    37)."""
    # The mask may arrive as uint8 or as float, hence no test of equality.
    supervised = loss_mask > 0.5

    # [B, T - 1]: the last position has no label, so it is never an anchor.
    eligible = supervised[:, :-1] & supervised[:, 1:]
    return eligible if segments is None else eligible & (segments[:, :-1] == segments[:, 1:])


def sample_anchors(
    key: Array, loss_mask: Int[Array, "b t"], count: int, segments: Int[Array, "b t"] | None = None
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """`sample_positions` of the positions that may be anchors."""
    return sample_positions(key, eligible_anchors(loss_mask, segments), count)


def sample_positions(
    key: Array, eligible: Bool[Array, "b t"], count: int
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """Draws up to N = `count` eligible positions of each row, uniformly and without replacement.

    A row's draw depends on the key and the row's number, not on the other rows.

    Returns:
        (positions, keep), [B, N]: the drawn ones in ascending order, then dummies at position 0 with keep False.
    """
    # A row with fewer eligible positions than N gets dummies.
    rows, size = eligible.shape
    # The largest of independent uniforms are a draw without replacement whose shape is static. Ineligible positions
    # score -1, below every uniform.
    noise = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (size,)))(jnp.arange(rows))
    scores, chosen = jax.lax.top_k(jnp.where(eligible, noise, -1.0), min(count, size))
    # Dummies take the value `size`, which sorts behind every position.
    ordered = jnp.sort(jnp.where(scores >= 0, chosen, size), axis=-1)
    ordered = jnp.pad(ordered, ((0, 0), (0, count - ordered.shape[1])), constant_values=size)

    keep = ordered < size

    return jnp.where(keep, ordered, 0), keep


def make_blocks(
    input_ids: Int[Array, "b t"],
    loss_mask: Array,
    anchors: Int[Array, "b n"],
    keep: Bool[Array, "b n"],
    block_size: int,
    decay_gamma: float | None,
    segments: Int[Array, "b t"] | None = None,
) -> Blocks:
    """The K = `block_size` slots of every anchor: labels, supervision, weights (docs/algorithm.md, rules 38 to 40).

    Args:
        input_ids, loss_mask: the batch's tokens, and where they are supervised.
        anchors, keep: as `sample_anchors` returns them.
        block_size: slots K of a block.
        decay_gamma: g of the weights exp(-k / g), k from 0; None or <= 0 gives every slot weight 1.
        segments: the sequence number of each position, where rows are packed.
    """
    length = input_ids.shape[1]
    # Slot k's label is the token at anchor + 1 + k (docs/algorithm.md, rules 22 and 38).
    offsets = jnp.arange(block_size)
    # [B, N, K]. Dummies read position 0; they are unsupervised, so its values are never used.
    unclamped = anchors[..., None] + 1 + offsets
    positions = jnp.where(keep[..., None], jnp.minimum(unclamped, length - 1), 0)

    def at(values: Array, index: Array) -> Array:
        # take_along_axis needs equal ranks: [B, N, K] is flattened to [B, N K] and restored.
        return jnp.take_along_axis(values, index.reshape(index.shape[0], -1), axis=1).reshape(index.shape)

    labels = at(input_ids, positions)
    here = (unclamped < length) & (at(loss_mask, positions) > 0.5) & keep[..., None]

    # A block must not run into the next sequence of a packed row: that label is another conversation's.
    starts = None
    if segments is not None:
        starts = at(segment_starts(segments), anchors)
        here &= at(segments, positions) == at(segments, anchors)[..., None]

    # A slot counts only while every slot before it does: a gap in the mask ends the block.
    supervised = jnp.cumprod(here.astype(jnp.int32), axis=-1) > 0
    # Later slots count less, since decoding reaches them less often.
    decay = jnp.exp(-offsets / decay_gamma) if decay_gamma and decay_gamma > 0 else jnp.ones((block_size,))

    return Blocks(
        anchors=anchors,
        keep=keep,
        starts=starts,
        # Teacher forcing: the anchor's token, then the labels shifted by one (docs/algorithm.md, rule 34).
        previous=jnp.concatenate([at(input_ids, anchors)[..., None], labels[..., :-1]], axis=-1),
        labels=labels,
        # The target's law for a label comes from the position before it (docs/algorithm.md, rule 39).
        sources=jnp.maximum(positions - 1, 0),
        supervised=supervised,
        weights=supervised * decay.astype(jnp.float32),
    )
