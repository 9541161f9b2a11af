"""The manifest of a target cache: its finished shards, saved atomically, and checks of files against it."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dspark_jax.data.records import CacheSpec
from dspark_jax.errors import UserError
from dspark_jax.files import write_atomically
from dspark_jax.readers import Schema, check_fields, flag, integer, list_of, object_of, read_object, text
from dspark_jax.storage.places import copy_path, local_path, place_of
from dspark_jax.storage.replica import Replica, fetched_folder
from dspark_jax.storage.shards import Shard, require_shards

FORMAT = "dspark_jax target cache"
VERSION = 1
MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype([("sample_id", "<u8"), ("length", "<u4")])
"""One entry of samples.idx."""


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard: `records` of the sources `first_source` to `last_source`, with `dropped` others left out."""

    file: str
    records: int
    dropped: int
    tokens: int
    bytes: int
    xxh3: str
    index_xxh3: str
    first_source: int
    last_source: int


_SHARD: Schema = {
    **dict.fromkeys(("records", "dropped", "tokens", "bytes", "first_source", "last_source"), integer(0, 1 << 60)),
    **dict.fromkeys(("file", "xxh3", "index_xxh3"), text(empty=False)),
}
_FIELDS: Schema = {
    "spec": object_of(),
    "max_shard_bytes": integer(1, 1 << 60),
    "records": integer(0, 1 << 60),
    "complete": flag(),
    "shards": list_of(object_of()),
}


@dataclass(frozen=True)
class Manifest:
    """State of a cache on disk: its spec, the finished shards, and whether these are all."""

    spec: CacheSpec
    max_shard_bytes: int
    shards: tuple[ShardEntry, ...] = ()
    complete: bool = False

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def next_source(self) -> int:
        """The first source that no finished shard covers."""
        return self.spec.num_sources if self.complete else (self.shards[-1].last_source + 1 if self.shards else 0)

    def save(self, folder: Path) -> None:
        value = {
            # Named first: a person who opens the file sees what it is.
            "format": FORMAT,
            "version": VERSION,
            "spec": self.spec.to_json(),
            "max_shard_bytes": self.max_shard_bytes,
            "records": self.records,
            "complete": self.complete,
            "shards": [asdict(shard) for shard in self.shards],
        }
        # Written beside the old one and renamed over it: a kill leaves either, never half of one.
        write_atomically(folder / "manifest.json", json.dumps(value, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads and checks a manifest; UserError where there is none, or one of another format or version."""
        path = folder / "manifest.json"
        value = read_manifest(path)
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            raise UserError(
                f"{path} has format {value.get('format')!r} version {value.get('version')!r}, expected "
                f"{FORMAT!r} version {VERSION}."
            )

        # After the version: fields of another one may differ, and the sentence above says why.
        check_fields(value, _FIELDS, str(path), required=_FIELDS)
        for number, shard in enumerate(value["shards"]):
            where = f"{path}, shard {number},"
            check_fields(shard, _SHARD, where, required=_SHARD)
            # A manifest may come from elsewhere: its names must not lead out of the folder.
            if PurePath(shard["file"]).name != shard["file"]:
                raise UserError(f"{where} names the file {shard['file']!r}; expected a name within the cache's folder.")

        try:
            spec = CacheSpec.from_json(value["spec"], str(path))
            shards = tuple(ShardEntry(**shard) for shard in value["shards"])
            manifest = cls(spec, int(value["max_shard_bytes"]), shards, bool(value["complete"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be understood ({error}); restore it or build the cache again.") from error

        # The count is redundant on purpose: a manifest that lost an entry by editing is found out.
        if manifest.records != value.get("records"):
            raise UserError(
                f"{path} says {value.get('records')} records, its shards add up to {manifest.records}; build it again."
            )

        return manifest


def beside_shards(name: str) -> bool:
    """Whether a file of a cache is one of the small ones, which are copied with their folder."""
    return "/" not in name and not name.startswith("shard-")


def pulled(folder: str | os.PathLike[str]) -> Path:
    """A cache's folder to read: of a place, a copy of the small files."""
    if place_of(folder) is None:
        return Path(folder)
    return fetched_folder(folder, "target cache", beside_shards)


def begun(folder: Path) -> Path:
    """Where the settings of a cache lie that may have been begun: its folder, of a place a copy of the small files."""
    place = place_of(folder)
    if place is None:
        return folder

    replica = Replica(place, copy_path(folder), beside_shards)
    replica.pull()
    return replica.folder


def require_room(folder: Path, needed_bytes: int, shard_bytes: int) -> None:
    """UserError where a cache of so many bytes, less those that stand there, does not fit the disk.

    Args:
        folder: of the cache; of a place this machine holds one shard at a time, and nothing is known of the store.
        needed_bytes: of the whole cache.
        shard_bytes: of one shard.
    """
    if place_of(folder) is not None:
        require_disk(local_path(folder), min(needed_bytes, 2 * shard_bytes))
        return

    # A continued build needs room only for what is missing.
    require_disk(folder, needed_bytes - sum(path.stat().st_size for path in folder.glob("shard-*")))


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """UserError naming the first shard (or the index) that is missing or whose size is not the manifest's."""
    place = place_of(folder)
    if place is not None:
        require_shards(place, [Shard(shard.file, shard.bytes, shard.xxh3) for shard in manifest.shards])

    for shard in manifest.shards if place is None else ():
        path = folder / shard.file
        # Sizes alone, at every start: hashing hundreds of gigabytes is `verify`'s work.
        size = path.stat().st_size if path.exists() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{path} {found}, expected {shard.bytes} bytes; restore it or build the cache again in a new folder."
            )

    # The index is checked like a shard: lengths come from it, and a short one would drop samples.
    index = folder / "samples.idx"
    size = index.stat().st_size if index.exists() else 0
    needed = manifest.records * INDEX_DTYPE.itemsize
    # An unfinished cache may hold entries of a shard its manifest does not name yet.
    if size < needed or (manifest.complete and size != needed):
        raise UserError(
            f"{index} has {size} bytes, expected {needed}; restore it or build the cache again in a new folder."
        )


def require_disk(folder: str | os.PathLike[str], needed_bytes: int) -> None:
    """UserError when the disk that holds (or will hold) `folder` has less than `needed_bytes` free."""
    # The folder may not exist yet: its closest ancestor is on the same disk.
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent

    # Asked before the work, not during it: a full disk after hours would leave a cache that nothing completes.
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"The cache needs {needed_bytes / 1e9:,.2f} GB and the disk of {existing} has {free / 1e9:,.2f} GB free; "
            "use another disk, fewer conversations, a shorter max_length or fewer layers."
        )


def read_manifest(path: Path) -> Mapping[str, Any]:
    """The JSON object of a manifest.json; UserError where the file is missing or holds something else."""
    # `lexists`: a link into nowhere is a damaged cache, not a missing one, and reading it says so.
    if not os.path.lexists(path):
        raise UserError(f"{path.parent} is no target cache: it has no manifest.json.")
    return read_object(path, expected="the manifest of a target cache")
