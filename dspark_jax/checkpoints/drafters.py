"""Drafters on disk, in any layout: detected from config.json when loaded, chosen by name when saved."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dspark_jax.checkpoints.deepseek_v4_drafters import holds_v4, load_v4_drafter, v4_drafter_config
from dspark_jax.checkpoints.deepseek_v4_published import save_v4_drafter
from dspark_jax.checkpoints.deepspec import drafter_tensor_map
from dspark_jax.checkpoints.folder_layout import CONFIG_FILE, DRAFT_HEAD, EMBEDDING, HEAD, FolderLayout
from dspark_jax.checkpoints.huggingface import DTYPES, Weights, resolve_folder
from dspark_jax.checkpoints.layouts import layout_named, native_config, read_stored_config
from dspark_jax.checkpoints.leftovers import HARMLESS, refuse_leftovers
from dspark_jax.checkpoints.manifest import (
    MANIFEST_FILE,
    UNKNOWN,
    Provenance,
    check_integrity,
    check_manifest,
    write_manifest,
)
from dspark_jax.checkpoints.tensor_map import ParamPath, Stored, TensorMap, stored_names
from dspark_jax.checkpoints.tensors import (
    WEIGHTS_FILE,
    TensorFolder,
    load_params,
    stored_tensors,
    write_json,
    write_tensors,
)
from dspark_jax.checkpoints.vocabulary_maps import maps_of, stored_vocabulary
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import Drafter, read_config, skeleton
from dspark_jax.drafters.vocabulary import DraftVocabulary, rows_of, sampled_rows
from dspark_jax.errors import UserError
from dspark_jax.sharding import ShardingRules, parameter_shardings, split
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.eight_bits import in_eight_bits, refuse_eight_bits
from dspark_jax.targets.target import Target

_DRAFT_HEAD_PATH = ("draft_head_pd",)


class _NamedTensors(TensorFolder):
    """A folder whose tensors are requested by DeepSpec's names."""

    def __init__(self, folder: Path, stored_name: Callable[[str], str]):
        super().__init__(folder)
        self.stored_name = stored_name

    def stored(self, name: str) -> Any:
        """The slices of the weight that the layout stores under another name."""
        return super().stored(self.stored_name(name))

    def holds(self, name: str) -> bool:
        """Whether the folder has it; frozen copies of the target's tables are optional."""
        return self.stored_name(name) in self.names


def drafter_layout(path_or_id: str | Path) -> FolderLayout:
    """The layout of a drafter's folder or hub id; UserError for a DeepSeek-V4 drafter, which is in none."""
    folder = resolve_folder(path_or_id, "drafter")
    if holds_v4(folder):
        raise UserError(
            f"{path_or_id} holds a DeepSeek-V4 drafter, which has no layout but the published one, mtp.* tensors among "
            "its target's files; copy the files as they are."
        )
    return read_stored_config(folder)[1]


def drafter_hf_config(path_or_id: str | Path, target: TargetConfig) -> dict[str, Any]:
    """The config.json of a drafter's folder or hub id in any of the layouts, in the form that `Drafter.hf_config` has.

    Raises:
        UserError: the file cannot be read or makes no drafter of `target`.
    """
    folder = resolve_folder(path_or_id, "drafter")
    return v4_drafter_config(folder) if holds_v4(folder) else native_config(*read_stored_config(folder), target)


