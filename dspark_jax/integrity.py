"""Examination of any file or folder of this project: its kind, its origin, and whether it is whole.

A kind is a line in `KINDS`: a recogniser and an examiner. An examination reads all content; its verdict is the first
fault found, as a sentence.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.deepseek_v4 import V4Folder
from dspark_jax.checkpoints.deepseek_v4_drafters import check_v4_drafter, drafter_kind_in, holds_v4, v4_drafter_alone
from dspark_jax.checkpoints.folder_layout import CONFIG_FILE
from dspark_jax.checkpoints.huggingface import (
    HASHES_FILE,
    load_tokenizer,
    read_hf_config,
    stop_tokens,
    target_skeleton,
    target_tensors,
)
from dspark_jax.checkpoints.layouts import read_stored_config
from dspark_jax.checkpoints.manifest import MANIFEST_FILE, check_files, read_manifest
from dspark_jax.checkpoints.serving_tables import SPS_FILE, STS_FILE, read_sps, read_sts
from dspark_jax.checkpoints.tensors import TensorFolder, all_finite, check_shapes
from dspark_jax.config.cli import from_json
from dspark_jax.config.schema import TrainConfig
from dspark_jax.data.conversations import read_conversations
from dspark_jax.data.pipeline import open_cache
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash, weights_hash
from dspark_jax.readers import check_fields, object_of, read_object, read_records, reason_of, text
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.temperatures import read_sealed
from dspark_jax.sharding import split
from dspark_jax.storage.places import place_of
from dspark_jax.targets.deepseek_v4.config import MODEL_TYPE
from dspark_jax.targets.registry import read_target_config
from dspark_jax.training.checkpoint_notes import damage, steps_in

Facts = dict[str, Any]


@dataclass
class Finding:
    """The result of one examination.

    Attributes:
        path: a file or folder.
        kind: a key of `KINDS`.
        facts: its properties and its origin, for display.
        fault: a sentence; "" if it is whole.
    """

    path: Path
    kind: str
    facts: Facts = field(default_factory=dict)
    fault: str = ""


def examine(path: Path) -> list[Finding]:
    """Examines a path as every kind that it is recognised as; a run includes its drafters.

    Returns:
        One finding for each kind; faults are in the findings and are not raised.
    Raises:
        UserError: the path is of no known kind, or in an object store.
    """
    if (place := place_of(path)) is not None:
        raise UserError(f"{place} is in an object store; copy it to a folder of this machine, and give that.")
    try:
        # One path can be of several kinds: a drafter's folder may hold a calibration and a profile.
        kinds = [name for name, (recognised, _) in KINDS.items() if recognised(path)]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); give the folder of one.") from None

    if not kinds:
        found = "is none of" if os.path.lexists(path) else "does not exist; expected one of"
        raise UserError(f"{path} {found}: {', '.join(KINDS)}. Give the path of one.")

    findings = []
    for kind in kinds:
        finding = Finding(path, kind)
        try:
            KINDS[kind][1](path, finding.facts)
        except UserError as error:
            # A fault is a result here: the other kinds and paths are examined all the same.
            finding.fault = " ".join(str(error).split())
        except OSError as error:
            finding.fault = f"{error.filename or path} cannot be read ({error.strerror}); copy it again."

        findings.append(finding)

    if "run" in kinds:
        # Exports of the run, which a user would give to the engine next.
        for name in ("drafter", "drafter_best"):
            findings += examine(path / name) if (path / name).is_dir() else []

    return findings


# ---- models


def _target(folder: Path, facts: Facts) -> None:
    hf_config = read_hf_config(folder)
    # Cheap checks first, as in loading: a config that describes no target explains the faults behind it.
    config = read_target_config(hf_config, str(folder / CONFIG_FILE))
    facts |= {"family": config.model_type, "layers": config.num_layers, "vocabulary": config.vocab_size}
    _check_hashes(folder)
    _check_hub_names(folder)
    # The shapes that the configuration implies are compared with those in the file.
    leaves = flatten_dict(split(target_skeleton(config))[1])
    tensors, table = target_tensors(folder, config, hf_config, leaves)
    check_shapes(tensors, table, leaves)
    if config.model_type == MODEL_TYPE and (drafter := check_v4_drafter(folder)):
        facts["drafter"] = drafter
    _check_finite(tensors)
    # Called for their errors: a model that cannot stop or be tokenised is not whole.
    stop_tokens(folder, hf_config)
    load_tokenizer(folder)
    facts |= {"tensors": len(tensors.names), "weights xxh3": weights_hash(folder)}


def _check_hashes(folder: Path) -> None:
    """UserError if a file is not as `save_target` wrote it; a folder without recorded hashes passes."""
    path = folder / HASHES_FILE
    if not os.path.lexists(path):
        return

    stored = read_object(path, expected="hashes of a model's files")
    check_fields({"": stored}, {"": object_of(text())}, str(path))

    for name, written in stored.items():
        # A name with a folder in it would reach outside of the model.
        if Path(name).name != name or not (folder / name).is_file() or file_hash(folder / name) != written:
            raise UserError(f"{folder / name} is not the file that was written ({path.name}); copy the folder again.")


def _check_hub_names(folder: Path) -> None:
    """UserError if a file of the hub's cache does not have the sha256 that is its name."""
    for path in sorted(folder.glob("*.safetensors")):
        # The cache links a readable name to a file that is named by its content.
        named = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", named):
            with open(path, "rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
            if found != named:
                raise UserError(f"{path} has sha256 {found[:12]}, the hub says {named[:12]}; remove it and load again.")


def _check_finite(tensors: TensorFolder) -> None:
    for name in sorted(tensors.names):
        # Quantised tensors are covered by their scales: codes are integers, or always finite.
        found = tensors.raw(name)
        if not all_finite(np.ascontiguousarray(found[:] if found.get_shape() else found[...])):
            raise UserError(f"Tensor {name} in {tensors.folder} holds values that are not finite; copy it again.")


def _drafter(folder: Path, facts: Facts) -> None:
    manifest = read_manifest(folder)
    if manifest is not None:
        made_for = manifest["target"]
        facts |= {"kind": manifest["kind"], "target": made_for["name"], "target config": made_for["config_sha256"][:12]}
        facts["target weights xxh3"] = made_for.get("weights_xxh3", "not recorded")
        facts |= {name: value for name, value in manifest.get("sources", {}).items() if isinstance(value, str | int)}
        check_files(folder, manifest)

    if v4 := holds_v4(folder):
        facts["kind"] = check_v4_drafter(folder) or drafter_kind_in(V4Folder(folder))
    layout = "published" if v4 else read_stored_config(folder)[1].name
    tensors = V4Folder(folder) if v4 else TensorFolder(folder)

    # The files of another program have no hashes; that their tensors are finite is then all that can be said.
    _check_finite(tensors)
    hashes = "as written" if manifest and "files" in manifest else "none"
    facts |= {"layout": layout, "tensors": len(tensors.names), "hashes": hashes}


# ---- data and runs


def _cache(folder: Path, facts: Facts) -> None:
    cache = open_cache(folder)
    facts |= {"samples": len(cache), "layers": list(cache.spec.layer_ids), "target": cache.spec.target_name}
    if os.path.lexists(folder / "build.json"):
        built = read_object(folder / "build.json").get("settings")
        if isinstance(built, Mapping):
            facts["target weights xxh3"] = built.get("weights_xxh3", "not recorded")

    facts["sources sha256"] = cache.spec.sources_sha256 or "not recorded"

    # Checksums first; reading every sample then checks that it can be decoded as well.
    if isinstance(cache, TargetCache):
        cache.verify()

    for index in range(len(cache)):
        cache[index]


def _run(folder: Path, facts: Facts) -> None:
    config = from_json(TrainConfig, read_object(folder / CONFIG_FILE, expected="the configuration of a run"))
    facts |= {"target": config.target, "drafter": config.drafter.kind}
    if os.path.lexists(folder / "inputs.json"):
        inputs = read_object(folder / "inputs.json", expected="the hashes of a run's inputs")
        check_fields({"": inputs}, {"": object_of(text())}, str(folder / "inputs.json"))
        facts |= inputs

    facts["records"] = len(read_records(folder / "metrics.jsonl"))
    finished = os.path.lexists(folder / "metrics.json")
    if finished:
        read_object(folder / "metrics.json", expected="the last record of a run")

    steps = steps_in(folder / "checkpoints")
    for step in steps:
        # Hashes of all files, the arrays' included.
        if reason := damage(folder / "checkpoints" / str(step)):
            raise UserError(f"The checkpoint of step {step} in {folder} is damaged: {reason}.")

    facts |= {"finished": "yes" if finished else "no", "checkpoints": ", ".join(map(str, steps)) or "none"}
    # metrics.json is written last, after the export.
    if finished and not (folder / "drafter").is_dir():
        raise UserError(f"The run in {folder} is finished and has no drafter; export it again with train.export.")


def _conversations(path: Path, facts: Facts) -> None:
    settings, metrics = (path.with_suffix(f".{name}.json") for name in ("settings", "metrics"))
    if os.path.lexists(settings):
        made = read_object(settings, expected="the settings of conversations").get("settings")
        if isinstance(made, Mapping):
            facts |= {name: value for name, value in made.items() if isinstance(value, str | int | float)}

    # Reading them all checks every line.
    facts["conversations"] = sum(1 for _ in read_conversations(path))
    if os.path.lexists(metrics):
        counted = read_object(metrics, expected="the counts of conversations")
        if counted.get("conversations", facts["conversations"]) != facts["conversations"]:
            raise UserError(
                f"{path} holds {facts['conversations']} conversations, {metrics.name} says {counted['conversations']}; "
                "restore it, or run train.prepare_data again."
            )
        if counted.get("xxh3", (found := file_hash(path))) != found:
            raise UserError(
                f"{path} is not the file that was written ({metrics.name}); restore it or prepare it again."
            )


# ---- tables beside a drafter


def _calibration(path: Path, facts: Facts) -> None:
    path = path / STS_FILE if path.is_dir() else path
    facts["positions"] = len(read_sts(path).temperatures)
    # Tables of other programs have no record of what they were fitted on.
    if "valid_for" in read_object(path):
        _, made_for = read_sealed(path)
        facts |= {name: made_for[name] for name in ("target_name", "drafter_name", "temperature") if name in made_for}


def _profile(path: Path, facts: Facts) -> None:
    path = path / SPS_FILE if path.is_dir() else path
    if "profile" in read_object(path):
        profile = Profile.read(path)
        facts |= {"device": profile.key.get("device"), "token counts": list(profile.tokens)}
    else:
        facts["form"] = type(read_sps(path)).__name__


# ---- recognition


def _holds(*names: str) -> Callable[[Path], bool]:
    return lambda path: path.is_dir() and any(os.path.lexists(path / name) for name in names)


def _is_run(path: Path) -> bool:
    # Runs, drafters and targets all hold a config.json; what lies beside it tells them apart.
    return _holds(CONFIG_FILE)(path) and _holds("metrics.jsonl", "checkpoints", "inputs.json")(path)


# Fields of config.json that drafters alone have, in whatever layout.
_OF_DRAFTERS = {"target_layer_ids", "speculators_model_type", "dflash_config", "eagle_config"}


def _is_drafter(path: Path) -> bool:
    if _holds(MANIFEST_FILE)(path):
        return True
    if not _holds(CONFIG_FILE)(path) or _is_run(path):
        return False

    try:
        stored = read_object(path / CONFIG_FILE)
        # A V4 drafter has its target's config.json, so that its tensors alone tell the two apart.
        return not _OF_DRAFTERS.isdisjoint(stored) or v4_drafter_alone(path)
    except UserError:
        return False  # a damaged folder is examined as a target's, which says so


def _is_target(path: Path) -> bool:
    return _holds(CONFIG_FILE)(path) and not _is_run(path) and not _is_drafter(path)


KINDS: Mapping[str, tuple[Callable[[Path], bool], Callable[[Path, Facts], None]]] = {
    "target": (_is_target, _target),
    "drafter": (_is_drafter, _drafter),
    "target cache": (_holds("manifest.json"), _cache),
    "run": (_is_run, _run),
    "conversations": (lambda path: path.suffix == ".jsonl" and path.is_file(), _conversations),
    "calibration": (lambda path: path.name == STS_FILE or _holds(STS_FILE)(path), _calibration),
    "profile": (lambda path: path.name == SPS_FILE or _holds(SPS_FILE)(path), _profile),
}
"""Name -> (whether a path is one, what examines it)."""
