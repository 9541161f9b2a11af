"""Tensors of 8 and 4 bits with power-of-two scales, and safetensors files that hold them, read slice by slice.

e4m3: sign, 4 exponent bits, 3 of mantissa, no infinity; one e8m0 scale (2^(byte - 127)) for each block of 128 x 128.
e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, two codes in a byte, the even one in the low half; one scale for
32 columns.
"""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dspark_jax import files
from dspark_jax.checkpoints.safetensors_header import read_tensor_header
from dspark_jax.errors import UserError
from dspark_jax.targets.low_bit import BLOCK, GROUP

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

_DTYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def e8m0_values(codes: np.ndarray) -> np.ndarray:
    """float32 2^(byte - 127); byte 255 is NaN."""
    # numpy cannot compute with e8m0 itself; its bytes are the exponents, biased by 127.
    exponents = codes.view(np.uint8).astype(np.int32)
    # 2^-127 is a subnormal float32, for which ldexp is exact.
    return np.where(exponents == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponents - 127)).astype(np.float32)


def e8m0_codes(exponents: np.ndarray) -> np.ndarray:
    """The scales 2^exponent as stored codes."""
    return (np.clip(exponents, -127, 127) + 127).astype(np.uint8).view(_DTYPES["F8_E8M0"])


def decode_fp8(codes: np.ndarray, scales: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
    """float32 values of codes [n, k] at (row, column) of a matrix whose block scales are `scales`."""
    # Offsets matter: a device's slice may begin in the middle of a block.
    rows = (row + np.arange(codes.shape[0])) // BLOCK
    columns = (column + np.arange(codes.shape[1])) // BLOCK
    return codes.astype(np.float32) * e8m0_values(scales)[rows[:, None], columns[None, :]]


def unpack_fp4(packed: np.ndarray) -> np.ndarray:
    """float32 values [..., 2 k] of packed codes [..., k], without their scales."""
    codes = packed.view(np.uint8)
    # The even code is in the low half of a byte.
    return E2M1[np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)]


def decode_fp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 values [n, 2 k] of packed codes [n, k] with scales [n, 2 k / 32]."""
    # One scale for each GROUP columns; the last group may be cut.
    return unpack_fp4(packed) * np.repeat(e8m0_values(scales), GROUP, axis=-1)[..., : 2 * packed.shape[-1]]


def encode_fp8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3 codes, e8m0 block scales) of a matrix: each block takes the smallest power of two that avoids overflow.

    Values that were decoded from such a tensor come back exactly.
    """
    rows, columns = values.shape

    # Padding with zeros leaves the maxima of partial blocks unchanged.
    padded = np.zeros((-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK), np.float32)
    padded[:rows, :columns] = values
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)

    # [rows / 128, columns / 128] maxima of the blocks.
    exponents = _exponents(np.abs(blocks).max(axis=(1, 3)), E4M3_MAX)  # one for each block
    scaled = np.ldexp(blocks, -exponents[:, None, :, None]).reshape(padded.shape)[:rows, :columns]

    return scaled.astype(_DTYPES["F8_E4M3"]), e8m0_codes(exponents)


