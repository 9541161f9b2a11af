"""The batch pipeline: order, padding, resume, threads."""

import dataclasses
import threading
import time
import weakref

import ml_dtypes
import numpy as np
import pytest

from dspark_jax.data import pipeline
from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.pipeline import Batches, length_buckets, open_cache, pad_batch
from dspark_jax.data.records import TokenSample
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.data.views import Tapped
from dspark_jax.errors import UserError
from tests.kill_cache import SPEC, make_sample, write_cache

BUCKETS = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder)
    found = open_cache(folder)
    assert isinstance(found, TargetCache)
    return found


def take(batches: Batches, count: int, start: int = 0) -> list[list[int]]:
    with batches.iterate(start) as iterator:
        return [next(iterator)["sample_ids"].tolist() for _ in range(count)]


def test_every_epoch_holds_every_sample_once_in_another_order(cache):
    count = len(cache)
    batches = Batches(cache, 4, seed=3, buckets=BUCKETS)
    assert batches.steps_per_epoch == count // 4
    flat = np.concatenate([batches.indices_at(s) for s in range(3 * batches.steps_per_epoch)]).reshape(3, count)
    for epoch in flat:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in flat}) == 3
    assert flat[0].tolist() != list(range(count))


def test_order_is_a_function_of_seed_and_step(cache):
    batches = Batches(cache, 5, seed=3, buckets=BUCKETS)
    straight = take(batches, 12)
    ids = cache.sample_ids
    assert straight == [ids[batches.indices_at(s)].tolist() for s in range(12)]
    assert straight == [batches.batch_at(s)["sample_ids"].tolist() for s in reversed(range(12))][::-1]
    assert straight == take(Batches(cache, 5, seed=3, buckets=(64,)), 12)
    assert straight != take(Batches(cache, 5, seed=4, buckets=BUCKETS), 12)
    assert straight[5:] == take(batches, 7, start=5)
    with batches.iterate(ahead=1) as one, batches.iterate(ahead=8) as many:
        assert [next(one)["sample_ids"].tolist() for _ in range(6)] == straight[:6]
        assert [next(many)["sample_ids"].tolist() for _ in range(6)] == straight[:6]
    in_order = Batches(cache, 5, seed=3, buckets=BUCKETS, shuffle=False)
    assert in_order.indices_at(0).tolist() == list(range(5))


def test_order_is_pinned(cache):
    """A change of the order would break the resume of runs begun with an earlier version."""
    assert Batches(cache, 6, seed=0, buckets=BUCKETS).indices_at(10).tolist() == [25, 8, 17, 34, 30, 41]


def test_resume_continues_whatever_was_read_ahead(cache):
    batches = Batches(cache, 3, seed=1, buckets=BUCKETS)
    straight = take(batches, 10)
    with batches.iterate(ahead=6) as iterator:
        for _ in range(4):
            next(iterator)
        state = iterator.get_state()
    assert state == {"step": 4}
    with batches.iterate() as iterator:
        next(iterator)
        iterator.set_state(state)
        assert [next(iterator)["sample_ids"].tolist() for _ in range(6)] == straight[4:]
        assert iterator.get_state() == {"step": 10}


def test_hosts_share_a_step_and_its_length(cache):
    whole = Batches(cache, 12, seed=5, buckets=BUCKETS)
    for hosts in (2, 3):
        spans = np.split(np.arange(12), hosts)
        parts = [Batches(cache, 12, seed=5, buckets=BUCKETS, rows=tuple(span.tolist())) for span in spans]
        for step in range(8):
            expected = whole.batch_at(step)
            rows = [part.batch_at(step) for part in parts]
            for name, array in expected.items():
                np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), array)


def test_batch_is_padded_to_the_smallest_bucket(cache):
    batches = Batches(cache, 4, seed=2, buckets=BUCKETS)
    seen = set()
    for step in range(12):
        batch = batches.batch_at(step)
        longest, length = int(batch["lengths"].max()), batch["input_ids"].shape[1]
        assert length == min(b for b in BUCKETS if b >= longest)
        seen.add(length)
        assert batch["input_ids"].dtype == np.int32 and batch["loss_mask"].dtype == np.uint8
        assert batch["features"].shape == (4, length, SPEC.feature_size)
        assert batch["last_hidden"].shape == (4, length, SPEC.hidden_size)
        assert batch["features"].dtype == batch["last_hidden"].dtype == ml_dtypes.bfloat16
        for row, (size, source) in enumerate(zip(batch["lengths"], batch["sample_ids"], strict=True)):
            expected = make_sample(int(source)).features.astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(batch["features"][row, :size], expected)
            for name in ("input_ids", "loss_mask", "features", "last_hidden"):
                assert not batch[name][row, size:].any()
    assert len(seen) > 1


def test_a_step_may_be_larger_than_the_source(cache):
    batches = Batches(cache, len(cache) + 3, seed=2, buckets=BUCKETS)
    assert batches.steps_per_epoch == 1
    assert len(set(batches.indices_at(0)[: len(cache)].tolist())) == len(cache)


