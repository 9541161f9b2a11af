"""Named tensors in safetensors folders and their layout here, read slice by slice: a device holds only its part."""

import json
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

from dspark_jax.errors import UserError

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
    name: str
    layout: Layout = Layout.SAME


# Parameter path -> where it is stored.
TensorMap = Mapping[ParamPath, Stored]


def decoder_layer_map(path: ParamPath, prefix: str, bias: bool) -> dict[ParamPath, Stored]:
    """The tensors of one decoder block, whose names Qwen3 targets and drafters share."""
    attention = (*path, "attention")
    table = {
        (*path, "input_norm", "weight"): Stored(f"{prefix}.input_layernorm.weight"),
        (*path, "post_attention_norm", "weight"): Stored(f"{prefix}.post_attention_layernorm.weight"),
        (*attention, "q_weight_dqh"): Stored(f"{prefix}.self_attn.q_proj.weight", Layout.HEADS_OUT),
        (*attention, "k_weight_dgh"): Stored(f"{prefix}.self_attn.k_proj.weight", Layout.HEADS_OUT),
        (*attention, "v_weight_dgh"): Stored(f"{prefix}.self_attn.v_proj.weight", Layout.HEADS_OUT),
        (*attention, "o_weight_qhd"): Stored(f"{prefix}.self_attn.o_proj.weight", Layout.HEADS_IN),
        (*attention, "q_norm", "weight"): Stored(f"{prefix}.self_attn.q_norm.weight"),
        (*attention, "k_norm", "weight"): Stored(f"{prefix}.self_attn.k_norm.weight"),
        (*path, "mlp", "gate_weight_df"): Stored(f"{prefix}.mlp.gate_proj.weight", Layout.LINEAR),
        (*path, "mlp", "up_weight_df"): Stored(f"{prefix}.mlp.up_proj.weight", Layout.LINEAR),
        (*path, "mlp", "down_weight_fd"): Stored(f"{prefix}.mlp.down_proj.weight", Layout.LINEAR),
    }
    if bias:
        table |= {
            (*attention, "q_bias_qh"): Stored(f"{prefix}.self_attn.q_proj.bias", Layout.HEADS_BIAS),
            (*attention, "k_bias_gh"): Stored(f"{prefix}.self_attn.k_proj.bias", Layout.HEADS_BIAS),
            (*attention, "v_bias_gh"): Stored(f"{prefix}.self_attn.v_proj.bias", Layout.HEADS_BIAS),
            (*attention, "o_bias_d"): Stored(f"{prefix}.self_attn.o_proj.bias"),
        }
    return table


class TensorFolder:
    """Tensors of a folder holding `model.safetensors`, or shards listed in `model.safetensors.index.json`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            for name, file in read_json(index).get("weight_map", {}).items():
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
        stored = folder.stored(source.name)
        expected = source.layout.stored_shape(leaf.shape)
        if tuple(stored.get_shape()) != expected:
            raise UserError(
                f"Tensor {source.name} in {folder.folder} has shape {list(stored.get_shape())}; config.json calls for "
                f"{list(expected)}. The weights and the config are not of one model."
            )
        kind = np.dtype(dtype(path))

        part = partial(_read_part, stored, source.layout, leaf.shape, kind)
        if shardings is None:
            flat[path] = jax.device_put(part(None))
        else:
            flat[path] = jax.make_array_from_callback(leaf.shape, shardings[path], part)
    return unflatten_dict(flat)


def _read_part(
    stored: Any, layout: Layout, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...] | None
) -> np.ndarray:
    whole = (slice(None),) * len(shape)
    return np.ascontiguousarray(layout.read(stored, shape, index or whole)).astype(dtype, copy=False)


def stored_tensors(table: TensorMap, params: dict, dtype: str | None) -> dict[str, np.ndarray]:
    """The tensors of a params dict under their stored names and layouts, ready for a safetensors file."""
    flat = flatten_dict(params)
    kind = None if dtype is None else np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = {}
    for path, source in table.items():
        array = np.asarray(jax.device_get(flat[path]))
        tensors[source.name] = np.ascontiguousarray(source.layout.write(array if kind is None else array.astype(kind)))
    return tensors


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes beside the file and renames, so that a kill leaves the old file or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(file)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a model folder in Hugging Face layout there.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy it again.") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
