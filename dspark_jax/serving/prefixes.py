"""The kept beginnings of prompts: whole chunks by the tokens up to their end, least recently used first to go.

The chunks are arrays of their own; decoding/prefixes.py copies them out of a slot and into one. In pages a chunk is the
pages that hold it: requests that begin alike have them in common, and pages that none has are given up as soon as a
request needs them.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from dspark_jax.decoding.prefixes import KeptChunk, keep_chunk, restore_chunk
from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.decoding.state import DecodeState
from dspark_jax.drafters.paired import PairedRows
from dspark_jax.drafters.registry import Drafter, kind_of
from dspark_jax.errors import UserError
from dspark_jax.serving.page_pool import PagePool
from dspark_jax.serving.roster import Entry
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.pages import page_bytes

TOKEN_BYTES = 4
"""Of a token in a key: a prompt of thousands is still a small one."""


class Kept(NamedTuple):
    """A chunk; the pages that hold its keys and values, none by slot, where it holds them itself; bytes of both."""

    chunk: KeptChunk
    pages: tuple[int, ...]
    bytes: int

    @classmethod
    def of(cls, chunk: KeptChunk, pages: tuple[int, ...] = (), page_bytes: int = 0) -> "Kept":
        return cls(chunk, pages, chunk.bytes + len(pages) * page_bytes)


@dataclass
class PrefixCache:
    """Chunks of prompts that have been prefilled, within a bound of memory.

    Attributes:
        limit: bytes on the device that all chunks may take together.
        chunk: tokens of a chunk.
        pool: pages that are shared; None: chunks are copied.
        page_bytes: of a page, in all layers.
        used: bytes that the chunks take now.
        reused: prompt tokens that were not prefilled again, since the engine was made.
    """

    limit: int
    chunk: int
    pool: PagePool | None = None
    page_bytes: int = 0
    used: int = 0
    reused: int = 0
    _kept: "OrderedDict[bytes, Kept]" = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        if self.pool is not None:
            self.pool.give_up = self._give_up

    @classmethod
    def of(
        cls, config: EngineConfig, loop: DecodeLoop, state: DecodeState, pool: PagePool | None, drafter: Drafter | None
    ) -> "PrefixCache | None":
        """The cache that a configuration asks for, if any.

        Args:
            config: prefix_cache, prefill_chunk.
            loop: of the engine.
            state: of the loop.
            pool: pages of the state's caches; None: they lie slot by slot.
            drafter: the engine's.
        Raises:
            UserError: on several devices, over which slots are spread, or chunks that are no whole pages.
        """
        # A slot's rows lie on one of the devices, and a copy would have to move with the slot.
        if config.prefix_cache and loop.mesh is not None:
            raise UserError("Prompts are kept on a single device only; leave prefix_cache at 0 on a mesh.")
        limit, chunk = config.prefix_cache * 2**20, config.prefill_chunk
        if pool is None or not limit or not shares_pages(config, drafter):
            return cls(limit, chunk) if limit else None

        if chunk % pool.page:
            raise UserError(
                f"The engine has prefill_chunk = {chunk} and page = {pool.page}; a kept prefix is whole chunks in "
                "whole pages. Make the chunk a multiple of the page, or leave prefix_cache at 0."
            )
        return cls(limit, chunk, pool, page_bytes(state))

    def match(self, prompt: Sequence[int]) -> list[Kept]:
        """The kept chunks that a prompt begins with, in order; they leave at least its last token to be prefilled."""
        keys, tokens = list[bytes](), _key(prompt)
        # Whole chunks only, and from the first on: a chunk's bits depend on everything before it (docs/algorithm.md,
        # rule 116).
        for end in range(self.chunk, len(prompt), self.chunk):
            key = tokens[: end * TOKEN_BYTES]
            if key not in self._kept:
                break
            keys.append(key)

        # The first chunks are touched last: without them the later ones cannot be used, so these go before them.
        for key in reversed(keys):
            self._kept.move_to_end(key)
        return [self._kept[key] for key in keys]

    def pages(self, prompt: Sequence[int]) -> list[int]:
        """The pages of the kept chunks that a prompt begins with."""
        return [page for kept in self.match(prompt) for page in kept.pages]

    def restore(
        self, loop: DecodeLoop, state: DecodeState, slot: int, prompt: Sequence[int]
    ) -> tuple[DecodeState, int]:
        """Write the kept chunks that a prompt begins with into its slot; `state` is donated.

        Returns:
            (the state, the tokens that the slot holds).
        """
        matched = self.match(prompt)
        if self.pool is not None:
            # It has them since it was admitted, unless they have been kept since.
            self.pool.begin(slot, [page for kept in matched for page in kept.pages])

        held = 0
        # In order: a later chunk overlaps the earlier one by a row, and its copy of that row is the complete one.
        for kept in matched:
            state = restore_chunk(loop, state, kept.chunk, *jax.device_put((np.int32(slot), np.int32(held))))
            held += self.chunk
        self.reused += held
        return state, held

    def begin(self, loop: DecodeLoop, state: DecodeState, seats: Mapping[int, Entry]) -> DecodeState:
        """Write what is kept of the prompts in `seats` of which nothing is prefilled yet; `state` is donated."""
        for slot, entry in seats.items():
            if not entry.prefilled:
                state, entry.prefilled = self.restore(loop, state, slot, entry.running.prompt)
                # Of a request that goes on, tokens of its answer may be among them, and what it prefilled itself.
                spared = min(entry.prefilled, len(entry.job.prompt))
                entry.cached = min(spared, entry.cached) if entry.begun else spared
        return state

    def keep(self, loop: DecodeLoop, state: DecodeState, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Keep what a slot holds of a prompt from `start` on, unless it is no whole chunk or is kept already.

        Args:
            loop: static part of the state.
            state: after the chunk has been prefilled, before any round or later chunk.
            slot: of the prompt.
            start: the chunk's position.
            tokens: the prompt's, from its beginning to the chunk's end.
        """
        # A last, shorter chunk was computed at another width, whose bits differ.
        if len(tokens) - start == self.chunk and _key(tokens) not in self._kept:
            at = jax.device_put((np.int32(slot), np.int32(start)))
            chunk = keep_chunk(loop, state, *at, self.chunk, self.pool is not None)
            pages = () if self.pool is None else self.pool.keep(slot, start, len(tokens))
            self.add(tokens, Kept.of(chunk, pages, self.page_bytes))

    def add(self, tokens: Sequence[int], kept: Kept) -> None:
        """Keep the chunk that ends with the last of these tokens; the least recently used are dropped until it fits."""
        self._kept[_key(tokens)] = kept
        # The chunks before it count as used, last the first, as in `match`.
        for end in range(len(tokens), 0, -self.chunk):
            key = _key(tokens[:end])
            if key in self._kept:
                self._kept.move_to_end(key)

        # One that does not fit alone goes first: it could only be kept by emptying the cache.
        if kept.bytes > self.limit:
            self._drop(_key(tokens))
        while self._count() > self.limit:
            self._drop(next(iter(self._kept)))

    def compiled(self, loop: DecodeLoop, state: DecodeState) -> DecodeState:
        """Compile both programs on slot 0 of an idle engine, whose state is donated."""
        # Slot 0 is copied onto itself: the state changes in nothing but its place in memory.
        start = jax.device_put((np.int32(0), np.int32(0)))
        return restore_chunk(loop, state, keep_chunk(loop, state, *start, self.chunk, self.pool is not None), *start)

    def clear(self) -> None:
        """Drop all chunks, and with them their device memory."""
        for key in list(self._kept):
            self._drop(key)
        self._count()

    def _give_up(self) -> None:
        """Drop the chunk that no request has whose last use is longest ago, for its pages."""
        assert self.pool is not None
        self._drop(next(key for key, kept in self._kept.items() if not self.pool.used(kept.pages)))
        self._count()

    def _drop(self, key: bytes) -> None:
        """Keep a chunk no longer; requests that have its pages go on with them."""
        pages = self._kept.pop(key).pages
        if self.pool is not None:
            self.pool.drop(pages)

    def _count(self) -> int:
        """Set and return `used`."""
        # Anew each time, so that an interrupt between two lines leaves no wrong count behind; in one step, as figures
        # are read on other threads.
        self.used = sum(kept.bytes for kept in self._kept.values())
        return self.used


def shares_pages(config: EngineConfig, drafter: Drafter | None) -> bool:
    """Whether kept prefixes stay in pages that requests have in common."""
    # A paired drafter writes a chunk's last row again, with the first token behind it: such a page is not shared.
    paired = drafter is not None and issubclass(kind_of(drafter.hf_config).module, PairedRows)
    return config.cache_pages > 0 and not paired


def _key(tokens: Sequence[int]) -> bytes:
    """All tokens up to the end of a chunk: equal keys are equal prompts, without the chance of a hash."""
    return np.asarray(tokens, np.int32).tobytes()
