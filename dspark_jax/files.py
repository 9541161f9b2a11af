"""Files on disk: one atomic writer, one lock, content hashes, and the settings recorded beside a program's output.

A file is replaced whole or not at all (`replacing`), and is on the disk before it gets its name. A folder is written by
one process at a time (`lock_folder`). Content is identified by the bytes of the files themselves (`file_hash`,
`hash_tree`, `weights_hash`).
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from dspark_jax.errors import UserError
from dspark_jax.readers import Check, check_fields, object_of, read_object, reason_of

WEIGHTS = ("*.safetensors", "*.gguf")
_CHUNK = 1 << 22
_STORES = re.compile("(s3|gs):/+")
_HASH = Check("32 hexadecimal digits", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{32}", v) is not None)


# -- Atomic replacement ----------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; at the end of the block it replaces `path`, complete and on the disk.

    After a kill or a power loss `path` has either the old content or the new. A block that raises leaves the old
    content and no temporary file. A link stays a link: the file that it leads to is replaced.

    Yields:
        `path` with `.tmp` appended, in the same folder, which must exist.
    """
    require_disk_path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        # Content before name: otherwise a power loss could leave the new name on an empty file.
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise

    # The new name is an entry of the folder, which has to reach the disk as well.
    fsync(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replaces a file by bytes, or by text in UTF-8, as `replacing` does; OSError if the disk refuses."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: Path, value: Mapping[str, Any], *, indent: int = 1, sort_keys: bool = False) -> None:
    """Writes an indented JSON file atomically; NaN, which JSON lacks, becomes null, and a path its text.

    Raises:
        UserError: the file can't be written.
    """
    text = json.dumps(_plain(value), indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n"
    require_disk_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError(f"{path} cannot be written ({reason_of(error)}); give an output that can.") from error


def read_results(path: Path) -> dict[str, Any]:
    """The figures in a results file; none where there is no file yet."""
    return read_object(path, expected="the figures of earlier runs") if path.exists() else {}


def add_results(path: Path, found: Mapping[str, Any], *, levels: int = 1) -> dict[str, Any]:
    """Writes rows of figures into a results file and leaves its other rows as they are: runs measure a few at a time.

    Args:
        path: of the JSON file, made where it is missing.
        found: rows by name; with 2 levels, groups of them by name.
        levels: how many; what lies below is replaced whole.
    Returns:
        All that the file holds now.
    """
    known = read_results(path)
    merged = {**known, **found}
    for name in known.keys() & found.keys() if levels == 2 else ():
        merged[name] = {**known[name], **found[name]}
    write_json(path, merged)
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # JSON has no NaN: null stands for what was not measured.
    if isinstance(value, float) and math.isnan(value):
        return None

    return str(value) if isinstance(value, Path) else value


def fsync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    # Read-only suffices, and is all that a folder allows.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- Settings --------------------------------------------------------------------------------------------------------


def require_same_settings(path: Path, settings: Mapping[str, Any], output: Path) -> bool:
    """Compares a program's settings with those that its output was begun with.

    Args:
        path: the file of recorded settings.
        settings: those of this run.
        output: named in errors.
    Returns:
        True if `path` records these settings, False if there is no such file.
    Raises:
        UserError: the output was begun with other settings (names the first that differs, and both values), or `path`
            is no settings file.
    """
    if not os.path.lexists(path):
        return False

    stored, cure = read_object(path, expected="recorded settings"), f"move {output} away and run again"
    check_fields(stored, {"settings": object_of()}, str(path), required=("settings",), cure=cure)
    recorded = stored["settings"]
    # As the file holds them: a tuple comes back as a list.
    wanted = json.loads(json.dumps(settings))

    for name in [*wanted, *recorded]:
        if recorded.get(name) != wanted.get(name):
            if name not in recorded:
                raise UserError(
                    f"{output} was begun by an earlier version, which had no setting {name} (this run has "
                    f"{wanted[name]!r}); continue with that version or give a new output."
                )
            raise UserError(
                f"{output} was begun with {name} = {recorded.get(name)!r}, this run has {wanted.get(name)!r}; "
                "continue with the same setting or give a new output."
            )

    return True


def write_settings(path: Path, settings: Mapping[str, Any], **about: Any) -> None:
    """Records settings atomically; `about` is further information for readers, never compared."""
    write_json(path, {**about, "settings": settings})


# -- Content hashes --------------------------------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, 32 hexadecimal digits; OSError when it can't be read."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        # In chunks: shards are larger than memory should hold.
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)

    return digest.hexdigest()


def hash_tree(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """`file_hash` of every file below a folder.

    Args:
        folder: what is hashed; a folder that is missing has no files.
        wanted: which relative names count; temporary files (`.tmp`) never do.
    Returns:
        Hashes by relative name with forward slashes, in ascending order of the names.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = sorted(name for name in files if not name.endswith(".tmp") and wanted(name))
    return {name: file_hash(files[name]) for name in names}


def weights_hash(folder: Path) -> str:
    """The identity of a model folder's weights: the bytes and names of its safetensors and GGUF files.

    Hashes are kept in the user's cache folder by path, size and times of change, so that gigabytes are read once.

    Returns:
        xxh3-128, 32 hexadecimal digits.
    Raises:
        UserError: a file can't be read.
    """
    digest = xxhash.xxh3_128()
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))

    try:
        for path in files:
            # Names count: the same bytes under another name are read as another shard.
            digest.update(f"{path.name}:{_remembered_hash(path)};".encode())
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}); copy it again.") from error

    return digest.hexdigest()


def user_cache() -> Path:
    """$DSPARK_JAX_CACHE, else dspark_jax in the user's cache folder: hashes and measured costs, all reproducible."""
    named = os.environ.get("DSPARK_JAX_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark_jax"


def _remembered_hash(path: Path) -> str:
    """`file_hash`, from the user's cache if path, size and times are those that were hashed."""
    stat = path.stat()
    name = str(path.resolve())
    # Copies and archives may keep the modification time, or set it to a constant; the time of the inode they can't.
    now = {"path": name, "bytes": stat.st_size, "written_ns": stat.st_mtime_ns, "changed_ns": stat.st_ctime_ns}

    note = user_cache() / "hashes" / f"{xxhash.xxh3_64_hexdigest(name.encode())}.json"

    # Any fault of the note, such as torn JSON or another type, means hashing again.
    with suppress(UserError):
        known = read_object(note, expected="a remembered hash")
        check_fields(known, {"xxh3": _HASH}, str(note), required=("xxh3",))
        if {name: known.get(name) for name in now} == now:
            return known["xxh3"]

    found = file_hash(path)
    # A cache that can't be written (a read-only home, a full disk) costs the next reading its time and nothing else.
    with suppress(OSError, UserError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(note.parent, "the hashes' folder", wait=True):
            write_json(note, now | {"xxh3": found})

    return found


# -- Locks -----------------------------------------------------------------------------------------------------------


class FolderLock:
    """The exclusive right to write a folder, until `release` or the end of `with`."""

    def __init__(self, folder: Path, descriptor: int, created: bool):
        self.folder = folder
        self._descriptor, self._created = descriptor, created

    def release(self) -> None:
        """Releases the folder, and removes one that was created for the lock and is still empty."""
        # Released before: `with` may follow an explicit release.
        if self._descriptor < 0:
            return

        # Before the lock is given up, so that no other process is already writing there.
        if self._created:
            with suppress(OSError):
                self.folder.rmdir()  # refuses a folder that holds something

        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_folder(folder: Path, what: str = "the folder", *, wait: bool = False) -> FolderLock:
    """Takes the exclusive right to write a folder, which is created if missing; it ends with the process at the latest.

    Args:
        folder: a run, a cache, an export.
        what: the folder's role in a sentence, as in "the cache".
        wait: wait for another process that has the right, instead of refusing.
    Raises:
        UserError: another process writes there, or the folder can't be made.
    """
    require_disk_path(folder)
    while True:
        try:
            created = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            where = f"{what} {folder}"
            raise UserError(
                f"{where[0].upper()}{where[1:]} cannot be used ({error.strerror}); give another."
            ) from error

        try:
            lock_descriptor(descriptor, folder, what, wait=wait)
        except UserError:
            os.close(descriptor)
            raise

        # Between opening and locking, the last owner may have removed the folder. The lock is then on a folder without
        # a name, and the next round creates a new one.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return FolderLock(folder, descriptor, created)

        os.close(descriptor)


def lock_descriptor(descriptor: int, path: Path, what: str, *, wait: bool = False) -> None:
    """The right of `lock_folder` on an open file, held until it is closed; UserError if another process has it."""
    try:
        # The kernel releases the lock with the process, so no stale lock can remain.
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise UserError(f"Another process is writing {what} {path}; wait for it or give another output.") from error


def require_disk_path(path: Path) -> None:
    """UserError for the address of an object store, which would become a folder of that name here."""
    if _STORES.match(str(path)):
        raise UserError(
            f"{path} is in an object store, where this program does not write; give a folder of this machine, and copy "
            "it there."
        )


def make_output(folder: Path, file: Path | None = None) -> None:
    """Creates a program's output folder and tests that it can be written, before anything is computed.

    Args:
        folder: of the output.
        file: a further file that the program writes at its end; its folder is created and tested too.

    Raises:
        UserError: a folder can't be made or written to.
    """
    require_disk_path(folder)
    if file is not None:
        make_output(file.parent)

    # Permission bits do not tell of read-only mounts and quotas; creating a file does.
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} can't be written to ({reason_of(error)}); give an output folder that can."
        ) from error


def check_new_folder(folder: Path) -> None:
    """UserError if the folder is not empty, so that a model's files are not mixed with others."""
    try:
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({reason_of(error)}); give another folder.") from error

    if occupied:
        raise UserError(f"{folder} holds something already; give a folder that is empty or missing.")
