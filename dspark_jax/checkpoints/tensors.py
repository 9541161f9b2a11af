"""Tensors of safetensors folders, read slice by slice, so that a device holds only its part, and written whole."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dspark_jax import files
from dspark_jax.checkpoints.safetensors_header import TensorEntry, read_tensor_header
from dspark_jax.checkpoints.tensor_map import ParamPath, Stored, StoredApart, TensorMap
from dspark_jax.errors import UserError
from dspark_jax.readers import check_fields, object_of, read_object, reason_of, text

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorFolder:
    """Tensors of a folder holding `model.safetensors`, or shards listed in `model.safetensors.index.json`.

    The headers of all files are read at once, so that a missing, cut off or misplaced tensor is found before the first
    one is read. UserError says which.
    """

    readable: ClassVar[frozenset[str]] = frozenset({"F16", "BF16", "F32", "F64"})
    """Stored dtypes that are weights; others, such as those of quantised tensors, are refused by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}

        # `lexists`: a broken link is a fault of the folder and no absent file.
        index = folder / INDEX_FILE
        listed = _weight_map(index) if os.path.lexists(index) else {}
        if not listed and not os.path.lexists(folder / WEIGHTS_FILE):
            raise UserError(
                f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; point to a folder with safetensors weights."
            )

        # Other libraries read the one file where both are there, so neither is what is surely meant.
        if listed and WEIGHTS_FILE not in listed.values() and os.path.lexists(folder / WEIGHTS_FILE):
            raise UserError(
                f"{folder} holds {WEIGHTS_FILE}, and an {INDEX_FILE} that places all tensors in other files: two sets "
                "of weights. Remove the one that is not meant."
            )

        # Every header now, so that a folder that is missing a shard fails in seconds and not after its other shards.
        files = {name: _inside(folder, name, index) for name in sorted(set(listed.values()))}
        headers = {path: self._header(path) for path in files.values() or [folder / WEIGHTS_FILE]}

        for name, file in listed.items():
            if name not in headers[files[file]]:
                raise UserError(f"{files[file]} has no tensor {name} though the index places it there.")

        # Tensors that the index leaves out count as well: with them the folder may hold another model.
        for path, entries in headers.items():
            self._file_of |= dict.fromkeys(entries, path)

        # The index decides where two files hold a tensor of one name.
        self._file_of |= {name: files[file] for name, file in listed.items()}
        self._entries = {name: headers[path][name] for name, path in self._file_of.items()}

    @property
    def names(self) -> set[str]:
        """The names of all tensors in the folder."""
        return set(self._file_of)

    def stored(self, name: str) -> Any:
        """The slices of a weight; UserError where it is missing or its dtype is not a weight's."""
        found = self.raw(name)
        if self._entries[name].dtype not in self.readable:
            raise UserError(
                f"Tensor {name} in {self.folder} is of type {self._entries[name].dtype}; weights are read as "
                f"{', '.join(sorted(self.readable))}. Give a folder whose weights are not quantised."
            )
        return found

    def codes(self, name: str) -> Any:
        """The slices of a quantised tensor's bytes; folders whose quantised forms are read override this."""
        raise UserError(f"Tensor {name} in {self.folder} cannot be kept as it is stored; load it widened.")

    def raw(self, name: str) -> Any:
        """The slices of a tensor of any dtype; UserError where it is missing."""
        if name not in self._file_of:
            raise UserError(
                f"{self.folder} has no tensor {name}, which its config.json calls for; copy the folder again."
            )
        return self._handle(self._file_of[name]).get_slice(name)

    def _header(self, path: Path) -> dict[str, TensorEntry]:
        """The entries of one file's header; UserError where the file is missing or cut off."""
        if not os.path.lexists(path):
            raise UserError(f"{path.name} is missing in {self.folder} though its index names it; copy the file there.")
        return read_tensor_header(path)

    def _handle(self, path: Path) -> Any:
        """The open file; handles are kept, since a parameter may be read in many parts."""
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again.") from None
        return self._open[path]


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor -> file, as the index states; UserError where it states none."""
    stored = read_object(index, expected="an index of safetensors files")
    expected = object_of(text(empty=False))
    check_fields(stored, {"weight_map": expected}, str(index), required=("weight_map",))

    # An empty map is no index of a small model: such a folder would read as one without weights.
    if not stored["weight_map"]:
        raise UserError(f"{index} places no tensor in any file; copy it again.")
    return stored["weight_map"]


def _inside(folder: Path, name: str, index: Path) -> Path:
    """The path of a file that an index names; UserError for one outside the folder, by its name or through a link.

    The hub's cache keeps its files as links into the folder `blobs` beside its snapshots, which is allowed.
    """
    # Both sides resolved, or a link in the path to the folder itself would look like a way out.
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{index} names the file {name!r}, which cannot be read ({reason_of(error)}).") from None

    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]

    # Names are checked as well as resolved paths: a name that leaves the folder is wrong even where it leads back.
    if (
        PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
        or not any(map(real.is_relative_to, homes))
    ):
        raise UserError(
            f"{index} names the file {name!r}, which lies outside the folder; expected files beside the index. Copy "
            "the model again from its source."
        )

    return path


def load_params(
    folder: TensorFolder,
    table: TensorMap,
    abstract: Mapping[ParamPath, jax.ShapeDtypeStruct],
    shardings: Mapping[ParamPath, Sharding] | None,
    dtype: Callable[[ParamPath], Any],
) -> dict:
    """Loads parameters slice by slice: a device's part is read alone, and nothing is held whole that is not kept whole.

    Args:
        folder: the tensors.
        table: where each parameter is stored.
        abstract: shapes of the parameters to load, by path.
        shardings: their placement; None: one device.
        dtype: the dtype of the parameter at a path.

    Returns:
        A nested params dict.

    Raises:
        UserError: a tensor is missing, of another shape, cut off, or not finite in its dtype.
    """
    flat = {}
    for path, leaf in abstract.items():
        source = table[path]
        kind = np.dtype(dtype(path))
        where = f"{source.name} in {folder.folder}"
        # Shapes are checked before any part is read, and for the whole tensor whatever parts this process needs.
        part = partial(_read_part, _checked_slices(folder, source, leaf.shape), source, leaf.shape, kind, where)
        if shardings is None:
            flat[path] = jax.device_put(part(None))
        else:
            flat[path] = jax.make_array_from_callback(leaf.shape, shardings[path], part)

    return unflatten_dict(flat)


def check_shapes(folder: TensorFolder, table: TensorMap, leaves: Mapping[ParamPath, Any]) -> None:
    """UserError naming the first tensor that is missing, is no weight or has another shape than the config's."""
    for path, leaf in leaves.items():
        _checked_slices(folder, table[path], leaf.shape)


