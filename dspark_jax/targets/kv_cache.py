"""Keys and values of committed positions: one head-major `KeysValues` [R, G, S, H] a layer, in a tuple.

Head-major, with a leaf for each layer, so that attention reads each head's rows in one stretch and XLA writes new rows
in place. A request's length lives outside: rows past it are junk that every mask hides, so rolling back is taking a
smaller length. Axes: R request slot, G kv heads, S cache size, H head dim, W new rows, A admitted requests, L layer.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dspark_jax.targets.attention import KeysValues

KVCache = tuple[KeysValues, ...]
Tree = TypeVar("Tree")


def empty_cache(shapes: Sequence[tuple[int, int]], requests: int, size: int, dtype: Any) -> KVCache:
    """Zeros for `size` positions; `shapes` are the layers' (G, H), `TargetConfig.kv_shapes`.

    Make `size` the longest length + the widest append: `append_rows` clamps its start.
    """
    # Gemma's layers differ in heads and head size, hence one shape for each layer.
    full = [(requests, kv_heads, size, head_dim) for kv_heads, head_dim in shapes]
    return tuple(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in full)


def head_major(rows: KeysValues) -> KeysValues:
    """A layer's own K/V [*n, W, G, H], as `DecoderLayer` returns them, in cache order [*n, G, W, H]."""
    return KeysValues(rows.keys.swapaxes(-3, -2), rows.values.swapaxes(-3, -2))


def append_rows(cache: KVCache, new: KVCache, starts: Int[Array, " r"]) -> KVCache:
    """Writes `new` (per layer [R, W, G, H]) at positions starts[r] .. starts[r] + W - 1 of every request.

    All W rows are written; those past what was accepted become junk beyond the length. `starts + W <= S` must hold,
    since a dynamic_update_slice that does not fit moves left, over live rows.
    """

    def write(stored: Array, rows: Array) -> Array:
        # Each request has a length of its own, so the start differs by row: a slice update under vmap, not one for all.
        return jax.vmap(lambda s, r, at: jax.lax.dynamic_update_slice(s, r, (0, at, 0)))(stored, rows, starts)

    rows = tuple(head_major(layer) for layer in new)
    # The cache's dtype may be narrower than the compute dtype.
    return jax.tree.map(lambda stored, r: write(stored, r.astype(stored.dtype)), cache, rows)


def insert_rows(
    state: Tree, rows: Tree, slots: Int[Array, " a"], starts: Int[Array, " a"] | None = None, axis: int = 1
) -> Tree:
    """Writes request a of `rows` into slot slots[a] of `state`, in place where the buffer is donated.

    rows: leaves [A, ...], each dimension at most the state's.
    slots: below R; a slot may come twice, and the later request wins.
    starts: first index along `axis` (None: 0); `starts` + the rows' length must fit, since the write clamps.

    The writes are a loop of slice updates, because a scatter copies the cache on some backends.
    """

    def one(a: Array, stored: Tree) -> Tree:
        def insert(leaf: Array, new: Array) -> Array:
            # Writes past the real rows are junk behind the slot's length, as everywhere in a cache.
            row = jax.lax.dynamic_slice_in_dim(new, a, 1).astype(leaf.dtype)  # [1, ...], the slot axis kept
            at: list[Any] = [slots[a], *(0,) * (leaf.ndim - 1)]
            if starts is not None:
                # A dynamic start may differ for each request; the other axes begin at 0.
                at[axis] = starts[a]
            return jax.lax.dynamic_update_slice(leaf, row, at)

        return jax.tree.map(insert, stored, rows)

    return jax.lax.fori_loop(0, slots.shape[0], one, state)


def take_slots(state: Tree, slots: Int[Array, " a"]) -> Tree:
    """The rows of `slots`, leaves [A, ...]: a copy of A slots, not of the cache."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, slots, axis=0, mode="clip"), state)
