"""What a run survives: numbers that are not finite, a full disk, SIGTERM, another number of devices."""

import asyncio
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.errors import UserError
from dspark_jax.training import feeds
from dspark_jax.training.checkpoint import Checkpoints, _quiet_failed_writes
from dspark_jax.training.run_folder import read_records
from dspark_jax.training.synthetic_cache import write_synthetic_cache
from tests.tiny import write_tiny_target
from tests.xla import xla_flags
from train.fit import main

ROOT = Path(__file__).parent.parent
SMALL = "--drafter.target-layer-ids 0 1 --drafter.block-size 3 --drafter.num-anchors 4 --data.max-length 24"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    target = write_tiny_target(folder / "target", num_hidden_layers=3)
    write_synthetic_cache(folder / "cache", describe_target(target), (0, 1), records=16, length=24, seed=0)
    return folder


def command(folder: Path, run: Path | str, *more: object, steps: int = 8) -> list[str]:
    places = ["--target", folder / "target", "--run-dir", folder / run, "--data.cache", folder / "cache"]
    recipe = f"--data.global-batch 4 --data.accumulation-steps 1 --epochs 99 --max-steps {steps}"
    return [str(w) for w in ("--config", "debug", *places, *SMALL.split(), *recipe.split(), *more)]


def poison(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int]) -> None:
    """Features of these steps (from 1) become NaN on their way to the device."""
    plain = feeds.device_batches

    def device_batches(batches: Any, placement: Any, start: int, stop: int) -> Any:
        for done, batch in enumerate(plain(batches, placement, start, stop), start + 1):
            if done in bad_steps:
                with jax.transfer_guard("allow"):
                    batch = batch | {"features": batch["features"] * jnp.nan}
            yield batch

    monkeypatch.setattr(feeds, "device_batches", device_batches)


