"""Faults around a run, each with the sentence or the value that is right: full disks, two writers, changed bytes."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.errors import UserError
from dspark_jax.files import lock_folder, write_settings
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.checkpoint_notes import HASHES, damage
from dspark_jax.training.checksum import checksums
from dspark_jax.training.run_folder import MetricsLog, read_records
from dspark_jax.training.synthetic_cache import write_synthetic_cache
from tests.test_guards import FileSizeLimit, command
from tests.tiny import write_tiny_target
from train import export
from train.fit import main

pytestmark = pytest.mark.usefixtures("shared_steps")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    target = write_tiny_target(folder / "target", num_hidden_layers=3)
    write_synthetic_cache(folder / "cache", describe_target(target), (0, 1), records=16, length=24, seed=0)
    main(command(folder, "whole", "--checkpoint.every-steps", 2, "--checkpoint.keep", 9))
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], program: Any = main) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    return said


def drafter_bytes(run: Path) -> bytes:
    return (run / "drafter" / "model.safetensors").read_bytes()


def unfinished(folder: Path, name: str) -> Path:
    """A copy of the whole run that lacks its summary and its drafter: it continues from its checkpoints."""
    run = folder / name
    shutil.copytree(folder / "whole", run)
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "drafter")
    return run


# -- A full disk -----------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_between_checkpoints_ends_the_run_with_a_sentence(folder: Path):
    """In a process of its own with a timeout: what it must not do is hang."""
    code = (
        "import pathlib, resource, signal, sys, time; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from dspark_jax.training import run_folder; from train.fit import main;"
        "write = run_folder.ScalarBoard.write\n"
        "def fill(self, step, scalars):\n"
        "    while step == 5 and not pathlib.Path(sys.argv[-1], 'checkpoints', '3').exists(): time.sleep(0.05)\n"
        "    if step == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))\n"
        "    write(self, step, scalars)\n"
        "run_folder.ScalarBoard.write = fill; main(sys.argv[1:])"
    )
    # Of as many steps as the whole run, so that it has its program.
    arguments = command(folder, "full", "--checkpoint.every-steps", 3)
    arguments += ["--run-dir", str(folder / "full")]  # last, where the code above looks for it
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "the run continues from its latest checkpoint" in done.stderr and "Traceback" not in done.stderr
    main(arguments)
    assert [record["step"] for record in read_records(folder / "full" / "metrics.jsonl")] == list(range(1, 9))


def test_records_before_a_full_disk_are_whole(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    with pytest.raises(UserError, match="cannot be written .File too large.; make room"), FileSizeLimit(200):
        for step in range(1, 99):
            log.write({"step": step, "loss": 0.1234567})
    log.close()
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= len(log.records) > 1


# -- Two writers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [main, export.main])
def test_a_run_has_one_writer(folder: Path, program: Any, capsys: pytest.CaptureFixture[str]):
    with lock_folder(folder / "whole"):
        said = refused(command(folder, "whole"), capsys, program)
    assert "Another process is writing the run" in said and "wait for it" in said


# -- Changed bytes ---------------------------------------------------------------------------------------------------


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_flipped_bit_in_a_checkpoint_falls_back_to_the_one_before(
    folder: Path, hashed: bool, capsys: pytest.CaptureFixture[str]
):
    """Without hashes of the files, as a kill right after a save leaves them, the arrays' checksums find it."""
    run = unfinished(folder, f"flipped-{hashed}")
    flip(largest(run / "checkpoints" / "8"))
    if not hashed:
        (run / "checkpoints" / "8" / HASHES).unlink()
    main(command(folder, run.name, "--checkpoint.every-steps", 2, "--checkpoint.keep", 9))
    said = capsys.readouterr().err
    assert "The checkpoint of step 8 in" in said and "is damaged" in said
    assert drafter_bytes(run) == drafter_bytes(folder / "whole")


def test_every_file_of_a_checkpoint_is_guarded(folder: Path, tmp_path: Path):
    whole = folder / "whole" / "checkpoints" / "4"
    assert damage(whole) is None
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        copy = tmp_path / "4"
        shutil.copytree(whole, copy)
        flip(copy / file)
        assert damage(copy) is not None, file
        shutil.rmtree(copy)


def test_no_whole_checkpoint_is_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]):
    run = unfinished(folder, "lost")
    for step in (2, 4, 6, 8):
        flip(largest(run / "checkpoints" / str(step)))
    assert "None of the checkpoints in" in refused(command(folder, "lost", "--checkpoint.every-steps", 2), capsys)


def test_a_changed_score_is_found(tmp_path: Path):
    with Checkpoints(tmp_path / "c", keep=3, keep_best=1) as checkpoints:
        for step, score in ((1, 2.0), (2, 1.0)):
            checkpoints.save(step, {"x": jnp.zeros(3)}, {}, score)
        checkpoints.wait()
    (tmp_path / "c" / "2" / "metrics" / "metrics").write_text('{"score": 9.0}')
    with Checkpoints(tmp_path / "c", keep=3, keep_best=1) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (1, 1)


def test_checksums_see_every_bit_and_no_layout():
    x = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    tree = {"a": jnp.asarray(x), "b": jnp.asarray(x[:3], jnp.bfloat16), "k": jax.random.key(1), "n": jnp.int32(3)}
    whole = checksums(tree)
    for bit in (0, 13, 31):
        words = x.view(np.uint32).copy()
        words[3, 2] ^= np.uint32(1 << bit)
        assert checksums(tree | {"a": jnp.asarray(words.view(np.float32))})[0] != whole[0]
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksums(tree | {"a": jnp.asarray(swapped)})[0] != whole[0]
    assert checksums(tree | {"k": jax.random.key(2)}) != whole and checksums(dict(tree)) == whole


