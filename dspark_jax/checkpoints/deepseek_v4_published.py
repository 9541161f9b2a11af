"""V4's published layout as a whole: the tensors of a repository, their stored forms, and folders written that way."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.deepseek_v4 import v4_tensor_map
from dspark_jax.checkpoints.deepseek_v4_drafters import v4_drafter_map
from dspark_jax.checkpoints.low_bit import encode_fp4, encode_fp8, write_raw
from dspark_jax.checkpoints.tensor_map import ParamPath, TensorMap
from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.drafters.deepseek_v4.config import native_config, target_config_of
from dspark_jax.drafters.registry import Drafter, read_config, skeleton
from dspark_jax.errors import UserError
from dspark_jax.sharding import split
from dspark_jax.targets.deepseek_v4.block import V4Block
from dspark_jax.targets.deepseek_v4.config import V4Config, v4_config
from dspark_jax.targets.deepseek_v4.model import V4Model
from dspark_jax.targets.low_bit import BLOCK, GROUP


class StoredTensor(NamedTuple):
    """A tensor's element type by its safetensors name, and its stored shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in a file."""
        sizes = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "BF16": 2, "F32": 4, "I64": 8}
        return sizes[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


_QUANTISED_FIELDS = ("quantization_config", "expert_dtype")
# The first pattern that matches decides; a tensor that matches none is BF16.
_FORMS = (
    ("fp4", r"\.ffn\.experts\."),
    ("fp8", r"\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.|\.indexer\.wq_b\.|\.shared_experts\.|\.(main|e|h)_proj\."),
    ("I64", r"\.tid2eid$"),
    ("F32", r"(^|\.)hc_|\.attn_sink$|\.ape$|\.gate\.bias$"),
)


def stored_form(name: str) -> str:
    """How a published tensor of this name is stored: fp4, fp8, I64, F32 or BF16."""
    return next((form for form, pattern in _FORMS if re.search(pattern, name)), "BF16")


def published_tensors(hf_config: Mapping[str, Any], drafter: str | None = None) -> dict[str, StoredTensor]:
    """Every tensor of a repository with this config.json, by name, from shapes alone.

    drafter: 'dspark' or 'mtp' includes that drafter's tensors; None: the target's alone.
    """
    # From shapes: the published models are too large to build for a list of names.
    target = _target_leaves(v4_config(hf_config).widened)
    found = dict(_forms(v4_tensor_map(target), target))

    if drafter is not None:
        native = native_config(hf_config, drafter)
        leaves = flatten_dict(split(skeleton(native, read_config(native).widened))[1])
        found |= _forms(v4_drafter_map(read_config(native), leaves), leaves)

    return found


def _target_leaves(config: V4Config) -> dict[ParamPath, Any]:
    """Shapes of the target's parameters; layers of one kind are described once."""
    # Tables and heads from a model without layers, then the layers of each kind.
    leaves = _shapes(lambda: V4Model(replace(config, layers=()), rngs=nnx.Rngs(0)))
    # A published model has dozens of layers of a few kinds, and tracing each of them would dominate.
    kinds = {layer: _shapes(lambda: V4Block(config, layer, rngs=nnx.Rngs(0))) for layer in set(config.layers)}  # noqa: B023

    for i, layer in enumerate(config.layers):
        leaves |= {("layers", i, *below): leaf for below, leaf in kinds[layer].items()}
    return leaves


def _shapes(make: Callable[[], nnx.Module]) -> dict[ParamPath, Any]:
    """Parameter paths and shapes of a module that is never built."""
    return flatten_dict(split(nnx.eval_shape(make))[1])


def _forms(table: TensorMap, leaves: Mapping[Any, Any]) -> Iterator[tuple[str, StoredTensor]]:
    """(name, stored form) of each tensor in `table`, scales of quantised ones included."""
    for path, source in table.items():
        for name, shape in source.parts(leaves[path].shape):
            form = stored_form(name)
            scale = name.removesuffix("weight") + "scale"

            # One scale for each BLOCK x BLOCK tile, partial tiles included; fp4 packs two codes in a byte.
            if form == "fp8":
                yield name, StoredTensor("F8_E4M3", shape)
                yield scale, StoredTensor("F8_E8M0", (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK)))
            elif form == "fp4":
                yield name, StoredTensor("I8", (shape[0], shape[1] // 2))
                yield scale, StoredTensor("F8_E8M0", (shape[0], shape[1] // GROUP))
            else:
                yield name, StoredTensor(form, shape)


def save_v4_target(folder: Path, hf_config: Mapping[str, Any], params: dict, dtype: str) -> None:
    """Writes config.json and model.safetensors under published names; `dtype` 'published': in the published forms."""
    table = v4_tensor_map(flatten_dict(params))
    _save(folder, hf_config, _encoded(table, params, dtype), dtype)


def save_v4_drafter(folder: Path, drafter: Drafter, dtype: str | None = None) -> None:
    """Writes the drafter's tensors, `mtp.*`, and the target's config.json. Put among the target's files, with their
    names in its index, they are the published repository; alone they load as a drafter of that target.

    dtype: as in `save_v4_target`; None: as published if the config.json describes a quantised repository.
    """
    if dtype is None:
        published = "quantization_config" in drafter.hf_config
        dtype = "published" if published else drafter.config.backbone.dtype

    table = v4_drafter_map(drafter.config, flatten_dict(drafter.params))
    _save(folder, target_config_of(drafter.hf_config), _encoded(table, drafter.params, dtype), dtype)


def _save(folder: Path, hf_config: Mapping[str, Any], tensors: dict[str, np.ndarray], dtype: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    # safetensors' own numpy writer has no fp8 types.
    write_raw(folder / "model.safetensors", tensors)
    kept = dict(hf_config)

    # An unquantised copy must not claim the repository's quantisation: readers would look for scales.
    if dtype != "published":
        kept = {name: value for name, value in kept.items() if name not in _QUANTISED_FIELDS} | {"torch_dtype": dtype}

    write_json(folder / "config.json", kept)


def _encoded(table: TensorMap, params: dict, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of a params dict under their stored names. `dtype`: 'published', or the type that all floats are
    stored in, except those that are float32 everywhere."""
    flat, tensors = flatten_dict(params), dict[str, np.ndarray]()

    for path, source in table.items():
        # A stack of experts is written as one tensor an expert, with scales of its own.
        array = np.asarray(jax.device_get(flat[path]))
        for (name, _), part in zip(source.parts(array.shape), source.write(array), strict=True):
            part = np.ascontiguousarray(part)
            tensors |= _kept(name, part, dtype) if source.codes else _encode(name, part, dtype)

    return tensors


def _kept(name: str, codes: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """{stored name: codes} of a tensor that was never widened."""
    if dtype != "published":
        raise UserError(f"{name} is held as it is stored; load the model with weights='widened' to save it in {dtype}.")
    return {name: codes.view(ml_dtypes.float8_e8m0fnu) if codes.dtype == np.uint8 else codes}


def _encode(name: str, array: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """{stored name: array}, with a second entry for the scales where the form is quantised."""
    form = stored_form(name)
    if form == "I64":
        return {name: array.astype(np.int64)}

    if form == "F32" or dtype != "published":
        return {name: array.astype(np.float32 if form == "F32" or dtype == "float32" else ml_dtypes.bfloat16)}

    if form == "BF16":
        return {name: array.astype(ml_dtypes.bfloat16)}

    # Weights that were decoded from such codes come back as the same values, at times with a smaller scale.
    codes, scales = (encode_fp8 if form == "fp8" else encode_fp4)(array.astype(np.float32))
    return {name: codes, name.removesuffix("weight") + "scale": scales}
