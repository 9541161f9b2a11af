"""A folder of a store and the folder on this machine that stands for it: pulled before work, pushed after it.

The store is the truth: what a killed process left here and had not pushed is replaced when its successor pulls, so a
run goes on in the same way on this machine and on another.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from dspark_jax.errors import UserError
from dspark_jax.files import lock_folder, write_json
from dspark_jax.readers import read_object
from dspark_jax.storage import objects
from dspark_jax.storage.lease import FILE, Lease
from dspark_jax.storage.objects import Found
from dspark_jax.storage.places import Location, Place, copy_path, local_path, place_of, seconds_of, stores_folder

Wanted = Callable[[str], bool]
PUSH = "DSPARK_PUSH_SECONDS"


class Replica:
    """The files below a place, by relative name.

    Args:
        place: of the store.
        folder: on this machine.
        wanted: which names are copied.
        names: the only names there are, so that no listing is needed.
    """

    def __init__(
        self, place: Place, folder: Path, wanted: Wanted = lambda name: True, names: Sequence[str] | None = None
    ):
        self.place, self.folder, self._names = place, folder, names
        self._wanted = lambda name: wanted(name) and not name.endswith((".tmp", FILE))
        # Which content of the store each file here is, so that gigabytes move once.
        key = xxhash.xxh3_64_hexdigest(str(folder).encode())
        self._notes = stores_folder() / ".copies" / key
        self._copies: dict[str, Any] = {}

    def pull(self, *, remove: bool = True) -> list[str]:
        """Makes the folder what the store holds, and returns the names of its files.

        Args:
            remove: also remove files that the store lacks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        there = {name: seen for name, seen in self._there().items() if self._wanted(name)}
        # Several processes of a machine may fetch the same model.
        with lock_folder(self._notes, "the notes on copies", wait=True):
            self._read_notes()
            # Removals first, so that a disk that is nearly full has room for what comes.
            for name in [] if not remove else [name for name in self._here() if name not in there]:
                (self.folder / name).unlink()
                self._copies.pop(name, None)

            for name, seen in there.items():
                path = self.folder / name
                # The same content in the store, and a file here that was not touched since it came.
                if self._copies.get(name) == [seen.tag, *_state(path)]:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                objects.download(self.place / name, path, seen)
                self._note(name, seen)

        return list(there)

    def push(self, last: Sequence[str] = ()) -> None:
        """Makes the store what the folder holds: new and changed files, then those of `last`, then removals."""
        here = self._here()
        ordered = sorted(here, key=lambda name: (last.index(name) if name in last else -1, name))
        with lock_folder(self._notes, "the notes on copies", wait=True):
            for name in ordered:
                path = self.folder / name
                # A file that is replaced while it is sent differs from its note, and is sent again next time.
                state = _state(path)
                if self._copies.get(name, [None])[1:] != list(state):
                    seen = objects.upload(path, self.place / name)
                    self._note(name, seen, state)

            # Only what was known here: others may keep objects below the same place. And only what is this replica's:
            # the notes are the folder's, in which files may have writers of their own.
            gone = [name for name in self._copies if self._wanted(name) and name not in here]
            objects.remove([self.place / name for name in gone])
            self._copies = {name: note for name, note in self._copies.items() if name not in gone}
            write_json(self._notes / "copies.json", self._copies)

    def _there(self) -> dict[str, Found]:
        if self._names is None:
            return objects.listing(self.place)
        found = {name: objects.find(self.place / name) for name in self._names}
        return {name: seen for name, seen in found.items() if seen is not None}

    def _here(self) -> list[str]:
        names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        return sorted(filter(self._wanted, names))

    def _read_notes(self) -> None:
        path = self._notes / "copies.json"
        self._copies = {}
        # A torn or strange note costs fetching again.
        with suppress(UserError):
            self._copies = dict(read_object(path)) if path.exists() else {}

    def _note(self, name: str, seen: Found, state: Sequence[int] | None = None) -> None:
        self._copies[name] = [seen.tag, *(state or _state(self.folder / name))]
        write_json(self._notes / "copies.json", self._copies)


def _state(path: Path) -> tuple[int, ...]:
    """Bytes and times of a file; () where there is none."""
    if not path.is_file():
        return ()
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


# -- Reading ---------------------------------------------------------------------------------------------------------