def test_weights_that_were_replaced_stop_a_resumed_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    mine = folder / "replaced"
    mine.mkdir()
    for name in ("target", "cache", "whole"):
        shutil.copytree(folder / name, mine / name)
    (mine / "whole" / "metrics.json").unlink()
    flip(mine / "target" / "model.safetensors", at=0.7)
    arguments = command(folder, mine / "whole", "--target", mine / "target", "--data.cache", folder / "cache")
    config = mine / "whole" / "config.json"
    config.write_text(config.read_text().replace(str(folder / "target"), str(mine / "target")))
    assert "The target weights of the run in" in refused(arguments, capsys)


def test_a_cache_that_was_rebuilt_stops_a_resumed_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    mine = folder / "rebuilt"
    write_synthetic_cache(
        mine / "cache", describe_target(folder / "target"), (0, 1), records=16, length=24, seed=5
    )  # another seed: other tokens in as many records of the same lengths
    run = unfinished(folder, "on-rebuilt")
    config = run / "config.json"
    config.write_text(config.read_text().replace(str(folder / "cache"), str(mine / "cache")))
    arguments = command(folder, run.name, "--data.cache", mine / "cache")
    assert "The target cache of the run in" in refused(arguments, capsys)


def test_a_cache_of_other_weights_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    mine = folder / "other-weights"
    shutil.copytree(folder / "cache", mine)
    write_settings(mine / "build.json", {"weights_xxh3": "0" * 32})
    said = refused(command(folder, "on-other-weights", "--data.cache", mine), capsys)
    assert "holds the states of other weights" in said and not (folder / "on-other-weights").exists()


# -- Records, supervision, lost drafters -----------------------------------------------------------------------------


def test_a_bad_line_drops_no_other_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": float(step)})
        digest = log.digest()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    other = (b'{"step": -5}\n', b'{"step": true}\n', b'{"step": 1}\n', b"\0" * 4096 + b"\n")
    for bad in (b"\xff{\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b"[" * 100_000 + b"\n", *other):
        (tmp_path / "metrics.jsonl").write_bytes(lines[0] + bad + lines[2])
        assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 3]
        assert "metrics.jsonl:2: no record of a step" in capsys.readouterr().err
    with MetricsLog(tmp_path, 3, digest):
        assert "records are missing or changed" in capsys.readouterr().err


def unsupervised(cache: Path, out: Path, rows: set[int]) -> Path:
    """The cache without supervision in these rows, through its own writer."""
    found = TargetCache(cache)
    with CacheWriter(out, found.spec) as writer:
        for index in range(len(found)):
            sample = found[index]
            mask = np.zeros_like(sample.loss_mask) if index in rows else sample.loss_mask
            writer.add(index, dataclasses.replace(sample, loss_mask=mask))
        writer.finish()
    return out


def test_a_batch_without_supervision_is_skipped_and_counted(folder: Path):
    cache = unsupervised(folder / "cache", folder / "partly", {0, 1, 2, 3})
    main(command(folder, "partly-run", "--data.cache", cache, "--data.no-shuffle", steps=4))
    records = read_records(folder / "partly-run" / "metrics.jsonl")
    assert [(r["skipped"], r["unsupervised"]) for r in records] == [(1, 1), (0, 0), (0, 0), (0, 0)]
    assert records[0]["loss"] is None and records[1]["loss"] > 0


@pytest.mark.parametrize(("steps", "said"), [(4, "no supervised token"), (9, "no supervised token to learn from in 6")])
def test_a_run_without_supervision_stops(folder: Path, steps: int, said: str, capsys: pytest.CaptureFixture[str]):
    cache = folder / "nothing"
    if not cache.exists():
        unsupervised(folder / "cache", cache, set(range(16)))
    assert said in refused(command(folder, f"nothing-{steps}", "--data.cache", cache, steps=steps), capsys)
    assert not (folder / f"nothing-{steps}" / "drafter").exists()


def test_a_finished_run_without_drafter_and_last_checkpoint_trains_the_rest_again(folder: Path, capsys):
    """Not the drafter of the checkpoint before: the run's own, to the same bytes."""
    run = folder / "no-drafter-no-checkpoint"
    shutil.copytree(folder / "whole", run)
    shutil.rmtree(run / "drafter")
    last = max(int(entry.name) for entry in (run / "checkpoints").iterdir() if entry.name.isdigit())
    (damaged,) = [p for p in (run / "checkpoints" / str(last)).rglob("*") if p.name == "_CHECKPOINT_METADATA"]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    main(command(folder, "no-drafter-no-checkpoint", "--checkpoint.every-steps", 2))
    assert "the run continues from the one before it" in capsys.readouterr().err
    assert drafter_bytes(run) == drafter_bytes(folder / "whole")


def test_a_finished_run_whose_drafter_is_gone_exports_it_again(folder: Path, capsys: pytest.CaptureFixture[str]):
    run = folder / "no-drafter"
    shutil.copytree(folder / "whole", run)
    written = ("model.safetensors", "config.json", "dspark.json")  # in this order: an export may end after any
    for kept in range(len(written)):
        for name in written[kept:]:
            (run / "drafter" / name).unlink()
        main(command(folder, "no-drafter", "--checkpoint.every-steps", 2))
        assert "is finished" in capsys.readouterr().out
        assert drafter_bytes(run) == drafter_bytes(folder / "whole")
        assert all((run / "drafter" / name).exists() for name in written)
    (run / "metrics.json").write_text("[")
    assert "metrics.json: not JSON" in refused(command(folder, "no-drafter"), capsys)
