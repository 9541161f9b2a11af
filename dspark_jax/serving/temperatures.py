"""Reads and writes sts.json: temperatures of the confidence logits, and the weights and settings they are valid for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from dspark_jax.checkpoints.serving_tables import StsTable, read_sts
from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import weights_hash
from dspark_jax.readers import SEAL, check_seal, read_object, sealed
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.targets.joined import apart
from dspark_jax.targets.target import Target

_DEFAULT_MODE = "rejection"


def validity(target: Target, drafter: Drafter, sampling: SamplingParams) -> dict[str, Any]:
    """The facts that a calibration depends on: the weights, and the sampling settings, which decide acceptance."""
    return {
        # Files are hashed once and remembered; weights that were made in memory have no files.
        "target": fingerprint(target.params) if target.folder is None else weights_hash(target.folder),
        "target_name": target.name,
        "drafter": drafter_fingerprint(drafter),
        "drafter_name": drafter.name,
        "temperature": float(sampling.temperature),
        "top_k": int(sampling.top_k),
        "top_p": float(sampling.top_p),
        "min_p": float(sampling.min_p),
        # Greedy drafts are accepted alike in every mode.
        "mode": _DEFAULT_MODE if sampling.temperature == 0 else sampling.mode or _DEFAULT_MODE,
    }


def drafter_fingerprint(drafter: Drafter) -> str:
    """`fingerprint` of a drafter's matrices one by one, so that joining them in memory leaves calibrations valid."""
    coded = any(path[-1].key == "codes" for path, _ in jax.tree.leaves_with_path(drafter.params))
    # Codes of joined matrices lie with their scales; they are other weights in any case.
    return fingerprint(drafter.params if coded else apart(drafter.params, drafter.config.backbone))


def fingerprint(params: Mapping[str, Any]) -> str:
    """xxh3-128 of the names, shapes and all values of a model's arrays, rounded to bfloat16.

    Independent of the dtype that the weights were loaded in and of the layout that they are stored in.
    """
    digest = xxhash.xxh3_128()
    for path, leaf in jax.tree.leaves_with_path(params):
        # Paths and shapes are hashed too, so that equal values under other names differ.
        digest.update(jax.tree_util.keystr(path).encode() + str(leaf.shape).encode())
        digest.update(np.asarray(jnp.asarray(leaf).astype(jnp.bfloat16)).tobytes())

    return digest.hexdigest()


def write_calibration(path: Path, table: StsTable, valid_for: Mapping[str, Any]) -> None:
    """Write sts.json: the fields that servers read, and `valid_for`."""
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}

    # The hash stands under `valid_for`: servers read the fields beside it, and only those they know.
    content = sealed(fields)
    seal = content.pop(SEAL)
    write_json(path, {**content, "valid_for": {**valid_for, SEAL: seal}})


def read_calibration(path: Path, valid_for: Mapping[str, Any]) -> np.ndarray:
    """Read the temperatures [K] of a calibration.

    Args:
        path: sts.json, as written by `write_calibration`.
        valid_for: the facts it has to be valid for, from `validity`.
    Raises:
        UserError: a file that is no calibration, or one made for other weights or sampling settings.
    """
    # Compared fact by fact, so that the sentence can name the one that differs.
    table, made_for = read_sealed(path)
    # Files of the time before there was a choice do not name a mode.
    made_for.setdefault("mode", _DEFAULT_MODE)
    for name, expected in valid_for.items():
        # Names only make the sentence readable: weights may move or be renamed and stay valid.
        if not name.endswith("_name") and made_for.get(name) != expected:
            said, here = (facts.get(f"{name}_name", facts.get(name)) for facts in (made_for, valid_for))
            same = " (of the same name, but other weights)" if said == here else ""
            raise UserError(
                f"{path} was calibrated for {name.replace('_', '-')} {said}, this is {here}{same}; calibrate "
                "again with infer.calibrate."
            )

    return np.asarray(table.temperatures)


def read_sealed(path: Path) -> tuple[StsTable, dict[str, Any]]:
    """Read a calibration and check its seal.

    Returns:
        (the table, the facts it is valid for).
    Raises:
        UserError: a file that is no calibration, or one that was changed after it was written.
    """
    table, content = read_sts(path), read_object(path)
    made_for = content.pop("valid_for", None)
    if not isinstance(made_for, dict):
        raise UserError(f"{path} does not say what it is valid for; calibrate with infer.calibrate.")

    # The seal covers the servers' fields: a temperature edited by hand would be taken for a measured one.
    seal = {SEAL: made_for[SEAL]} if SEAL in made_for else {}
    check_seal({**content, **seal}, str(path), cure="calibrate again with infer.calibrate")
    return table, made_for
