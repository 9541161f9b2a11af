"""Drafters in the DeepSpec-native layout: config.json and model.safetensors, as DeepSpec, vLLM and SGLang read them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from dspark_jax.checkpoints.huggingface import DTYPES, resolve_folder
from dspark_jax.checkpoints.tensors import (
    Layout,
    ParamPath,
    Stored,
    TensorFolder,
    layer_tensor,
    load_params,
    read_json,
    stored_tensors,
    write_json,
    write_tensors,
)
from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import LoadedDrafter, kind_of, skeleton
from dspark_jax.errors import UserError
from dspark_jax.sharding import ShardingRules, parameter_shardings, split
from dspark_jax.targets.target import Target

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_LEAVES = {
    "weight": ("weight", Layout.SAME),
    "weight_io": ("weight", Layout.LINEAR),
    "bias_o": ("bias", Layout.SAME),
    "w1_vr": ("markov_w1.weight", Layout.SAME),
    "w2_vr": ("markov_w2.weight", Layout.SAME),
}
_SAMPLED_ROWS = 64


def load_drafter(
    path_or_id: str | Path,
    target: Target,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> LoadedDrafter:
    """Loads a drafter of `target` from a DeepSpec folder or hub id.

    dtype: 'float32' or 'bfloat16'; None keeps the config's. The confidence head is float32 always. mesh: parameters are
    placed by `rules`, each device reading its own part. Raises UserError when files are missing or cut off, or when the
    drafter is of another target (depth, width, vocabulary, tapped layers, or frozen copies that differ).
    """
    folder = resolve_folder(path_or_id)
    hf_config = read_json(folder / "config.json")
    kind_of(hf_config)
    config = DrafterConfig.from_hf_dict(hf_config)
    config.check_target(target.config)
    if (dtype or config.backbone.dtype) not in DTYPES:
        raise UserError(
            f"Drafter dtype {dtype or config.backbone.dtype!r} is not supported; choose float32 or bfloat16."
        )
    storage = DTYPES[dtype or config.backbone.dtype]
    module = skeleton(hf_config)
    graphdef, abstract = split(module)
    leaves = flatten_dict(abstract)
    shardings = None if mesh is None else flatten_dict(parameter_shardings(module, mesh, rules or ShardingRules()))
    tensors = TensorFolder(folder)
    _check_frozen_copies(tensors, target)
    params = load_params(
        tensors,
        drafter_tensor_map(config, leaves),
        leaves,
        shardings,
        lambda path: jnp.float32 if path[0] == "confidence_head" else storage,
    )
    return LoadedDrafter(str(path_or_id), config, graphdef, params, hf_config)


def save_drafter(
    folder: str | Path,
    drafter: LoadedDrafter,
    target: Target,
    *,
    dtype: str | None = None,
    frozen_copies: bool = True,
) -> None:
    """Writes config.json (the drafter's own, unchanged but for `dtype`) and model.safetensors.

    dtype: of the stored tensors; None: the config's. frozen_copies: also write the target's embedding and head, always
    untied; servers take the target's own where they are absent. Loading and saving again gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or drafter.config.backbone.dtype
    table = drafter_tensor_map(drafter.config, flatten_dict(drafter.params))
    tensors = stored_tensors(table, drafter.params, dtype)
    if frozen_copies:
        shared = shared_tables(target)
        frozen = {("embed",): Stored(EMBEDDING), ("head",): Stored(HEAD)}
        tensors |= stored_tensors(frozen, {"embed": shared.embed, "head": shared.head}, dtype)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {**drafter.hf_config, "dtype": dtype})


def shared_tables(target: Target) -> SharedTables:
    """The target's embedding and head [V, D], the same array twice when they are tied."""
    embed = target.params["embed_weight_vd"]
    head = embed if target.config.tie_word_embeddings else target.params["head_weight_vd"]
    return SharedTables.of(target.config, embed, head)


def drafter_tensor_map(config: DrafterConfig, paths: Iterable[ParamPath]) -> dict[ParamPath, Stored]:
    """Parameter path -> DeepSpec tensor, for the parameters at `paths`.

    Draft layers have the target's names without `model.`; a linear of a head is stored under its attribute's name, so a
    new head needs no entry here.
    """
    table: dict[ParamPath, Stored] = {}
    for path in paths:
        if path[:2] == ("backbone", "layers"):
            table[path] = layer_tensor(path[3:], f"layers.{path[2]}")
        else:
            modules = path[1:-1] if path[0] == "backbone" else path[:-1]
            leaf, layout = _LEAVES[path[-1]]
            table[path] = Stored(".".join([*modules, leaf]), layout)
    return table


def _check_frozen_copies(tensors: TensorFolder, target: Target) -> None:
    """Compares sampled rows: over a fine-tuned or re-tokenised target a drafter would draft well-formed nonsense."""
    shared = shared_tables(target)
    for name, table in ((EMBEDDING, shared.embed), (HEAD, shared.head)):
        if name not in tensors.names or not table.is_fully_addressable:
            continue
        stored = tensors.stored(name)
        shape = tuple(stored.get_shape())
        if shape != table.shape:
            raise UserError(
                f"Vocabulary mismatch: the drafter's {name} has shape {list(shape)}, the target's table "
                f"{list(table.shape)}; give the target that the drafter was trained for."
            )
        rows = np.unique(np.linspace(0, shape[0] - 1, _SAMPLED_ROWS).astype(int))
        mine = np.stack([np.asarray(stored[int(r) : int(r) + 1])[0] for r in rows]).astype(np.float32)
        theirs = np.asarray(jnp.take(table, rows, axis=0)).astype(np.float32)
        if _differ(mine, theirs):
            raise UserError(
                f"Target/drafter mismatch: the drafter's frozen {name} is not {target.name}'s; it was trained for "
                "another target with the same sizes. Give that target."
            )


def _differ(mine: np.ndarray, theirs: np.ndarray) -> Any:
    """True beyond what rounding to bfloat16 on either side explains."""
    return np.any(np.abs(mine - theirs) > 2.0**-7 * np.abs(theirs) + 1e-6)
