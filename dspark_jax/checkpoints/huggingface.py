"""Targets in Hugging Face layout: config.json, safetensors, tokenizer, generation_config.json; a folder or a hub id."""

import os
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from dspark_jax.checkpoints.deepseek_v4 import V4Folder, check_tables, v4_needed, v4_tensor_map
from dspark_jax.checkpoints.gguf import SUFFIX, converted_folder, gguf_file
from dspark_jax.checkpoints.leftovers import refuse_leftovers
from dspark_jax.checkpoints.tensor_map import (
    ParamPath,
    Stored,
    StoredApart,
    TensorMap,
    layer_tensor,
    stored_names,
)
from dspark_jax.checkpoints.tensors import (
    WEIGHTS_FILE,
    TensorFolder,
    load_params,
    stored_tensors,
    write_json,
    write_tensors,
)
from dspark_jax.data import tokenizers
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash
from dspark_jax.programs import EMBEDDED, asset
from dspark_jax.readers import check_fields, read_object, reason_of
from dspark_jax.sharding import AnyMesh, ShardingRules, abstract_params, parameter_shardings, split
from dspark_jax.storage.places import Place, place_of
from dspark_jax.storage.replica import fetched_file, fetched_folder
from dspark_jax.targets.config import TargetConfig, config_sha256, text_config
from dspark_jax.targets.eight_bits import EIGHT_BITS, in_eight_bits, refuse_eight_bits
from dspark_jax.targets.fields import TOKEN_IDS
from dspark_jax.targets.low_bit import CODES, SCALES
from dspark_jax.targets.registry import TARGETS, read_target_config, target_module
from dspark_jax.targets.target import Target

HEAD_TENSOR = "lm_head.weight"
ADAPTER_FILE = "adapter_config.json"
HASHES_FILE = "hashes.json"
"""Hashes of the files by name, written by `save_target` and checked by infer.verify."""
Weights = Literal["stored", "int8", "fp8"]
"""How the programs keep the matrices of layers: as loaded, or in 8 bits with a scale for each output."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Weights in other formats, which may be as large again, are left where they are.
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def resolve_folder(path_or_id: str | Path, kind: Literal["target", "drafter"] = "target") -> Path:
    """The folder of a model.

    Args:
        path_or_id: a local folder, taken as it is; a target's GGUF file, which is converted first; `embedded`, the
            target or drafter that comes with this package; anything else is a hub id, taken from the hub or, offline,
            from the local hub cache.
        kind: which of the two `embedded` means.

    Raises:
        UserError: neither a folder nor a model that the hub gives.
    """
    # A model in a store is copied here first, the files that the hub would give alone.
    if (place := place_of(path_or_id)) is not None:
        path_or_id = _fetched(place)
    folder, name = Path(path_or_id), str(path_or_id)

    # Probed first: too long a name or a folder without permission raises here, and not later without a sentence.
    try:
        folder.is_dir()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({reason_of(error)}); give a model folder that can.") from None

    if kind == "target" and (file := gguf_file(path_or_id)) is not None:
        return converted_folder(file)

    # A folder wins over a hub id of the same name.
    if folder.is_dir():
        return folder
    if name == EMBEDDED:
        return asset(f"{EMBEDDED}_{kind}")

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{name} is not a folder; give a model folder in Hugging Face layout, a GGUF file, "
            f"a hub id (owner/name) or '{EMBEDDED}'."
        )

    # Imported late: only this branch needs the network library, and its import is slow.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Offline, this takes a complete copy from the local cache.
        return Path(snapshot_download(name, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name} is neither a folder here nor a model that the hub gives ({reason}); "
            "check the name, the network or HF_HOME."
        ) from None


def _fetched(place: Place) -> Path:
    """The copy of a model's folder, or of its GGUF file, on this machine."""
    if place.name.endswith(SUFFIX):
        return fetched_file(str(place))

    # Files of the folder itself: beside a GGUF file, its conversion lies in a folder of its own.
    patterns = (*_MODEL_FILES, f"*{SUFFIX}")
    wanted = lambda name: "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)  # noqa: E731
    return fetched_folder(str(place), "model", wanted)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """A target's config.json; UserError where it is missing or no JSON object."""
    return read_object(folder / "config.json", expected="the config.json of a model folder")


