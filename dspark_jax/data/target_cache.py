"""Target caches, the drafter's training data: written once (`cache_writer.py`), read here at random.

A cache is a folder:

    manifest.json              the spec, one entry a finished shard, `complete` at the end
    samples.idx                for each record `<QI`: sample id (source index), tokens
    shard-00000.array_record   records of `records.py`, `group_size:1,uncompressed`

Of a cache in a store the small files are copied here at opening, and shards as `storage/shards.py` has it.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from array_record.python.array_record_module import ArrayRecordReader

from dspark_jax.data.manifest import INDEX_DTYPE, Manifest, check_sizes, pulled
from dspark_jax.data.records import CacheSpec, Sample, decode_record, require_match
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash
from dspark_jax.storage.places import place_of
from dspark_jax.storage.shards import Shard, ShardFolder

_READER_OPTIONS = "readahead_buffer_size:0"  # reads are random: reading ahead is wasted
_READER_BUFFER = 32768
_MAX_OPEN_SHARDS = 256


class TargetCache:
    """Reads a finished cache: `len(cache)`, `cache[i]`, from any number of threads.

    Opening checks the manifest, every shard's size and the index; reading checks each record's checksum; `verify()`
    hashes everything.

    Raises:
        UserError: no cache, an unfinished one, a shard that is missing or has another size (all at opening); a record
            that is damaged (at reading), naming shard and sample.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder, place = pulled(folder), place_of(folder)
        self._manifest = Manifest.load(self.folder)
        # Shards of an unfinished cache are sound, but training on a part of the data must be a decision.
        if not self._manifest.complete:
            raise UserError(
                f"The cache in {self.folder} is unfinished: {self._manifest.next_source} of "
                f"{self.spec.num_sources} training rows "
                "are done; run the same train.build_cache command again, it continues where it stopped."
            )

        check_sizes(self.folder, self._manifest)
        self._index = self._read_index()
        # With the index in memory a sample's shard, place and length are known without reading.
        self._starts = np.cumsum([0, *(shard.records for shard in self._manifest.shards)])
        self._readers: dict[int, ArrayRecordReader] = {}
        # Guards the table of readers only; the readers themselves are used by several threads.
        self._lock = threading.Lock()

        named = [Shard(shard.file, shard.bytes, shard.xxh3) for shard in self._manifest.shards]
        self._fetched = None if place is None else ShardFolder(place, named)
        # A shuffle over all records wants every shard within the first steps.
        if self._fetched is not None and self._fetched.holds_all:
            self._fetched.ahead(range(len(named)))

    @property
    def spec(self) -> CacheSpec:
        return self._manifest.spec

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)], tokens of each sample."""
        return self._index["length"].astype(np.int64)

    @property
    def sample_ids(self) -> np.ndarray:
        """uint64 [len(self)], source index of each sample."""
        return self._index["sample_id"]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")

        # `_starts` [shards + 1]: the first record of each shard, then their number.
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        name = self._manifest.shards[number].file
        sample_id, length = (int(v) for v in self._index[index])

        try:
            record = self._reader(number).read([index - int(self._starts[number])])[0]
            sample = decode_record(record, self.spec)
            # The record is sound by its checksum; this finds a shard under another's name.
            if (sample.sample_id, len(sample.input_ids)) != (sample_id, length):
                raise ValueError(
                    f"it holds sample {sample.sample_id} of {len(sample.input_ids)} tokens, samples.idx says {length}"
                )
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"Sample {sample_id} (record {index}) in {self.folder / name} is damaged: {error}; "
                "restore the shard or build the cache again."
            ) from error

        return sample

    def require_match(self, **expected: Any) -> None:
        """`records.require_match` for this cache: fields of `CacheSpec` by name; UserError when one differs."""
        require_match(self.spec, str(self.folder), expected)

    def verify(self) -> None:
        """Hashes every shard; UserError naming the first whose bytes changed since it was written."""
        for number, shard in enumerate(self._manifest.shards):
            if file_hash(self._path(number)) != shard.xxh3:
                raise UserError(
                    f"{self.folder / shard.file} is damaged: its hash is not the manifest's; restore it or build again."
                )

    def ahead(self, indices: Iterable[int]) -> None:
        """Starts fetching the shards of samples that will be read; nothing where the shards lie on a disk."""
        if self._fetched is not None:
            numbers = np.searchsorted(self._starts, np.fromiter(indices, np.int64), side="right") - 1
            self._fetched.ahead(dict.fromkeys(int(number) for number in numbers))

    def close(self) -> None:
        with self._lock:
            self._readers.clear()
        if self._fetched is not None:
            self._fetched.close()

    def _path(self, number: int) -> Path:
        """The file of a shard, fetched where it lies in a store."""
        if self._fetched is None:
            return self.folder / self._manifest.shards[number].file

        path = self._fetched.path(number)
        # Another process of this machine, with the same folder, may have made room since.
        if not path.exists():
            self._fetched.forget(number)
            path = self._fetched.path(number)

        return path

    def _reader(self, number: int) -> ArrayRecordReader:
        # Outside the lock: fetching a shard takes long, and others are read meanwhile.
        path = self._path(number)
        with self._lock:
            reader = self._readers.get(number)
            if reader is None:
                if len(self._readers) >= _MAX_OPEN_SHARDS:
                    # Dropped, not closed: another thread may be reading from it; its last reference closes it.
                    self._readers.pop(next(iter(self._readers)))

                shard = self._manifest.shards[number]
                reader = ArrayRecordReader(str(path), options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
                # array_record opens a damaged file as one with fewer records, without an error.
                if reader.num_records() != shard.records:
                    raise ValueError(f"its shard opens with {reader.num_records()} records, expected {shard.records}")

                self._readers[number] = reader
            return reader

    def _read_index(self) -> np.ndarray:
        path = self.folder / "samples.idx"
        data = path.read_bytes() if path.exists() else b""
        # Each shard's entries have a hash of their own, so that an error can name the shard.
        start = 0

        for shard in self._manifest.shards:
            end = start + shard.records * INDEX_DTYPE.itemsize
            if xxhash.xxh3_128_hexdigest(data[start:end]) != shard.index_xxh3:
                raise UserError(
                    f"{path} is damaged at the entries of {shard.file}; restore it or build the cache again."
                )
            start = end

        return np.frombuffer(data[:start], INDEX_DTYPE)
