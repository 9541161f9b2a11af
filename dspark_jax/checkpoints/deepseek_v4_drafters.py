"""V4's drafters in the target's own files, detected by their tensors: a DSpark module, or the preview's MTP-1 block."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from dspark_jax.checkpoints.deepseek_v4 import V4Folder, block_tensor, v4_needed
from dspark_jax.checkpoints.huggingface import DTYPES, read_hf_config, resolve_folder
from dspark_jax.checkpoints.leftovers import refuse_leftovers
from dspark_jax.checkpoints.tensor_map import Layout, ParamPath, Stored, TensorMap, stored_names
from dspark_jax.checkpoints.tensors import check_shapes, load_params
from dspark_jax.drafters.config import DrafterConfig, held_dtype
from dspark_jax.drafters.deepseek_v4.config import native_config
from dspark_jax.drafters.registry import Drafter, read_config, skeleton
from dspark_jax.errors import UserError
from dspark_jax.sharding import ShardingRules, parameter_shardings, split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.deepseek_v4.config import MODEL_TYPE
from dspark_jax.targets.target import Target

# A tensor that only one of the two has.
_MARKS = {"dspark": "mtp.0.main_proj.weight", "mtp": "mtp.0.e_proj.weight"}
_SAMPLED_ROWS = 64

# Parameters after the last stage, stored with it; then those before the first, stored with that one.
_HEADS: dict[ParamPath, Stored] = {
    ("norm", "weight"): Stored("norm.weight"),
    **{("collapse", leaf): Stored(f"hc_head_{leaf}") for leaf in ("fn", "base", "scale")},
    ("markov_head", "w1_vr"): Stored("markov_head.markov_w1.weight"),
    ("markov_head", "w2_vr"): Stored("markov_head.markov_w2.weight"),
    ("confidence_head", "proj", "weight_io"): Stored("confidence_head.proj.weight", Layout.LINEAR),
}
_FIRST: dict[ParamPath, Stored] = {
    ("main_proj", "weight_io"): Stored("main_proj.weight", Layout.LINEAR),
    ("main_norm", "weight"): Stored("main_norm.weight"),
    ("e_proj", "weight_io"): Stored("e_proj.weight", Layout.LINEAR),
    ("h_proj", "weight_io"): Stored("h_proj.weight", Layout.LINEAR),
    ("enorm", "weight"): Stored("enorm.weight"),
    ("hnorm", "weight"): Stored("hnorm.weight"),
}


def holds_v4(folder: Path) -> bool:
    """Whether the folder's config.json is a V4 repository's."""
    return read_hf_config(folder).get("model_type") == MODEL_TYPE


def v4_drafter_alone(folder: Path) -> bool:
    """Whether a V4 folder holds a drafter without its target, as `save_v4_drafter` writes one."""
    return holds_v4(folder) and all(name.startswith("mtp.") for name in V4Folder(folder).names)


def drafter_kind_in(tensors: V4Folder) -> str:
    """'dspark' or 'mtp', by the folder's tensors; UserError for neither."""
    # By tensors: config.json is the target's in both kinds of repository.
    for kind, mark in _MARKS.items():
        if mark in tensors.names:
            return kind

    raise UserError(
        f"{tensors.folder} holds no drafter: neither {' nor '.join(_MARKS.values())} is among its tensors. Give a "
        "repository whose name ends in -DSpark, or the preview's."
    )


def v4_drafter_config(folder: Path) -> dict[str, Any]:
    """The config of the drafter in a V4 folder, without its weights; UserError where there is none."""
    stored = read_hf_config(folder)
    return native_config(stored, drafter_kind_in(V4Folder(folder)), num_anchors=stored.get("num_anchors", 512))


def check_v4_drafter(folder: Path) -> str:
    """The kind of the drafter in a V4 folder, "" for none; UserError where its tensors are not those that its
    config.json calls for. Reads no weights."""
    tensors = V4Folder(folder)
    if not any(name.startswith("mtp.") for name in tensors.names):
        return ""

    config = v4_drafter_config(folder)
    leaves = flatten_dict(split(skeleton(config))[1])
    check_shapes(tensors, _drafter_tensors(tensors, read_config(config), leaves), leaves)
    return drafter_kind_in(tensors)