def load_target(
    path_or_id: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    tokenizer: bool = True,
    weights: Literal["stored", "widened", "int8", "fp8"] = "stored",
) -> Target:
    """Loads a target of any kind in `targets.registry`, the language model alone where the folder is multimodal.

    Args:
        path_or_id: a folder in the Hugging Face layout, or a hub id.
        dtype: 'float32' or 'bfloat16', of weights and activations; None keeps the config's.
        mesh: parameters are placed over it, each device reading its own part; None: one device.
        rules: how they are placed.
        tokenizer: whether to load the tokenizer too.
        weights: 'stored' keeps the fp8 and fp4 codes of DeepSeek-V4's published files in memory; 'widened' turns them
            into `dtype`. Other files have no codes. 'int8' and 'fp8' keep the layers' matrices of any other target so,
            with a scale for each output, on one device.

    Returns:
        Config, parameters and tokenizer.

    Raises:
        UserError: files are missing, cut off or of another model.
    """
    folder = resolve_folder(path_or_id)
    hf_config = read_hf_config(folder)
    config = read_target_config(hf_config)
    if weights not in ("stored", "widened", *EIGHT_BITS):
        raise UserError(f"A target's weights are loaded 'stored', 'widened' or in 'int8' or 'fp8', not {weights!r}.")
    config = config.widened if weights == "widened" else config
    if (dtype or config.dtype) not in DTYPES:
        raise UserError(f"Target dtype {dtype or config.dtype!r} is not supported; choose float32 or bfloat16.")

    graphdef, params = _read(folder, hf_config, config, DTYPES[dtype or config.dtype], mesh, rules or ShardingRules())
    # After the weights: a damaged folder is reported before a tokenizer is parsed.
    words = load_tokenizer(folder) if tokenizer else None

    name = str(path_or_id)
    if weights == "int8" or weights == "fp8":
        # Another model to a calibration or a measured acceptance, so under another name.
        graphdef, params = in_eight_bits(graphdef, params, name, weights)
        name = f"{name} in {weights}"

    return Target(
        name=name,
        config=config,
        graphdef=graphdef,
        params=params,
        hf_config=hf_config,
        config_sha256=config_sha256(hf_config),
        stop_tokens=stop_tokens(folder, hf_config),
        tokenizer=words,
        known_tokens=count_known_tokens(words, config, str(path_or_id)),
        folder=folder,
    )


def _read(
    folder: Path, hf_config: dict[str, Any], config: TargetConfig, kind: Any, mesh: Mesh | None, rules: ShardingRules
) -> tuple[Any, dict]:
    """(graphdef, parameters) of a target's folder, in the dtype `kind`."""
    # Structure and shapes first, without an array: they say which tensors the folder must have.
    skeleton = target_skeleton(config)
    graphdef, abstract = split(skeleton)
    leaves = flatten_dict(abstract)
    shardings = None if mesh is None else flatten_dict(parameter_shardings(skeleton, mesh, rules))

    # Each parameter's own dtype: routing tables and V4's streams are not cast with the rest.
    tensors, table = target_tensors(folder, config, hf_config, leaves)
    return graphdef, load_params(tensors, table, leaves, shardings, parameter_dtypes(config, leaves, kind).__getitem__)


