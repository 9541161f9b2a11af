"""Rows and requests in pages, without an engine: where rows lie, attention over them, and who has which page."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.serving.page_pool import PagePool
from dspark_jax.targets.attention import KeysValues, causal_block, prefix_block_attention, prefix_mask
from dspark_jax.targets.kv_cache import ByPage, append_rows, empty_cache, insert_rows, take_slots
from dspark_jax.targets.pages import PagedCache, with_tables

PAGE = 8


# Rows in pages


def dense_and_paged(seed: int = 0) -> tuple[Any, Any]:
    """Two layers of three requests: as a cache by slot, and in pages of 8 in an order without any order."""
    layout, size, rng = ByPage(13, PAGE), 32, np.random.default_rng(seed)

    def make(slots: int, positions: int) -> Any:
        return empty_cache([(2, 4)] * 2, slots, positions, jnp.float32)

    tables = rng.permutation(13)[:12].reshape(3, 4).astype(np.int32)
    return make(3, size), with_tables(layout.empty(make, 3, size), lambda _: jnp.asarray(tables))


def drawn_rows(width: int, count: int = 3, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    return tuple(
        KeysValues(*(jnp.asarray(rng.normal(size=(count, width, 2, 4)), jnp.float32) for _ in "kv")) for _ in range(2)
    )


def contents(stored: Any, slots: int = 3, size: int = 32) -> list[np.ndarray]:
    """Keys and values [G, S, H] of each slot and layer."""
    if isinstance(stored, PagedCache):
        slot_rows = [stored.positions(jnp.asarray(s), jnp.asarray(0), size) for s in range(slots)]
        return [np.asarray(x) for layer in range(2) for kind in range(2) for x in (r[layer][kind] for r in slot_rows)]
    return [np.asarray(x) for layer in stored for kind in layer for x in kind]


@given(st.lists(st.integers(0, 27), min_size=3, max_size=3))
@settings(max_examples=15, deadline=None)
def test_rows_lie_where_they_would_by_slot(starts: list[int]) -> None:
    """Appended across the boundaries of pages, for all requests and through a view of some, and inserted."""
    at, width = jnp.asarray(starts), 5
    both = [append_rows(stored, drawn_rows(width), at) for stored in dense_and_paged()]
    for old, new in zip(*map(contents, both), strict=True):
        np.testing.assert_array_equal(old, new)

    slots = jnp.asarray([2, 0])
    for index, stored in enumerate(both):
        grown = append_rows(take_slots(stored, slots), drawn_rows(width, 2, seed=2), at[1:])
        both[index] = insert_rows(stored, grown, slots)
    for old, new in zip(*map(contents, both), strict=True):
        np.testing.assert_array_equal(old, new)

    chunk = tuple(KeysValues(*(x.swapaxes(1, 2) for x in layer)) for layer in drawn_rows(width, 1, seed=3))
    both = [insert_rows(stored, chunk, jnp.asarray([1]), at[:1], axis=2) for stored in both]
    for old, new in zip(*map(contents, both), strict=True):
        np.testing.assert_array_equal(old, new)


def test_attention_over_pages_is_attention_over_slots() -> None:
    rows, (dense, pages) = drawn_rows(32), dense_and_paged()
    dense, pages = (append_rows(stored, rows, jnp.zeros(3, jnp.int32)) for stored in (dense, pages))
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 1, 3, heads, 4)), jnp.float32) for heads in (4, 2, 2))

    for lengths in ([0, 9, 29], [8, 16, 31]):
        allowed = prefix_mask(jnp.asarray(lengths)[:, None], 32, 3, window=20)
        found = [
            prefix_block_attention(
                q, KeysValues(k, v), stored[1], allowed, causal_block(3), scale=0.4, held=jnp.asarray(max(lengths))
            )
            for stored in (dense, pages)
        ]
        np.testing.assert_allclose(found[1], found[0], rtol=2e-5, atol=2e-6)


def test_a_request_writes_to_its_own_pages_alone() -> None:
    """Rows behind its last page, and those of a slot without pages, are dropped."""
    _, pages = dense_and_paged()
    tables = np.asarray(pages.tables).copy()
    tables[0, 1:], tables[1] = 13, 13
    pages = with_tables(pages, lambda _: jnp.asarray(tables))
    after = append_rows(pages, drawn_rows(5), jnp.asarray([6, 3, 30]))
    changed = {int(page) for page in np.nonzero(np.any(np.asarray(after.layers[0].keys) != 0, axis=(1, 2)))[0]}
    assert changed == {int(tables[0, 0]), int(tables[2, 3])}


# The pool


def pool_of(pages: int = 20, slots: int = 4) -> PagePool:
    return PagePool.of(ByPage(pages, PAGE), slots, 64)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_page_has_two_owners_and_none_is_lost(calls: list[tuple[int, int]]) -> None:
    """Slots grow (to so many positions) and are emptied (0), in any order."""
    pool, held = pool_of(), [0] * 4
    for slot, positions in calls:
        before, pool.changed = pool.tables.copy(), False
        if positions == 0:
            pool.release(slot)
            held[slot] = 0
        else:
            wanted = max(-(-positions // PAGE), held[slot])
            fits = wanted - held[slot] <= pool.free
            assert pool.grow(slot, positions) == fits
            held[slot] = wanted if fits else held[slot]

        owned = [row[:count].tolist() for row, count in zip(pool.tables, held, strict=True)]
        pages = [page for row in owned for page in row]
        assert len(set(pages)) == len(pages) == 20 - pool.free and all(0 <= page < 20 for page in pages)
        assert all((row[count:] == 20).all() for row, count in zip(pool.tables, held, strict=True))
        assert pool.changed or np.array_equal(before, pool.tables), "what does not fit changes nothing"
        # However scattered they are, all free pages can be had.
        assert all(pool.needed(s, 64) == 8 - count for s, count in enumerate(held))


def test_shared_pages_are_counted_once_and_freed_by_the_last() -> None:
    pool = pool_of()
    assert pool.grow(0, 30)
    kept = pool.keep(0, 0, 24)
    assert kept == tuple(pool.tables[0, :3]) and pool.free == 16 and pool.shared == 0
    # A slot that has pages already is given the kept ones in their place.
    assert pool.grow(1, 10)
    for slot in (1, 2):
        pool.begin(slot, kept)
        assert pool.grow(slot, 40) and pool.tables[slot, :3].tolist() == list(kept)
    assert pool.free == 20 - 4 - 2 - 2 and pool.shared == 3

    pool.release(0)
    pool.release(2)
    assert pool.free == 20 - 3 - 2 and pool.shared == 0 and pool.used(kept)
    # Dropped while a slot has them, they stay with it and with no other.
    pool.drop(kept)
    assert pool.kept == 0 and pool.tables[1, :3].tolist() == list(kept)
    assert (
        pool.grow(0, 64) and pool.grow(2, 56) and not set(kept) & {*pool.tables[0].tolist(), *pool.tables[2].tolist()}
    )
    for slot in range(3):
        pool.release(slot)
    assert pool.free == 20 and pool.grow(3, 64)


def test_kept_pages_are_handed_out_last() -> None:
    """And only once they are given up."""
    pool, asked = pool_of(6), list[int]()
    assert pool.grow(0, 40)
    kept = pool.keep(0, 0, 16), pool.keep(0, 16, 32)
    pool.release(0)
    assert pool.free == 6 and pool.kept == 4

    def give_up() -> None:
        pool.drop(kept[len(asked)])
        asked.append(pool.kept)

    pool.give_up = give_up
    assert pool.grow(1, 16) and not asked
    assert pool.grow(2, 8) and asked == [2] and pool.free == 3
    assert not pool.grow(3, 40) and asked == [2]
    assert pool.grow(3, 24) and asked == [2, 0] and pool.free == 0
