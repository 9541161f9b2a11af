"""`dspark.json` beside a drafter's weights: the conventions it was trained under, its target and its training.

None of the layouts' own configs states all of it, and a drafter read under another convention drafts well-formed
nonsense without an error (docs/algorithm.md, rule 96). So each save writes the manifest, and each load that finds one
compares.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.folder_layout import CONFIG_FILE, Config, FolderLayout
from dspark_jax.checkpoints.tensors import WEIGHTS_FILE, write_json
from dspark_jax.drafters.registry import kind_name
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash, weights_hash
from dspark_jax.readers import SEAL, Schema, check_fields, check_seal, object_of, read_object, reason_of, sealed, text
from dspark_jax.targets.target import Target

MANIFEST_FILE = "dspark.json"
FORMAT, VERSION = "dspark_jax drafter", 1
# Sentences and not codes: the file is for people too, and comparison is by equality.
ANCHOR_PREDICTS = "row k, at position anchor + k, predicts token anchor + k + 1"
ANCHOR_WAITS = "row 0 predicts nothing; row k >= 1, at position anchor + k, predicts token anchor + k"
STEPWISE = "one token a step: hidden state t with token t + 1 at position t predicts token t + 2"


@dataclass(frozen=True)
class Provenance:
    """Facts that only the trainer knows; {} where unknown.

    Attributes:
        sampling: how the answers were drawn (temperature, top_k, top_p, seed).
        sources: data and their hashes, weights of the loss, and the like.
    """

    sampling: Mapping[str, Any]
    sources: Mapping[str, Any]


UNKNOWN = Provenance({}, {})


def conventions(native: Config, layout: FolderLayout) -> dict[str, Any]:
    """The conventions of a drafter with this DeepSpec config, stored in a folder of `layout`."""
    ids = list(native.get("target_layer_ids", []))
    found: dict[str, Any] = {
        "target_layer_ids": ids,
        "layer_id_base": layout.layer_id_base,
        # Both forms of the ids, because the off-by-one between them is silent (rule 96).
        "stored_layer_ids": [i + layout.layer_id_base for i in ids],
    }

    if kind_name(native) not in ("dspark", "dflash"):
        return found | {"anchor": STEPWISE}

    # DeepSpec's config has no such field, and its anchor row predicts.
    predicts = native.get("sample_from_anchor", True)

    return found | {
        "anchor": ANCHOR_PREDICTS if predicts else ANCHOR_WAITS,
        "sample_from_anchor": predicts,
        "predictions": native["block_size"],
        "rows": native["block_size"] + (not predicts),
        "mask_token_id": native["mask_token_id"],
        "block_position": "the block starts at the anchor's position; context keys are before it",
        "loss_mask": "read at the label's position, up to the first gap",
    }


def write_manifest(
    folder: Path, native: Config, layout: FolderLayout, target: Target, provenance: Provenance = UNKNOWN
) -> None:
    """Writes the manifest of a folder whose other files are already written: the manifest holds their hashes."""
    # A target made in memory has no files to hash.
    weights = {} if target.folder is None else {"weights_xxh3": weights_hash(target.folder)}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "layout": layout.name,
        "kind": kind_name(native),
        "conventions": conventions(native, layout),
        "target": {"name": target.name, "config_sha256": target.config_sha256, **weights},
        "files": {name: file_hash(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
        "sampling": dict(provenance.sampling),
        "sources": dict(provenance.sources),
    }

    write_json(folder / MANIFEST_FILE, sealed(content))


_FIELDS: Schema = {
    "layout": text(),
    "kind": text(),
    **dict.fromkeys(("conventions", "target", "sampling", "sources"), object_of()),
    "files": object_of(text()),
    SEAL: text(),
}
_TARGET: Schema = {"name": text(), "config_sha256": text(), "weights_xxh3": text()}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None if there is none; UserError if the file has another format or version."""
    path = folder / MANIFEST_FILE

    # `lexists`: a broken link is an error, not an absent manifest.
    if not os.path.lexists(path):
        return None
    content = read_object(path, expected="the manifest of a drafter")
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(
            f"{path} has format {content.get('format')!r} version {content.get('version')!r}; "
            f"expected {FORMAT!r} version {VERSION}. Read it with the version of dspark_jax that wrote it."
        )

    # The version first, then the fields: an unknown version may have others.
    check_fields(content, _FIELDS, str(path), required=("layout", "kind", "conventions", "target"))
    check_fields(content["target"], _TARGET, f"{path}, under target,", required=("name", "config_sha256"))
    return content


