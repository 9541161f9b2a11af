"""Writes target caches, shard by shard; `target_cache.py` describes the folder and reads it.

Where a shard ends is a function of the sources alone (it is closed by the record that reaches `max_shard_bytes`), and a
shard counts only once the manifest names it. A run killed at any byte therefore continues from the first source that no
finished shard covers, and ends with the same bytes as an undisturbed run.

A cache in a store is written here first: a finished shard is sent there, then the manifest that names it, and its file
is removed, so that this machine holds one shard at a time.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import xxhash
from array_record.python.array_record_module import ArrayRecordWriter

from dspark_jax.data.manifest import INDEX_DTYPE, MANIFEST, Manifest, ShardEntry, beside_shards, check_sizes
from dspark_jax.data.records import CacheSpec, Sample, encode_record
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash, fsync
from dspark_jax.storage import objects
from dspark_jax.storage.places import local_path, place_of, shown
from dspark_jax.storage.replica import written

_WRITER_OPTIONS = "group_size:1,uncompressed"
_SHARD_PATTERN = re.compile(r"shard-\d{5,}\.array_record(\.tmp)?")


class CacheWriter:
    """Writes a cache, or continues one that was interrupted.

    Call `add(source_index, sample)` for every source from `next_source` on, in order, with None for a dropped one; then
    `finish()`. One process at a time holds the folder.

    Raises:
        UserError: a folder with other content, a cache of another spec (names the field and both values), a finished
            shard that is missing or has another size; later, a full disk.
    """

    def __init__(self, folder: str | os.PathLike[str], spec: CacheSpec, max_shard_bytes: int = 512 * 2**20):
        self.folder, self._place = local_path(folder), place_of(folder)
        self._shard: _OpenShard | None = None
        self._stack = ExitStack()
        # Locked before the folder is looked at: another writer could change it in between.
        self._output = self._stack.enter_context(
            written(folder, "the cache", wanted=beside_shards, last=("samples.idx", MANIFEST))
        )

        try:
            # An existing cache is continued only if it is this one and its shards are whole.
            self._manifest = self._open_manifest(spec, max_shard_bytes)
            check_sizes(self.folder, self._manifest)
            # Last: files are removed only from a folder that has proved to be this cache.
            self._remove_orphans()
        except BaseException:
            # Nothing has changed here that the store should get.
            with suppress(UserError):
                self._stack.close()
            raise

        self._next = self._manifest.next_source

    @property
    def next_source(self) -> int:
        """Index of the source to add next; after opening: where to resume."""
        return self._next

    @property
    def complete(self) -> bool:
        return self._manifest.complete

    @property
    def records(self) -> int:
        """Records in finished shards."""
        return self._manifest.records

    @property
    def bytes_written(self) -> int:
        """Bytes of finished shards, which a resumed run needs no room for."""
        return sum(shard.bytes for shard in self._manifest.shards)

    def add(self, source_index: int, sample: Sample | None) -> None:
        """Adds the next source, whose record gets `source_index` as its sample id; closes the shard when it is full."""
        if self.complete or source_index != self._next or source_index >= self._manifest.spec.num_sources:
            raise ValueError(
                f"source {source_index} cannot be added: the next is {self._next} of {self._manifest.spec.num_sources}"
            )
        # Opened by its first source: number and border follow from the sources before, so a resumed run agrees.
        if self._shard is None:
            self._shard = _OpenShard(self.folder, len(self._manifest.shards), source_index)

        if sample is None:
            # Counted and not stored: the manifest shows how many rows were too short.
            self._shard.dropped += 1
        else:
            spec = self._manifest.spec
            # The id is the source's place, whatever the sample says: by it a resumed run knows where to go on.
            record = encode_record(dataclasses.replace(sample, sample_id=source_index), spec)
            with self._reported():
                self._shard.write(record, source_index, len(sample.input_ids))

        self._next += 1
        if self._shard.payload_bytes >= self._manifest.max_shard_bytes:
            with self._reported():
                self._close_shard(self._shard)

    def flush(self) -> None:
        """Ends the shard here, so that all that was added is kept whatever happens next."""
        if self._shard is not None:
            with self._reported():
                self._close_shard(self._shard)

    def finish(self) -> None:
        """Closes the last shard and marks the cache complete; ValueError when sources are missing."""
        if self.complete:
            return
        if self._next != self._manifest.spec.num_sources:
            raise ValueError(f"{self._next} of {self._manifest.spec.num_sources} sources were added")

        with self._reported():
            if self._shard is not None:
                self._close_shard(self._shard)
            self._publish(
                Manifest(self._manifest.spec, self._manifest.max_shard_bytes, self._manifest.shards, complete=True)
            )

    def close(self) -> None:
        """Releases the folder; an unfinished shard is given up, and written again by the next run."""
        if self._shard is not None:
            self._shard.discard()
            self._shard = None
        self._stack.close()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_manifest(self, spec: CacheSpec, max_shard_bytes: int) -> Manifest:
        # Of a place, a shard lies here only until it is sent: one that does was left by a kill.
        for left in self.folder.glob("shard-*") if self._place is not None else ():
            left.unlink()

        if not (self.folder / "manifest.json").exists():
            others = sorted(p.name for p in self.folder.iterdir() if p.name != "manifest.json.tmp")
            if others:
                raise UserError(
                    f"{self.folder} is not a cache and not empty (it holds {others[0]}); give a new folder for "
                    "the cache."
                )

            # Saved before the first shard: a killed run is recognised as this cache, and continued.
            fresh = Manifest(spec, max_shard_bytes)
            fresh.save(self.folder)
            self._output.push()
            return fresh

        found = Manifest.load(self.folder)
        wanted = {**spec.to_json(), "max_shard_bytes": max_shard_bytes}
        # Another setting would put records of two kinds into one cache.
        for name, value in {**found.spec.to_json(), "max_shard_bytes": found.max_shard_bytes}.items():
            if value != wanted[name]:
                raise UserError(
                    f"The cache in {self.folder} was begun with {name} = {value!r}, this run has {wanted[name]!r}; "
                    "continue with the same setting or give a new folder."
                )

        return found

    def _remove_orphans(self) -> None:
        """Removes the shards and index entries of a killed run that its manifest does not name."""
        named = {shard.file for shard in self._manifest.shards}
        if self._place is not None:
            torn_there = [name for name in objects.listing(self._place) if _SHARD_PATTERN.fullmatch(name)]
            objects.remove([self._place / name for name in torn_there if name not in named])

        for path in self.folder.iterdir():
            torn = path.name == "manifest.json.tmp" or (_SHARD_PATTERN.fullmatch(path.name) and path.name not in named)
            if torn:
                path.unlink()
        with open(self.folder / "samples.idx", "ab") as index:
            index.truncate(self._manifest.records * INDEX_DTYPE.itemsize)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns a failed write, mostly a full disk, into a UserError; finished shards are not affected."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"The cache in {shown(self.folder)} could not be written ({error}); its "
                f"{len(self._manifest.shards)} finished shards are whole. Make room on the disk and give the same "
                "command again."
            ) from error

    def _close_shard(self, shard: "_OpenShard") -> None:
        self._shard = None
        if shard.index:
            entry = shard.publish(self._next - 1)
            if self._place is not None:
                # There before the manifest that names it, and here only until then.
                objects.upload(shard.final, self._place / entry.file)
                shard.final.unlink()
            manifest = self._manifest
            self._publish(Manifest(manifest.spec, manifest.max_shard_bytes, (*manifest.shards, entry)))
        else:
            # Only dropped sources since the last shard: no file. A resumed run sees them again.
            shard.discard()

    def _publish(self, manifest: Manifest) -> None:
        manifest.save(self.folder)
        self._output.push()
        self._manifest = manifest


class _OpenShard:
    """The shard being written, under a temporary name until `publish`."""

    def __init__(self, folder: Path, number: int, first_source: int):
        self.final = folder / f"shard-{number:05d}.array_record"
        self.temporary = self.final.with_name(self.final.name + ".tmp")
        self.first_source = first_source
        self.payload_bytes = self.dropped = self.tokens = 0
        self.index: list[tuple[int, int]] = []
        self._writer = ArrayRecordWriter(str(self.temporary), _WRITER_OPTIONS)

    def write(self, record: bytes, sample_id: int, length: int) -> None:
        self._writer.write(record)
        self.payload_bytes += len(record)
        self.tokens += length
        self.index.append((sample_id, length))

    def publish(self, last_source: int) -> ShardEntry:
        """Puts data, name and index on disk, in this order; the manifest entry follows in the caller, last."""
        self._writer.close()
        fsync(self.temporary)
        digest = file_hash(self.temporary)
        # A file with its final name is whole, whenever the run is killed.
        os.replace(self.temporary, self.final)
        rows = np.array(self.index, INDEX_DTYPE).tobytes()

        with open(self.final.with_name("samples.idx"), "ab") as index:
            index.write(rows)
            index.flush()
            os.fsync(index.fileno())

        # Entries appended here do not count either before the manifest names the shard.
        return ShardEntry(
            file=self.final.name,
            records=len(self.index),
            dropped=self.dropped,
            tokens=self.tokens,
            bytes=self.final.stat().st_size,
            xxh3=digest,
            index_xxh3=xxhash.xxh3_128_hexdigest(rows),
            first_source=self.first_source,
            last_source=last_source,
        )

    def discard(self) -> None:
        if self._writer.is_open():
            with suppress(RuntimeError):  # what can't be written is given up anyway
                self._writer.close()
        self.temporary.unlink(missing_ok=True)
