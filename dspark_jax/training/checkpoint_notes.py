"""What lies beside a checkpoint's arrays: sealed notes, the hashes of its files, and what they say of damage."""

import json
from pathlib import Path
from typing import Any

import jax
import xxhash

from dspark_jax.errors import UserError
from dspark_jax.files import hash_tree, write_json
from dspark_jax.readers import read_object
from dspark_jax.training.array_blocks import Damaged

HASHES = "hashes.json"
NOTES, SCORE = "_CHECKPOINT_METADATA", "metrics/metrics"
"""Files of a step that Orbax reads when it opens the folder."""


def sealed(notes: dict[str, Any]) -> dict[str, Any]:
    """A copy of JSON notes with the hash of all of them, as they will be read back."""
    # Through JSON first: tuples come back as lists, and the hash must be that of what is read.
    plain = json.loads(json.dumps(notes))
    return plain | {"seal": _seal(plain)}


def opened(notes: Any) -> dict[str, Any]:
    """The notes that `sealed` made, without the seal; Damaged where they are not whole."""
    if not isinstance(notes, dict) or "seal" not in notes:
        raise Damaged("its notes have no seal")

    # Orbax reads the notes without checking them, hence a seal of our own.
    # The seal is over everything but itself.
    plain = {name: value for name, value in notes.items() if name != "seal"}
    if notes["seal"] != _seal(plain):
        raise Damaged("its notes are not those that were saved")

    return plain


def require_same_arrays(content: dict[str, Any], like: Any, where: str) -> None:
    """UserError unless a checkpoint, whose opened notes are `content`, holds as many arrays as the state `like`."""
    # The notes are sealed, so no damage makes the difference: an earlier version kept its parameters otherwise.
    found, expected = len(content["checksums"]), len(jax.tree.leaves(like))
    if found != expected:
        raise UserError(
            f"The checkpoint of {where} holds {found} arrays, the state of this run {expected}: the run was begun with "
            "another version of dspark_jax. Continue it with that version, or begin anew in another folder with "
            "--run-dir."
        )


def steps_in(folder: Path) -> list[int]:
    """The steps that a folder has checkpoints of, ascending."""
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def write_hashes(checkpoint: Path) -> None:
    """Records the hashes of a finished checkpoint's files; nothing where it is gone again. UserError on a full disk."""
    if checkpoint.is_dir():
        write_json(checkpoint / HASHES, hash_tree(checkpoint, lambda name: name != HASHES))


def damage(checkpoint: Path, notes_alone: bool = False) -> str | None:
    """Why a checkpoint's files are not what was written, as a clause; None where they are.

    Args:
        checkpoint: the folder of one step.
        notes_alone: leave the arrays' files unread.
    """
    try:
        notes = opened(_read_json(checkpoint / NOTES).get("custom_metadata"))
        scores = {} if notes["score"] is None else _read_json(checkpoint / SCORE)
        if scores.get("score") != notes["score"]:
            raise Damaged("its score is not the one that was saved")
        # A process that was killed right after a save has left no hashes; the arrays' checksums are compared then.
        recorded = _read_json(checkpoint / HASHES) if (checkpoint / HASHES).exists() else {}
    except Damaged as error:
        return str(error)

    # Opening the folder needs the notes alone, and must not read gigabytes of arrays for them.
    compared = {NOTES, SCORE} & set(recorded) if notes_alone else set(recorded)
    found = hash_tree(checkpoint, lambda name: name in compared)
    wrong = sorted(name for name in compared if found.get(name) != recorded[name])

    return f"{wrong[0]} is not what was written" if wrong else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError as error:
        raise Damaged(str(error).rstrip(".")) from error


def _seal(plain: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())
