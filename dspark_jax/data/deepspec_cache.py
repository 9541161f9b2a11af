"""DeepSpec target caches, version 2: read and written byte for byte.

    manifest.json    JSON, sorted keys
    samples.idx      56 bytes a sample, `<QIIQQQQQ`: sample id, shard, tokens, then the arrays' offsets in the shard
    shard-00000.bin  per sample int32 ids, uint8 attention mask, uint8 loss mask, bfloat16 features [T, m*D],
                     bfloat16 last hidden [T, D], back to back and unaligned

The format has no checksums: sizes and offsets are checked, changed bytes go undetected. See docs/algorithm.md, rules
82 to 84.
"""

import json
import mmap
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.data.manifest import read_manifest
from dspark_jax.data.records import CacheSpec, Sample, convert, require_match
from dspark_jax.errors import UserError
from dspark_jax.files import fsync, write_atomically
from dspark_jax.readers import Schema, check_fields, integer, list_of, object_of, text
from dspark_jax.storage.replica import fetched_folder

_INDEX = struct.Struct("<QIIQQQQQ")
_INDEX_DTYPE = np.dtype([("sample_id", "<u8"), ("shard", "<u4"), ("length", "<u4"), ("offsets", "<u8", (5,))])
_FIXED = {
    "version": 2,
    "hidden_dtype": "bfloat16",
    "token_dtype": "int32",
    "mask_dtype": "uint8",
    "index_record_size": _INDEX.size,
}

_FIELDS: Schema = {
    **dict.fromkeys(("num_samples", "num_shards"), integer(0, 1 << 40)),
    "target_layer_ids": list_of(integer(-1, 1024), least=1),
    "hidden_size": integer(1, 1 << 24),
    **dict.fromkeys(("max_length", "min_loss_tokens"), integer()),
    **dict.fromkeys(("target_model_name_or_path", "chat_template"), text()),
    "shards": list_of(object_of()),
}
_SHARD: Schema = {"file_name": text(empty=False), "shard_id": integer()}


