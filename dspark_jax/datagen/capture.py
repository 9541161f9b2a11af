"""A target's hidden states for training rows: which rows run together, and the run that overlaps with their writing.

Training rows are taken in windows, one after the other, and a window's batches are a function of its rows alone, so
that a run can begin at any window and computes the same bits. A batch's rows hold one conversation each, of like
length, or several of them, packed: then none attends to another, and positions begin at 0 in each.

Axes: B batch row, T padded position.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import dropwhile
from threading import Event
from typing import Any, Literal

import jax
import numpy as np

from dspark_jax.data.chat import Encoded
from dspark_jax.data.codecs import STATES
from dspark_jax.data.pipeline import length_buckets
from dspark_jax.data.records import CacheSpec, Sample
from dspark_jax.data.views import pack
from dspark_jax.sharding import ShardingRules, parameter_mesh, replicated, traced_over
from dspark_jax.targets.target import Target
from dspark_jax.training.states import TargetStates

Layout = Literal["packed", "by-length"]
WINDOW_BATCHES = 4
"""Batches whose rows are put together from the same conversations."""
AHEAD = 2  # batches that devices have before them while states are copied from them
SMALLEST_BUCKET = 64
"""Shortest padded length, in tokens."""


@dataclass(frozen=True)
class TrainingRow:
    """A training row of the cache; `kept` is False where it has too few supervised tokens and is dropped."""

    index: int
    encoded: Encoded
    kept: bool

    @property
    def length(self) -> int:
        return len(self.encoded.input_ids)


@dataclass(frozen=True)
class Batch:
    """What the target runs at once: rows with one conversation or, `packed`, with several, padded to `length`."""

    rows: Sequence[Sequence[TrainingRow]]
    length: int
    packed: bool

    def arrays(self, height: int) -> dict[str, np.ndarray]:
        """input_ids and, packed, segments (1, 2, ... in each row; 0: padding), int32 [height, T]."""
        # Always `height` rows, the missing ones zero: one compiled program a length, and every run sums in one order.
        names = ("input_ids", "segments") if self.packed else ("input_ids",)
        made = {name: np.zeros((height, self.length), np.int32) for name in names}
        for row, at, item in self.places():
            made["input_ids"][row, at : at + item.length] = item.encoded.input_ids
            if self.packed:
                made["segments"][row, at : at + item.length] = made["segments"][row, at - 1] + 1 if at else 1
        return made

    def places(self) -> Iterator[tuple[int, int, TrainingRow]]:
        """(row, first position, training row) of every conversation."""
        for row, items in enumerate(self.rows):
            at = 0
            for item in items:
                yield row, at, item
                at += item.length


@dataclass(frozen=True)
class Window:
    """Neighbouring training rows, dropped ones included, and the batches of those that are kept."""

    members: Sequence[TrainingRow]
    batches: Sequence[Batch]


def windows(items: Sequence[TrainingRow], batch: int, max_length: int, layout: Layout) -> Iterator[Window]:
    """All windows of the training rows.

    Args:
        items: in their order.
        batch: rows B of a batch.
        max_length: of a conversation.
        layout: of the rows. Packed ones have room for `max_length` tokens, all of them, and are filled by best fit.
    """
    lengths = length_buckets(max_length, SMALLEST_BUCKET)
    return _packed(items, batch, lengths[-1]) if layout == "packed" else _by_length(items, batch, lengths)


def _by_length(items: Sequence[TrainingRow], batch: int, lengths: Sequence[int]) -> Iterator[Window]:
    # Small enough that little is computed twice after a kill, large enough that lengths can be sorted.
    for first in range(0, len(items), batch * WINDOW_BATCHES):
        members = items[first : first + batch * WINDOW_BATCHES]
        # Similar lengths share a batch, for less padding; the index makes the order unique.
        kept = sorted((item for item in members if item.kept), key=lambda item: (item.length, item.index))
        groups = [kept[at : at + batch] for at in range(0, len(kept), batch)]
        batches = [
            Batch([[item] for item in group], next(size for size in lengths if size >= group[-1].length), packed=False)
            for group in groups
        ]
        yield Window(members, batches)


def _packed(items: Sequence[TrainingRow], batch: int, length: int) -> Iterator[Window]:
    """As many conversations a window as fill its rows, so that no batch but the last of all has empty rows."""
    sizes = np.array([item.length if item.kept else 0 for item in items], np.int64)
    ends, most, first = np.cumsum(sizes), batch * WINDOW_BATCHES, 0
    while first < len(items):
        before = ends[first - 1] if first else 0
        count = int(np.searchsorted(ends, before + most * length, side="right")) - first
        while True:
            members = items[first : first + count]
            kept = [item for item in members if item.kept]
            rows = pack(np.array([item.length for item in kept], np.int64), length)
            if len(rows) <= most:
                break
            # The rows too many hold the shortest conversations: about so many have no room.
            count -= max(1, sum(map(len, rows[most:])) // 2)

        filled = [[kept[place] for place in row] for row in rows]
        batches = [Batch(filled[at : at + batch], length, packed=True) for at in range(0, len(filled), batch)]
        yield Window(members, batches)
        first += count


@dataclass(frozen=True)
class Padding:
    """How a layout fills its batches.

    Attributes:
        tokens: real ones.
        positions: that are computed, padding included.
        passes: by padded length.
        lengths: of the conversations that share rows; None where none do.
    """

    tokens: int
    positions: int
    passes: dict[int, int]
    lengths: np.ndarray | None

    @classmethod
    def of(cls, items: Sequence[TrainingRow], batch: int, max_length: int, layout: Layout) -> "Padding":
        """That of `windows`."""
        passes: dict[int, int] = {}
        for window in windows(items, batch, max_length, layout):
            for one in window.batches:
                passes[one.length] = passes.get(one.length, 0) + 1
        lengths = np.array([item.length for item in items if item.kept], np.int64)
        positions = sum(batch * length * count for length, count in passes.items())
        return cls(int(lengths.sum()), positions, passes, lengths if layout == "packed" else None)

    @property
    def share(self) -> float:
        return 1 - self.tokens / self.positions if self.positions else 0.0


class Capture:
    """Computes samples in a thread of its own, a window ahead of what is taken.

    Attributes:
        waited: seconds in which a window was asked for and not yet computed.
        idle: seconds in which a window was computed and the one before still in use; devices may compute
            `AHEAD` batches in them.
    """

    def __init__(self, target: Target, spec: CacheSpec, batch: int, layout: Layout):
        self._target, self._spec, self._batch, self._layout = target, spec, batch, layout
        self._forward = make_forward(target, spec)
        self.waited = self.idle = 0.0

    def __call__(self, items: Sequence[TrainingRow], start: int) -> Generator[tuple[int, Sample | None]]:
        """Yields (index, sample) of every source from `start` on, in order; None in place of a dropped one's sample.

        The window that holds `start` is computed from its beginning, so that its batches, and with them every bit of
        the results, are those of a run that was not interrupted.
        """
        all_windows = windows(items, self._batch, self._spec.max_length, self._layout)
        rest = dropwhile(lambda window: window.members[-1].index < start, all_windows)

        stopped = Event()
        computed = self._computed(rest, stopped)
        with ThreadPoolExecutor(1, "capture") as pool:
            try:
                following = pool.submit(_timed_next, computed)
                while True:
                    asked = time.perf_counter()
                    made, ended = following.result()
                    self.waited += time.perf_counter() - asked
                    if made is None:
                        return
                    self.idle += max(asked - ended, 0.0)
                    following = pool.submit(_timed_next, computed)
                    members, samples = made
                    for item in members:
                        # Rows before `start` were computed only for their batches' sake. Dropped here once used.
                        sample = samples.pop(item.index, None)
                        if item.index >= start:
                            yield item.index, sample
            finally:
                # Whoever takes no more need not wait for a whole window.
                stopped.set()

    def _computed(
        self, rest: Iterator[Window], stopped: Event
    ) -> Iterator[tuple[Sequence[TrainingRow], dict[int, Sample]]]:
        """(training rows, samples by index) of every window; ends early once `stopped`."""

        def under_way() -> Iterator[tuple[Window, Batch | None, dict[str, jax.Array]]]:
            for window in rest:
                for batch in window.batches:
                    states = self._forward(self._target.params, batch.arrays(self._batch))
                    for array in states.values():
                        # Starts the copy without waiting for it.
                        if array.is_fully_addressable:
                            array.copy_to_host_async()
                    yield window, batch, states
                yield window, None, {}

        samples: dict[int, Sample] = {}
        for window, batch, states in _ahead(under_way()):
            if stopped.is_set():
                return
            if batch is None:
                yield window.members, samples
                samples = {}
            else:
                samples.update(_cut(batch, jax.device_get(states)))


def _timed_next(made: Iterator[Any]) -> tuple[Any, float]:
    """(the next one or None, when it was there)."""
    one = next(made, None)
    return one, time.perf_counter()


def _ahead(made: Iterator[Any]) -> Iterator[Any]:
    """The same, each handed out once the next `AHEAD` are under way."""
    waiting = deque[Any]()
    for one in made:
        waiting.append(one)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def make_forward(target: Target, spec: CacheSpec) -> Callable[[dict, Any], dict[str, jax.Array]]:
    """Makes the jitted function (params, `Batch.arrays`) -> states in the cache's codec (`codecs.STATES`).

    Rows are sharded over the parameters' mesh; the states are replicated, so that every process has them whole.
    """
    mesh = parameter_mesh(target.params)
    states = TargetStates(target.graphdef, spec.layer_ids, codec=spec.dtype)

    def forward(params: dict, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if mesh is not None:
            rows = ShardingRules().rows(mesh, 2)
            batch = {name: jax.lax.with_sharding_constraint(x, rows) for name, x in batch.items()}
        # Padding stands at the right, so causal rows never see it; encoding on the device shrinks what leaves it.
        with traced_over(mesh):
            return states.stored(params, batch)

    return jax.jit(forward, out_shardings=replicated(mesh) if mesh is not None and jax.process_count() > 1 else None)


def _cut(batch: Batch, stored: dict[str, np.ndarray]) -> Iterator[tuple[int, Sample]]:
    """Yields (index, sample) of every conversation of a batch, without padding."""
    for row, at, item in batch.places():
        states = [stored[name][row, at : at + item.length] for name in STATES if name in stored]
        yield item.index, Sample(item.index, item.encoded.input_ids, item.encoded.loss_mask, *states)
