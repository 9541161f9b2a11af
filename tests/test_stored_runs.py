"""Caches, checkpoints and runs in an object store: a kill at every request, damage, other machines."""

import itertools
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import load_config
from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.pipeline import Batches
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.data.views import Packed, Tapped, Truncated
from dspark_jax.errors import UserError
from dspark_jax.files import lock_folder
from dspark_jax.storage import lease, objects, replica, shards
from dspark_jax.storage.places import Place, local_path
from dspark_jax.storage.shards import Shard, ShardFolder
from dspark_jax.training.checkpoint import Checkpoints, abstract
from dspark_jax.training.fitting import only_writer
from dspark_jax.training.object_checkpoints import ASIDE, MARKER, ObjectCheckpoints
from dspark_jax.training.run_folder import require_same_run, write_config
from dspark_jax.training.snapshots import Snapshots
from infer.export import main as export
from tests.drafters_tiny import write_pair
from tests.kill_cache import SHARD_BYTES, SOURCES, SPEC, make_sample, write_cache
from tests.kill_resume import TASKS
from tests.kill_stores import kill_and_compare
from tests.store_fixtures import machine, place, server
from tests.stores import BUCKET, S3Server
from tests.tiny import write_tiny_target

__all__ = ["machine", "server"]  # fixtures


class Crash(BaseException):
    """A kill: nothing of the writer's own clean-up may run before it."""


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """dies(k): after k more changes of the store this process changes nothing; what it had locked before is free."""
    left, leases, locks = [0], [], []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return function(*args, **options)

        return call

    def taken(self: lease.Lease, *args: Any, begin: Any = lease.Lease.__init__) -> None:
        leases.append(self)
        begin(self, *args)

    def remembered(folder: Path, what: str, lock: Any = replica.lock_folder, **options: Any) -> Any:
        locks.append(lock(folder, what, **options))
        return locks[-1]

    def arm(operations: int) -> None:
        # What the end of a process does to its threads and locks.
        for dead in leases:
            dead._ended.set()
        for held in locks:
            held.release()
        left[0] = operations

    monkeypatch.setattr(objects, "_put", counted(objects._put))
    monkeypatch.setattr(objects, "remove", counted(objects.remove))
    monkeypatch.setattr(replica, "lock_folder", remembered)
    # The dead renew nothing, which is known here without waiting.
    monkeypatch.setattr(lease.Lease, "_watch", lambda self, before, host: None)
    monkeypatch.setattr(lease.Lease, "__init__", taken)
    return arm


def test_a_cache_killed_at_any_change_ends_with_the_same_bytes(
    machine: Path, tmp_path: Path, dies: Callable[[int], None]
):
    write_cache(tmp_path / "disk")
    names = sorted(path.name for path in (tmp_path / "disk").iterdir())
    graves: list[CacheWriter] = []
    for operations in itertools.count(2, 4):
        there, folder = place(f"killed-{operations}"), machine / f"work/s3/{BUCKET}/killed-{operations}"
        dies(operations)
        try:
            leave_cache(str(there), graves)
            break
        except Crash:
            dies(10_000)
        # In turn the same machine, and one that has nothing of it.
        if operations % 8 == 2:
            shutil.rmtree(folder)
        write_cache(Path(str(there)))
        assert list(objects.listing(there)) == names
        assert all(objects.read(there / name) == (tmp_path / "disk" / name).read_bytes() for name in names)
        assert not list(folder.glob("shard-*"))
    assert operations > 20


def leave_cache(folder: str, graves: list[CacheWriter]) -> None:
    """`write_cache` without the clean-up that a killed process does not do, nor the collector for it."""
    writer = CacheWriter(folder, SPEC, SHARD_BYTES)
    graves.append(writer)
    for index in range(writer.next_source, SOURCES):
        writer.add(index, make_sample(index))
    writer.finish()
    writer.close()


