"""Shards of a place in a bounded folder on this machine: fetched when needed or ahead, verified by their hashes."""

import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dspark_jax.errors import UserError
from dspark_jax.files import file_hash
from dspark_jax.storage import objects
from dspark_jax.storage.objects import Found, Missing
from dspark_jax.storage.places import Place, copy_path

GIGABYTES = "DSPARK_SHARDS_GB"
_SHARE_OF_DISK = 0.8
_FETCHERS = 4


@dataclass(frozen=True)
class Shard:
    """A file of a place, as its manifest names it; `xxh3` None: it has no hash there."""

    name: str
    bytes: int
    xxh3: str | None


class ShardFolder:
    """The shards of a place, of which as many lie here as `most_bytes` hold: the ones that were used last.

    Args:
        place: that holds them.
        shards: all of them, by number.
        most_bytes: None: $DSPARK_SHARDS_GB, else four fifths of the disk's free bytes and those that lie here.
    """

    def __init__(self, place: Place, shards: Sequence[Shard], most_bytes: int | None = None):
        self.place, self.folder, self._shards = place, copy_path(str(place)), shards
        self.folder.mkdir(parents=True, exist_ok=True)
        self.most_bytes = bound_of(self.folder) if most_bytes is None else most_bytes
        # Those that lie here or are on their way, in the order of their last use.
        self._here: OrderedDict[int, Future[Path]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")

    @property
    def holds_all(self) -> bool:
        """Whether all shards may lie here at once."""
        return sum(shard.bytes for shard in self._shards) <= self.most_bytes

    def path(self, number: int) -> Path:
        """The file of a shard, fetched now where it does not lie here; UserError where that fails."""
        return self._wanted(number).result()

    def ahead(self, numbers: Iterable[int]) -> None:
        """Starts fetching shards, in this order, without waiting for them."""
        # The pool's own queue keeps the order, and its size bounds the requests under way.
        for number in numbers:
            self._wanted(number)

    def forget(self, number: int) -> None:
        """Fetches a shard again at its next use: its file is gone, or is not what it was."""
        with self._lock:
            self._here.pop(number, None)

    def close(self) -> None:
        """Ends the fetching; the files stay for the next reader."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _wanted(self, number: int) -> "Future[Path]":
        # Under the lock nothing waits: fetching is the pool's work.
        with self._lock:
            future = self._here.get(number)
            # A shard whose fetching failed is tried again at its next use.
            if future is None or (future.done() and (future.cancelled() or future.exception())):
                future = self._here[number] = self._pool.submit(self._fetch, number)
            self._here.move_to_end(number)
            self._make_room()
            return future

    def _make_room(self) -> None:
        """Removes the shards that were not used for longest; one that a reader has open stays readable."""
        while len(self._here) > 1 and sum(self._shards[k].bytes for k in self._here) > self.most_bytes:
            oldest = next((k for k, future in self._here.items() if future.done()), None)
            # All of them are on their way: the bound is kept once they are here.
            if oldest is None or oldest == next(reversed(self._here)):
                return
            del self._here[oldest]
            (self.folder / self._shards[oldest].name).unlink(missing_ok=True)

    def _fetch(self, number: int) -> Path:
        shard = self._shards[number]
        path = self.folder / shard.name
        # Left by an earlier reader, perhaps of another cache under this name.
        with suppress(OSError):
            if path.stat().st_size == shard.bytes and (shard.xxh3 is None or file_hash(path) == shard.xxh3):
                return path

        # Seen first, so that the parts of the file are of one content.
        place = self.place / shard.name
        seen = objects.find(place)
        if seen is None:
            raise Missing(f"{place} is missing; restore it or build the cache again in a new folder.")
        _require_size(place, seen, shard)
        objects.download(place, path, seen, shard.xxh3)
        return path


def require_shards(place: Place, shards: Sequence[Shard]) -> None:
    """UserError naming the first shard that is missing at a place or whose size is not its manifest's; one listing."""
    # One listing instead of a request for each of thousands.
    there = objects.listing(place)
    for shard in shards:
        seen = there.get(shard.name)
        if seen is None:
            raise UserError(f"{place / shard.name} is missing; restore it or build the cache again in a new folder.")
        _require_size(place / shard.name, seen, shard)


def _require_size(place: Place, seen: Found, shard: Shard) -> None:
    if seen.bytes != shard.bytes:
        raise UserError(
            f"{place} has {seen.bytes} bytes, expected {shard.bytes} bytes; restore it or build the cache again in a "
            "new folder."
        )


def bound_of(folder: Path) -> int:
    """Bytes that shards may take in a folder: $DSPARK_SHARDS_GB, else a share of the disk."""
    text = os.environ.get(GIGABYTES)
    if text:
        try:
            return int(float(text) * 1e9)
        except ValueError:
            raise UserError(f"{GIGABYTES} is {text!r}; a number of gigabytes was expected.") from None

    # What lies here already may be replaced, so it counts as free.
    here = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return int(_SHARE_OF_DISK * (shutil.disk_usage(folder).free + here))
