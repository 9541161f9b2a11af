"""Files on disk: atomic replacement, locks, hashes, and the settings recorded beside a program's output."""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from dspark_jax.errors import UserError

_SAMPLED = 1 << 20


def require_same_settings(path: Path, settings: Mapping[str, Any], output: Path) -> bool:
    """True when `path` records these settings, False when there is no such file.

    Raises:
        UserError: the output was begun with other settings (names the first that differs, and both values), or `path`
            is no settings file.
    """
    try:
        recorded = json.loads(path.read_bytes())["settings"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as settings ({error}); move {output} away and run again.") from error
    wanted = json.loads(json.dumps(settings))
    for name in [*wanted, *recorded]:
        if recorded.get(name) != wanted.get(name):
            raise UserError(
                f"{output} was begun with {name} = {recorded.get(name)!r}, this run has {wanted.get(name)!r}; "
                "continue with the same setting or give a new output."
            )
    return True


def write_settings(path: Path, settings: Mapping[str, Any], **about: Any) -> None:
    """Records the settings, whole or not at all; `about` is for people and never compared."""
    write_json(path, {**about, "settings": settings})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """An indented JSON file, replaced atomically; NaN, which JSON lacks, becomes null, a path its text.

    Raises:
        UserError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_plain(value), indent=1, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give an output that can.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return str(value) if isinstance(value, Path) else value


def weights_fingerprint(folder: Path) -> str:
    """Identity of a folder's safetensors by names, sizes and the first and last MiB of each (xxh3-128, hex).

    Training changes every tensor, so this tells a retrained model from its predecessor without reading all of it.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as handle:
            digest.update(handle.read(_SAMPLED))
            handle.seek(max(0, size - _SAMPLED))
            digest.update(handle.read(_SAMPLED))
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file so that after a kill or power loss either the old or the new content stands there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, as hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> int:
    """Creates a cache folder and holds it until the returned descriptor is closed; UserError when another does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"The cache folder {folder} cannot be used: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"Another process is writing the cache {folder}; wait for it or give a new folder.") from error
    return descriptor


def check_new_folder(folder: Path) -> None:
    """UserError where the folder holds something: a model's files are not to be mixed with others."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; give a folder that is empty or missing.")