class DeepSpecCache:
    """Reads a DeepSpec version-2 cache with the interface of `TargetCache` (`records.FeatureSource`).

    The attention mask is not read; it follows from the lengths. Fields that the format does not record (target and
    tokenizer hashes) are None in `spec` and cannot be checked.

    Raises:
        UserError: not such a cache, a missing or truncated file, an index that contradicts itself (all at opening).
    """

    def __init__(self, folder: str | os.PathLike[str]):
        # Its records are read in place, without hashes: of a store the whole cache is copied here.
        self.folder = fetched_folder(folder, "target cache")
        self.manifest = read_manifest(self.folder / "manifest.json")
        self.spec = _spec_of(self.manifest, self.folder / "manifest.json")
        self._shards = _shard_paths(self.manifest, self.folder)
        # Index and shards are compared before the first sample: a truncated copy is refused at opening.
        self._index = self._read_index()
        self._check_extents()
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)], tokens of each sample."""
        return self._index["length"].astype(np.int64)

    @property
    def sample_ids(self) -> np.ndarray:
        """uint64 [len(self)]."""
        return self._index["sample_id"]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")

        row = self._index[index]
        length, offsets = int(row["length"]), [int(v) for v in row["offsets"]]
        shard = self._map(int(row["shard"]))
        dtype, width, hidden = self.spec.numpy_dtype, self.spec.feature_size, self.spec.hidden_size
        # Views of the mapping, which stays alive as long as one of them does.
        features = np.frombuffer(shard, dtype, length * width, offsets[3])
        last_hidden = np.frombuffer(shard, dtype, length * hidden, offsets[4])

        return Sample(
            int(row["sample_id"]),
            np.frombuffer(shard, np.dtype("<i4"), length, offsets[0]),
            np.frombuffer(shard, np.uint8, length, offsets[2]),
            features.reshape(length, width),
            last_hidden.reshape(length, hidden),
        )

    def require_match(self, **expected: Any) -> None:
        """`records.require_match` for this cache: fields of `CacheSpec` by name; UserError when one differs."""
        require_match(self.spec, str(self.folder), expected)

    def close(self) -> None:
        """Drops the shards' mappings; each is unmapped with its last sample."""
        with self._lock:
            self._maps.clear()

    def _map(self, number: int) -> mmap.mmap:
        with self._lock:
            if number not in self._maps:
                # The mapping outlives the descriptor, so that no shard keeps a file open.
                with open(self._shards[number], "rb") as handle:
                    self._maps[number] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps[number]

    def _read_index(self) -> np.ndarray:
        path = self.folder / "samples.idx"
        if not path.exists():
            raise UserError(f"{path} is missing; the cache is incomplete, copy it again.")

        data = path.read_bytes()
        wanted = self.manifest["num_samples"] * _INDEX.size
        # A multiple of the record size is not enough: a cut at a record's end would pass.
        if len(data) != wanted:
            raise UserError(
                f"{path} has {len(data)} bytes, expected {wanted} for {self.manifest['num_samples']} samples; "
                "copy the cache again."
            )

        return np.frombuffer(data, _INDEX_DTYPE)

    def _check_extents(self) -> None:
        path = self.folder / "samples.idx"
        # Ids are dense in this format, so a gap means a damaged index (docs/algorithm.md, rule 82).
        if not np.array_equal(self._index["sample_id"], np.arange(len(self._index))):
            raise UserError(f"{path} does not number its samples 0, 1, 2, ...; it is damaged, copy the cache again.")

        if len(self._index) and int(self._index["shard"].max()) >= len(self._shards):
            raise UserError(
                f"{path} names shard {self._index['shard'].max()}, the manifest has {len(self._shards)}; copy "
                "the cache again."
            )

        # [samples, 5]: every array's end, to be within its shard.
        offsets = self._index["offsets"]
        lengths = self._index["length"].astype(np.uint64)[:, None]
        ends = offsets + lengths * np.array(_token_bytes(self.spec), np.uint64)

        for number, shard in enumerate(self._shards):
            rows = self._index["shard"] == number
            needed = int(ends[rows].max(initial=0))
            size = shard.stat().st_size
            # A sum that wrapped would look small, so offsets are compared too.
            if size < max(needed, int(offsets[rows].max(initial=0))):
                raise UserError(
                    f"{shard} has {size} bytes, its index needs {needed}; it is truncated, copy the cache again."
                )


