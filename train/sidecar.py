"""What the data programs keep beside their output: the settings it was begun with, and how the run went."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from dspark_jax.data.manifest import write_atomically
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
    """An indented JSON file, replaced atomically; UserError where it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value, indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give an output that can.") from error


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


def table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns; counts with thousands separators, other numbers with one decimal."""
    width = max(map(len, rows))

    def shown(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value)

    return "\n".join(f"{name:<{width}}  {shown(value)}" for name, value in rows.items())
