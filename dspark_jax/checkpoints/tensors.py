"""Named tensors in safetensors folders and their layout here, read slice by slice: a device holds only its part."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dspark_jax import files
from dspark_jax.errors import UserError
from dspark_jax.readers import read_object

ParamPath = tuple[Any, ...]


class Layout(Enum):
    """How a stored tensor (output-first, heads flattened) becomes ours (input-first, heads apart)."""

    SAME = "same"
    LINEAR = "[out, in] -> [in, out]"
    HEADS_OUT = "[N*H, D] -> [D, N, H]"
    HEADS_IN = "[D, N*H] -> [N, H, D]"
    HEADS_BIAS = "[N*H] -> [N, H]"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self is Layout.LINEAR:
            return shape[::-1]
        if self is Layout.HEADS_OUT:
            return (shape[1] * shape[2], shape[0])
        if self is Layout.HEADS_IN:
            return (shape[2], shape[0] * shape[1])
        if self is Layout.HEADS_BIAS:
            return (shape[0] * shape[1],)
        return shape

    def read(self, stored: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """Our `index` of our `shape`, read from the stored tensor's slices. Heads are split by whole heads only."""
        spans = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        lo = [span.start for span in spans]
        hi = [span.stop for span in spans]
        if self is Layout.LINEAR:
            return stored[lo[1] : hi[1], lo[0] : hi[0]].T
        if self is Layout.HEADS_OUT:
            h = shape[2]
            rows = stored[lo[1] * h : hi[1] * h, lo[0] : hi[0]]
            return rows.reshape(-1, h, rows.shape[-1]).transpose(2, 0, 1)[..., lo[2] : hi[2]]
        if self is Layout.HEADS_IN:
            h = shape[1]
            columns = stored[lo[2] : hi[2], lo[0] * h : hi[0] * h]
            return columns.reshape(columns.shape[0], -1, h).transpose(1, 2, 0)[:, lo[1] : hi[1]]
        if self is Layout.HEADS_BIAS:
            h = shape[1]
            return stored[lo[0] * h : hi[0] * h].reshape(-1, h)[:, lo[1] : hi[1]]
        return stored[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))]

    def write(self, array: np.ndarray) -> np.ndarray:
        stored = self.stored_shape(array.shape)
        if self is Layout.LINEAR:
            return array.T
        if self is Layout.HEADS_OUT:
            return array.transpose(1, 2, 0).reshape(stored)
        if self is Layout.HEADS_IN:
            return array.transpose(2, 0, 1).reshape(stored)
        return array.reshape(stored)


