"""The parts of a target that training needs: embedding, output head, and layers that a drafter starts from."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Array

from dspark_jax.checkpoints.huggingface import (
    DTYPES,
    count_known_tokens,
    load_tokenizer,
    parameter_dtypes,
    read_hf_config,
    resolve_folder,
    stop_tokens,
    target_skeleton,
    target_tensors,
)
from dspark_jax.checkpoints.tensor_map import ParamPath
from dspark_jax.checkpoints.tensors import load_params
from dspark_jax.errors import UserError
from dspark_jax.sharding import ShardingRules, parameter_shardings, split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.joined import apart
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target

_TABLES = (("embed_weight_vd",), ("head_weight_vd",))


def describe_target(path_or_id: str | Path, *, tokenizer: bool = True) -> Target:
    """A target without parameters, from its small files: for checks and plans before any weight is read.

    Args:
        path_or_id: a folder in the Hugging Face layout, or a hub id.
        tokenizer: whether to load the tokenizer too.

    Raises:
        UserError: a file is missing or describes no target here.
    """
    folder = resolve_folder(path_or_id)
    hf_config = read_hf_config(folder)
    config = read_target_config(hf_config)

    # Shapes only: nothing is allocated until tables or layers are loaded.
    graphdef, _ = split(target_skeleton(config))
    words = load_tokenizer(folder) if tokenizer else None

    return Target(
        name=str(path_or_id),
        config=config,
        graphdef=graphdef,
        params={},
        hf_config=hf_config,
        config_sha256=config_sha256(hf_config),
        stop_tokens=stop_tokens(folder, hf_config),
        tokenizer=words,
        known_tokens=count_known_tokens(words, config, str(path_or_id)),
        folder=folder,
    )


def load_tables(target: Target, *, dtype: str, mesh: Mesh, rules: ShardingRules | None = None) -> Target:
    """The described target with its embedding [V, D] and, where it is untied, its head [V, D], in `dtype`.

    They are placed by `rules`, each device reading its own part. `shared_tables` and `save_drafter` accept the result,
    which cannot run. UserError where the tensors are missing, cut off or of another shape.
    """
    return replace(target, params=_load(target, lambda path: path in _TABLES, dtype, mesh, rules))


def load_rest(
    target: Target, tables: Mapping[str, Array], *, dtype: str, mesh: Mesh, rules: ShardingRules | None = None
) -> dict:
    """All parameters of the described target, placed as in `load_tables`; those in `tables` are not read again."""
    # A tied target has no head parameter of its own.
    names = ("embed_weight_vd",) if target.config.tie_word_embeddings else ("embed_weight_vd", "head_weight_vd")
    rest = _load(target, lambda path: path not in _TABLES, dtype, mesh, rules)

    return {**rest, **{name: tables[name] for name in names}}


def load_layers(
    target: Target, layers: tuple[int, ...], *, mesh: Mesh, rules: ShardingRules | None = None
) -> tuple[dict[int, dict], dict]:
    """({layer: float32 parameters, every matrix by itself}, the final norm's parameters), placed by `rules`.

    UserError on a wrong id.
    """
    # Negative ids would count from the end in Python, and mean the embeddings elsewhere.
    wrong = [layer for layer in layers if not 0 <= layer < target.config.num_layers]
    if wrong:
        raise UserError(
            f"drafter.init_target_layers names layer {wrong[0]}; {target.name} has layers 0 to "
            f"{target.config.num_layers - 1}."
        )

    def wanted(path: ParamPath) -> bool:
        return path[0] == "final_norm" or (path[0] == "layers" and path[1] in layers)

    # float32, the dtype of master weights: a drafter starts from copies of them (docs/algorithm.md, rule 47).
    params = _load(target, wanted, "float32", mesh, rules)
    # Draft layers hold their matrices joined in another way.
    return {i: apart(layer, target.config, i) for i, layer in params["layers"].items()}, params["final_norm"]


def _load(
    target: Target, wanted: Callable[[ParamPath], bool], dtype: str, mesh: Mesh, rules: ShardingRules | None
) -> dict:
    """Nested parameters at the wanted paths, read from the target's own folder."""
    if dtype not in DTYPES:
        raise UserError(f"Target dtype {dtype!r} is not supported; choose float32 or bfloat16.")

    module = target_skeleton(target.config)
    leaves = flatten_dict(split(module)[1])

    # All leaves are mapped, wanted or not, so that leftovers are judged against the whole model.
    tensors, table = target_tensors(resolve_folder(target.name), target.config, target.hf_config, leaves)

    return load_params(
        tensors,
        table,
        {path: leaf for path, leaf in leaves.items() if wanted(path)},
        flatten_dict(parameter_shardings(module, mesh, rules or ShardingRules())),
        parameter_dtypes(target.config, leaves, DTYPES[dtype]).__getitem__,
    )
