"""Training batches from a source of samples; the order is a pure function of (seed, step).

Each epoch is a global shuffle of the samples, and epochs are laid end to end; step s takes positions [s*B, (s+1)*B), of
which each host reads those that its devices hold. The pipeline's whole state is therefore the step: it survives a kill
and a change of the number of hosts.
"""

import bisect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grain
import numpy as np

from dspark_jax.data.deepspec_cache import DeepSpecCache
from dspark_jax.data.manifest import FORMAT, MANIFEST, pulled, read_manifest
from dspark_jax.data.records import TokenSample, TokenSource
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.data.views import announce
from dspark_jax.errors import UserError

Batch = dict[str, np.ndarray]
_ENDLESS = 2**40

GIGABYTES = "DSPARK_READ_AHEAD_GB"
_SHARE_OF_MEMORY = 0.25
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # as a container sees its own control group
_AHEAD = 4


def open_cache(folder: str | os.PathLike[str]) -> TargetCache | DeepSpecCache:
    """Opens a cache of either format, detected from its manifest; UserError as the two readers raise it."""
    cache = TargetCache if read_manifest(pulled(folder) / MANIFEST).get("format") == FORMAT else DeepSpecCache
    return cache(folder)


def length_buckets(max_length: int, smallest: int = 128) -> tuple[int, ...]:
    """Padded lengths: `smallest` times 1, 2, 3, 4, 6, 8, 12, 16, ..., then its first multiple >= max_length.

    Every bucket is one compilation of the training step; a batch's longest row fills at least half of its bucket,
    unless that is the smallest.
    """
    # Powers of two with their midpoints; all are multiples of `smallest`.

    last = -(-max_length // smallest) * smallest
    buckets, step = {last}, smallest
    while step < last:
        buckets.update(size for size in (step, step * 3 // 2) if size < last and size % smallest == 0)
        step *= 2
    return tuple(sorted(buckets))


def pad_batch(samples: Sequence[TokenSample], length: int) -> Batch:
    """Rows padded at the right with zeros to `length` >= the longest.

    Returns:
        input_ids int32 [B, T], loss_mask uint8 [B, T], lengths int32 [B], sample_ids int64 (those of every
        conversation, row after row); for packed rows segments int32 [B, T], 0 in the padding; where the source
        has states features [B, T, m*D], last_hidden [B, T, D] and, with codes, scales [B, T, m+1], all in the cache's
        dtypes.
    """
    # Zeros in ids, masks and states alike (docs/algorithm.md, rule 46): what is padded follows from the lengths.
    batch: Batch = {
        name: np.zeros((len(samples), length, *array.shape[1:]), array.dtype)
        for name, array in samples[0].arrays().items()
    }

    for row, sample in enumerate(samples):
        for name, array in sample.arrays().items():
            batch[name][row, : len(array)] = array

    # Everything that is masked in a step follows from the lengths, so no mask of padding is carried along.
    batch["lengths"] = np.array([len(s.input_ids) for s in samples], np.int32)
    batch["sample_ids"] = np.array([name for s in samples for name in s.members or (s.sample_id,)], np.int64)
    return batch


@dataclass(frozen=True)
class Batches:
    """The batches of one host.

    Attributes:
        global_batch: rows of a step over all hosts.
        buckets: lengths a batch may be padded to, ascending; all hosts of a step use the same one.
        shuffle: False reads the source in order (evaluation).
        rows: the rows of a step that this host reads, ascending; None: all.

    Raises:
        UserError: an empty source, a sample longer than the largest bucket.
    """

    source: TokenSource
    global_batch: int
    seed: int
    buckets: tuple[int, ...]
    shuffle: bool = True
    rows: tuple[int, ...] | None = None
    _lengths: np.ndarray = field(init=False, repr=False)
    _order: grain.MapDataset = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.source)
        if count == 0:
            raise UserError(
                "The cache has no samples: every training row was dropped; lower min_loss_tokens or raise max_length."
            )

        # Known without reading a sample, so that no step can fail on its length later.
        lengths = self.source.lengths
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            raise UserError(f"length_buckets are {list(self.buckets)}, expected at least one, strictly increasing.")

        if int(lengths.max()) > self.buckets[-1]:
            raise UserError(
                f"The longest sample has {lengths.max()} tokens, the largest length bucket {self.buckets[-1]}; "
                "add a larger bucket."
            )

        order = grain.MapDataset.range(count)
        if self.shuffle:
            # grain shuffles epoch e with seed + e; the seed is hashed, so that neighbouring seeds share no epochs.
            order = order.shuffle(seed=int(np.random.SeedSequence(self.seed).generate_state(1)[0]))

        object.__setattr__(self, "_lengths", lengths)
        object.__setattr__(self, "_order", order)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample has been seen once (the last of them may reach into the next epoch)."""
        return -(-len(self.source) // self.global_batch)

    def indices_at(self, step: int) -> np.ndarray:
        """int64 [global_batch]: the samples of a step, over all hosts."""
        # Positions run on through the epochs; the order maps each to a sample, epoch after epoch.
        positions = range(step * self.global_batch, (step + 1) * self.global_batch)
        return np.array([self._order[position] for position in positions], np.int64)

    def length_at(self, step: int) -> int:
        """The padded length T of a step: the smallest bucket that holds its longest sample over all hosts."""
        return self.buckets[bisect.bisect_left(self.buckets, int(self._lengths[self.indices_at(step)].max()))]

    def batch_at(self, step: int) -> Batch:
        """This host's rows of a step, as `pad_batch` returns them; safe from several threads."""
        indices = self.indices_at(step)
        # All hosts agree on the step's samples and its length; each reads its own rows.
        mine = indices if self.rows is None else indices[list(self.rows)]
        announce(self.source, [int(index) for index in mine])
        return pad_batch([self.source[int(index)] for index in mine], self.length_at(step))

    def sample_ids_at(self, step: int) -> list[int]:
        """Sample ids of a step, packed ones included, over all hosts, row after row."""
        samples = [self.source[int(index)] for index in self.indices_at(step)]
        return [int(name) for sample in samples for name in sample.members or (sample.sample_id,)]

    def iterate(self, start: int = 0, stop: int | None = None, ahead: int | None = None) -> "BatchIterator":
        """Batches from step `start` up to `stop` (None: endless), `ahead` of them read by as many threads.

        However slow the loop is, at most `ahead` batches are in memory beside the one that it has, and the records
        of those that are being padded; None: as many as `read_ahead` allows.
        """
        return BatchIterator(self, start, _ENDLESS if stop is None else stop, ahead)

    def read_ahead(self, step: int) -> int:
        """Batches to read ahead: 4, or as many as the bound holds, at least 1; reads a sample of `step`."""
        # Each is counted twice: while it is padded its records are in memory, too.
        return int(min(max(bound_of_memory() // (2 * self.batch_bytes(step)), 1), _AHEAD))

    def batch_bytes(self, step: int) -> int:
        """Bytes of this host's rows of a step, padded to the longest bucket; reads a sample of `step`."""
        here = range(self.global_batch) if self.rows is None else self.rows
        arrays = self.source[int(self.indices_at(step)[here[0]])].arrays().values()
        token = sum(array.itemsize * math.prod(array.shape[1:]) for array in arrays)
        return len(here) * self.buckets[-1] * token


def bound_of_memory() -> int:
    """Bytes that a process's batches may take before the loop takes them: $DSPARK_READ_AHEAD_GB, else a share of the
    machine's or its container's memory; UserError where the variable is no number."""
    text = os.environ.get(GIGABYTES)
    if not text:
        return int(_SHARE_OF_MEMORY * min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _container_limit()))
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise UserError(f"{GIGABYTES} is {text!r}; a number of gigabytes was expected.") from None


def _container_limit() -> float:
    """Bytes that a container may take; infinity where none is set, or no control group is seen."""
    try:
        text = CONTAINER_LIMIT.read_text().strip()
    except OSError:
        return math.inf
    return int(text) if text.isdecimal() else math.inf  # "max": none


class BatchIterator(Iterator[Batch]):
    """Batches in order, read ahead by threads; call `close` (or use `with`), so that no thread outlives the run.

    `get_state()` is {"step": step of the next batch to be returned}, however many were read ahead.
    """

    def __init__(self, batches: Batches, start: int, stop: int, ahead: int | None):
        self._batches, self._stop, self._ahead = batches, stop, ahead
        # Over steps and not over samples: a batch is the unit that is read ahead.
        self._dataset = grain.MapDataset.range(stop).map(self._load)
        self._iterator: grain.DatasetIterator | None = None
        self._step = start

    def __next__(self) -> Batch:
        if self._step >= self._stop:
            self.close()
            raise StopIteration
        # Started late, so that a state may be set before any thread reads.
        if self._iterator is None:
            ahead = self._batches.read_ahead(self._step) if self._ahead is None else self._ahead
            # Grain's buffer holds the batches that its threads are at, too, so that more threads would stand idle.
            options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
            self._iterator = iter(self._dataset.to_iter_dataset(options))
            self._iterator.set_state({"next_index": self._step})

        loaded = next(self._iterator)
        # Raised here, in the caller's thread.
        if isinstance(loaded, UserError):
            self.close()
            raise loaded

        self._step += 1
        return loaded

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at the step of a state; batches read ahead are dropped."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends the reading threads, each after its current batch; a later `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _load(self, step: int) -> Batch | UserError:
        # Returned, not raised: from a reading thread, grain would add its own lines to the sentence.
        try:
            return self._batches.batch_at(step)
        except UserError as error:
            return error

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