def load_drafter(
    path_or_id: str | Path,
    target: Target,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    compare_manifest: bool = True,
    layer_shift: int = 0,
    weights: Weights = "stored",
) -> Drafter:
    """Loads a drafter of `target` from a folder or hub id in any of the layouts.

    Args:
        path_or_id: a folder or hub id.
        target: the target that it was trained for.
        dtype: 'float32' or 'bfloat16'; None keeps the config's. The confidence head is always float32.
        mesh: parameters are placed over it, each device reading its own part; None: one device.
        rules: how they are placed.
        compare_manifest: refuse a folder whose dspark.json, where it has one, contradicts its config or the target.
        layer_shift: added to the layer ids that the files name, for files whose convention is in doubt.
        weights: "int8" and "fp8" keep the draft layers' matrices so, with a scale for each output, on one device.

    Returns:
        The drafter, config and parameters.

    Raises:
        UserError: a contradiction, files that are missing or cut off, or a drafter of another target (depth, width,
            vocabulary, tapped layers, or frozen copies that differ).
    """
    _check_weights(weights)
    folder = resolve_folder(path_or_id, "drafter")
    if holds_v4(folder):
        _refuse_bits_of_v4(weights, path_or_id)
        return load_v4_drafter(folder, target, dtype=dtype, mesh=mesh, rules=rules)

    # Whatever the layout, everything below works on DeepSpec's names and fields.
    hf_config, layout = _native_config(folder, target, layer_shift)
    config = read_config(hf_config)
    config.check_target(target.config)
    if compare_manifest:
        check_manifest(folder, hf_config, layout, target)

    # Shapes and shardings follow from the config alone, so each tensor can be judged before it is read.
    module = skeleton(hf_config)
    graphdef, abstract = split(module)
    leaves = flatten_dict(abstract)
    shardings = None if mesh is None else flatten_dict(parameter_shardings(module, mesh, rules or ShardingRules()))
    tensors = _NamedTensors(folder, lambda name: layout.tensor(name, hf_config))
    table, vocabulary = drafter_tensor_map(config, leaves), getattr(config, "draft_vocabulary", None)
    _check_tensors(tensors, table, leaves, layout, target, vocabulary)
    storage = _storage_dtype(dtype or config.backbone.dtype)
    params = _load_params(tensors, table, leaves, shardings, storage, target, vocabulary)

    # Last: a fault that an earlier check explains is better named by that check.
    if compare_manifest:
        check_integrity(folder, target)
    if weights != "stored":
        graphdef, params = in_eight_bits(graphdef, params, str(path_or_id), weights)
    return Drafter(str(path_or_id), config, graphdef, params, hf_config)


def save_drafter(
    folder: str | Path,
    drafter: Drafter,
    target: Target,
    *,
    layout: str = "deepspec",
    dtype: str | None = None,
    frozen_copies: bool = True,
    vocabulary_maps: bool = False,
    provenance: Provenance = UNKNOWN,
) -> None:
    """Writes config.json, model.safetensors and the manifest dspark.json in the named layout.

    Loading and saving again, through any of the layouts, gives the same bytes.

    Args:
        folder: created where it is missing.
        drafter: as returned by `load_drafter` or by training.
        target: the target that it was trained for.
        layout: a name in `checkpoints.layouts`; a DeepSeek-V4 drafter always has the published one, `mtp.*`.
        dtype: of the stored tensors; None: the config's.
        frozen_copies: also write the copies of the target's embedding and head that the layout's readers expect, always
            untied; servers take the target's own where they are absent, and so does `load_drafter` for the head of a
            pruned draft vocabulary.
        vocabulary_maps: also write the identity as `d2t` and `t2d`, where the layout has them; a pruned vocabulary's
            are always written.
        provenance: how the drafter was made, for the manifest.

    Raises:
        UserError: the layout cannot express the drafter, or it is held in 8 bits; nothing is written.
    """
    if str(drafter.hf_config.get("model_type")) == "deepseek_v4":
        save_v4_drafter(Path(folder), drafter, dtype)
        return

    refuse_eight_bits(drafter.params, drafter.name)
    folder, form = Path(folder), layout_named(layout)

    # The config states the dtype of the tensors that are written with it.
    native = {**drafter.hf_config, "dtype": dtype or drafter.config.backbone.dtype}
    stored = form.from_native(native, target)

    tensors = _own_tensors(drafter, native, form, target if frozen_copies else None)

    # Renamed once, here: up to this line every name is DeepSpec's.
    tensors = {form.tensor(name, native): array for name, array in tensors.items()}

    vocabulary = getattr(drafter.config, "draft_vocabulary", None)
    if form.vocabulary_maps and (vocabulary_maps or vocabulary is not None):
        tensors |= maps_of(vocabulary, native["vocab_size"])

    # Before the first file is replaced: an old manifest beside new files would contradict them.
    with suppress(OSError, ValueError):
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, stored)

    # Last, because it holds the hashes of the files before it.
    write_manifest(folder, native, form, target, provenance)


