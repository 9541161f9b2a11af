"""Rings of a drafter's keys: the latest positions, addressed by position, written only by accepted rows."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.targets.deepseek_v4.rings import write_ring


def filled_ring(
    rows: Float[Array, "r t h"], starts: Int[Array, " r"], counts: Int[Array, " r"], size: int
) -> Float[Array, "r w h"]:
    """A ring of `size` slots with rows written at positions starts.., the first `counts` of them."""
    empty = jnp.zeros((len(rows), size, rows.shape[-1]), rows.dtype)
    return write_ring(empty, rows, jnp.arange(len(rows)), starts, counts)


def ring_positions(size: int, ends: Int[Array, " r"]) -> Int[Array, "r w"]:
    """The position below ends[r] that each slot holds; negative for one that nothing was written to."""
    # Slot i holds the latest position congruent to i, at most `last`.
    last = ends[:, None] - 1
    return last - (last - jnp.arange(size)) % size


def before(positions: Int[Array, "r w"], first: Int[Array, " r"]) -> Bool[Array, "r w"]:
    """Whether each slot holds a position from first[r] on; negative positions are empty slots."""
    return positions >= jnp.maximum(first, 0)[:, None]
