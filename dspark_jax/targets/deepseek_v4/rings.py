"""Rings of rows addressed by absolute position: the row of position t lies in slot t mod size.

A query's visibility depends on its own position alone, so dropping rows is keeping a smaller length: nothing is moved
or cleared, and a dropped row left in a slot is outside every window until the slot is written again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def rows_at(ring: Array | None, block: Array, starts: Int[Array, " r"], positions: Int[Array, "r t"]) -> Array:
    """Rows [R, T, ...] at `positions`: from the ring before `starts`, from the block [R, W, ...] from there on.

    Rows that neither holds (negative positions, those past the block, all earlier ones without a ring) are zero or
    some other row of the block; the caller's mask hides them.
    """
    fresh = _take(block, jnp.clip(positions - starts[:, None], 0, block.shape[1] - 1))
    before = (positions < starts[:, None]).reshape(*positions.shape, *(1,) * (block.ndim - 2))

    if ring is None:
        return jnp.where(before, 0, fresh)

    # jnp's remainder has the divisor's sign, so negative positions give a slot as well.
    held = _take(ring, positions % ring.shape[1]).astype(block.dtype)
    return jnp.where(before, held, fresh)


def write_ring(
    ring: Array, rows: Array, slots: Int[Array, " a"], starts: Int[Array, " a"], counts: Int[Array, " a"]
) -> Array:
    """The ring [R, size, ...] with rows [A, W, ...] written at positions starts.. of requests `slots`.

    The first `counts` rows are real; of more rows than the ring has slots, the last ones are kept.
    """
    size, columns = ring.shape[1], jnp.arange(rows.shape[1])
    # Rows before position 0 belong to no request: in an empty slot, an MTP block's commit begins at -1.
    kept = (columns < counts[:, None]) & (columns >= counts[:, None] - size) & (starts[:, None] + columns >= 0)
    # A scatter: the slots of kept rows differ, and dropped rows are given index `size`, past the ring.
    index = jnp.where(kept, (starts[:, None] + columns) % size, size)
    return ring.at[slots[:, None], index].set(rows.astype(ring.dtype), mode="drop")


def write_entries(entries: Array, rows: Array, slots: Int[Array, " a"], first: Int[Array, " a"]) -> Array:
    """Entries [R, N, C] with rows [A, N', C] at indices first.. of requests `slots`; rows past the end are dropped."""
    # Entries are addressed by their own index, which never wraps: the whole sequence's stay.
    index = first[:, None] + jnp.arange(rows.shape[1])
    return entries.at[slots[:, None], index].set(rows.astype(entries.dtype), mode="drop")


def _take(x: Array, index: Int[Array, "r t"]) -> Array:
    """x[r, index[r, t]] for each request r."""
    return jax.vmap(lambda rows, at: jnp.take(rows, at, axis=0))(x, index)
