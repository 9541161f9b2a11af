"""Target-cache shards and DeepSpec's version-2 cache."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.deepspec_cache import DeepSpecCache, DeepSpecCacheWriter
from dspark_jax.data.manifest import require_disk
from dspark_jax.data.pipeline import open_cache
from dspark_jax.data.records import Sample, estimate_bytes
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.errors import UserError
from dspark_jax.storage import replica as replica_module
from tests.golden_data import check_target_cache
from tests.kill_cache import SHARD_BYTES, SOURCES, SPEC, digest, kill_and_compare, make_sample, write_cache

CASE = Path(__file__).parent / "data" / "target_cache"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def assert_sample(found: Sample, expected: Sample, dtype) -> None:
    assert found.sample_id == expected.sample_id
    assert (found.input_ids.dtype, found.loss_mask.dtype, found.features.dtype) == (np.int32, np.uint8, dtype)
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
    np.testing.assert_array_equal(found.features, expected.features.astype(dtype))
    np.testing.assert_array_equal(found.last_hidden, expected.last_hidden.astype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip_in_any_order(tmp_path, dtype):
    spec = dataclasses.replace(SPEC, dtype=dtype)
    write_cache(tmp_path / "c", spec)
    cache = TargetCache(tmp_path / "c")
    kept = [i for i in range(SOURCES) if make_sample(i) is not None]
    assert len(cache) == len(kept) and len(cache.manifest.shards) > 3
    for index in np.random.default_rng(0).permutation(len(cache)):
        assert_sample(cache[int(index)], make_sample(kept[index]), spec.numpy_dtype)
    assert cache.lengths.tolist() == [len(make_sample(i).input_ids) for i in kept]
    assert cache.sample_ids.tolist() == kept
    assert cache.spec == spec
    cache.verify()
    with pytest.raises(IndexError):
        cache[len(cache)]


def test_bfloat16_input_is_kept_bit_for_bit(tmp_path):
    spec = dataclasses.replace(SPEC, num_sources=1, layer_ids=(0,), hidden_size=4)
    bits = np.array([[0x0001, 0x8000, 0x7F80, 0x3F81]], np.uint16).view(
        ml_dtypes.bfloat16
    )  # a subnormal, -0, inf, 1.0078
    with CacheWriter(tmp_path, spec) as writer:
        writer.add(0, Sample(0, np.array([7]), np.array([1]), bits, bits))
        writer.finish()
    np.testing.assert_array_equal(TargetCache(tmp_path)[0].features.view(np.uint16), bits.view(np.uint16))


def test_kill_at_random_moments_ends_with_the_same_bytes(tmp_path):
    built, same = kill_and_compare(tmp_path, times=4, seed=1)
    assert built >= 1 and same


class Crash(BaseException):
    """A kill: nothing of the writer's own clean-up may run before it."""


def test_crash_at_every_file_operation_ends_with_the_same_bytes(written, tmp_path, monkeypatch):
    """Stops before the k-th fsync or replace, for each k: every state a kill can leave between two of them."""
    left, locks = [0], []

    def counted(function):
        def call(*args):
            left[0] -= 1
            if left[0] == 0:
                raise Crash
            return function(*args)

        return call

    def remembered(folder, what, lock=replica_module.lock_folder):
        locks.append(lock(folder, what))
        return locks[-1]

    def unlink(path, missing_ok=False, remove=Path.unlink):
        if left[0] <= 0:
            raise Crash  # the dead remove nothing
        remove(path, missing_ok)

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(replica_module, "lock_folder", remembered)
    expected, operations = digest(written), 0
    while True:
        folder, operations = tmp_path / str(operations), operations + 1
        left[0] = operations
        try:
            write_and_leave(folder)
            break
        except Crash:
            locks.pop().release()  # what the kernel does for a killed process
            left[0] = sys.maxsize
        write_cache(folder)
        assert digest(folder) == expected, operations
    assert operations > 15


def write_and_leave(folder: Path) -> None:
    """`write_cache` without the clean-up that a killed process does not do."""
    writer = CacheWriter(folder, SPEC, SHARD_BYTES)
    for index in range(writer.next_source, SOURCES):
        writer.add(index, make_sample(index))
    writer.finish()
    writer.close()


