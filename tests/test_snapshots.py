"""What a save holds the loop up for, and what it writes: the state of its step, whose memory the next step takes."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.errors import UserError
from dspark_jax.storage import objects
from dspark_jax.training import checkpoint, checksum, snapshots
from dspark_jax.training.array_blocks import share
from dspark_jax.training.checkpoint import Checkpoints, abstract
from dspark_jax.training.object_checkpoints import AnyCheckpoints, ObjectCheckpoints
from dspark_jax.training.snapshots import Snapshots
from tests.store_fixtures import machine, place, server
from train.studies.save_stall import step_until_told

__all__ = ["machine", "server"]  # fixtures


def state_of(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "weight": jnp.asarray(rng.normal(size=(300, 7)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "key": jax.random.key(seed),
        "step": jnp.int32(seed),
    }


@jax.jit
def plain(state: Any) -> dict[str, np.ndarray]:
    return state | {"key": jax.random.key_data(state["key"])}


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(plain(one)[name], plain(other)[name]) for name in one)


step = jax.jit(lambda state: state | {"weight": state["weight"] * 0 - 1}, donate_argnums=0)


def test_a_copy_outlives_the_step_and_the_next_one_takes_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshots, "_PIECE", 64)  # several pieces an array
    taken, state = Snapshots(), state_of(1)
    touching = taken.prepare(state)
    assert touching is not None
    where = state["weight"].unsafe_buffer_pointer()
    copy = taken.take(state)
    assert not touching.is_alive()
    state = jax.block_until_ready(step(state))
    # A reference that was left behind would make the step copy its state.
    assert state["weight"].unsafe_buffer_pointer() == where
    assert same(copy, state_of(1)) and abstract(copy) == abstract(state_of(1))

    # No second copy beside the first, and none that JAX makes of it.
    held = copy["weight"].unsafe_buffer_pointer()
    del copy
    again = taken.take(state_of(2))
    assert again["weight"].unsafe_buffer_pointer() == held and same(again, state_of(2))


def test_devices_without_room_copy_nothing(monkeypatch: pytest.MonkeyPatch):
    """As an accelerator: once the devices have said how much no step has used."""
    monkeypatch.setattr(snapshots, "_on_host", lambda leaves: False)
    size = sum(x.nbytes for x in plain(state_of(1)).values())
    for free, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(snapshots, "_free", lambda device, free=free: free)
        taken = Snapshots()
        copy = taken.take(state_of(1))
        assert (copy is not None) == fits and (copy is None or same(copy, state_of(1)))


def test_processes_that_hold_the_same_share_it_out():
    for shape in ((), (5, 3), (2, 40, 7), (0, 4), (1,)):
        for count in (1, 3, 16):
            written = np.zeros(shape or (1,), int)
            for number in range(count):
                axis, first, last = share(shape, number, count)
                written[(slice(None),) * axis + (slice(first, last),)] += 1
            assert (written == 1).all()


KINDS: dict[str, Callable[[Path], AnyCheckpoints]] = {
    "disk": lambda folder: Checkpoints(folder / "c", 1),
    "store": lambda folder: ObjectCheckpoints(place(folder.name), 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_waits_for_the_copy_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Checksums, serialising, writing and the files' hashes are the thread's."""
    goes_on, threads = threading.Event(), list[threading.Thread]()

    def held(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            threads.append(threading.current_thread())
            assert goes_on.wait(20)
            return function(*args)

        return call

    with KINDS[kind](tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checksum, "checksums", held(checksum.checksums))
            patch.setattr(checkpoint, "write_hashes", held(checkpoint.write_hashes))
            patch.setattr(objects, "write", held(objects.write))
            state = state_of(2)
            checkpoints.save(2, state, {"pending": [2]})
            # The memory that was saved is written over before anything of it is read.
            jax.block_until_ready(step(state))
            goes_on.set()
            checkpoints.wait()

        assert len(threads) >= 2 and threading.main_thread() not in threads
        restored = checkpoints.restore_latest(abstract(state_of(0)))
        assert restored is not None and restored[0] == 2 and same(restored[1], state_of(2))


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_devices_the_loop_starts_the_checksums(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Collectives of two threads may reach the devices in different orders, which then wait for each other."""
    threads = list[threading.Thread]()
    begin, whole = checksum.begin_checksums, checksum.checksums

    def noted(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda tree: threads.append(threading.current_thread()) or function(tree)

    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with KINDS[kind](tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checksum, "begin_checksums", noted(begin))
        patch.setattr(checksum, "checksums", noted(whole))
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        assert threads == [threading.main_thread()]
        assert same(checkpoints.restore(1, abstract(state_of(0)))[0], state_of(1))


def test_a_copy_that_changes_before_it_is_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seal = checkpoint.sealed
    with Checkpoints(tmp_path / "c", 1) as checkpoints:

        def flipped(notes: dict[str, Any]) -> dict[str, Any]:
            assert checkpoints._snapshots._memory is not None
            checkpoints._snapshots._memory[3] ^= 1
            return seal(notes)

        monkeypatch.setattr(checkpoint, "sealed", flipped)
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        with pytest.raises(UserError, match="its arrays are not those that were saved"):
            checkpoints.restore(1, abstract(state_of(0)))


def test_sigterm_leaves_a_durable_checkpoint_though_one_was_being_saved(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "c", 2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    state: Any = {"x": jnp.ones(3)}
    with checkpoints, pytest.raises(SystemExit) as stop:
        step_until_told(checkpoints, state, 1)
    assert stop.value.code == 143
    with Checkpoints(tmp_path / "c", 2) as again:
        assert again.latest is not None and again.latest > 1
