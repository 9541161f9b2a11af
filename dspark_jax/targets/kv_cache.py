"""Keys and values of committed positions: one head-major `KeysValues` [R, G, S, H] a layer, in a tuple.

Head-major, with a leaf for each layer, so that attention reads each head's rows in one stretch and XLA writes new rows
in place. A request's length lives outside: rows past it are junk that every mask hides, so rolling back is taking a
smaller length. Where the memory is shared, a `PagedCache` (pages.py) takes the tuple's place, and the functions below
work on either. Axes: R request slot, G kv heads, S cache size, H head dim, W new rows, A admitted requests, L layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dspark_jax.targets.attention import KeysValues
from dspark_jax.targets.kernels import layer_gpu
from dspark_jax.targets.pages import PagedCache, PageView, in_pages, is_cache, is_paged, with_tables

KVCache = tuple[KeysValues, ...]
Tree = TypeVar("Tree")


class CacheLayout(Protocol):
    """Where the caches of a decode state lie; hashable, as it is a static part of the loop."""

    @property
    def facts(self) -> dict[str, int]:
        """What tells it from other layouts, beside the shapes of a loop."""
        ...

    def empty(self, make: Callable[[int, int], Any], requests: int, size: int) -> Any:
        """An empty state of `requests` slots for `size` positions each, of which make(requests, size) makes one that
        has its caches slot by slot."""
        ...

    def handed_out(self, state: Any, put: Callable[[np.ndarray], Array]) -> Any:
        """An empty state whose slots can hold all their positions, for measurements; `put` moves arrays to the
        device."""
        ...


@dataclass(frozen=True)
class BySlot:
    """Every slot has a cache for the longest request: the fastest to read, and the largest."""

    @property
    def facts(self) -> dict[str, int]:
        return {}

    def empty(self, make: Callable[[int, int], Any], requests: int, size: int) -> Any:
        return make(requests, size)

    def handed_out(self, state: Any, put: Callable[[np.ndarray], Array]) -> Any:
        return state


@dataclass(frozen=True)
class ByPage:
    """All requests share `count` pages of `page` positions."""

    count: int
    page: int

    @property
    def facts(self) -> dict[str, int]:
        return {"pages": self.count, "page": self.page}

    def empty(self, make: Callable[[int, int], Any], requests: int, size: int) -> Any:
        # Only what the caches leave out is taken of the first; XLA allocates no more than it returns.
        return in_pages(make(requests, size), make(self.count, self.page), size, self.count)

    def handed_out(self, state: Any, put: Callable[[np.ndarray], Array]) -> Any:
        # In turn, and again from the first where there are fewer than the slots could hold: as many places are read.
        def tables(old: Array) -> Array:
            return put(np.arange(old.size, dtype=np.int32).reshape(old.shape) % self.count)

        return with_tables(state, tables)

    @staticmethod
    def holds(state: Any) -> bool:
        """Whether all keys and values of a state lie by position, so that pages can take their place."""
        nodes = jax.tree.leaves(state, is_leaf=lambda node: is_cache(node) or isinstance(node, KeysValues))
        return any(map(is_cache, nodes)) and not any(isinstance(node, KeysValues) for node in nodes)


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


def finite_or_zero(x: Array) -> Array:
    """Replace non-finite values by zeros. A masked NaN is still a NaN in a product: in a cache it would outlive its
    request and fail the slot's next one."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def append_rows(cache: Any, new: KVCache, starts: Int[Array, " r"]) -> Any:
    """Writes `new` (per layer [R, W, G, H]) at positions starts[r] .. starts[r] + W - 1 of every request, what is not
    finite as 0.

    All W rows are written; those past what was accepted become junk beyond the length. `starts + W <= S` must hold,
    since a block that does not fit moves left, over live rows.
    """
    if layer_gpu.takes_rows(cache, new):
        return _written(cache, new, starts)
    new = jax.tree.map(finite_or_zero, new)
    if isinstance(cache, PagedCache | PageView):
        return cache.appended(new, starts)

    def write(stored: Array, rows: Array) -> Array:
        if len(starts) == 1:
            # As a scatter, which vmap makes of it, GPUs would read the places first that it writes: a kernel more.
            return jax.lax.dynamic_update_slice(stored, rows, (0, 0, starts[0], 0))
        # Each request has a length of its own, so the start differs by row: a slice update under vmap, not one for all.
        return jax.vmap(lambda s, r, at: jax.lax.dynamic_update_slice(s, r, (0, at, 0)))(stored, rows, starts)

    rows = tuple(head_major(layer) for layer in new)
    # The cache's dtype may be narrower than the compute dtype.
    return jax.tree.map(lambda stored, r: write(stored, r.astype(stored.dtype)), cache, rows)


def _written(cache: KVCache, new: KVCache, starts: Int[Array, " r"]) -> KVCache:
    """`append_rows` by a GPU's kernel, many layers at once."""
    caches, rows = jax.tree.leaves(cache), jax.tree.leaves(new)
    made = list(caches)
    # A kernel takes caches of one shape, and Gemma's layers have two.
    for shape in dict.fromkeys(x.shape for x in caches):
        same = [i for i, x in enumerate(caches) if x.shape == shape]
        for some in (same[at : at + layer_gpu.MOST_CACHES] for at in range(0, len(same), layer_gpu.MOST_CACHES)):
            after = layer_gpu.written([caches[i] for i in some], [rows[i] for i in some], starts)
            for i, x in zip(some, after, strict=True):
                made[i] = x
    return jax.tree.unflatten(jax.tree.structure(cache), made)


def insert_rows(
    state: Tree, rows: Tree, slots: Int[Array, " a"], starts: Int[Array, " a"] | None = None, axis: int = 1
) -> Tree:
    """Writes request a of `rows` into slot slots[a] of `state`, in place where the buffer is donated.

    rows: leaves [A, ...], each dimension at most the state's.
    slots: below R; a slot may come twice, and the later request wins.
    starts: first index along `axis` (None: 0); `starts` + the rows' length must fit, since the write clamps.

    The writes are a loop of slice updates, because a scatter copies the cache on some backends. Caches in pages are
    written apart from it, row by row.
    """
    if any(map(is_paged, jax.tree.leaves(state, is_leaf=is_paged))):
        # What is not in pages goes through the loop below, as in a state without any.
        own = jax.tree.map(lambda part: None if is_paged(part) else part, state, is_leaf=is_paged)
        rest = jax.tree.map(lambda part, new: None if is_paged(part) else new, state, rows, is_leaf=is_paged)
        left = insert_rows(own, rest, slots, starts, axis) if jax.tree.leaves(own) else own

        def written(part: Any, new: Any, kept: Any) -> Any:
            return part.inserted(new, slots, starts) if is_paged(part) else kept

        return jax.tree.map(written, state, rows, left, is_leaf=is_paged)

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
    """The rows of `slots`, leaves [A, ...]: a copy of A slots, not of the cache; of caches in pages a view."""

    def taken(leaf: Any) -> Any:
        return leaf.of_slots(slots) if is_paged(leaf) else jnp.take(leaf, slots, axis=0, mode="clip")

    return jax.tree.map(taken, state, is_leaf=is_paged)