def test_resume_skips_finished_shards_and_torn_leftovers(written, tmp_path):
    with CacheWriter(tmp_path / "c", SPEC, SHARD_BYTES) as writer:
        for index in range(SOURCES // 2):
            writer.add(index, make_sample(index))
    (tmp_path / "c" / "shard-00099.array_record").write_bytes(b"orphan")
    (tmp_path / "c" / "shard-00003.array_record.tmp").write_bytes(b"torn")
    with open(tmp_path / "c" / "samples.idx", "ab") as index_file:
        index_file.write(b"torn entry")
    with pytest.raises(UserError, match="unfinished: .* of 60 training rows are done; run the same"):
        TargetCache(tmp_path / "c")
    with CacheWriter(tmp_path / "c", SPEC, SHARD_BYTES) as writer:
        assert 0 < writer.next_source <= SOURCES // 2 and writer.records > 0 and writer.bytes_written > 0
        with pytest.raises(ValueError, match="the next is"):
            writer.add(writer.next_source + 1, None)
        with pytest.raises(ValueError, match="of 60 sources were added"):
            writer.finish()
    write_cache(tmp_path / "c")
    assert digest(tmp_path / "c") == digest(written)
    with CacheWriter(tmp_path / "c", SPEC, SHARD_BYTES) as writer:
        assert writer.complete and writer.next_source == SOURCES
        writer.finish()


def test_other_settings_are_not_continued(copied):
    before = digest(copied)
    for change, words in (
        ({"layer_ids": (0, 2)}, r"begun with layer_ids = \[-1, 2\], this run has \[0, 2\]"),
        ({"tokenizer_hash": "c" * 64}, "begun with tokenizer_hash = 'bbb.*, this run has 'ccc"),
        ({"max_length": 32}, "begun with max_length = 64, this run has 32"),
    ):
        with pytest.raises(UserError, match=words):
            CacheWriter(copied, dataclasses.replace(SPEC, **change), SHARD_BYTES)
    with pytest.raises(UserError, match="max_shard_bytes"):
        CacheWriter(copied, SPEC, SHARD_BYTES + 1)
    assert digest(copied) == before


def test_writer_touches_no_other_folder_and_has_it_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty .it holds thesis.txt"):
        CacheWriter(tmp_path, SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with CacheWriter(tmp_path / "c", SPEC), pytest.raises(UserError, match="Another process"):
        CacheWriter(tmp_path / "c", SPEC)


def test_truncated_and_missing_shards_are_named(copied):
    name = TargetCache(copied).manifest.shards[1].file
    with open(copied / name, "r+b") as shard:
        shard.truncate(shard.seek(0, 2) - 1)
    for opened in (TargetCache, lambda folder: CacheWriter(folder, SPEC, SHARD_BYTES)):
        with pytest.raises(UserError, match=f"{name} has .* bytes, expected"):
            opened(copied)
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        TargetCache(copied)


def test_flipped_byte_names_shard_and_sample(copied):
    cache = TargetCache(copied)
    name, sample = cache.manifest.shards[1].file, cache.manifest.shards[0].records
    record = make_sample(int(cache.sample_ids[sample])).features.astype(ml_dtypes.bfloat16).tobytes()
    flip(copied / name, (copied / name).read_bytes().index(record) + 5)
    cache = TargetCache(copied)
    with pytest.raises(UserError, match=f"Sample {cache.sample_ids[sample]} .record {sample}. in .*{name} is damaged"):
        cache[sample]
    cache[sample + 1], cache[0]
    with pytest.raises(UserError, match=f"{name} is damaged"):
        cache.verify()


def test_no_flipped_byte_goes_unnoticed(copied):
    """Anywhere in a shard: either a UserError or, in padding, the right samples, and `verify` always tells."""
    whole = TargetCache(copied)
    shard = copied / whole.manifest.shards[0].file
    good = [whole[i] for i in range(whole.manifest.shards[0].records)]
    data, refused = shard.read_bytes(), 0
    used = data.rindex(good[-1].last_hidden.tobytes()) + 200
    for offset in np.random.default_rng(0).integers(0, used, 40):
        flip(shard, int(offset))
        cache = TargetCache(copied)
        with pytest.raises(UserError):
            cache.verify()
        for index, expected in enumerate(good):
            try:
                assert_sample(cache[index], expected, SPEC.numpy_dtype)
            except UserError:
                refused += 1
        shard.write_bytes(data)
    assert refused >= 30


def test_own_checksum_catches_what_the_container_does_not(copied, monkeypatch):
    cache = TargetCache(copied)
    record = bytearray(cache._reader(0).read([0])[0])
    record[-1] ^= 1

    class Reader:
        def read(self, _):
            return [bytes(record)]

    monkeypatch.setattr(cache, "_reader", lambda number: Reader())
    with pytest.raises(UserError, match="Sample 0 .* checksum"):
        cache[0]
    with pytest.raises(UserError, match="samples.idx says"):
        record[-1] ^= 1
        cache[1]


def test_damaged_manifest_and_index(copied):
    flip(copied / "samples.idx", 3)
    with pytest.raises(UserError, match="samples.idx is damaged at the entries of shard-00000"):
        TargetCache(copied)
    path = copied / "manifest.json"
    value = json.loads(path.read_text())
    for change, words in (
        ({"version": 9}, "version 9, expected"),
        ({"records": 1}, "says 1 records, its shards add up"),
        ({"spec": {**value["spec"], "colour": 1}}, "missing or unknown fields .colour"),
        ({"shards": [{}]}, "shard 0, has no field"),
    ):
        path.write_text(json.dumps({**value, **change}))
        with pytest.raises(UserError, match=words):
            TargetCache(copied)
    path.write_text("{")
    with pytest.raises(UserError, match="manifest.json: not JSON"):
        TargetCache(copied)
    path.unlink()
    with pytest.raises(UserError, match="no manifest.json"):
        TargetCache(copied)


def test_mismatch_with_the_drafter_is_refused(written):
    cache = TargetCache(written)
    cache.require_match(layer_ids=[-1, 2], target_sha256="a" * 64, hidden_size=16)
    with pytest.raises(
        UserError, match=r"layer_ids is \[-1, 2\], expected \[0, 2\]; tokenizer_hash is 'b+', expected 'x'"
    ):
        cache.require_match(layer_ids=(0, 2), tokenizer_hash="x", hidden_size=16)
    DeepSpecCache(CASE / "cache").require_match(tokenizer_hash="not recorded there")


def test_estimate_and_disk(written, tmp_path):
    cache = TargetCache(written)
    estimate = estimate_bytes(int(cache.lengths.sum()), len(cache), SPEC, SHARD_BYTES)
    assert estimate >= sum(p.stat().st_size for p in written.iterdir() if p.name != "manifest.json")
    real = dataclasses.replace(SPEC, layer_ids=(1, 9, 17, 25, 33), hidden_size=2560)
    exact = 1_000_000 * (6 * 2560 * 2 + 5)
    assert exact < estimate_bytes(1_000_000, 1000, real, 512 * 2**20) < exact * 1.01
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match="needs 1,000,000,000.00 GB and the disk of .* has"):
        require_disk(tmp_path / "not" / "yet", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_spec_refuses_layer_ids_out_of_order():
    for ids in ((), (2, 1), (1, 1), (-2, 0)):
        with pytest.raises(UserError, match="strictly increasing"):
            dataclasses.replace(SPEC, layer_ids=ids)


def test_deepspec_golden_case():
    results = list(check_target_cache(CASE))
    assert len(results) > 30
    assert [r for r in results if not r[3]] == []


def test_deepspec_oversize_sample_has_a_shard_of_its_own(tmp_path):
    kept = [s for s in map(make_sample, range(6)) if s is not None]
    writer = DeepSpecCacheWriter(tmp_path / "c", SPEC, max_shard_bytes=1)
    for sample in kept:
        writer.add(sample)
    assert not (tmp_path / "c" / "manifest.json").exists()
    writer.finish()
    cache = open_cache(tmp_path / "c")
    assert isinstance(cache, DeepSpecCache) and len(list((tmp_path / "c").glob("shard-*.bin"))) == len(cache) == len(
        kept
    )
    for index, sample in enumerate(kept):
        assert_sample(cache[index], dataclasses.replace(sample, sample_id=index), SPEC.numpy_dtype)
    assert cache.spec.layer_ids == SPEC.layer_ids and cache.spec.max_length == SPEC.max_length
    with pytest.raises(UserError, match="not empty"):
        DeepSpecCacheWriter(tmp_path / "c", SPEC)


def test_deepspec_damage_is_named(tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        return Path(shutil.copytree(CASE / "cache", tmp_path / "c"))

    def refused(words):
        with pytest.raises(UserError, match=words):
            DeepSpecCache(tmp_path / "c")

    with open(fresh() / "shard-00001.bin", "r+b") as shard:
        shard.truncate(shard.seek(0, 2) - 1)
    refused("shard-00001.bin has 13467 bytes, its index needs 13468")
    with open(fresh() / "samples.idx", "r+b") as index:
        index.truncate(279)
    refused("samples.idx has 279 bytes, expected 280")
    (fresh() / "shard-00000.bin").unlink()
    refused("shard-00000.bin is missing")
    flip(fresh() / "samples.idx", 0)
    refused("does not number its samples")
    flip(fresh() / "samples.idx", 8)
    refused("names shard 16")
    flip(fresh() / "samples.idx", 17 + 6)
    refused("is truncated")
    value = json.loads((fresh() / "manifest.json").read_text())
    for change, words in (
        ({"version": 1}, "version = 1, only 2"),
        ({"hidden_dtype": "float8_e5m2"}, "hidden_dtype = 'float8_e5m2'"),
        ({"shards": value["shards"][:1]}, r"lists the shards \[0\]"),
        ({"target_layer_ids": [3, 1]}, "strictly increasing"),
    ):
        (tmp_path / "c" / "manifest.json").write_text(json.dumps({**value, **change}))
        refused(words)
    del value["hidden_size"]
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(value))
    refused("lacks hidden_size")
    with pytest.raises(UserError, match="has format None"):
        CacheWriter(tmp_path / "c", SPEC)