class DeepSpecCacheWriter:
    """Writes a DeepSpec version-2 cache into a new folder; the manifest comes last, so a killed run leaves none.

    Args:
        extra: further fields of the manifest (exp_name, git_sha, project_name, source_jsonl_paths, ...).

    Raises:
        UserError: the folder is not empty.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        spec: CacheSpec,
        max_shard_bytes: int = 2**31,
        extra: Mapping[str, Any] | None = None,
    ):
        # The format has no field for another dtype.
        if spec.dtype != "bfloat16":
            raise UserError(f"dtype is {spec.dtype!r}, a DeepSpec cache holds bfloat16 only.")

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # A writer never continues: without checksums a torn shard would go unnoticed.
        if any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty; give a new folder for a DeepSpec cache.")

        self.spec, self.max_shard_bytes, self.extra = spec, max_shard_bytes, dict(extra or {})
        self._index: list[bytes] = []
        self._shards: list[Path] = []
        self._handle: Any = None

    def add(self, sample: Sample) -> None:
        """Appends a sample under the next dense id (its own `sample_id` is not kept)."""
        sample = convert(sample, self.spec)
        # A sample has no padding, so its mask is 1 throughout.
        attention = np.ones_like(sample.loss_mask)
        arrays = (sample.input_ids, attention, sample.loss_mask, sample.features, sample.last_hidden)
        sizes = [array.nbytes for array in arrays]
        # A shard exceeds its limit only by one oversize sample (docs/algorithm.md, rule 84).
        if self._handle is None or 0 < self._handle.tell() > self.max_shard_bytes - sum(sizes):
            self._open_shard()

        # Five arrays back to back; the index holds where each begins.
        start = self._handle.tell()
        offsets = [start + sum(sizes[:k]) for k in range(5)]
        for array in arrays:
            self._handle.write(array.reshape(-1).view(np.uint8).data)

        self._index.append(_INDEX.pack(len(self._index), len(self._shards) - 1, len(sample.input_ids), *offsets))

    def finish(self) -> None:
        """Writes the index, then the manifest, which makes the folder a cache."""
        self._close_shard()
        write_atomically(self.folder / "samples.idx", b"".join(self._index))

        # The reference's own fields; `extra` may add to them but replace none.
        manifest = {
            **self.extra,
            **_FIXED,
            "chat_template": self.spec.chat_template,
            "hidden_size": self.spec.hidden_size,
            "max_length": self.spec.max_length,
            "min_loss_tokens": self.spec.min_loss_tokens,
            "num_samples": len(self._index),
            "num_shards": len(self._shards),
            "shards": [{"file_name": path.name, "shard_id": k} for k, path in enumerate(self._shards)],
            "target_layer_ids": list(self.spec.layer_ids),
            "target_model_name_or_path": self.spec.target_name,
        }

        write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True).encode())

    def _open_shard(self) -> None:
        self._close_shard()
        self._shards.append(self.folder / f"shard-{len(self._shards):05d}.bin")
        self._handle = open(self._shards[-1], "wb")  # noqa: SIM115 (held until the shard is full)

    def _close_shard(self) -> None:
        if self._handle is not None:
            self._handle.close()
            fsync(self._shards[-1])
            self._handle = None


def _token_bytes(spec: CacheSpec) -> list[int]:
    """Bytes a token takes in each of the five arrays."""
    return [4, 1, 1, 2 * spec.feature_size, 2 * spec.hidden_size]


def _spec_of(manifest: Mapping[str, Any], path: Path) -> CacheSpec:
    needed = {*_FIXED, "num_samples", "num_shards", "target_layer_ids", "hidden_size", "shards"}
    # Fields that another version lacks are named together, since one of them alone says little.
    missing = sorted(needed.difference(manifest))
    if missing:
        raise UserError(f"{path} is no DeepSpec version-2 manifest: it lacks {', '.join(missing)}.")

    for name, value in _FIXED.items():
        if manifest[name] != value:
            raise UserError(f"{path} has {name} = {manifest[name]!r}, only {value!r} can be read.")

    # Optional fields too: a wrong type would fail far from here.
    check_fields(manifest, _FIELDS, str(path))
    return CacheSpec(
        target_name=manifest.get("target_model_name_or_path", ""),
        target_sha256=None,
        layer_ids=tuple(manifest["target_layer_ids"]),
        hidden_size=manifest["hidden_size"],
        tokenizer_hash=None,
        chat_template=manifest.get("chat_template", ""),
        max_length=manifest.get("max_length", 0),
        min_loss_tokens=manifest.get("min_loss_tokens", 0),
        num_sources=manifest["num_samples"],
    )


def _shard_paths(manifest: Mapping[str, Any], folder: Path) -> list[Path]:
    path = folder / "manifest.json"
    for number, entry in enumerate(manifest["shards"]):
        check_fields(entry, _SHARD, f"{path}, shard {number},", required=_SHARD)

    names = [entry["file_name"] for entry in manifest["shards"]]
    numbers = [entry["shard_id"] for entry in manifest["shards"]]
    if numbers != list(range(manifest["num_shards"])):
        raise UserError(
            f"{path} lists the shards {numbers}, expected 0 to {manifest['num_shards'] - 1}; copy the cache again."
        )

    for name in names:
        # A name is joined to the folder, so it must not lead out of it.
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; the cache is incomplete, copy it again.")

    return [folder / name for name in names]
