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
    supervised = loss_mask > 0.5
    eligible = supervised[:, :-1] & supervised[:, 1:]
    return eligible if segments is None else eligible & (segments[:, :-1] == segments[:, 1:])


def sample_anchors(
    key: Array, loss_mask: Int[Array, "b t"], count: int, segments: Int[Array, "b t"] | None = None
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """(positions, keep): up to `count` eligible positions a row without replacement, ascending, then zeros not kept.

    A row's draw depends on the key and the row's number only, not on the other rows.
    """
    eligible = eligible_anchors(loss_mask, segments)
    rows, size = eligible.shape
    noise = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (size,)))(jnp.arange(rows))
    scores, chosen = jax.lax.top_k(jnp.where(eligible, noise, -1.0), min(count, size))
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
    """Labels, supervision and weights exp(-k / decay_gamma) of K = `block_size` slots an anchor (docs/algorithm.md,
    rules 38 to 40).

    A slot counts only while every slot before it in its block does, and its label is of the anchor's sequence;
    decay_gamma None or <= 0 weighs all alike. `segments`: the numbers of packed rows' sequences.
    """
    length = input_ids.shape[1]
    offsets = jnp.arange(block_size)
    unclamped = anchors[..., None] + 1 + offsets
    positions = jnp.where(keep[..., None], jnp.minimum(unclamped, length - 1), 0)

    def at(values: Array, index: Array) -> Array:
        return jnp.take_along_axis(values, index.reshape(index.shape[0], -1), axis=1).reshape(index.shape)

    labels = at(input_ids, positions)
    here = (unclamped < length) & (at(loss_mask, positions) > 0.5) & keep[..., None]
    starts = None
    if segments is not None:
        starts = at(segment_starts(segments), anchors)
        here &= at(segments, positions) == at(segments, anchors)[..., None]
    supervised = jnp.cumprod(here.astype(jnp.int32), axis=-1) > 0
    decay = jnp.exp(-offsets / decay_gamma) if decay_gamma and decay_gamma > 0 else jnp.ones((block_size,))
    return Blocks(
        anchors=anchors,
        keep=keep,
        starts=starts,
        previous=jnp.concatenate([at(input_ids, anchors)[..., None], labels[..., :-1]], axis=-1),
        labels=labels,
        sources=jnp.maximum(positions - 1, 0),
        supervised=supervised,
        weights=supervised * decay.astype(jnp.float32),
    )