def fetched_folder(location: Location, what: str, wanted: Wanted = lambda name: True) -> Path:
    """A folder to read: a place's files are copied here first, and again only where they have changed.

    Args:
        location: a path, or a place.
        what: its role in a sentence, as in "model".
        wanted: which relative names are copied.
    Raises:
        UserError: there is nothing at the place, or it can't be read.
    """
    place = place_of(location)
    if place is None:
        return Path(location)

    replica = Replica(place, copy_path(location), wanted)
    if not replica.pull():
        raise UserError(f"{place} holds no {what}; correct the path, or copy one there.")
    return replica.folder


def fetched_file(location: Location) -> Path:
    """A file to read: that of a place is copied here first, and again only where it has changed; Missing without it."""
    place = place_of(location)
    if place is None:
        return Path(location)

    # By its name alone: the folder around it may hold anything.
    replica = Replica(place.parent, copy_path(location).parent, names=[place.name])
    if not replica.pull(remove=False):
        raise objects.Missing(f"{place} does not exist; correct the path.")
    return replica.folder / place.name


def fetched_if_there(location: Location) -> Path | None:
    """`fetched_file`, or None where there is no such file."""
    with suppress(objects.Missing):
        path = fetched_file(location)
        return path if path.is_file() else None
    return None


# -- Writing ---------------------------------------------------------------------------------------------------------


class Output:
    """A folder to write, as `written` opens it."""

    def __init__(self, folder: Path, replica: Replica | None, lease: Lease | None, last: Sequence[str]):
        self.folder, self._replica, self._lease, self._last = folder, replica, lease, last
        self._pushed = time.monotonic()

    @classmethod
    def here(cls, folder: Path) -> "Output":
        """A folder that another process of the job brings to the store, or that lies on this machine."""
        return cls(folder, None, None, ())

    def push(self) -> None:
        """Brings what was written to the store; nothing for a folder of this machine."""
        if self._replica is not None and self._lease is not None:
            self._lease.check()
            self._replica.push(self._last)
            self._pushed = time.monotonic()

    def push_when_due(self) -> None:
        """`push` where the last one is $DSPARK_PUSH_SECONDS past: an object has no append, so all of a file is sent."""
        if self._replica is not None and time.monotonic() - self._pushed >= seconds_of(PUSH, 60, least=0):
            self.push()


@contextmanager
def written(
    location: Location, what: str, *, wanted: Wanted = lambda name: True, last: Sequence[str] = ()
) -> Iterator[Output]:
    """Holds a folder for writing: a place's files are pulled, and pushed at the end of the block, even by an error.

    Args:
        location: a path, or a place.
        what: its role in a sentence, as in "the run".
        wanted: which relative names belong to it.
        last: names that are pushed after all others, because their presence says that the rest is whole.
    Raises:
        UserError: another process writes there, or the store refuses.
    """
    folder, place = local_path(location), place_of(location)
    with lock_folder(folder, what):
        if place is None:
            yield Output.here(folder)
            return

        with Lease(place / FILE, folder, what) as lease, _pushed(Replica(place, folder, wanted), lease, last) as out:
            yield out


@contextmanager
def written_file(location: Location, what: str, beside: Sequence[str] = ()) -> Iterator[Output]:
    """`written` for one file and its companions; nothing is done for a file of this machine.

    Args:
        location: a path, or a place.
        what: its role in a sentence, as in "the conversations".
        beside: names of the companions in the same folder.
    """
    path, place = local_path(location), place_of(location)
    if place is None:
        yield Output.here(path.parent)
        return

    # By whole names: what begins with "a." may be a.b.jsonl or its companion, which have a writer of their own.
    names, stem = {path.name, *beside}, path.stem
    # Other files of the folder may be written meanwhile, so a folder of this name alone is locked.
    locked = path.with_name(f".{stem}")
    with lock_folder(locked, what), Lease(place.parent / f".{stem}{FILE}", locked, what) as lease:
        replica = Replica(place.parent, path.parent, names.__contains__)
        with _pushed(replica, lease, ()) as out:
            yield out


@contextmanager
def _pushed(replica: Replica, lease: Lease, last: Sequence[str]) -> Iterator[Output]:
    # Before the caller looks at the folder: it shall find what the store has, not what a kill has left here.
    replica.pull()
    output = Output(replica.folder, replica, lease, last)
    try:
        yield output
    except BaseException:
        # The error that ends the block is the one to report.
        with suppress(UserError):
            output.push()
        raise
    output.push()
