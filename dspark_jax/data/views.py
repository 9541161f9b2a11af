"""Views of a sample source with the interface of a source: cut, layers selected, reordered, packed."""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from dspark_jax.data.records import CacheSpec, FeatureSource, Sample, TokenSample, TokenSource
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.errors import UserError

Row = TypeVar("Row", bound=TokenSample)


@dataclass(frozen=True)
class Truncated:
    """`source` with every sample cut at its end to `max_length` tokens."""

    source: TokenSource
    max_length: int

    @property
    def lengths(self) -> np.ndarray:
        return np.minimum(self.source.lengths, self.max_length)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> TokenSample:
        return self.source[index].cut(self.max_length)


@dataclass(frozen=True)
class Tapped:
    """`source` with the features of `layer_ids` only; UserError where it lacks one of them."""

    source: FeatureSource
    layer_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        missing = [layer for layer in self.layer_ids if layer not in self.source.spec.layer_ids]
        if missing:
            raise UserError(
                f"The cache holds features of the layers {list(self.source.spec.layer_ids)}, not of layer "
                f"{missing[0]}; build one with it."
            )

    @property
    def spec(self) -> CacheSpec:
        return dataclasses.replace(self.source.spec, layer_ids=self.layer_ids)

    @property
    def lengths(self) -> np.ndarray:
        return self.source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample, size = self.source[index], self.source.spec.hidden_size
        # Layers lie side by side on the last axis, [T, m D], in the order of the cache's spec.
        places = [self.source.spec.layer_ids.index(layer) for layer in self.layer_ids]
        features = np.concatenate([sample.features[:, at * size : (at + 1) * size] for at in places], axis=1)
        # The last scale, of the last hidden states, goes with every choice of layers.
        scales = None if sample.scales is None else sample.scales[:, [*places, -1]]
        return dataclasses.replace(sample, features=features, scales=scales)


@dataclass(frozen=True)
class Reordered:
    """Sample i is `source[order[i]]` under the sample id names[i]."""

    source: TokenSource
    order: np.ndarray
    names: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.source.lengths[self.order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> TokenSample:
        return dataclasses.replace(self.source[int(self.order[index])], sample_id=int(self.names[index]))


@dataclass(frozen=True)
class Packed:
    """Rows of at most `length` tokens with several samples of `source` each, in `segments` of their own.

    Which samples share a row follows from their lengths alone, so the rows are the same in every epoch and on every
    host, and only their order changes.

    Attributes:
        rows: the samples of every row, in order.
    """

    source: TokenSource
    length: int
    rows: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _lengths: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = self.source.lengths
        # Packed once, for all epochs: a row is a unit of the shuffle, and its members stay together.
        rows = tuple(map(tuple, pack(lengths, self.length)))
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "_lengths", np.array([lengths[list(row)].sum() for row in rows], np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)], tokens of every row."""
        return self._lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenSample:
        return join(index, [self.source[member] for member in self.rows[index]])


def announce(source: TokenSource, indices: Sequence[int]) -> None:
    """Has what lies beneath views fetch what these samples need, side by side; nothing where that is on a disk."""
    while not isinstance(source, TargetCache):
        if isinstance(source, Packed):
            indices = [member for index in indices for member in source.rows[index]]
        elif isinstance(source, Reordered):
            indices = [int(source.order[index]) for index in indices]
        elif not isinstance(source, Truncated | Tapped):
            return
        source = source.source

    source.ahead(indices)


def join(name: int, samples: Sequence[Row]) -> Row:
    """Concatenates samples into one row with segments 1, 2, ... and their ids as `members`."""
    parts = [sample.arrays() for sample in samples]
    changes: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    sizes = [len(sample.input_ids) for sample in samples]
    # Segments keep conversations apart in attention and positions; 0 is left for padding.
    changes["segments"] = np.repeat(np.arange(1, len(samples) + 1, dtype=np.int32), sizes)
    changes["members"] = tuple(sample.sample_id for sample in samples)
    return dataclasses.replace(samples[0], sample_id=name, **changes)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs samples into rows by best fit decreasing: longest first, each into the fullest row that still takes it.

    Args:
        lengths: int [n], tokens of each sample.
        capacity: tokens that a row holds.

    Returns:
        Indices of the samples of each row.

    Raises:
        ValueError: a length above the capacity.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a length of {lengths.max()} does not fit a row of {capacity}")

    rows: list[list[int]] = []
    room: list[int] = []  # the distinct amounts of room left in rows, ascending
    having: dict[int, list[int]] = {}  # the rows with each amount

    # A stable sort: equal lengths keep their order, so that every host packs alike.
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(room, length)
        # No row takes it: a new one is opened.
        if at == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left = room[at]
            # The fullest row that still takes it; rows of equal room are interchangeable.
            row = having[left].pop()
            if not having[left]:
                del having[left], room[at]

        rows[row].append(index)
        left -= length
        if left not in having:
            bisect.insort(room, left)
        having.setdefault(left, []).append(row)

    return rows
