"""What a target cache holds: its specification, one sample, and the bytes of one record.

Letters: T tokens of a sample, m tapped layers, D hidden size of the target.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import xxhash

from dspark_jax.errors import UserError

LAYER_CONVENTION = "output of decoder layer i, -1 = embeddings"
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_DTYPE_CODES = {"bfloat16": 1, "float32": 2}

_MAGIC = b"DSTC"
_VERSION = 1
# magic, version, dtype code, T, m, D, reserved, sample id; then xxh3 of this and of the payload
_HEADER = struct.Struct("<4sHHIIIIQ")
_HASH = struct.Struct("<Q")
_START = _HEADER.size + _HASH.size
# A record's chunk header and index entry in an array_record, and samples.idx; measured at 112 bytes.
_RECORD_OVERHEAD = 128


@dataclass(frozen=True)
class CacheSpec:
    """What a cache was made from. Two caches with equal specs hold the same records.

    Attributes:
        target_name: path or hub id, for people.
        target_sha256: hash of the target's config; None where a foreign cache does not record it.
        layer_ids: tapped layers, strictly increasing, in `layer_convention` (the order of the features' last axis).
        hidden_size: D.
        tokenizer_hash: `chat.tokenizer_hash` of the tokenizer that made the ids; None where not recorded.
        chat_template: name of the `ChatFormat`.
        max_length: samples were cut at their end to so many tokens.
        min_loss_tokens: samples with fewer supervised tokens after the cut were dropped.
        num_sources: conversations the cache is built from, dropped ones included.
        dtype: of features and last hidden states, "bfloat16" or "float32".
        sources_sha256: hash of the conversations, so that a changed file is not continued; None where not recorded.
    """

    target_name: str
    target_sha256: str | None
    layer_ids: tuple[int, ...]
    hidden_size: int
    tokenizer_hash: str | None
    chat_template: str
    max_length: int
    min_loss_tokens: int
    num_sources: int
    dtype: str = "bfloat16"
    layer_convention: str = LAYER_CONVENTION
    sources_sha256: str | None = None

    def __post_init__(self) -> None:
        ids = self.layer_ids
        if not ids or any(b <= a for a, b in zip(ids, ids[1:], strict=False)) or ids[0] < -1:
            raise UserError(
                f"layer_ids are {list(ids)}, expected at least one, strictly increasing, from -1 (embeddings) on."
            )
        if self.dtype not in _DTYPES:
            raise UserError(f"dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}.")

    @property
    def numpy_dtype(self) -> np.dtype:
        return _DTYPES[self.dtype]

    @property
    def feature_size(self) -> int:
        """m * D, the width of a sample's features."""
        return len(self.layer_ids) * self.hidden_size

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "layer_ids": list(self.layer_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "CacheSpec":
        """Inverse of `to_json`; UserError naming `where` when fields are missing or unknown."""
        fields = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(value, Mapping) or set(value) != fields:
            odd = ", ".join(sorted(fields.symmetric_difference(value if isinstance(value, Mapping) else ())))
            raise UserError(
                f"{where}: the cache's spec has missing or unknown fields ({odd}); it was written by another version."
            )
        return cls(**{**value, "layer_ids": tuple(value["layer_ids"])})


@dataclass(frozen=True)
class Sample:
    """One conversation with the target's hidden states.

    Attributes:
        sample_id: index of its source conversation (dense numbers in a DeepSpec cache).
        input_ids: int32 [T].
        loss_mask: uint8 [T].
        features: [T, m*D], the tapped layers concatenated in the order of `CacheSpec.layer_ids`.
        last_hidden: [T, D], after the target's final norm.
    """

    sample_id: int
    input_ids: np.ndarray
    loss_mask: np.ndarray
    features: np.ndarray
    last_hidden: np.ndarray


class FeatureSource(Protocol):
    """Random access to samples, from any storage; reading must be safe from several threads."""

    @property
    def spec(self) -> CacheSpec: ...

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)], tokens of every sample, known without reading it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def convert(sample: Sample, spec: CacheSpec) -> Sample:
    """The sample in the cache's dtypes, its shapes checked (ValueError): what is written is what will be read."""
    converted = Sample(
        int(sample.sample_id),
        np.ascontiguousarray(sample.input_ids, np.dtype("<i4")),
        np.ascontiguousarray(sample.loss_mask, np.uint8),
        np.ascontiguousarray(np.asarray(sample.features).astype(spec.numpy_dtype, copy=False)),
        np.ascontiguousarray(np.asarray(sample.last_hidden).astype(spec.numpy_dtype, copy=False)),
    )
    length = len(converted.input_ids)
    shapes = ((length,), (length,), (length, spec.feature_size), (length, spec.hidden_size))
    found = tuple(
        a.shape for a in (converted.input_ids, converted.loss_mask, converted.features, converted.last_hidden)
    )
    if found != shapes:
        raise ValueError(f"sample {sample.sample_id} has the shapes {found}, expected {shapes}")
    return converted


