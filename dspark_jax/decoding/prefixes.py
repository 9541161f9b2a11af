"""Kept chunks: copies of whole prompt chunks of a slot, from which other requests start (docs/algorithm.md, rule 116).

A chunk's copy holds everything that prefilling it has changed in its slot: its tokens, its positions of the target's
cache and of the drafter's state, and whole those leaves that have no axis of positions, such as rings. To restore a
prompt's chunks one after the other is to have prefilled them. Where whole pages hold a chunk, its keys and values can
stay there, in pages that other slots are given too.

Axes: R request slots, S positions of a slot, C tokens of a chunk, G kv heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.decoding.state import DecodeState
from dspark_jax.targets.attention import KeysValues
from dspark_jax.targets.pages import PagedCache


class KeptChunk(NamedTuple):
    """A prompt chunk's part of a slot.

    Attributes:
        tokens: [C] int32.
        failed: [] bool: the target gave no finite numbers up to here.
        target_cache, draft: the state's trees without the slot axis; keys and values [G, C + 1, H] begin one position
            before the chunk, since a drafter may complete that row only when it sees the chunk's first token; () in
            place of a cache whose pages are shared.
    """

    tokens: Array
    failed: Array
    target_cache: Any
    draft: Any

    @property
    def bytes(self) -> int:
        """Memory on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@partial(jax.jit, static_argnums=(0, 4, 5))
def keep_chunk(
    loop: DecodeLoop,
    state: DecodeState,
    slot: Int[Array, ""],
    start: Int[Array, ""],
    width: int,
    shared: bool,
) -> KeptChunk:
    """Copy a chunk that has just been prefilled, before any round or later chunk.

    Args:
        loop: static part.
        state: read only.
        slot: of the request.
        start: position of the chunk.
        width: its tokens, all of them real.
        shared: leave out what lies in pages.
    """

    def copied(leaf: Any, positions: bool) -> Any:
        if isinstance(leaf, PagedCache):
            return () if shared else leaf.positions(slot, _first_row(start), width + 1)
        # Leaves without an axis of positions are copied whole: of a ring, say, the chunk may have changed any row.
        at: list[Any] = [slot, *[0] * (leaf.ndim - 1)]
        shape = [1, *leaf.shape[1:]]
        if positions:
            at[2], shape[2] = _first_row(start), width + 1
        return jax.lax.dynamic_slice(leaf, at, shape)[0]

    # Kept with the chunk: penalties of a request that starts from it count them (docs/algorithm.md, rule 113).
    tokens = jax.lax.dynamic_slice(state.tokens, (slot, start), (1, width))[0]
    # Target and drafter alike: a prefix without the drafter's context would draft blindly.
    caches = _map_leaves(loop, copied, (state.target_cache, state.draft))
    return KeptChunk(tokens, state.failed[slot], *caches)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def restore_chunk(
    loop: DecodeLoop, state: DecodeState, kept: KeptChunk, slot: Int[Array, ""], start: Int[Array, ""]
) -> DecodeState:
    """Write a kept chunk into a slot that holds the positions before it, and its pages where they are shared. The slot
    stays inactive.

    Args:
        loop: static part.
        state: donated.
        kept: the chunk, of the same loop.
        slot: to write to.
        start: the chunk's position.
    """

    def written(leaf: Any, positions: bool, part: Any) -> Any:
        if isinstance(leaf, PagedCache):
            rows = jax.tree.map(lambda x: x[None], part)
            return leaf.inserted(rows, slot[None], _first_row(start)[None]) if rows else leaf
        # The same places as in `keep_chunk`.
        at: list[Any] = [slot, *[0] * (leaf.ndim - 1)]
        if positions:
            at[2] = _first_row(start)
        return jax.lax.dynamic_update_slice(leaf, part[None], at)

    end = start + len(kept.tokens)
    old, new = (state.target_cache, state.draft), (kept.target_cache, kept.draft)
    target_cache, draft = _map_leaves(loop, written, old, new)
    # As after a chunk that is not the last: rounds write their junk behind it.
    restored = replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, kept.tokens[None], (slot, start)),
        length=state.length.at[slot].set(end + 1),
        active=state.active.at[slot].set(False),
        failed=state.failed.at[slot].set(kept.failed),
        target_cache=target_cache,
        draft=draft,
    )
    return loop.place(restored)


def _first_row(start: Array) -> Array:
    """The first position of a chunk's keys and values: one before it, but none before the first."""
    # The width stays the same: the first chunk's copy takes a row behind it instead, which is junk until it is written.
    return jnp.maximum(start - 1, 0)


def _map_leaves(loop: DecodeLoop, function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply `function(leaf, positions, *others)`, where `positions` says whether the leaf's third axis is that of S."""

    def one(node: Any, *rest: Any) -> Any:
        # Everything else belongs to the slot as a whole.
        if not isinstance(node, KeysValues):
            return function(node, False, *rest)
        # By shape: windows and compressed caches are also keys and values, of fewer positions than S.
        return jax.tree.map(lambda leaf, *r: function(leaf, leaf.shape[2] == loop.size, *r), node, *rest)

    return jax.tree.map(one, tree, *others, is_leaf=lambda node: isinstance(node, KeysValues | PagedCache))