def test_a_bad_batch_is_skipped_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        poison(patch, {3, 4})
        main(command(folder, "skipped", "--log-every", 2))
    records = read_records(folder / "skipped" / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [0, 2, 0, 0]
    assert records[1]["loss"] is None and np.isfinite(records[2]["loss"])
    summary = json.loads((folder / "skipped" / "metrics.json").read_text())
    assert summary["skipped"] == 2 and np.isfinite(summary["loss"])


def test_too_many_in_a_row_stop_at_the_last_good_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    limit = ["--optimizer.max-skipped", 1, "--checkpoint.every-steps", 2, "--log-every", 2]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        poison(patch, {3, 5, 6, 7, 8})
        main(command(folder, "stopped", *limit))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "not finite in 2 steps in a row, up to step 6" in said and "nonfinite.json names the samples" in said
    report = json.loads((folder / "stopped" / "nonfinite.json").read_text())
    assert [row["step"] for row in report["steps"]] == [5, 6]
    known = set(TargetCache(folder / "cache").sample_ids.tolist())
    assert all(len(row["sample_ids"]) == 4 and set(row["sample_ids"]) <= known for row in report["steps"])
    with Checkpoints(folder / "stopped" / "checkpoints", 9) as checkpoints:
        assert checkpoints.latest == 4  # not 6, which was skipped
    main(command(folder, "stopped", *limit))  # the samples were mended: it goes on
    losses = [record["loss"] for record in read_records(folder / "stopped" / "metrics.jsonl")]
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_sigterm_saves_and_the_next_start_continues(folder: Path):
    main(command(folder, "whole", "--checkpoint.every-steps", 1000, steps=40))
    arguments = command(folder, "told", "--checkpoint.every-steps", 1000, steps=40)
    process = subprocess.Popen(
        [sys.executable, "-m", "train.fit", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    log = folder / "told" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143, said
    assert "Stopped by SIGTERM after step" in said and "Traceback" not in said
    with Checkpoints(folder / "told" / "checkpoints", 9) as checkpoints:
        assert 2 <= (checkpoints.latest or 0) < 40
    main(arguments)
    steps = [record["step"] for record in read_records(log)]
    assert steps == list(range(1, 41))
    one, other = ((folder / run / "drafter" / "model.safetensors").read_bytes() for run in ("whole", "told"))
    assert one == other


def test_another_number_of_devices_continues_with_the_same_losses(folder: Path):
    """Steps 1 and 2 on one device, 3 to 8 on four: the curve of one device throughout."""
    main(command(folder, "one", "--checkpoint.every-steps", 2, "--checkpoint.keep", 9))
    shutil.copytree(folder / "one", folder / "moved")
    for step in ("4", "6", "8"):
        shutil.rmtree(folder / "moved" / "checkpoints" / step)
    (folder / "moved" / "metrics.json").unlink()
    arguments = command(folder, "moved", "--mesh.data", 2, "--mesh.fsdp", 2, "--checkpoint.every-steps", 2)
    done = subprocess.run(
        [sys.executable, "-m", "train.fit", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(4)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (
        {record["step"]: record["loss"] for record in read_records(folder / run / "metrics.jsonl")}
        for run in ("one", "moved")
    )
    assert one.keys() == other.keys() and len(one) == 8
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=2e-5)


class FileSizeLimit:
    """A disk with room for files of `size` bytes: a longer write fails, as on a full disk."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_writes_that_end_after_a_failed_save_print_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A thread of the storage library finds Orbax's event loop closed; what else goes wrong in a thread is shown."""
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    _quiet_failed_writes.__wrapped__()
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="closed") as caught:
        loop.call_soon_threadsafe(print)
    from_here = caught.value.__traceback__
    assert from_here is not None
    for trace in (from_here.tb_next, from_here, None):
        sys.unraisablehook(SimpleNamespace(exc_value=caught.value, exc_traceback=trace))  # type: ignore[arg-type]
    assert [raised.exc_traceback for raised in seen] == [from_here, None]

    seen.clear()
    state = {str(i): jnp.arange(512.0) + i for i in range(12)}
    for limit in (40, 300, 1200, 2000):
        saves = Checkpoints(tmp_path / str(limit), 2)
        with pytest.raises(UserError, match="could not be written"), saves, FileSizeLimit(limit):
            saves.save(1, state, {})
            saves.wait()
    gc.collect()
    assert not seen and capfd.readouterr().err == ""


def test_a_full_disk_during_a_save_leaves_the_save_before(tmp_path: Path):
    def state(value: float) -> dict[str, jax.Array]:
        return {"x": jnp.arange(100_000, dtype=jnp.float32) * value}

    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    checkpoints.save(1, state(1.0), {"n": 1})
    checkpoints.wait()
    with FileSizeLimit(8192), pytest.raises(UserError, match="could not be written .*; the one of step 1 is whole"):
        checkpoints.save(2, state(2.0), {"n": 2})
        checkpoints.wait()
    with Checkpoints(tmp_path / "c", keep=3) as again:
        assert again.latest == 1
        restored, extra = again.restore(1, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(1.0)))
        np.testing.assert_array_equal(restored["x"], state(1.0)["x"])
        assert extra == {"n": 1}
        again.save(2, state(2.0), {"n": 2})
        again.wait()
        assert again.latest == 2


def test_a_full_disk_while_a_cache_is_written_leaves_its_finished_shards(folder: Path, tmp_path: Path):
    whole = TargetCache(folder / "cache")
    samples = [whole[i] for i in range(8)]
    shard = 2 * 24 * (2 * 32 + 32) * 4  # two records
    with CacheWriter(tmp_path / "c", whole.spec, shard) as writer:
        for sample in samples[:4]:
            writer.add(sample.sample_id, sample)
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    full = pytest.raises(UserError, match="could not be written .*; its 2 finished shards are whole")
    with full, FileSizeLimit(8192), CacheWriter(tmp_path / "c", whole.spec, shard) as writer:
        for index in range(writer.next_source, 8):
            writer.add(index, samples[index])
    after = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    assert {name: after[name] for name in before} == before
    with CacheWriter(tmp_path / "c", whole.spec, shard) as writer:
        assert writer.next_source == 4