def test_threads_end_with_the_iterator(cache):
    def ended() -> bool:
        deadline = time.monotonic() + 10  # a thread ends after the batch it is at
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        return threading.active_count() <= before

    before = threading.active_count()
    iterator = Batches(cache, 2, seed=0, buckets=BUCKETS).iterate(ahead=3)
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    iterator.close()
    assert ended()
    assert len(list(Batches(cache, 2, seed=0, buckets=BUCKETS).iterate(stop=5))) == 5
    assert ended()


class Counting:
    """A source, and the bytes of the records and batches that are in memory because of it."""

    def __init__(self, cache: TargetCache, monkeypatch: pytest.MonkeyPatch):
        self._cache, self._lock, self.lengths = cache, threading.Lock(), cache.lengths
        self.alive = self.most = self.records = 0
        monkeypatch.setattr(pipeline, "pad_batch", lambda *args: self._counted(pad_batch(*args)))

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> TokenSample:
        sample = self._cache[index]
        self._counted(sample.arrays())
        self.records += 1
        return sample

    def _counted(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for array in arrays.values():
            self._add(array.nbytes)
            weakref.finalize(array, self._add, -array.nbytes)
        return arrays

    def _add(self, size: int) -> None:
        with self._lock:
            self.alive += size
            self.most = max(self.most, self.alive)


def test_what_is_read_ahead_is_bounded(cache, monkeypatch):
    """In batches by the buffer of Grain's threads, and in bytes by what a batch may take."""
    rows = 2
    for allowed, ahead in ((0.1, 1), (4.1, 2), (100, 4)):
        source = Counting(cache, monkeypatch)
        batches = Batches(source, rows, seed=0, buckets=(64,))
        largest = batches.batch_bytes(0)
        monkeypatch.setenv(pipeline.GIGABYTES, str(allowed * largest / 1e9))
        source.records, batch = 0, None
        with batches.iterate() as iterator:
            for taken in range(1, 8):
                batch = next(iterator)
                # A loop that does nothing with its batches: the threads have all the time they want.
                until = time.monotonic() + 0.05
                while time.monotonic() < until:
                    time.sleep(0.01)
                # The sample that gave the size, the batches taken, those ahead.
                assert source.records <= 1 + rows * (taken + ahead)
        # Beside the loop's own batch and the one that it takes.
        assert batch is not None and source.most <= (2 * ahead + 2) * largest
        assert source.records == 1 + rows * (7 + ahead)

    monkeypatch.setenv(pipeline.GIGABYTES, "much")
    with pytest.raises(UserError, match="DSPARK_READ_AHEAD_GB is 'much'; a number"):
        next(batches.iterate())


def test_a_containers_limit_counts_for_the_machines_memory(tmp_path, monkeypatch):
    monkeypatch.delenv(pipeline.GIGABYTES, raising=False)
    monkeypatch.setattr(pipeline, "CONTAINER_LIMIT", tmp_path / "memory.max")
    machine = pipeline.bound_of_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert pipeline.bound_of_memory() == machine > 4000
    (tmp_path / "memory.max").write_text("4000\n")
    assert pipeline.bound_of_memory() == 1000


def test_damage_surfaces_as_the_users_error(cache, monkeypatch):
    batches = Batches(cache, 2, seed=0, buckets=BUCKETS)

    def damaged(self, index):
        raise UserError("Sample 3 is damaged")

    monkeypatch.setattr(TargetCache, "__getitem__", damaged)
    with batches.iterate() as iterator, pytest.raises(UserError, match="^Sample 3 is damaged$"):
        next(iterator)


def test_settings_that_cannot_work_are_refused(cache):
    with pytest.raises(UserError, match="longest sample has .* tokens, the largest length bucket 16"):
        Batches(cache, 2, seed=0, buckets=(8, 16))
    with pytest.raises(UserError, match="strictly increasing"):
        Batches(cache, 2, seed=0, buckets=(64, 8))


def test_empty_cache_is_refused(tmp_path):
    with CacheWriter(tmp_path, dataclasses.replace(SPEC, num_sources=2)) as writer:
        writer.add(0, None)
        writer.add(1, None)
        writer.finish()
    empty = TargetCache(tmp_path)
    assert len(empty) == 0
    with pytest.raises(UserError, match="every training row was dropped"):
        Batches(empty, 1, seed=0, buckets=BUCKETS)


def test_length_buckets():
    assert length_buckets(4096) == (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
    assert length_buckets(100) == (128,)
    assert length_buckets(130, smallest=64) == (64, 128, 192)
    assert length_buckets(33, smallest=1)[-1] == 33


def test_pad_batch_takes_a_longer_length(cache):
    batch = pad_batch([cache[0], cache[1]], 50)
    assert batch["input_ids"].shape == (2, 50) and batch["lengths"].tolist() == cache.lengths[:2].tolist()


def test_some_layers_of_a_cache(cache):
    layers = cache.spec.layer_ids
    assert len(layers) > 1
    view, whole = Tapped(cache, layers[-1:]), cache[3]
    assert view.spec.layer_ids == layers[-1:] and view.spec.feature_size == cache.spec.hidden_size
    np.testing.assert_array_equal(view[3].features, whole.features[:, -cache.spec.hidden_size :])
    np.testing.assert_array_equal(view[3].input_ids, whole.input_ids)
    assert len(view) == len(cache) and view.lengths.tolist() == cache.lengths.tolist()
    with pytest.raises(UserError, match="not of layer 77; build one with it"):
        Tapped(cache, (layers[0], 77))