def save_target(folder: str | Path, hf_config: Mapping[str, Any], params: dict, dtype: str = "bfloat16") -> None:
    """Writes config.json, model.safetensors in Hugging Face naming, and their hashes; a tied head is not written.
    UserError for weights held in 8 bits."""
    refuse_eight_bits(params, "The target")
    folder = Path(folder)

    # `text_config` returns the file itself for a text-only model: the index is whether it is multimodal.
    prefix = _PREFIXES[text_config(hf_config) is not hf_config]
    table = target_tensor_map(read_target_config(hf_config), flatten_dict(params), prefix)
    write_json(folder / "config.json", {**hf_config, "dtype": dtype})
    write_tensors(folder / WEIGHTS_FILE, stored_tensors(table, params, dtype))

    # Last: hashes of files as written, so that a cut copy is found later.
    write_json(folder / HASHES_FILE, {name: file_hash(folder / name) for name in ("config.json", WEIGHTS_FILE)})


_ROWS = 4096  # read at a time where two tables are compared

# Prefixes of the language model's tensors, in text-only and in multimodal files.
_PREFIXES = ("model", "model.language_model")


def stored_prefix(tensors: TensorFolder, hf_config: Mapping[str, Any]) -> str:
    """The prefix under which the folder has its embedding, whatever its config says: text-only configs are also found
    beside multimodal tensors. Where there is no embedding under either, the config's own prefix."""
    own = _PREFIXES[text_config(hf_config) is not hf_config]
    # The config's own prefix first, for folders that hold both.
    for prefix in (own, *_PREFIXES):
        if f"{prefix}.embed_tokens.weight" in tensors.names:
            return prefix
    return own


def target_tensors(
    folder: Path, config: TargetConfig, hf_config: Mapping[str, Any], leaves: Mapping[ParamPath, Any]
) -> tuple[TensorFolder, TensorMap]:
    """The folder's tensors, and the map from the paths of `leaves`, all of the target's, to the tensors that hold them.

    Raises:
        UserError: the folder holds tensors that the config does not call for, an adapter, or a head that differs from
            the embedding to which the config ties it.
    """
    # Other libraries apply an adapter that lies beside the weights.
    if os.path.lexists(folder / ADAPTER_FILE):
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_FILE}), which is not read; merge it into the weights, or remove it."
        )

    if config.model_type == "deepseek_v4":
        # V4's files have names and quantised forms of their own.
        published, own = V4Folder(folder), v4_tensor_map(leaves)
        names = stored_names(own, leaves)
        refuse_leftovers(published, v4_needed(published, names), ("deepseek_v4",))
        assert config.experts is not None
        check_tables(published, names, config.experts.count)
        return published, own

    tensors = TensorFolder(folder)
    prefix = stored_prefix(tensors, hf_config)
    table = target_tensor_map(config, leaves, prefix)
    needed = stored_names(table, leaves)

    if config.tie_word_embeddings and HEAD_TENSOR in tensors.names:
        # A tied head is stored by some writers; it is harmless only while it equals the embedding.
        _check_tied_head(tensors, f"{prefix}.embed_tokens.weight")
        needed.add(HEAD_TENSOR)

    refuse_leftovers(tensors, needed, ("multimodal",) if prefix == _PREFIXES[1] else ())
    return tensors, table


def _check_tied_head(tensors: TensorFolder, embedding: str) -> None:
    """UserError where a stored head differs from the embedding, which a tied head cannot."""
    embed, head = tensors.stored(embedding), tensors.stored(HEAD_TENSOR)

    # Every row: a head that was trained apart for some added tokens alone differs in their rows alone.
    count = embed.get_shape()[0]
    rows = [slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS)]
    same = embed.get_shape() == head.get_shape() and all(np.array_equal(embed[row], head[row]) for row in rows)

    if not same:
        raise UserError(
            f"{tensors.folder} holds a {HEAD_TENSOR} that differs from {embedding}, and its config.json ties the head "
            "to the embedding (tie_word_embeddings); give the config.json that the weights were saved with."
        )