def encode_record(sample: Sample, spec: CacheSpec) -> bytes:
    """Header, int32 ids [T], uint8 loss mask [T], features [T, m*D], last hidden [T, D]; packed, little-endian."""
    sample = convert(sample, spec)
    arrays = (sample.input_ids, sample.loss_mask, sample.features, sample.last_hidden)
    shape = (len(sample.input_ids), len(spec.layer_ids), spec.hidden_size)
    header = _HEADER.pack(_MAGIC, _VERSION, _DTYPE_CODES[spec.dtype], *shape, 0, sample.sample_id)
    payload = [array.reshape(-1).view(np.uint8).data for array in arrays]
    return b"".join([header, _HASH.pack(_checksum(header, *payload)), *payload])


def decode_record(record: bytes, spec: CacheSpec) -> Sample:
    """Inverse of `encode_record`; the arrays are read-only views of `record`.

    Raises:
        ValueError: a header of another format or spec, a wrong size, or a checksum that does not fit (the caller knows
            the shard and turns it into a UserError).
    """
    if len(record) < _START:
        raise ValueError(f"it has {len(record)} bytes, its header alone {_START}")
    magic, version, code, length, layers, hidden, _, sample_id = _HEADER.unpack_from(record)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"its header starts with {magic!r} version {version}, expected {_MAGIC!r} version {_VERSION}")
    if (code, layers, hidden) != (_DTYPE_CODES[spec.dtype], len(spec.layer_ids), spec.hidden_size):
        raise ValueError(f"its header says dtype {code}, {layers} layers, hidden size {hidden}, unlike the manifest")
    if len(record) != record_bytes(length, spec):
        raise ValueError(f"it has {len(record)} bytes, expected {record_bytes(length, spec)} for {length} tokens")
    view = memoryview(record)
    if _checksum(view[: _HEADER.size], view[_START:]) != _HASH.unpack_from(record, _HEADER.size)[0]:
        raise ValueError("its checksum does not fit its bytes")
    offset = _START
    arrays = []
    for dtype, width in _layout(spec):
        arrays.append(np.frombuffer(record, dtype, length * width, offset))
        offset += length * width * dtype.itemsize
    ids, mask, features, last_hidden = arrays
    features = features.reshape(length, spec.feature_size)
    return Sample(sample_id, ids, mask, features, last_hidden.reshape(length, spec.hidden_size))


def record_bytes(length: int, spec: CacheSpec) -> int:
    """Bytes of the record of a sample with `length` tokens."""
    return _START + length * sum(dtype.itemsize * width for dtype, width in _layout(spec))


def estimate_bytes(total_tokens: int, samples: int, spec: CacheSpec, max_shard_bytes: int) -> int:
    """Bytes on disk of a cache of so many tokens in so many samples: an upper bound, closer than 1 % for real sizes."""
    payload = samples * (record_bytes(0, spec) + _RECORD_OVERHEAD) + total_tokens * (
        record_bytes(1, spec) - record_bytes(0, spec)
    )
    shards = math.ceil(payload / max_shard_bytes)
    return payload + shards * (
        192 * 1024 + 512
    )  # array_record ends a shard on a 64 KiB block, with its index in others


def require_match(spec: CacheSpec, where: str, expected: Mapping[str, Any]) -> None:
    """Refuses a cache that does not fit what the drafter or its target says.

    `expected` maps names of `CacheSpec` fields to values; a field the cache does not record (None) cannot be checked.

    Raises:
        UserError: one sentence with every differing field, both values, and what to do.
    """
    differing = []
    for name, wanted in expected.items():
        found = getattr(spec, name)
        wanted = tuple(wanted) if isinstance(wanted, list) else wanted
        if found is not None and found != wanted:
            differing.append(f"{name} is {_shown(found)}, expected {_shown(wanted)}")
    if differing:
        raise UserError(
            f"The cache {where} does not fit: {'; '.join(differing)}. Build a cache for this target and drafter."
        )


def _layout(spec: CacheSpec) -> tuple[tuple[np.dtype, int], ...]:
    dtype = spec.numpy_dtype
    return ((np.dtype("<i4"), 1), (np.dtype(np.uint8), 1), (dtype, spec.feature_size), (dtype, spec.hidden_size))


def _checksum(*parts: bytes | memoryview) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)