@dataclass(frozen=True)
class Stored:
    """Where a parameter is stored. A name with {} stands for one tensor an index of our first axis (experts)."""

    name: str
    layout: Layout = Layout.SAME

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def parts(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """(name, stored shape) of every tensor that a parameter of this shape is stored in."""
        if self.stacked:
            return [(self.name.format(i), self.layout.stored_shape(shape[1:])) for i in range(shape[0])]
        return [(self.name, self.layout.stored_shape(shape))]


# Parameter path -> where it is stored.
TensorMap = Mapping[ParamPath, Stored]

# Path below a decoder layer -> its tensor below the layer's prefix, in every family here, targets and drafters alike.
LAYER_TENSORS: dict[ParamPath, Stored] = {
    ("input_norm", "weight"): Stored("input_layernorm.weight"),
    ("post_attention_norm", "weight"): Stored("post_attention_layernorm.weight"),
    ("pre_feedforward_norm", "weight"): Stored("pre_feedforward_layernorm.weight"),
    ("post_feedforward_norm", "weight"): Stored("post_feedforward_layernorm.weight"),
    ("layer_scalar",): Stored("layer_scalar"),
    ("attention", "q_weight_dqh"): Stored("self_attn.q_proj.weight", Layout.HEADS_OUT),
    ("attention", "k_weight_dgh"): Stored("self_attn.k_proj.weight", Layout.HEADS_OUT),
    ("attention", "v_weight_dgh"): Stored("self_attn.v_proj.weight", Layout.HEADS_OUT),
    ("attention", "o_weight_qhd"): Stored("self_attn.o_proj.weight", Layout.HEADS_IN),
    ("attention", "q_bias_qh"): Stored("self_attn.q_proj.bias", Layout.HEADS_BIAS),
    ("attention", "k_bias_gh"): Stored("self_attn.k_proj.bias", Layout.HEADS_BIAS),
    ("attention", "v_bias_gh"): Stored("self_attn.v_proj.bias", Layout.HEADS_BIAS),
    ("attention", "o_bias_d"): Stored("self_attn.o_proj.bias"),
    ("attention", "q_norm", "weight"): Stored("self_attn.q_norm.weight"),
    ("attention", "k_norm", "weight"): Stored("self_attn.k_norm.weight"),
    ("mlp", "gate_weight_df"): Stored("mlp.gate_proj.weight", Layout.LINEAR),
    ("mlp", "up_weight_df"): Stored("mlp.up_proj.weight", Layout.LINEAR),
    ("mlp", "down_weight_fd"): Stored("mlp.down_proj.weight", Layout.LINEAR),
    ("mlp", "gate_bias_f"): Stored("mlp.gate_proj.bias"),
    ("mlp", "up_bias_f"): Stored("mlp.up_proj.bias"),
    ("mlp", "down_bias_d"): Stored("mlp.down_proj.bias"),
    ("mlp", "router_weight_de"): Stored("mlp.gate.weight", Layout.LINEAR),
    ("mlp", "gate_weight_edf"): Stored("mlp.experts.{}.gate_proj.weight", Layout.LINEAR),
    ("mlp", "up_weight_edf"): Stored("mlp.experts.{}.up_proj.weight", Layout.LINEAR),
    ("mlp", "down_weight_efd"): Stored("mlp.experts.{}.down_proj.weight", Layout.LINEAR),
}


def layer_tensor(below: ParamPath, prefix: str) -> Stored:
    """The tensor of the parameter at path `below` a decoder layer stored under `prefix`."""
    stored = LAYER_TENSORS[below]
    return Stored(f"{prefix}.{stored.name}", stored.layout)


class TensorFolder:
    """Tensors of a folder holding `model.safetensors`, or shards listed in `model.safetensors.index.json`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            for name, file in read_object(index).get("weight_map", {}).items():
                self._file_of[name] = folder / file
        elif (folder / "model.safetensors").exists():
            path = folder / "model.safetensors"
            self._file_of = dict.fromkeys(self._handle(path).keys(), path)
        else:
            raise UserError(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
                "point to a folder with safetensors weights."
            )

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            if not path.exists():
                raise UserError(
                    f"{path.name} is missing in {self.folder} though its index names it; copy the file there."
                )
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again.") from None
        return self._open[path]

    def stored(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self.folder} has no tensor {name}, which its config.json calls for.")
        handle = self._handle(self._file_of[name])
        if name not in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
            raise UserError(f"{self._file_of[name]} has no tensor {name} though the index places it there.")
        return handle.get_slice(name)


def load_params(
    folder: TensorFolder,
    table: TensorMap,
    abstract: Mapping[ParamPath, jax.ShapeDtypeStruct],
    shardings: Mapping[ParamPath, Sharding] | None,
    dtype: Callable[[ParamPath], Any],
) -> dict:
    """Nested params dict. Each device's part is read by itself; nothing is held whole unless it is kept whole."""
    flat = {}
    for path, leaf in abstract.items():
        source = table[path]
        kind = np.dtype(dtype(path))
        part = partial(_read_part, _checked_slices(folder, source, leaf.shape), source, leaf.shape, kind)
        if shardings is None:
            flat[path] = jax.device_put(part(None))
        else:
            flat[path] = jax.make_array_from_callback(leaf.shape, shardings[path], part)
    return unflatten_dict(flat)


def _checked_slices(folder: TensorFolder, source: Stored, shape: tuple[int, ...]) -> list[Any]:
    slices = []
    for name, expected in source.parts(shape):
        slices.append(folder.stored(name))
        found = list(slices[-1].get_shape())
        if found != list(expected):
            raise UserError(
                f"Tensor {name} in {folder.folder} has shape {found}; config.json calls for {list(expected)}. The "
                "weights and the config are not of one model."
            )
    return slices


def _read_part(
    slices: list[Any], source: Stored, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...] | None
) -> np.ndarray:
    index = index or (slice(None),) * len(shape)
    if source.stacked:
        part = np.stack([source.layout.read(one, shape[1:], index[1:]) for one in slices[index[0]]])
    else:
        part = source.layout.read(slices[0], shape, index)
    return np.ascontiguousarray(part).astype(dtype, copy=False)


def stored_tensors(table: TensorMap, params: dict, dtype: str | None) -> dict[str, np.ndarray]:
    """The tensors of a params dict under their stored names and layouts, ready for a safetensors file."""
    flat = flatten_dict(params)
    kind = None if dtype is None else np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = {}
    for path, source in table.items():
        array = np.asarray(jax.device_get(flat[path]))
        array = array if kind is None else array.astype(kind)
        for (name, _), part in zip(source.parts(array.shape), array if source.stacked else [array], strict=True):
            tensors[name] = np.ascontiguousarray(source.layout.write(part))
    return tensors


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, replaced atomically."""
    with files.replacing(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As transformers writes it: two spaces, sorted."""
    files.write_json(path, content, indent=2, sort_keys=True)
