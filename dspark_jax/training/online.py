"""Online and hybrid runs: tokenised conversations, and the cache that a hybrid run's first epoch writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from dspark_jax.config.schema import DataSettings
from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.chat import template_id
from dspark_jax.data.codecs import STATES
from dspark_jax.data.manifest import begun, require_room
from dspark_jax.data.pipeline import Batches
from dspark_jax.data.records import CacheSpec, Sample, TokenSource, estimate_bytes
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.data.tokenised import Tokenised, encode_files
from dspark_jax.data.tokenizers import tokenizer_hash
from dspark_jax.data.views import Packed, Reordered
from dspark_jax.distributed import barrier, fetch_rows, from_first, is_first
from dspark_jax.errors import UserError
from dspark_jax.files import require_same_settings, write_settings
from dspark_jax.targets.target import Target

SHARD_BYTES = 256 * 2**20


def open_conversations(data: DataSettings, target: Target) -> Tokenised:
    """Tokenises the conversations of the settings.

    Raises:
        UserError: sequences longer than the target's context, a target without tokenizer, no conversation that has
            enough supervised tokens.
    """
    if data.max_length > target.config.max_positions:
        raise UserError(
            f"data.max_length is {data.max_length}, the target's context {target.config.max_positions}; lower it."
        )
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files to read conversations with; add tokenizer.json.")

    files = [data.conversations]
    # The cut happens while tokenising, and short conversations are dropped after it (docs/algorithm.md, rule 88).
    encoded = encode_files(files, target.tokenizer, data.thinking, data.max_length, target.config.vocab_size)
    found = Tokenised.of(encoded, data.min_loss_tokens)
    if not len(found):
        raise UserError(
            f"No conversation in {data.conversations} has {data.min_loss_tokens} supervised tokens within "
            f"{data.max_length}; raise data.max_length, or look at the answers."
        )

    return found


@dataclass(frozen=True)
class FirstEpoch:
    """The sequences in the order of the first epoch, which is the order of the records in the cache that it writes.

    Attributes:
        batches: of the run.
        sequences: the source beneath packed rows.
        order: int64 [records], the sequence of each record.
        firsts: int64 [rows + 1], the first record of every row of the epoch, and their number.
    """

    batches: Batches
    sequences: TokenSource
    order: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, batches: Batches) -> "FirstEpoch":
        """The first epoch of a run's batches, over packed or single sequences."""
        source, count = batches.source, len(batches.source)

        steps = range(batches.steps_per_epoch)
        # The last step is filled from the second epoch, whose rows are not recorded.
        rows = np.concatenate([batches.indices_at(step) for step in steps])[:count]

        # Without packing a row is one record.
        if not isinstance(source, Packed):
            return cls(batches, source, rows, np.arange(count + 1))

        members = [source.rows[row] for row in rows]
        firsts = np.cumsum([0, *map(len, members)])

        return cls(batches, source.source, np.concatenate(members).astype(np.int64), firsts)

    def spec(self, data: DataSettings, target: Target, layer_ids: tuple[int, ...]) -> CacheSpec:
        """The spec of the cache; its sources are the sequences in this order."""
        # A cache of the same sequences in another order is another cache: records are found by place.
        digest = xxhash.xxh3_128(self.order.astype("<i8").tobytes())
        # The samples' own content as well: conversations that were edited since give other states at the same
        # places.
        for index in self.order.tolist():
            sample = self.sequences[index]

            digest.update(sample.input_ids.tobytes() + sample.loss_mask.tobytes())

        return CacheSpec(
            target_name=target.name,
            target_sha256=target.config_sha256,
            layer_ids=layer_ids,
            hidden_size=target.config.hidden_size,
            tokenizer_hash=tokenizer_hash(target.tokenizer),
            chat_template=template_id(target.tokenizer, data.thinking),
            max_length=data.max_length,
            min_loss_tokens=data.min_loss_tokens,
            num_sources=len(self.order),
            dtype=data.codec,
            sources_sha256=digest.hexdigest(),
        )

    def names(self) -> np.ndarray:
        """int64, by sequence: the sample id of its conversation."""
        return np.array([self.sequences[index].sample_id for index in range(len(self.sequences))], np.int64)