def encode_fp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(packed int8 [n, k / 2], e8m0 scales [n, k / 32]) of a matrix whose k is a multiple of 32; ties to even codes."""
    rows, columns = values.shape
    groups = values.astype(np.float32).reshape(rows, columns // GROUP, GROUP)

    exponents = _exponents(np.abs(groups).max(axis=-1), E2M1_MAX)  # [n, k / 32]
    # ldexp shifts the exponent and leaves the mantissa: dividing by the scale rounds nothing.
    scaled = np.ldexp(groups, -exponents[..., None]).reshape(rows, columns)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)

    # Two codes in a byte, the even column in the low half, as `unpack_fp4` reads them.
    packed = codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4
    return packed.view(np.int8), e8m0_codes(exponents)


def _exponents(largest: np.ndarray, limit: float) -> np.ndarray:
    """The least e with largest <= limit 2^e; -127 for zero."""
    # frexp gives a mantissa in [0.5, 1), one exponent too many where the quotient is a power of two.
    mantissa, exponent = np.frexp(largest.astype(np.float64) / limit)
    exact = mantissa == 0.5
    return np.where(largest > 0, np.maximum(exponent - exact, -127), -127).astype(np.int32)


class RawTensor:
    """A stored tensor, sliced without reading the rest; element types that numpy lacks are from ml_dtypes."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def get_shape(self) -> list[int]:
        """The stored shape, as safetensors' slices give it."""
        return list(self.array.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[index]


class CodeTensor(RawTensor):
    """A quantised tensor, or its scales, that slices as bytes to keep; UserError for the codes of NaN."""

    def __init__(self, array: np.ndarray, where: str):
        # Exponents are kept as plain bytes: few devices compute with e8m0.
        scales = array.dtype == _DTYPES["F8_E8M0"]
        super().__init__(array.view(np.uint8) if scales else array)
        self.where, self.scales = where, scales

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self.array[index]
        # e4m3 has NaN alone, in both signs, beyond its finite numbers; every fp4 code is finite.
        if self.scales:
            bad = part == 255
        else:
            bad = np.asarray(part.view(np.uint8) & 127 == 127) if part.dtype == _DTYPES["F8_E4M3"] else np.False_
        if bad.any():
            raise UserError(f"Tensor {self.where} holds values that are not finite; copy the folder again.")
        return part


class ScaledTensor:
    """A quantised matrix that slices as float32 values."""

    def __init__(self, codes: np.ndarray, scales: np.ndarray):
        self.codes, self.scales, self.packed = codes, scales, codes.dtype == np.int8

    def get_shape(self) -> list[int]:
        """The shape in values: fp4 packs two of them in a code."""
        rows, columns = self.codes.shape
        return [rows, columns * (2 if self.packed else 1)]

    def __getitem__(self, index: Any) -> np.ndarray:
        # Missing trailing axes are whole, as in numpy.
        index = index if isinstance(index, tuple) else (index,)
        index = (*index, *(slice(None),) * (2 - len(index)))

        # Steps are always 1: only contiguous parts of a parameter are read.
        (top, bottom, _), (left, right, _) = (s.indices(n) for s, n in zip(index, self.get_shape(), strict=True))

        if not self.packed:
            return decode_fp8(self.codes[top:bottom, left:right], self.scales, top, left)

        # A scale serves GROUP columns, so whole groups are decoded and then cut.
        first, last = left // GROUP, -(-right // GROUP)
        codes = self.codes[top:bottom, first * GROUP // 2 : last * GROUP // 2]
        values = decode_fp4(codes, self.scales[top:bottom, first:last])
        return values[:, left - first * GROUP : right - first * GROUP]


class RawFile:
    """One safetensors file as a map of `RawTensor`s; nothing is read before it is sliced."""

    def __init__(self, path: Path):
        self.path, self.entries = path, read_tensor_header(path)
        # Eight bytes of header length, the header, then the tensors at their offsets.
        with path.open("rb") as file:
            self.start = 8 + struct.unpack("<Q", file.read(8))[0]

    def keys(self) -> list[str]:
        """The names of all tensors in the file."""
        return list(self.entries)

    def get_slice(self, name: str) -> RawTensor:
        """A tensor over a memory map; UserError for an element type that is not supported."""
        entry = self.entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(f"Tensor {name} in {self.path} is of type {entry.dtype}, which is not read here.")
        # An empty memory map is an error.
        if 0 in entry.shape:
            return RawTensor(np.zeros(entry.shape, _DTYPES[entry.dtype]))
        return RawTensor(np.memmap(self.path, _DTYPES[entry.dtype], "r", self.start + entry.begin, entry.shape))


def write_raw(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file with any of the element types here, to a temporary name first and then renamed."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0

    for name, array in tensors.items():
        kind = _NAMES[array.dtype]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes

    text = json.dumps(header).encode()

    # Padded to a multiple of 8, as the reference writer does, so that tensors are aligned.
    text += b" " * (-len(text) % 8)

    with files.replacing(file) as temporary, Path(temporary).open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            out.write(np.ascontiguousarray(array).tobytes())