def _checked_slices(folder: TensorFolder, source: Stored | StoredApart, shape: tuple[int, ...]) -> list[Any]:
    """Slices of the tensors that a parameter is stored in, their shapes checked."""
    slices = []
    for name, expected in source.parts(shape):
        # Opens no data: a slice is read when it is indexed.
        slices.append(folder.codes(name) if source.codes else folder.stored(name))
        found = list(slices[-1].get_shape())
        if found != list(expected):
            raise UserError(
                f"Tensor {name} in {folder.folder} has shape {found}; config.json calls for {list(expected)}. The "
                "weights and the config are not of one model; copy both again."
            )

    return slices


def _read_part(
    slices: list[Any],
    source: Stored | StoredApart,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: str,
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """The part `index` of a parameter, in C order and in `dtype`; UserError where it is damaged or not finite."""
    index = index or (slice(None),) * len(shape)
    try:
        part = source.read(slices, shape, index)
    except (SafetensorError, OSError) as error:
        raise UserError(f"Tensor {where} cannot be read ({error}); copy the folder again.") from None

    # Checked after the cast: wide weights may overflow a narrower dtype.
    part = np.ascontiguousarray(part).astype(dtype, copy=False)
    if not all_finite(part):
        raise UserError(
            f"Tensor {where} holds values that are not finite in {dtype.name}; the weights are damaged or overflowed. "
            "Copy the folder again, or load it in float32."
        )

    return part


_EXPONENTS = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


def all_finite(array: np.ndarray, chunk: int = 1 << 18) -> bool:
    """Whether a contiguous array holds neither NaN nor infinity, judged by its exponent bits; True for dtypes other
    than bfloat16, float16 and float32. Chunks fit a core's cache, so the check costs one reading of the array."""
    if array.dtype.name not in _EXPONENTS:
        return True
    kind, ones = _EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(kind)
    return all(np.max(bits[at : at + chunk] & kind(ones)) < ones for at in range(0, bits.size, chunk))


def stored_tensors(table: TensorMap, params: dict, dtype: str | None) -> dict[str, np.ndarray]:
    """The tensors of a params dict under their stored names and layouts, ready for a safetensors file."""
    flat = flatten_dict(params)
    kind = None if dtype is None else np.dtype(getattr(ml_dtypes, dtype, dtype))

    tensors = {}
    for path, source in table.items():
        # One parameter at a time on the host: a large model is not there twice.
        array = np.asarray(jax.device_get(flat[path]))
        array = array if kind is None else array.astype(kind)
        for (name, _), part in zip(source.parts(array.shape), source.write(array), strict=True):
            tensors[name] = np.ascontiguousarray(part)

    return tensors


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically; UserError where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be written ({reason_of(error)}); give a folder that can.") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as transformers does: two spaces, sorted keys."""
    files.write_json(path, content, indent=2, sort_keys=True)