def _own_tensors(
    drafter: Drafter, native: dict[str, Any], form: FolderLayout, copied: Target | None
) -> dict[str, np.ndarray]:
    """The drafter's tensors by DeepSpec's names, with the frozen copies of the tables of `copied`, None for none."""
    table = drafter_tensor_map(drafter.config, flatten_dict(drafter.params))
    tensors = stored_tensors(table, drafter.params, native["dtype"])

    if copied is not None:
        shared = shared_tables(copied)
        tables = {EMBEDDING: shared.embed, HEAD: shared.head}
        # Each layout's readers expect other copies: z-lab's, for one, take both tables from the target.
        frozen = {(name,): Stored(name) for name in form.frozen(native)}
        tensors |= stored_tensors(frozen, tables, native["dtype"])
    elif form.name == "deepspec":
        # The draft head is a frozen copy too: without copies, loading takes the target's rows again.
        tensors.pop(DRAFT_HEAD, None)

    return tensors


def saved_whole(folder: Path) -> bool:
    """Whether `save_drafter` came to its end there: the last file is the manifest, or V4's config.json."""
    present = (folder / WEIGHTS_FILE).exists() and (folder / CONFIG_FILE).exists()
    return present and ((folder / MANIFEST_FILE).exists() or holds_v4(folder))


def shared_tables(target: Target) -> SharedTables:
    """The target's embedding and head [V, D], the same array twice if they are tied."""
    embed = target.params["embed_weight_vd"]
    head = embed if target.config.tie_word_embeddings else target.params["head_weight_vd"]
    return SharedTables.of(target.config, embed, head)


def draft_head(shared: SharedTables, vocabulary: DraftVocabulary) -> Float[Array, "p d"]:
    """The target's head rows [P, D] for a pruned draft vocabulary."""
    return rows_of(shared.head, vocabulary.ids)


def _native_config(folder: Path, target: Target, layer_shift: int) -> tuple[dict[str, Any], FolderLayout]:
    """(DeepSpec's form of the folder's config, layer ids shifted and a pruned vocabulary taken from the tensors; the
    folder's layout)."""
    # DeepSpec's names and fields from here on, whatever the folder has.
    stored, layout = read_stored_config(folder)
    native = native_config(stored, layout, target.config)

    # Ids that are off by one load without an error and draft badly (docs/algorithm.md, rule 96).
    if layer_shift:
        native["target_layer_ids"] = [i + layer_shift for i in native["target_layer_ids"]]

    if native.get("draft_vocabulary") is not None:
        return native, layout

    # Null, or the size of the whole vocabulary, says that nothing is pruned: such fields are dropped.
    native.pop("draft_vocabulary", None)
    size, whole = native.pop("draft_vocab_size", None), native.get("vocab_size")

    # The config, on which shapes depend, needs the vocabulary before any weight is read. A config without the whole
    # one's size is refused where it is read.
    if size not in (None, whole) and whole is not None:
        vocabulary = stored_vocabulary(TensorFolder(folder), size, whole)
        native |= {"draft_vocabulary": vocabulary.bits, "draft_vocab_size": vocabulary.size}
    return native, layout


def _storage_dtype(name: str) -> Any:
    """The dtype of that name; UserError for one that parameters are not stored in."""
    if name not in DTYPES:
        raise UserError(f"Drafter dtype {name!r} is not supported; choose float32 or bfloat16.")
    return DTYPES[name]


def _check_weights(weights: str) -> None:
    if weights not in get_args(Weights):
        raise UserError(f"A drafter's weights are loaded 'stored' or in 'int8' or 'fp8', not {weights!r}.")


def _refuse_bits_of_v4(weights: str, name: str | Path) -> None:
    if weights != "stored":
        raise UserError(f"{name} is of DeepSeek-V4, whose weights are not kept in {weights}; load it 'stored'.")


def _check_tensors(
    tensors: _NamedTensors,
    table: TensorMap,
    leaves: dict[ParamPath, Any],
    layout: FolderLayout,
    target: Target,
    vocabulary: DraftVocabulary | None,
) -> None:
    """Refuses tensors without a parameter, and tables of another vocabulary, before any weight is read."""
    # A tensor without a parameter means that config and weights differ.
    needed = {tensors.stored_name(name) for name in stored_names(table, leaves)}
    refuse_leftovers(tensors, needed, ("drafter", layout.name) if layout.name in HARMLESS else ("drafter",))
    _check_tables(tensors, target, vocabulary)