def _drafter_tensors(tensors: V4Folder, config: DrafterConfig, leaves: Mapping[ParamPath, Any]) -> TensorMap:
    """The map from all parameters to the folder's tensors; UserError for tensors of a drafter that it leaves over."""
    table = v4_drafter_map(config, leaves)

    # The target's own tensors are harmless leftovers in a shared folder; unknown ones of the drafter are not.
    refuse_leftovers(tensors, v4_needed(tensors, stored_names(table, leaves)), ("deepseek_v4_drafter",))
    return table


def v4_drafter_map(config: DrafterConfig, paths: Iterable[ParamPath]) -> dict[ParamPath, Stored]:
    """Parameter path -> published tensor, for a V4 drafter's parameters at `paths`."""
    paths = list(paths)

    # The published files have no place outside the stages: heads lie under the last `mtp.N`, inputs under `mtp.0`.
    stages = [path[1] for path in paths if path[0] == "stages"]
    last = f"mtp.{max(stages, default=0)}"
    table = {}

    for path in paths:
        if path[0] == "stages":
            table[path] = block_tensor(path[2:], f"mtp.{path[1]}")
        elif path[0] == "block":
            table[path] = block_tensor(path[1:], "mtp.0")
        else:
            stored, prefix = (_FIRST[path], "mtp.0") if path in _FIRST else (_HEADS[path], last)
            table[path] = Stored(f"{prefix}.{stored.name}", stored.layout)

    return table


def load_v4_drafter(
    path_or_id: str | Path,
    target: Target,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> Drafter:
    """Loads the drafter in a V4 folder or hub id, be it the target's own or one that holds a drafter alone.

    Args:
        path_or_id: a folder or hub id.
        target: the target that it was trained for.
        dtype: 'float32' or 'bfloat16'; None keeps the config's.
        mesh: parameters are placed over it; None: one device.
        rules: how they are placed.

    Raises:
        UserError: there is no drafter, its widths are not the config's, or it belongs to another target.
    """
    folder = resolve_folder(path_or_id)
    stored = read_hf_config(folder)

    tensors, hf_config = V4Folder(folder), v4_drafter_config(folder)

    # Checked against the target before any weight is read.
    config = read_config(hf_config)
    config.check_target(target.config)
    # The drafter's blocks are held as the target's are: as their codes, or widened.
    if target.config.widened == target.config:
        config = config.widened

    # A config's hash that matches settles it; without one the folder may still be the same model with another config.
    if config.target_sha256 != target.config_sha256 and config_sha256(stored) != target.config_sha256:
        _check_same_target(tensors, target)

    storage = DTYPES[dtype or config.backbone.dtype]
    module = skeleton(hf_config, config)
    graphdef, abstract = split(module)
    leaves = flatten_dict(abstract)
    shardings = None if mesh is None else flatten_dict(parameter_shardings(module, mesh, rules or ShardingRules()))

    def kept(path: ParamPath) -> Any:
        return held_dtype(path, leaves[path].dtype, storage)

    table = _drafter_tensors(tensors, config, leaves)
    params = load_params(tensors, table, leaves, shardings, kept)

    return Drafter(str(path_or_id), config, graphdef, params, hf_config)


def _check_same_target(tensors: V4Folder, target: Target) -> None:
    """UserError where the folder has an embedding too and sampled rows of it are not the target's."""
    table = target.params.get("embed_weight_vd")

    # A table sharded over several processes cannot be sampled from one of them.
    if "embed.weight" not in tensors.names or table is None or not table.is_fully_addressable:
        return

    # Spread over the vocabulary: rows of added tokens at its end are often untrained and equal.
    rows = np.unique(np.linspace(0, table.shape[0] - 1, _SAMPLED_ROWS).astype(int))
    stored = tensors.stored("embed.weight")
    mine = np.stack([np.asarray(stored[int(r) : int(r) + 1])[0] for r in rows]).astype(np.float32)
    theirs = np.asarray(table[rows]).astype(np.float32)

    # Beyond what rounding to bfloat16 on either side explains.
    if np.any(np.abs(mine - theirs) > 2.0**-7 * np.abs(theirs) + 1e-6):
        raise UserError(
            f"Target/drafter mismatch: the embedding in {tensors.folder} is not {target.name}'s; load the drafter from "
            "the target's own folder."
        )