class Recorder:
    """Writes the states of the first epoch's steps, each while the next step runs.

    Steps that a resumed run computes again are not written twice. Because `flush` precedes every checkpoint, the cache
    covers all steps before it. The first process of a job writes and gathers the rows of the others, so every process
    must call every method at the same steps.
    """

    def __init__(self, folder: Path, epoch: FirstEpoch, spec: CacheSpec, made: Mapping[str, Any], start: int):
        """Opens the cache, or continues it.

        Args:
            folder: of the cache.
            epoch: the order of its records.
            spec: `epoch.spec` of the run.
            made: what else the states depend on (weights, dtype), recorded in build.json.
            start: the step at which the run continues.
        Raises:
            UserError: the folder is not this run's cache up to that step, or the disk is too small.
        """
        self.folder, self.epoch = folder, epoch

        # The disk is checked before the first step, not when it is full after hours.
        tokens = int(epoch.sequences.lengths.sum())
        continued = require_same_settings(begun(folder) / "build.json", made, folder)
        require_room(folder, estimate_bytes(tokens, len(epoch.order), spec, SHARD_BYTES), SHARD_BYTES)
        barrier("the cache's folder has been looked at")

        # Every process has read build.json before the first may write there.
        self._writer = CacheWriter(folder, spec, SHARD_BYTES) if is_first() else None
        # Records in finished shards, as the writer knows; every process must skip the same ones.
        self._next = int(from_first(self._writer.next_source if self._writer else 0))

        # A start past the first epoch has all of its records behind it.
        behind = int(epoch.firsts[min(start * epoch.batches.global_batch, len(epoch.firsts) - 1)])

        # Fewer records than steps: the missing states were computed before the checkpoint and are lost.
        if self._next < behind:
            self.close()
            raise UserError(
                f"The cache in {folder} has {self._next} records of the {behind} that the run has behind "
                "it; restore it, or begin the run anew in another folder."
            )

        if not continued and self._next > 0:
            self.close()
            raise UserError(
                f"{folder} is a cache without build.json, which another program wrote; give a new data.cache."
            )

        if not continued and is_first():
            write_settings(folder / "build.json", made)

        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def take(self, step: int, stored: dict[str, jax.Array]) -> None:
        """Writes the states of the previous step, and keeps these until the next call."""
        self._write()
        for array in stored.values():
            # Starts the copy without waiting; arrays split over processes need a collective, in `_write`.
            if array.is_fully_addressable:
                array.copy_to_host_async()

        self._pending = step, stored

    def flush(self) -> None:
        """Writes everything taken so far, and finishes the cache after the epoch's last record."""
        self._write()
        # The open shard ends early: the cache must hold everything that the coming checkpoint has behind it.
        if self._writer and not self._writer.complete:
            # Only `finish` marks the cache complete, which tells it from an interrupted one.
            if self._writer.next_source == len(self.epoch.order):
                self._writer.finish()
            else:
                self._writer.flush()

    def finish(self) -> TokenSource:
        """Finishes the cache, and returns its sequences under their original indices and sample ids."""
        self.flush()
        self.close()

        # The others open what the first process has just completed.
        barrier("the cache is written")

        # Record r holds sequence order[r]; the later epochs ask for sequences by their own number.
        inverse = np.empty_like(self.epoch.order)
        inverse[self.epoch.order] = np.arange(len(inverse))

        return Reordered(TargetCache(self.folder), inverse, self.epoch.names())

    def close(self) -> None:
        """Releases the cache's folder; states that were taken and not yet written are dropped."""
        if self._writer:
            self._writer.close()

    def _write(self) -> None:
        if self._pending is None:
            return

        (step, stored), self._pending = self._pending, None

        rows, firsts = self.epoch.batches.global_batch, self.epoch.firsts
        # Row numbers of the epoch, not of the batch: `firsts` maps them to records.
        first = step * rows
        last = min(first + rows, len(firsts) - 1)

        # Past the first epoch, or recorded before the run was resumed.
        if first >= last or firsts[last] <= self._next:
            return

        # Collective: the other processes take part, and write nothing.
        arrays = {name: fetch_rows(array) for name, array in stored.items()}
        if self._writer:
            for row in range(last - first):
                span = int(firsts[first + row]), int(firsts[first + row + 1])
                self._write_row(self._writer, *span, {name: array[row] for name, array in arrays.items()})

        self._next = int(firsts[last])

    def _write_row(self, writer: CacheWriter, first: int, stop: int, states: dict[str, np.ndarray]) -> None:
        """Writes the records `first` to `stop` of a row that the cache does not have yet."""
        # A packed row's sequences follow one another, so each begins where the last one ended.
        start = 0
        for record in range(first, stop):
            tokens = self.epoch.sequences[int(self.epoch.order[record])]
            span = slice(start, start + len(tokens.input_ids))
            start = span.stop
            # Records that the cache has already are passed over, but their tokens count for the place.
            if record == writer.next_source:
                parts = [states[name][span] for name in STATES if name in states]
                writer.add(record, Sample(record, tokens.input_ids, tokens.loss_mask, *parts))