def _load_params(
    tensors: _NamedTensors,
    table: TensorMap,
    leaves: dict[ParamPath, Any],
    shardings: dict[ParamPath, Any] | None,
    storage: Any,
    target: Target,
    vocabulary: DraftVocabulary | None,
) -> dict:
    """The parameters at `leaves`, from the tensors; a pruned vocabulary's head from the target where it is absent."""
    # The layout may leave out the draft head, whose rows are the target's own (rule 18).
    borrowed = vocabulary is not None and not tensors.holds(DRAFT_HEAD)
    params = load_params(
        tensors,
        table,
        {path: leaf for path, leaf in leaves.items() if not borrowed or path != _DRAFT_HEAD_PATH},
        shardings,
        # Confidences are compared with thresholds and multiplied (docs/algorithm.md, rule 35).
        lambda path: jnp.float32 if path[0] == "confidence_head" else storage,
    )

    if vocabulary is not None and borrowed:
        # Placed as a stored head would be.
        rows = draft_head(shared_tables(target), vocabulary).astype(storage)
        params[_DRAFT_HEAD_PATH[0]] = rows if shardings is None else jax.device_put(rows, shardings[_DRAFT_HEAD_PATH])
    return params


def _check_tables(tensors: _NamedTensors, target: Target, vocabulary: DraftVocabulary | None) -> None:
    """UserError where the drafter's tables are another target's: the same sizes do not make it the same one."""
    _check_frozen_copies(tensors, target, vocabulary)
    if vocabulary is None:
        _check_vocabulary_map(tensors)


def _check_frozen_copies(tensors: _NamedTensors, target: Target, vocabulary: DraftVocabulary | None) -> None:
    """Compares sampled rows of the frozen copies: over a fine-tuned or re-tokenised target, a drafter would draft
    well-formed nonsense."""
    shared = shared_tables(target)
    if vocabulary is None:
        heads = {HEAD: shared.head}
    else:
        heads = {DRAFT_HEAD: draft_head(shared, vocabulary)}

    for name, table in ({EMBEDDING: shared.embed} | heads).items():
        # A layout may store no copies, and a table sharded over processes cannot be sampled in one.
        if not tensors.holds(name) or not table.is_fully_addressable:
            continue
        stored = tensors.stored(name)
        shape = tuple(stored.get_shape())
        if shape != table.shape:
            raise UserError(
                f"Vocabulary mismatch: the drafter's {name} has shape {list(shape)}, the target's table "
                f"{list(table.shape)}; give the target that the drafter was trained for."
            )

        rows = sampled_rows(shape[0])
        # Rows are read one by one: a table of a hundred thousand rows is not loaded for a sample of it.
        mine = np.stack([np.asarray(stored[int(r) : int(r) + 1])[0] for r in rows]).astype(np.float32)
        # Gathered on the device, so that the whole table does not travel to the host.
        theirs = np.asarray(rows_of(table, jax.device_put(rows))).astype(np.float32)
        if _differ(mine, theirs):
            raise UserError(
                f"Target/drafter mismatch: the drafter's frozen {name} is not {target.name}'s; it was trained for "
                "another target with the same sizes. Give that target."
            )


def _check_vocabulary_map(tensors: _NamedTensors) -> None:
    """UserError where a drafter without a pruned vocabulary maps its ids to others."""
    if "d2t" in tensors.names and np.any(np.asarray(tensors.raw("d2t")[:])):
        raise UserError(
            f"The drafter in {tensors.folder} speaks ids of its own (its d2t is not zero); drafters here speak the "
            "target's. Give one that was trained with the whole vocabulary."
        )


def _differ(mine: np.ndarray, theirs: np.ndarray) -> Any:
    """Whether the rows differ by more than rounding to bfloat16 on either side explains."""
    return np.any(np.abs(mine - theirs) > 2.0**-7 * np.abs(theirs) + 1e-6)
