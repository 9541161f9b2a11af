"""Which requests the caches have room for: all that find a slot, or those whose positions find pages.

Pages are handed out between dispatches, by the host alone. A request enters with pages for its prompt, those of a kept
prefix among them, and for the dispatch behind it, and gets more before each dispatch. When none is left, the request
whose turn comes last gives up its own and goes back to the queue, to go on later as if nothing had been
(docs/engine.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.decoding.state import DecodeState
from dspark_jax.serving.page_pool import PagePool
from dspark_jax.serving.roster import Entry
from dspark_jax.sharding import replicated
from dspark_jax.targets.kv_cache import ByPage
from dspark_jax.targets.pages import with_tables

SEATS_A_SPARE_PAGE = 4
"""A page is left free for so many requests in slots when another one enters."""
Seats = Mapping[int, Entry]
"""The requests in slots, by slot."""


class Memory(Protocol):
    """An engine's view of its caches' memory.

    preempted: requests that had to leave their slots, since the engine was made. pool: the pages; None where there are
    none. share: the part of the memory in use, 0 to 1, where `held` positions are. figures: further gauges, by name:
    their help and value.
    """

    preempted: int

    @property
    def pool(self) -> PagePool | None: ...

    def settle(self, seats: Seats) -> list[int]:
        """Free what requests that left have held, and give those in `seats` what their next dispatch may need.

        Returns:
            The slots whose requests have to leave for it, whose memory is free already.
        """
        ...

    def admit(self, slot: int, entry: Entry, seats: Seats, begins: Sequence[int] = ()) -> bool:
        """Give a request what it needs to enter a slot beside those in `seats`, if there is as much. `begins`: kept
        pages that its prompt begins with."""
        ...

    def placed(self, state: DecodeState) -> DecodeState:
        """The state, knowing what each slot has. Only its small leaves are replaced."""
        ...

    def clear(self) -> None:
        """Nothing is held: the state was made anew."""
        ...

    def share(self, held: int) -> float: ...

    def figures(self) -> dict[str, tuple[str, float]]: ...


@dataclass
class SlotMemory:
    """Every slot has room for the longest request, which `submit` has checked."""

    positions: int  # of all slots together
    preempted: int = 0
    pool: None = None

    def settle(self, seats: Seats) -> list[int]:
        return []

    def admit(self, slot: int, entry: Entry, seats: Seats, begins: Sequence[int] = ()) -> bool:
        return True

    def placed(self, state: DecodeState) -> DecodeState:
        return state

    def clear(self) -> None:
        pass

    def share(self, held: int) -> float:
        return held / self.positions

    def figures(self) -> dict[str, tuple[str, float]]:
        return {}


@dataclass
class PagedMemory:
    """Requests hold pages for their positions, and for those that the next dispatch may add.

    Attributes:
        pool: the pages.
        reach: positions that a dispatch may add to a request.
        mesh: the devices that the tables lie on; None: one.
        preempted: requests that had to leave their slots, since the engine was made.
    """

    pool: PagePool
    reach: int
    mesh: Mesh | None = None
    preempted: int = 0

    def settle(self, seats: Seats) -> list[int]:
        for slot in range(len(self.pool.tables)):
            if slot not in seats:
                self.pool.release(slot)

        # The first in turn get theirs first, from the last in turn where none is left: the first of all always goes on,
        # since `require_room` has made sure that it fits alone.
        leaving: list[int] = []
        turns = sorted(seats, key=lambda slot: seats[slot].turn)
        while turns:
            slot = turns.pop(0)
            wanted = self._wanted(seats[slot]) if seats[slot].decoding else 0
            while not self.pool.grow(slot, wanted):
                # It gives up its own pages where all that are left have come before it.
                leaving.append(turns.pop() if turns else slot)
                self.pool.release(leaving[-1])
                if leaving[-1] == slot:
                    break

        self.preempted += len(leaving)
        return leaving

    def admit(self, slot: int, entry: Entry, seats: Seats, begins: Sequence[int] = ()) -> bool:
        # First, so that they are neither counted as free nor given up for the others.
        self.pool.begin(slot, begins)
        # Some pages are left for those in slots: one of them may need one soon, and would turn this one out again.
        positions, spare = self._wanted(entry), -(-len(seats) // SEATS_A_SPARE_PAGE)
        if self.pool.needed(slot, positions) + spare <= self.pool.free:
            return self.pool.grow(slot, positions)
        self.pool.release(slot)
        return False

    def placed(self, state: DecodeState) -> DecodeState:
        if not self.pool.changed:
            return state
        held = {"target_cache": state.target_cache, "draft": state.draft}
        held = with_tables(held, lambda _: to_device(self.pool.tables, self.mesh))
        self.pool.changed = False
        return replace(state, **held)

    def clear(self) -> None:
        self.pool.clear()

    def share(self, held: int) -> float:
        return 1.0 - self.pool.free / self.pool.count

    def figures(self) -> dict[str, tuple[str, float]]:
        used = self.pool.count - self.pool.free
        return {
            "dspark_cache_pages": ("Pages of the caches.", self.pool.count),
            "dspark_cache_pages_used": ("Pages of the caches that requests have.", used),
            "dspark_cache_pages_shared": ("Pages of the caches that more than one request has.", self.pool.shared),
            "dspark_cache_pages_kept": ("Pages of the caches that kept prefixes have.", self.pool.kept),
        }

    def _wanted(self, entry: Entry) -> int:
        """Positions that a request may hold after its next dispatch. The last token is never run, so none is kept."""
        return min(len(entry.job.prompt) + len(entry.seen.tokens) + self.reach, entry.job.longest - 1)


def memory_of(loop: DecodeLoop, rounds: int) -> Memory:
    """The memory of a loop's caches, for dispatches of at most so many rounds."""
    layout = loop.layout
    if isinstance(layout, ByPage):
        pool = PagePool.of(layout, loop.requests, loop.size)
        # A round commits a token beyond its accepted drafts.
        return PagedMemory(pool, rounds * (loop.block + 1), loop.mesh)
    return SlotMemory(loop.requests * loop.size)


def to_device(tables: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """The tables of pages on a loop's devices, whole on each."""
    # A copy: the transfer may still read the array when the next page is handed out.
    return jax.device_put(tables.copy(), None if mesh is None else replicated(mesh))
