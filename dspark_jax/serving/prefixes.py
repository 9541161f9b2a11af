"""The kept beginnings of prompts: whole chunks by the tokens up to their end, least recently used first to go.

The chunks are arrays on the device; decoding/prefixes.py copies them out of a slot and into one.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from dspark_jax.decoding.prefixes import KeptChunk, keep_chunk, restore_chunk
from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.decoding.state import DecodeState
from dspark_jax.errors import UserError
from dspark_jax.serving.roster import Entry
from dspark_jax.serving.settings import EngineConfig


@dataclass
class PrefixCache:
    """Chunks of prompts that have been prefilled, within a bound of memory.

    Attributes:
        limit: bytes on the device that all chunks may take together.
        chunk: tokens of a chunk.
        used: bytes that they take now.
        reused: prompt tokens that were not prefilled again, since the engine was made.
    """

    limit: int
    chunk: int
    used: int = 0
    reused: int = 0
    _kept: "OrderedDict[bytes, KeptChunk]" = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def of(cls, config: EngineConfig, mesh: Mesh | None) -> "PrefixCache | None":
        """The cache that a configuration asks for, if any.

        Raises:
            UserError: on several devices, over which slots are spread.
        """
        # A slot's rows lie on one of the devices, and a copy would have to move with the slot.
        if config.prefix_cache and mesh is not None:
            raise UserError("Prompts are kept on a single device only; leave prefix_cache at 0 on a mesh.")
        return cls(config.prefix_cache * 2**20, config.prefill_chunk) if config.prefix_cache else None

    def match(self, prompt: Sequence[int]) -> list[KeptChunk]:
        """The kept chunks that a prompt begins with, in order; they leave at least its last token to be prefilled."""
        keys: list[bytes] = []
        # Whole chunks only, and from the first on: a chunk's bits depend on everything before it (docs/algorithm.md,
        # rule 116).
        for end in range(self.chunk, len(prompt), self.chunk):
            key = _key(prompt[:end])
            if key not in self._kept:
                break
            keys.append(key)

        # The first chunks are touched last: without them the later ones cannot be used, so these go before them.
        for key in reversed(keys):
            self._kept.move_to_end(key)
        return [self._kept[key] for key in keys]

    def restore(
        self, loop: DecodeLoop, state: DecodeState, slot: int, prompt: Sequence[int]
    ) -> tuple[DecodeState, int]:
        """Write the kept chunks that a prompt begins with into its slot; `state` is donated.

        Returns:
            (the state, the tokens that the slot holds).
        """

        held = 0
        # In order: a later chunk overlaps the earlier one by a row, and its copy of that row is the complete one.
        for kept in self.match(prompt):
            state = restore_chunk(loop, state, kept, *jax.device_put((np.int32(slot), np.int32(held))))
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
            self.add(tokens, keep_chunk(loop, state, *at, self.chunk))

    def add(self, tokens: Sequence[int], kept: KeptChunk) -> None:
        """Keep the chunk that ends with the last of these tokens; the least recently used are dropped until it fits."""
        # It could only be kept by emptying the cache and still not fit.
        if kept.bytes > self.limit:
            return
        # Counted anew each time, so that an interrupt between two lines leaves no wrong count behind.
        self._kept[_key(tokens)] = kept
        # The chunks before it count as used, last the first, as in `match`.
        for end in range(len(tokens), 0, -self.chunk):
            key = _key(tokens[:end])
            if key in self._kept:
                self._kept.move_to_end(key)

        while (used := sum(chunk.bytes for chunk in self._kept.values())) > self.limit:
            self._kept.popitem(last=False)
        # Written last, in one step: figures are read on other threads.
        self.used = used

    def compiled(self, loop: DecodeLoop, state: DecodeState) -> DecodeState:
        """Compile both programs on slot 0 of an idle engine, whose state is donated."""
        # Slot 0 is copied onto itself: the state changes in nothing but its place in memory.
        start = jax.device_put((np.int32(0), np.int32(0)))
        return restore_chunk(loop, state, keep_chunk(loop, state, *start, self.chunk), *start)

    def clear(self) -> None:
        """Drop all chunks, and with them their device memory."""
        self._kept.clear()
        self.used = 0


def _key(tokens: Sequence[int]) -> bytes:
    """All tokens up to the end of a chunk: equal keys are equal prompts, without the chance of a hash."""
    # Four bytes a token: a prompt of thousands is still a small key.
    return np.asarray(tokens, np.int32).tobytes()