def target_tensor_map(
    config: TargetConfig, paths: Iterable[ParamPath], prefix: str = "model"
) -> dict[ParamPath, Stored | StoredApart]:
    """Parameter path -> Hugging Face tensor, or tensors, for the parameters at `paths`."""
    outer = {
        ("embed_weight_vd",): Stored(f"{prefix}.embed_tokens.weight"),
        ("final_norm", "weight"): Stored(f"{prefix}.norm.weight"),
        ("head_weight_vd",): Stored(HEAD_TENSOR),
    }

    return {
        path: layer_tensor(path[2:], f"{prefix}.layers.{path[1]}", config, path[1])
        if path[0] == "layers"
        else outer[path]
        for path in paths
    }


def parameter_dtypes(config: TargetConfig, leaves: Mapping[ParamPath, Any], storage: Any) -> dict[ParamPath, Any]:
    """The dtype of each parameter: `storage`, except for tables of ids and parameters that the family keeps float32."""
    wide = TARGETS[config.model_type].float32

    def dtype(path: ParamPath, leaf: Any) -> Any:
        # Routing tables hold expert ids, which a cast to bfloat16 would corrupt; stored codes are bytes.
        if path[-1] in (CODES, SCALES) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.dtype
        return jnp.float32 if path[-1] in wide else storage

    return {path: dtype(path, leaf) for path, leaf in leaves.items()}


def stop_tokens(folder: Path, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's if it names any, else config.json's."""
    # `lexists`, so that a broken link is reported instead of being read as an absent file.
    path = folder / "generation_config.json"
    stored = read_object(path) if os.path.lexists(path) else {}
    check_fields(stored, {"eos_token_id": TOKEN_IDS}, str(path))

    declared = stored.get("eos_token_id")

    # A multimodal file may state it outside or within its text config, and leave the other one null.
    for config in (hf_config, text_config(hf_config)):
        if declared is None:
            check_fields(config, {"eos_token_id": TOKEN_IDS}, "config.json")
            declared = config.get("eos_token_id")

    if declared is None:
        return ()
    return tuple(declared) if isinstance(declared, list) else (declared,)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None when it has no tokenizer files. Never runs code from the folder."""
    # A target without a tokenizer is whole: token ids go in and out.
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return tokenizers.load_tokenizer(folder)


def count_known_tokens(tokenizer: Any, config: TargetConfig, name: str) -> int | None:
    """`Target.known_tokens`, with a warning if the target's vocabulary is longer than the tokenizer or shorter."""
    if tokenizer is None:
        return None

    # Not len(): ids may have holes, and the largest one bounds what can be decoded.
    known = 1 + max(tokenizer.get_vocab().values(), default=-1)

    if known < config.vocab_size:
        warnings.warn(
            f"{name} has a vocabulary of {config.vocab_size:,} ids and a tokenizer of {known:,}: ids from {known:,} on "
            "are no tokens.",
            stacklevel=3,
        )

    if known > config.vocab_size:
        warnings.warn(
            f"{name} has a tokenizer of {known:,} ids and a vocabulary of {config.vocab_size:,}: text that needs the "
            "others cannot be decoded.",
            stacklevel=3,
        )

    return known


@lru_cache(maxsize=16)
def target_skeleton(config: TargetConfig) -> nnx.Module:
    """The target's module with shapes instead of arrays: nothing is allocated. Shared by equal configurations, so it is
    only read."""
    return nnx.eval_shape(lambda: target_module(config, rngs=nnx.Rngs(0)))


def abstract_target(
    config: TargetConfig, dtype: str, mesh: AnyMesh | None = None, rules: ShardingRules | None = None
) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, ShapeDtypeStructs of params) of a target that is not loaded, for planning and lowering.

    Args:
        config: of the target.
        dtype: 'float32' or 'bfloat16'; stored codes, tables of ids and what stays float32 keep their dtypes.
        mesh: the shapes have the shardings that loading over it would give; None: none.
        rules: how they are placed.
    """
    skeleton = target_skeleton(config)
    graphdef, abstract = split(skeleton)
    dtypes = parameter_dtypes(config, flatten_dict(abstract), DTYPES[dtype])
    return graphdef, abstract_params(skeleton, mesh, dtypes.__getitem__, rules)
