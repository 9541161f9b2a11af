"""Contents of a target cache: its specification, one sample, and the bytes of one record.

Letters: T tokens of a sample, m tapped layers, D hidden size of the target.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import xxhash

from dspark_jax.data.codecs import CODECS, Codec, decode_states, encode_states
from dspark_jax.errors import UserError
from dspark_jax.readers import Schema, check_fields, integer, list_of, optional, text

LAYER_CONVENTION = "output of decoder layer i, -1 = embeddings"

_MAGIC = b"DSTC"
_VERSION = 1
# magic, version, dtype code, T, m, D, reserved, sample id; then xxh3 of this and of the payload
_HEADER = struct.Struct("<4sHHIIIIQ")
_HASH = struct.Struct("<Q")
_START = _HEADER.size + _HASH.size
# A record's chunk header and index entry in an array_record, and its entry of samples.idx: measured at 112 bytes.
_RECORD_OVERHEAD = 128


SPEC_FIELDS: Schema = {
    **dict.fromkeys(("target_name", "chat_template", "dtype", "layer_convention"), text()),
    **dict.fromkeys(("target_sha256", "tokenizer_hash", "sources_sha256"), optional(text())),
    "layer_ids": list_of(integer(-1, 1024), least=1),
    "hidden_size": integer(1, 1 << 24),
    **dict.fromkeys(("max_length", "min_loss_tokens"), integer()),
    "num_sources": integer(0, 1 << 60),
}
"""Types and ranges of a stored spec."""


@dataclass(frozen=True)
class CacheSpec:
    """The inputs that determine a cache's contents: two caches with equal specs hold the same records.

    Attributes:
        target_name: path or hub id, as it was given.
        target_sha256: hash of the target's config; None where a foreign cache does not record it.
        layer_ids: tapped layers, strictly increasing, in `layer_convention` (the order of the features' last axis).
        hidden_size: D.
        tokenizer_hash: `tokenizers.tokenizer_hash` of the tokenizer that made the ids; None where not recorded.
        chat_template: `chat.template_id` of the template that made the texts.
        max_length: tokens that samples were cut to, at their end.
        min_loss_tokens: samples with fewer supervised tokens after the cut were dropped.
        num_sources: training rows that the cache is built from, dropped ones included.
        dtype: storage of features and last hidden states, a name in `codecs.CODECS`.
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
        # The order is that of the features' last axis, which a drafter's weights depend on (rule 16).
        if not ids or any(b <= a for a, b in zip(ids, ids[1:], strict=False)) or ids[0] < -1:
            raise UserError(
                f"layer_ids are {list(ids)}, expected at least one, strictly increasing, from -1 (embeddings) on."
            )
        if self.dtype not in CODECS:
            raise UserError(f"dtype is {self.dtype!r}, expected one of {', '.join(CODECS)}.")

    @property
    def codec(self) -> Codec:
        return CODECS[self.dtype]

    @property
    def numpy_dtype(self) -> np.dtype:
        """Dtype of the stored states or codes."""
        return self.codec.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in a record: 5 for id and mask, then (m + 1) D states or codes, and m + 1 scales of 4."""
        return sum(dtype.itemsize * width for dtype, width in _layout(self))

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
        # Unknown fields are refused too: a cache by a later version may differ in what they say.
        if not isinstance(value, Mapping) or set(value) != fields:
            odd = ", ".join(sorted(fields.symmetric_difference(value if isinstance(value, Mapping) else ())))
            raise UserError(
                f"{where}: the cache's spec has missing or unknown fields ({odd}); it was written by another version."
            )

        check_fields(value, SPEC_FIELDS, f"{where}, under spec,")
        return cls(**{**value, "layer_ids": tuple(value["layer_ids"])})


@dataclass(frozen=True)
class TokenSample:
    """One training row, or several packed into one, as token ids.

    Attributes:
        sample_id: index of its training row (dense numbers in a DeepSpec cache); of a packed row: its number.
        input_ids: int32 [T].
        loss_mask: uint8 [T].
        segments: int32 [T] of a packed row: 1, 2, ... for one conversation after the other.
        members: sample ids of a packed row's conversations.
    """

    sample_id: int
    input_ids: np.ndarray
    loss_mask: np.ndarray
    segments: np.ndarray | None = field(default=None, kw_only=True)
    members: tuple[int, ...] = field(default=(), kw_only=True)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the sample by its name; all have the tokens as their first axis."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}

    def cut(self, end: int) -> Self:
        """The first `end` tokens."""
        changes: dict[str, Any] = {name: array[:end] for name, array in self.arrays().items()}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Sample(TokenSample):
    """One conversation with the target's hidden states, or their codes.

    Attributes:
        features: [T, m*D], the tapped layers concatenated in the order of `CacheSpec.layer_ids`.
        last_hidden: [T, D], after the target's final norm.
        scales: float32 [T, m+1] where both are codes (`codecs.encode_states`), else None.
    """

    features: np.ndarray
    last_hidden: np.ndarray
    scales: np.ndarray | None = None

    def decoded(self, dtype: Any = np.float32) -> Self:
        """The sample with states in place of codes."""
        if self.scales is None:
            return self
        return dataclasses.replace(self, **decode_states(self.arrays(), dtype), scales=None)


class TokenSource(Protocol):
    """Random access to samples, from any storage; reading must be safe from several threads."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)], tokens of every sample, known without reading it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenSample: ...


class FeatureSource(TokenSource, Protocol):
    """A source whose samples have the target's states."""

    @property
    def spec(self) -> CacheSpec: ...

    def __getitem__(self, index: int) -> Sample: ...


def convert(sample: Sample, spec: CacheSpec) -> Sample:
    """The sample in the cache's storage format, contiguous and little-endian.

    Args:
        sample: states to be encoded, or codes with their scales, which are kept.
        spec: of the cache.

    Raises:
        ValueError: shapes or a dtype that are not the spec's.
    """
    given, codec = sample.scales, spec.codec
    # Codes of another codec would be stored as numbers they do not mean.
    if given is not None and (not codec.scaled or sample.features.dtype != spec.numpy_dtype):
        raise ValueError(f"sample {sample.sample_id} has codes of {sample.features.dtype}, the cache is {spec.dtype}")

    length = len(sample.input_ids)
    shapes = (length, length, (length, spec.feature_size), (length, spec.hidden_size))
    found = (len(sample.input_ids), len(sample.loss_mask), np.shape(sample.features), np.shape(sample.last_hidden))
    if found != shapes or (given is not None and given.shape != (length, len(spec.layer_ids) + 1)):
        raise ValueError(f"sample {sample.sample_id} has the shapes {found}, expected {shapes}")

    # States are encoded here unless they are codes already, as in a hybrid run, whose step encodes them.
    stored = sample.arrays()
    if given is None:
        stored = encode_states(np.asarray(sample.features), np.asarray(sample.last_hidden), codec)

    # Contiguous and little-endian: the bytes on disk do not depend on the machine.
    scales = stored.get("scales")
    return Sample(
        int(sample.sample_id),
        np.ascontiguousarray(sample.input_ids, np.dtype("<i4")),
        np.ascontiguousarray(sample.loss_mask, np.uint8),
        np.ascontiguousarray(stored["features"]),
        np.ascontiguousarray(stored["last_hidden"]),
        None if scales is None else np.ascontiguousarray(scales, np.dtype("<f4")),
    )


def encode_record(sample: Sample, spec: CacheSpec) -> bytes:
    """Bytes of a record: header, int32 ids [T], uint8 loss mask [T], features [T, m*D], last hidden [T, D], and float32
    scales [T, m+1] where the codec has them; packed, little-endian."""
    arrays = list(convert(sample, spec).arrays().values())
    shape = (len(arrays[0]), len(spec.layer_ids), spec.hidden_size)
    header = _HEADER.pack(_MAGIC, _VERSION, spec.codec.code, *shape, 0, int(sample.sample_id))
    # Views, not copies: the join and the hash read the arrays' own memory.
    payload = [array.reshape(-1).view(np.uint8).data for array in arrays]
    return b"".join([header, _HASH.pack(_checksum(header, *payload)), *payload])


def decode_record(record: bytes, spec: CacheSpec) -> Sample:
    """Inverse of `encode_record`; the arrays are read-only views of `record`.

    Raises:
        ValueError: a header of another format or spec, a wrong size, or a checksum that does not fit. Callers, which
            know the shard, turn it into a UserError.
    """
    if len(record) < _START:
        raise ValueError(f"it has {len(record)} bytes, its header alone {_START}")

    magic, version, code, length, layers, hidden, _, sample_id = _HEADER.unpack_from(record)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"its header starts with {magic!r} version {version}, expected {_MAGIC!r} version {_VERSION}")
    if (code, layers, hidden) != (spec.codec.code, len(spec.layer_ids), spec.hidden_size):
        raise ValueError(f"its header says dtype {code}, {layers} layers, hidden size {hidden}, unlike the manifest")
    # The size is checked before the checksum, which would not say that a record was cut.
    if len(record) != record_bytes(length, spec):
        raise ValueError(f"it has {len(record)} bytes, expected {record_bytes(length, spec)} for {length} tokens")

    view = memoryview(record)
    if _checksum(view[: _HEADER.size], view[_START:]) != _HASH.unpack_from(record, _HEADER.size)[0]:
        raise ValueError("its checksum does not fit its bytes")

    # The arrays are packed without alignment, which `frombuffer` allows.
    offset = _START
    arrays = []
    for dtype, width in _layout(spec):
        arrays.append(np.frombuffer(record, dtype, length * width, offset))
        offset += length * width * dtype.itemsize

    ids, mask, *states = arrays
    widths = [width for _, width in _layout(spec)[2:]]
    return Sample(sample_id, ids, mask, *(a.reshape(length, w) for a, w in zip(states, widths, strict=True)))


