"""Hands out the pages of a cache: to slots, several of which may have a page in common, and to kept prefixes.

Host bookkeeping alone, which knows no request. A page that no slot has is free; if a kept prefix has it, it is handed
out last, once that prefix has been given up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_jax.targets.kv_cache import ByPage


def _keeps_none() -> None:
    raise AssertionError("Pages are kept, and nothing gives them up.")


@dataclass
class PagePool:
    """The pages, and which slots have which.

    Attributes:
        count: pages of the pool, numbered from 0 on.
        page: positions of a page.
        tables: [R, N] int32: the pages of each slot in the order of its positions; `count` behind the last one.
        changed: whether `tables` have changed since this was last set to False.
        free: pages that no slot has.
        give_up: called where kept pages alone are free: drops some that no slot has.
    """

    count: int
    page: int
    tables: np.ndarray
    changed: bool = field(init=False)
    free: int = field(init=False)
    give_up: Callable[[], None] = field(init=False, repr=False, default=_keeps_none)
    _unused: list[int] = field(init=False, repr=False)  # neither a slot's nor kept
    _held: list[int] = field(init=False, repr=False)  # pages of each slot
    _users: list[int] = field(init=False, repr=False)  # slots that have each page
    _kept: set[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.clear()

    @classmethod
    def of(cls, layout: ByPage, slots: int, size: int) -> "PagePool":
        """The pool of a loop with so many slots, for up to `size` positions each."""
        return cls(layout.count, layout.page, np.empty((slots, -(-size // layout.page)), np.int32))

    @property
    def kept(self) -> int:
        """Pages that kept prefixes have, those of slots among them."""
        return len(self._kept)

    @property
    def shared(self) -> int:
        """Pages that more than one slot has."""
        return sum(users > 1 for users in self._users)

    def needed(self, slot: int, positions: int) -> int:
        """Pages that the slot lacks to hold so many positions."""
        return max(-(-positions // self.page) - self._held[slot], 0)

    def grow(self, slot: int, positions: int) -> bool:
        """Give the slot pages for so many positions; False, and nothing is given, if too few are free."""
        more = self.needed(slot, positions)
        if more > self.free:
            return False
        while more > len(self._unused):
            self.give_up()
        # Pages are alike, so that there are no gaps to look for: any one does.
        self._append(slot, [self._unused.pop() for _ in range(more)])
        return True

    def begin(self, slot: int, pages: Sequence[int]) -> None:
        """Let the slot begin with these pages, which other slots may have or which are kept, in place of its own."""
        held = self._held[slot]
        if self.tables[slot, : len(pages)].tolist() == list(pages):
            return
        # Taken first: none of them may be handed out while the slot's own are given back.
        own = self.tables[slot, :held].tolist()
        self._held[slot] = 0
        self._append(slot, [*pages, *own[len(pages) :]])
        self._leave(own)

    def release(self, slot: int) -> None:
        """Take the slot's pages from it."""
        held, self._held[slot] = self._held[slot], 0
        self._leave(self.tables[slot, :held].tolist())
        self.changed |= held > 0
        self.tables[slot] = self.count

    def keep(self, slot: int, start: int, stop: int) -> tuple[int, ...]:
        """Keep the pages of a slot's positions start .. stop - 1, whole pages, until they are dropped; returns them."""
        pages = tuple(self.tables[slot, start // self.page : stop // self.page].tolist())
        self._kept.update(pages)
        return pages

    def drop(self, pages: Sequence[int]) -> None:
        """Keep these pages no longer. Slots that have them still do."""
        self._kept.difference_update(pages)
        self._unused += [page for page in pages if not self._users[page]]

    def used(self, pages: Sequence[int]) -> bool:
        """Whether a slot has one of these pages."""
        return any(self._users[page] for page in pages)

    def clear(self) -> None:
        """No slot has a page, and none is kept."""
        self.tables[:], self.changed, self.free = self.count, True, self.count
        # Handed out from the end: the first page first.
        self._unused, self._kept = list(range(self.count))[::-1], set()
        self._held, self._users = [0] * len(self.tables), [0] * self.count

    def _append(self, slot: int, pages: list[int]) -> None:
        for page in pages:
            self.free -= not self._users[page]
            self._users[page] += 1
        held = self._held[slot]
        self.tables[slot, held : held + len(pages)] = pages
        self._held[slot] = held + len(pages)
        self.changed |= bool(pages)

    def _leave(self, pages: list[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self.free += 1
                if page not in self._kept:
                    self._unused.append(page)
