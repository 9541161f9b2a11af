"""The header of a safetensors file, read strictly: which tensors it holds, and where they lie."""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.readers import Schema, check_fields, integer, list_of, one_of, opened, parse_json, require_object, shown

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own bound


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: the format's dtype name (`F32`, `BF16`, ...), its shape, and where it begins
    in the file, in bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_ENTRY: Schema = {
    "dtype": one_of(*_BITS),
    "shape": list_of(integer(0, 2**48), most=64),
    "data_offsets": list_of(integer(0, 2**60), least=2, most=2),
}


def read_tensor_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file holds, from its header alone.

    Raises:
        UserError: the file is unreadable or no regular file, its header is no object of tensors or larger than the
            format allows, or the tensors do not fill the file to its end.
    """
    with opened(path, "a safetensors file") as handle:
        size, start = os.fstat(handle.fileno()).st_size, handle.read(8)
        # Bounded before it is read: a damaged length would ask for terabytes of memory.
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(
                f"{path} is not a whole safetensors file: its {size:,} bytes announce a header of {length:,}; copy it "
                "again."
            )
        header = handle.read(length)

    where = f"{path}, its header"
    stored = require_object(parse_json(header, where, expected="an object of tensors"), where)
    return _tensor_entries(stored, path, size - 8 - length)


def _tensor_entries(stored: Mapping[str, Any], path: Path, data_bytes: int) -> dict[str, TensorEntry]:
    """Checked entries: each tensor as large as its shape, all of them one after the other up to the end."""
    entries, spans = {}, []
    for name, value in stored.items():
        if name == "__metadata__":
            continue
        where = f"{path}, tensor {shown(name)},"
        check_fields(require_object(value, where), _ENTRY, where, required=_ENTRY)
        # In bits: 4- and 6-bit elements do not fill bytes one by one.
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise UserError(
                f"{path} gives tensor {shown(name)} {end - begin:,} bytes, and {dtype} {list(shape)} takes "
                f"{math.prod(shape) * _BITS[dtype] // 8:,}; copy it again."
            )
        entries[name] = TensorEntry(dtype, shape, begin)
        spans.append((begin, end))

    # The format allows neither gaps nor overlaps, so the last tensor ends with the file: a cut copy is found here.
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise UserError(f"{path} has a gap or an overlap between its tensors at byte {reached:,}; copy it again.")
        reached = end
    if reached != data_bytes:
        raise UserError(
            f"{path} is not a whole safetensors file: its tensors take {reached:,} bytes and {data_bytes:,} follow its "
            "header; copy it again."
        )
    return entries
