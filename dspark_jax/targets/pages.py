"""A cache in pages that all requests share: memory by positions held, not by slots times the longest request.

Every layer has one pool of pages, and one table [R, N] says for all layers which pages a request has: its position t
lies in page tables[r, t // C] at t % C. The host hands out pages between dispatches (serving/memory.py); requests that
begin alike may have the same first pages, which none of them writes. A page that a request doesn't have is named P, one
past the pool: what is written there is dropped, what is read there no mask shows.

A position's heads lie side by side, [P, C, G * H]: one stretch to write, and matrices [C, H] whose rows are whole tiles
to a TPU's kernel, which would have to gather them from [P, C, G, H].

Axes: R request slots, N pages of a request at most, P pages of the pool, C positions of a page, G kv heads, H head dim,
A admitted requests, W new rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dspark_jax.targets.attention import HELD_CHUNK, KeysValues

Layers = tuple[KeysValues, ...]
"""A pool [P, C, G * H] of keys and one of values for each layer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedLayer:
    """One layer's pools, and the pages of the requests that read them: a `Prefix` of N * C positions."""

    keys: Array  # [P, C, G * H]
    values: Array
    tables: Int[Array, "r n"]
    heads: int = field(metadata={"static": True})

    @property
    def size(self) -> int:
        return self.tables.shape[1] * self.keys.shape[1]

    @property
    def step(self) -> int:
        return self._pages * self.keys.shape[1]

    @property
    def _pages(self) -> int:
        # As many positions as a chunk of a cache without pages, so that both add up in the same order.
        return min(max(HELD_CHUNK // self.keys.shape[1], 1), self.tables.shape[1])

    def chunk(self, number: Int[Array, ""]) -> tuple[KeysValues, Array]:
        at = jnp.minimum(number * self._pages, self.tables.shape[1] - self._pages)
        pages = jax.lax.dynamic_slice_in_dim(self.tables, at, self._pages, axis=1)

        def read(pool: Array) -> Array:
            # Clipped: a page that a request lacks reads as another, which is finite and hidden by every mask.
            rows = jnp.take(pool, pages, axis=0, mode="clip")
            return rows.reshape(len(pages), -1, self.heads, pool.shape[2] // self.heads).swapaxes(1, 2)

        return KeysValues(read(self.keys), read(self.values)), at * self.keys.shape[1]


class NewRows(NamedTuple):
    """Rows of A requests that are still to be written: per layer [A, W, G, H], from positions `starts` on."""

    rows: Layers
    starts: Int[Array, " a"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageView:
    """The pages of some requests, to be read alone. What is appended stays apart, for `PagedCache.inserted`: a view
    that went through a branch and came back with the pools would have taken a copy of all of them."""

    layers: Layers
    tables: Int[Array, "a n"]
    heads: tuple[int, ...] = field(metadata={"static": True})  # G of each layer

    def __getitem__(self, layer: int) -> PagedLayer:
        return PagedLayer(*self.layers[layer], self.tables, self.heads[layer])

    def appended(self, rows: Layers, starts: Int[Array, " a"]) -> NewRows:
        """The rows [A, W, G, H] of every layer as they are."""
        return NewRows(rows, starts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """A `KVCache` in pages; see the head of this file."""

    layers: Layers
    tables: Int[Array, "r n"]
    heads: tuple[int, ...] = field(metadata={"static": True})  # G of each layer

    def __getitem__(self, layer: int) -> PagedLayer:
        return PagedLayer(*self.layers[layer], self.tables, self.heads[layer])

    def of_slots(self, slots: Int[Array, " a"]) -> PageView:
        """The pages of some slots, without a copy."""
        return PageView(self.layers, jnp.take(self.tables, slots, axis=0, mode="clip"), self.heads)

    def appended(self, rows: Layers, starts: Int[Array, " r"]) -> "PagedCache":
        """The cache with rows [R, W, G, H] of every layer at positions starts.. of every request."""
        return self._written(self.tables, NewRows(rows, starts))

    def inserted(self, new: Any, slots: Int[Array, " a"], starts: Int[Array, " a"] | None) -> "PagedCache":
        """The cache with chunks of A requests: what was appended to a view, or head-major K/V [A, G, W, H] a layer
        from positions `starts` (None: 0) on. A slot may come twice with the same chunk."""
        if not isinstance(new, NewRows):
            rows = tuple(KeysValues(*(x.swapaxes(1, 2) for x in layer)) for layer in new)
            new = NewRows(rows, jnp.zeros_like(slots) if starts is None else starts)
        return self._written(jnp.take(self.tables, slots, axis=0, mode="clip"), new)

    def positions(self, slot: Int[Array, ""], first: Int[Array, ""], width: int) -> Layers:
        """A copy of a slot's positions first .. first + width - 1: head-major K/V [G, W, H] of each layer."""
        places = self._places(self.tables[slot][None], first[None], width)

        def read(pool: Array, heads: int) -> Array:
            return pool.at[places].get(mode="clip").reshape(width, heads, -1).swapaxes(0, 1)

        pairs = zip(self.layers, self.heads, strict=True)
        return tuple(KeysValues(*(read(pool, heads) for pool in layer)) for layer, heads in pairs)

    def _places(self, tables: Array, starts: Array, width: int) -> tuple[Array, Array]:
        """(pages, positions within them) [A, W] of `width` positions from `starts` on."""
        size = self.layers[0].keys.shape[1]
        at = starts[:, None] + jnp.arange(width)
        # Beyond the last page of a table: the fill value names a page that the pool doesn't have.
        number = jnp.take_along_axis(tables, at // size, axis=1, mode="fill", fill_value=jnp.iinfo(jnp.int32).max)
        return number, at % size

    def _written(self, tables: Array, new: NewRows) -> "PagedCache":
        places = self._places(tables, new.starts, new.rows[0].keys.shape[1])

        # The places lead, and a row is one stretch of the pool: XLA writes such rows in place on every backend.
        def write(pool: Array, rows: Array) -> Array:
            flat = rows.reshape(*rows.shape[:2], -1)
            return pool.at[places].set(flat.astype(pool.dtype), mode="drop")

        return replace(self, layers=jax.tree.map(write, self.layers, new.rows))


def in_pages(slots: Any, pools: Any, size: int, count: int) -> Any:
    """`slots`, a state of R slots, with its caches in the pages of `pools`, the same state with `count` slots of
    `page` positions each: what is a slot there becomes a page. `size`: positions of a request. No request has a page.
    """

    def paged(cache: Any, pool: Any) -> Any:
        if not is_cache(cache):
            return cache
        requests, page = len(cache[0].keys), pool[0].size
        layers = tuple(KeysValues(*(x.swapaxes(1, 2).reshape(count, page, -1) for x in layer)) for layer in pool)
        tables = jnp.full((requests, -(-size // page)), count, jnp.int32)
        return PagedCache(layers, tables, tuple(layer.heads for layer in pool))

    return jax.tree.map(paged, slots, pools, is_leaf=is_cache)


def with_tables(state: Any, new: Callable[[Array], Array]) -> Any:
    """The state with new tables [R, N] in its caches; `new`, given the old ones, is called for each of them, since a
    donated state must not hold one buffer twice."""

    def tabled(node: Any) -> Any:
        return replace(node, tables=new(node.tables)) if isinstance(node, PagedCache) else node

    return jax.tree.map(tabled, state, is_leaf=is_paged)


def page_bytes(state: Any) -> int:
    """Bytes that a page takes in all layers of a state's caches."""
    caches = [node for node in jax.tree.leaves(state, is_leaf=is_paged) if is_paged(node)]
    return sum(pool.nbytes // len(pool) for cache in caches for pool in jax.tree.leaves(cache.layers))


def is_cache(node: Any) -> bool:
    """Whether a node of a state is a `KVCache` without pages: keys and values of every layer, and nothing else."""
    return type(node) is tuple and len(node) > 0 and all(isinstance(layer, KeysValues) for layer in node)


def is_paged(node: Any) -> bool:
    """Whether a node of a state is a cache in pages."""
    return isinstance(node, PagedCache)