def test_shards_are_fetched_bounded_and_verified(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cache(tmp_path / "disk")
    write_cache(Path("s3://pod/shards"))
    disk, folder = TargetCache(tmp_path / "disk"), machine / f"read/s3/{BUCKET}/shards"
    sizes = [shard.bytes for shard in disk.manifest.shards]
    assert len(sizes) > 3

    # Room for two of the shards: every sample is read all the same.
    monkeypatch.setenv(shards.GIGABYTES, str(2.2 * max(sizes) / 1e9))
    stored = TargetCache("s3://pod/shards")
    for index in np.random.default_rng(0).permutation(len(disk)):
        np.testing.assert_array_equal(stored[int(index)].features, disk[int(index)].features)
    assert 0 < sum(path.stat().st_size for path in folder.glob("shard-*")) <= 2.2 * max(sizes)
    stored.close()

    # Room for all: they come ahead of the first read.
    monkeypatch.setenv(shards.GIGABYTES, "1")
    whole = TargetCache("s3://pod/shards")
    assert whole._fetched is not None
    assert [whole._fetched.path(number).stat().st_size for number in range(len(sizes))] == sizes
    whole.close()

    data = bytearray(objects.read(place("shards/shard-00000.array_record")))
    data[100] ^= 1
    objects.write(place("shards/shard-00000.array_record"), bytes(data))
    (folder / "shard-00000.array_record").unlink()
    with pytest.raises(UserError, match="s3://pod/shards/shard-00000.array_record is damaged: its hash"):
        TargetCache("s3://pod/shards")[0]
    objects.remove([place("shards/shard-00001.array_record")])
    with pytest.raises(UserError, match="shard-00001.array_record is missing"):
        TargetCache("s3://pod/shards")


def test_shards_come_ahead_in_order():
    for number in range(3):
        objects.write(place(f"ahead/{number}"), bytes([number]) * 10)
    folder = ShardFolder(place("ahead"), [Shard(str(number), 10, None) for number in range(3)], most_bytes=20)
    folder.ahead([2, 0])
    assert folder.path(0).read_bytes() == b"\0" * 10 and folder.path(1).read_bytes() == b"\1" * 10
    left = {path.name for path in folder.folder.iterdir()}
    assert len(left) == 2 and "1" in left
    folder.close()


# -- Checkpoints -----------------------------------------------------------------------------------------------------


def state_of(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {
        "weight": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "none": jnp.zeros((0, 4)),
        "key": jax.random.key(step),
        "step": jnp.int32(step),
    }


def same(one: Any, other: Any) -> bool:
    def data(x: jax.Array) -> Any:
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return all(np.array_equal(data(a), data(b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


LIKE = abstract(state_of(0))


def test_what_is_no_step_is_left_alone():
    from train.studies.save_stall import opened

    objects.write(place("beside/notes/a.txt"), b"of the user")
    objects.write(place("beside/7/torn.bin"), b"of a killed save")
    ObjectCheckpoints(place("beside"), 1).close()
    assert list(objects.listing(place("beside"))) == ["notes/a.txt"]
    # A study removes what it saves, and so takes an empty place alone.
    with pytest.raises(UserError, match="s3://pod/beside is not empty"):
        opened("s3://pod/beside")


def test_checkpoints_are_kept_and_restored():
    pushed: list[int] = []
    with ObjectCheckpoints(place("kept"), 2, 1, lambda: pushed.append(1)) as checkpoints:
        assert checkpoints.restore_latest(LIKE) is None
        for step, score in ((1, 3.0), (2, None), (3, 2.0), (4, None)):
            checkpoints.save(step, state_of(step), {"pending": [step]}, score)
        checkpoints.wait()
        assert (checkpoints.latest, checkpoints.best, len(pushed)) == (4, 1, 4)

    # The latest two, and the best.
    assert {name.partition("/")[0] for name in objects.listing(place("kept"))} == {"1", "3", "4"}
    with ObjectCheckpoints(place("kept"), 2, 1) as checkpoints:
        restored = checkpoints.restore_latest(LIKE)
        assert restored is not None
        assert restored[0] == 4 and same(restored[1], state_of(4)) and restored[2] == {"pending": [4]}
        assert same(checkpoints.restore(1, LIKE)[0], state_of(1))


@pytest.mark.parametrize("room", [True, False])
def test_what_is_saved_is_the_state_of_its_step(room: bool, monkeypatch: pytest.MonkeyPatch):
    """Though the next step takes its memory, and whether or not the devices have room for a copy."""
    if not room:
        monkeypatch.setattr(Snapshots, "take", lambda self, state: None)
    move = jax.jit(lambda state: state | {"weight": state["weight"] * 0 - 1}, donate_argnums=0)
    held = threading.Event()
    plain = objects.write
    monkeypatch.setattr(objects, "write", lambda *args: held.wait(10) and plain(*args))

    with ObjectCheckpoints(place(f"donated-{room}"), keep=1) as checkpoints:
        state = state_of(1)
        checkpoints.save(1, state, {})
        # The write begins when the memory has been written over.
        jax.block_until_ready(move(state))
        held.set()
        checkpoints.wait()
        assert same(checkpoints.restore(1, LIKE)[0], state_of(1))


def test_a_save_killed_at_any_change_leaves_the_one_before(dies: Callable[[int], None]):
    for operations in range(6):
        there = place(f"cut-{operations}")
        dies(10_000)
        with ObjectCheckpoints(there, keep=1) as checkpoints:
            checkpoints.save(1, state_of(1), {})
        checkpoints = ObjectCheckpoints(there, keep=1)
        dies(operations)
        checkpoints.save(2, state_of(2), {})
        with pytest.raises(UserError, match="could not be written") if operations < 3 else pytest.raises(Exception):
            checkpoints.wait()
            raise UserError("it was written")

        dies(10_000)
        with ObjectCheckpoints(there, keep=1) as checkpoints:
            restored = checkpoints.restore_latest(LIKE)
            # Three changes make a checkpoint: the bytes, their table, the marker.
            step = 1 if operations < 3 else 2
            assert restored is not None and restored[0] == step and same(restored[1], state_of(step))
            left = {name.partition("/")[0] for name in objects.listing(there)}
            assert left <= ({"1"} if step == 1 else {"1", "2"})


def test_a_damaged_checkpoint_is_passed_over(capsys: pytest.CaptureFixture[str]):
    there = place("damaged")
    with ObjectCheckpoints(there, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), {})

    bits = next(name for name in objects.listing(there) if name.startswith("3/") and name.endswith(".bin"))
    flip(there / bits, 7)
    flip(there / "2" / MARKER, 40)
    with ObjectCheckpoints(there, keep=9) as checkpoints:
        restored = checkpoints.restore_latest(LIKE)
        assert restored is not None and restored[0] == 1 and same(restored[1], state_of(1))
    said = capsys.readouterr().err
    assert "step 2 in s3://pod/damaged is damaged" in said and "step 3 in s3://pod/damaged is damaged" in said
    assert {f"2/{ASIDE}", f"3/{ASIDE}", bits} <= set(objects.listing(there))

    objects.write(there / "1" / MARKER, json.dumps({"seal": "", "score": None}).encode())
    with ObjectCheckpoints(there, keep=9) as checkpoints, pytest.raises(UserError, match="None of the checkpoints"):
        checkpoints.restore_latest(LIKE)


@pytest.mark.parametrize("stored", [True, False])
def test_a_checkpoint_with_other_parameters_is_not_called_damaged(stored: bool, tmp_path: Path):
    """Of a run begun before its matrices were joined: it stays where it is, for the version that can read it."""

    def opened() -> Any:
        return ObjectCheckpoints(place("apart"), 1) if stored else Checkpoints(tmp_path / "apart", 1)

    # Orbax saves no empty arrays.
    state = {name: leaf for name, leaf in state_of(1).items() if name != "none"}
    with opened() as checkpoints:
        checkpoints.save(1, state, {})
    joined = abstract({name: leaf for name, leaf in state.items() if name != "half"})
    with opened() as checkpoints, pytest.raises(UserError, match="holds 4 arrays, .* 3: .* another version"):
        checkpoints.restore_latest(joined)
    with opened() as checkpoints:
        assert checkpoints.latest == 1 and same(checkpoints.restore(1, abstract(state))[0], state)


def flip(there: Place, at: int) -> None:
    data = bytearray(objects.read(there))
    data[at] ^= 1
    objects.write(there, bytes(data))


def test_a_store_that_fails_ends_a_save_with_a_sentence(server: S3Server, monkeypatch: pytest.MonkeyPatch):
    with ObjectCheckpoints(place("down"), keep=1) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        monkeypatch.setenv("DSPARK_STORE_SECONDS", "1")
        server.faults(every=1, status=503)
        checkpoints.save(2, state_of(2), {})
        with pytest.raises(UserError, match="could not be written; the one of step 1 is whole"):
            checkpoints.wait()


@pytest.mark.subprocesses
def test_a_killed_run_in_a_failing_store_is_undisturbed(server: S3Server, tmp_path: Path):
    task = TASKS["train"](write_tiny_target(tmp_path / "target", num_hidden_layers=3), tmp_path)
    shorter = replace(task, command=lambda folder: [*task.command(folder), "--max-steps", "6"])
    assert kill_and_compare(shorter, tmp_path, server, times=1) == []


def test_batches_have_the_shards_of_their_samples_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cache(Path("s3://pod/batched"))
    monkeypatch.setenv(shards.GIGABYTES, "0.00003")  # no room for all of them
    announced: list[list[int]] = []
    monkeypatch.setattr(ShardFolder, "ahead", lambda self, numbers: announced.append(list(numbers)))
    cache = TargetCache("s3://pod/batched")
    assert announced == []

    source = Packed(Truncated(Tapped(cache, (2,)), 32), 64)
    batch = Batches(source, global_batch=2, seed=0, buckets=(64,)).batch_at(0)
    wanted = {int(np.searchsorted(cache.sample_ids, name)) for name in Batches(source, 2, 0, (64,)).sample_ids_at(0)}
    shard_of = np.searchsorted(cache._starts, sorted(wanted), side="right") - 1
    assert batch["input_ids"].shape == (2, 64) and set(announced[0]) == set(shard_of.tolist())
    cache.close()


def test_models_are_read_from_a_store_and_exports_written_to_it(
    server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target, drafter = write_pair(tmp_path / "pair", dtype="bfloat16")
    save_drafter(tmp_path / "drafter", drafter, target)
    for kind, folder in (("target", Path(target.name)), ("drafter", tmp_path / "drafter")):
        for path in folder.iterdir():
            objects.upload(path, place("models") / kind / path.name)

    server.faults(every=3, status=503)
    options = ["--target", "s3://pod/models/target", "--layout", "speculators", "--verifier", "tiny/target"]
    export([*options, "--drafter", "s3://pod/models/drafter", "--output", "s3://pod/models/out"])
    export([*options, "--drafter", str(tmp_path / "drafter"), "--output", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert list(objects.listing(place("models/out"))) == names
    assert all(objects.read(place("models/out") / name) == (tmp_path / "out" / name).read_bytes() for name in names)

    with pytest.raises(SystemExit):
        export([*options, "--drafter", "s3://pod/models/drafter", "--output", "s3://pod/models/out"])
    assert "holds something already" in capsys.readouterr().err
    with pytest.raises(UserError, match="s3://pod/models/none.gguf does not exist"):
        load_target("s3://pod/models/none.gguf")
    with pytest.raises(UserError, match="is in an object store, where this program does not write"):
        lock_folder(Path("s3://pod/models/out"))


def test_a_run_is_known_in_the_store_before_it_has_anything_else():
    """A kill while it writes its own records must not leave a folder that is no run's."""
    config, folder = load_config("debug"), local_path("s3://pod/early")
    write_config(folder, config)
    assert list(objects.listing(place("early"))) == ["config.json"]
    objects.write(place("early/cache/manifest.json"), b"{}")
    shutil.rmtree(folder)
    with only_writer(folder):
        require_same_run(folder, config)