def provenance_of(manifest: Config | None) -> Provenance:
    """The provenance that a converted drafter keeps: its manifest's, or none."""
    return UNKNOWN if manifest is None else Provenance(manifest.get("sampling", {}), manifest.get("sources", {}))


def mismatches(manifest: Config, native: Config, layout: FolderLayout, target: Target) -> list[str]:
    """Contradictions between a folder's manifest and its config.json or the target, each as a clause."""
    declared, found = manifest.get("conventions", {}), conventions(native, layout)
    compared: list[tuple[str, Any, Any]] = [
        ("layout", manifest.get("layout"), layout.name),
        ("kind", manifest.get("kind"), kind_name(native)),
    ]

    # Names of both sides are compared: a convention that only one of them knows is a contradiction too.
    compared += [(name, declared.get(name), found.get(name)) for name in sorted({*declared, *found})]
    wrong = [
        f"{name} is {was!r} in {MANIFEST_FILE} and {now!r} by config.json" for name, was, now in compared if was != now
    ]

    # By content and not by name: a target may lie under any path.
    sha = manifest.get("target", {}).get("config_sha256")
    if sha != target.config_sha256:
        name = manifest.get("target", {}).get("name")
        wrong.append(
            f"it was trained for {name} with config sha256 {str(sha)[:12]}, and {target.name} has "
            f"{target.config_sha256[:12]}"
        )

    return wrong


def check_files(folder: Path, manifest: Config) -> None:
    """UserError where the manifest, or a file whose hash it holds, has changed since it was written."""
    check_seal(manifest, str(folder / MANIFEST_FILE), cure="export the drafter again")

    for name, written in manifest.get("files", {}).items():
        # A manifest from elsewhere must not make the reader hash arbitrary paths.
        if name not in (CONFIG_FILE, WEIGHTS_FILE):
            raise UserError(f"{folder / MANIFEST_FILE} names the file {name!r}; copy the drafter again.")
        try:
            found = file_hash(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({reason_of(error)}); copy it again.") from None

        if found != written:
            raise UserError(
                f"{folder / name} is not the file that was written: its hash is {found[:12]}, {MANIFEST_FILE} says "
                f"{written[:12]}. It was changed or damaged; copy the drafter again, or export it."
            )


def check_weights(folder: Path, manifest: Config, target: Target) -> None:
    """UserError where the target's weights are not those that the drafter was trained for."""
    made_for = manifest["target"].get("weights_xxh3")

    # The config's hash was compared already; weights differ where a target was fine-tuned without changing its config.
    if made_for is None or target.folder is None:
        return

    if (found := weights_hash(target.folder)) != made_for:
        raise UserError(
            f"The drafter in {folder} was trained for {manifest['target']['name']} with weights {made_for[:12]}, and "
            f"{target.name} has weights {found[:12]}. Give the target that it was trained for; load_drafter(..., "
            "compare_manifest=False) takes it for this one all the same."
        )


def check_manifest(folder: Path, native: Config, layout: FolderLayout, target: Target) -> None:
    """UserError naming the first contradiction between a folder's manifest, its config and the target."""
    manifest = read_manifest(folder)
    # A folder of another program has no manifest, and is read by its config alone.
    wrong = [] if manifest is None else mismatches(manifest, native, layout, target)

    if wrong:
        raise UserError(
            f"The drafter in {folder} contradicts its manifest: {wrong[0]}. Give the target that it was trained "
            "for and the files as they were written; infer.conformance measures which of the two is right."
        )


def check_integrity(folder: Path, target: Target) -> None:
    """UserError where a folder's files, or the target's weights, differ from the hashes in its manifest."""
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest)
        check_weights(folder, manifest, target)