def record_bytes(length: int, spec: CacheSpec) -> int:
    """Bytes of the record of a sample with `length` tokens."""
    return _START + length * spec.token_bytes


def estimate_bytes(total_tokens: int, samples: int, spec: CacheSpec, max_shard_bytes: int) -> int:
    """Upper bound of a cache's bytes on disk, within 1 % for real sizes."""
    # Above the real size in every case: the disk is asked for this much before hours of work begin.
    payload = samples * (record_bytes(0, spec) + _RECORD_OVERHEAD) + total_tokens * spec.token_bytes

    # array_record ends a shard on a 64 KiB block, with its index in others.
    shards = math.ceil(payload / max_shard_bytes)
    return payload + shards * (192 * 1024 + 512)


def require_match(spec: CacheSpec, where: str, expected: Mapping[str, Any]) -> None:
    """Refuses a cache whose spec differs from what the drafter and its target need (docs/algorithm.md, rule 84).

    Args:
        spec: the cache's.
        where: its place, for the message.
        expected: names of `CacheSpec` fields to values; a field the cache does not record (None) is not checked.

    Raises:
        UserError: one sentence with every differing field, both values, and what to do.
    """
    differing = []
    for name, wanted in expected.items():
        found = getattr(spec, name)
        # JSON has no tuples.
        wanted = tuple(wanted) if isinstance(wanted, list) else wanted
        if found is not None and found != wanted:
            differing.append(f"{name} is {_shown(found)}, expected {_shown(wanted)}")

    if differing:
        raise UserError(
            f"The cache {where} does not fit: {'; '.join(differing)}. Build a cache for this target and drafter."
        )


def _layout(spec: CacheSpec) -> tuple[tuple[np.dtype, int], ...]:
    """(dtype, entries a token) of each array of a record, in order: ids, mask, features, last hidden, scales."""
    dtype, scales = spec.numpy_dtype, ((np.dtype("<f4"), len(spec.layer_ids) + 1),)
    states = ((np.dtype("<i4"), 1), (np.dtype(np.uint8), 1), (dtype, spec.feature_size), (dtype, spec.hidden_size))
    return states + scales if spec.codec.scaled else states


def _checksum(*parts: bytes | memoryview) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)
