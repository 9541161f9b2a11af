"""Jobs of two processes: the curve of one, files written once, stops and continuations on other numbers of them."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import native
from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.distributed import Job
from dspark_jax.errors import UserError
from dspark_jax.sharding import ShardingRules, make_mesh
from dspark_jax.storage import objects
from dspark_jax.storage.places import Place
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.object_checkpoints import ObjectCheckpoints
from dspark_jax.training.run_folder import read_records
from tests import fetched_rows, jobs
from tests.stores import S3Server, on_this_machine
from tests.tiny import write_tiny_target
from train import build_cache
from train.fit import main

pytestmark = pytest.mark.usefixtures("shared_steps")

STEPS = 8
"""Of every run: an epoch has five, so that a hybrid one goes on from its cache."""
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1234"}


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, S3Server() as server:
        for name, value in on_this_machine(server, tmp_path_factory.mktemp("stores")).items():
            patch.setenv(name, value)
        # This process stands beside jobs on many devices, which have no kernels of a CPU: those round otherwise.
        patch.setattr(native, "ready", lambda: False)
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Path:
    """A target, conversations, their cache, and a held-out prompt."""
    folder = tmp_path_factory.mktemp("jobs")
    write_tiny_target(folder / "target", num_hidden_layers=3, tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    with open(folder / "conversations.jsonl", "w", encoding="utf-8") as lines:
        for index in range(40):
            answer = "word " * int(rng.integers(1, 9))
            messages = [{"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    heldout = {"messages": [{"role": "user", "content": "What is the sum?"}], "domain": "math"}
    (folder / "heldout.jsonl").write_text(json.dumps(heldout) + "\n", encoding="utf-8")
    build_cache.main(caching(folder, "cache"))
    for path in (folder / "cache").iterdir():
        objects.upload(path, Place("s3", "pod", "cache") / path.name)
    return folder


def caching(folder: Path, output: str) -> list[str]:
    places = ["--target", folder / "target", "--conversations", folder / "conversations.jsonl"]
    options = ["--output", folder / output, "--layers", 0, 1, "--max-length", 48, "--codec", "float32"]
    return [str(word) for word in (*places, *options)]


def command(folder: Path, run: str, *more: object) -> list[str]:
    """The debug configuration on a smaller drafter, a micro-batch for every device."""
    drafter = "--drafter.target-layer-ids 0 1 --drafter.block-size 2 --drafter.num-anchors 4"
    data = "--data.global-batch 8 --data.accumulation-steps 0 --data.max-length 48 --epochs 99"
    recipe = f"--max-steps {STEPS} --checkpoint.every-steps 4 --checkpoint.keep 9"
    places = ["--target", folder / "target", "--run-dir", folder / run]
    return [
        str(word) for word in ("--config", "debug", *places, *drafter.split(), *data.split(), *recipe.split(), *more)
    ]


def offline(folder: Path, run: str, *more: object) -> list[str]:
    return command(folder, run, "--data.cache", folder / "cache", "--drafter.init-target-layers", 2, *more)


def online(folder: Path, run: str, *more: object) -> list[str]:
    return command(
        folder, run, "--data.source", "online", "--data.conversations", folder / "conversations.jsonl", *more
    )


def hybrid(folder: Path, run: str, *more: object) -> list[str]:
    """Online for five steps, whose states are stored as they are; then from the cache."""
    stored = ("--data.source", "hybrid", "--data.codec", "float32")
    return online(folder, run, *stored, *more)


def stored(folder: Path, *more: object) -> list[str]:
    """`offline` with its run and its cache in an object store."""
    places = {str(folder / "stored"): "s3://pod/stored", str(folder / "cache"): "s3://pod/cache"}
    return [places.get(word, word) for word in offline(folder, "stored", *more)]


def unsaved(folder: Path, *more: object) -> list[str]:
    """A hybrid run that saves when it is stopped, and at the end."""
    return hybrid(folder, "shrunk", "--checkpoint.every-steps", 99, *more)


def evaluated(folder: Path) -> list[object]:
    options = "--evaluation.every-steps 8 --evaluation.max-new-tokens 6 --evaluation.temperature 0"
    return ["--evaluation.prompts", folder / "heldout.jsonl", *options.split()]


def losses(folder: Path, run: str) -> list[float]:
    records = read_records(folder / run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "a record is missing, or there twice"
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """On one device of this process: both sources, and a run that is stopped after step 4."""
    main(offline(folder, "offline-1"))
    main(online(folder, "online-1", *evaluated(folder)))
    for kind, arguments in ((Checkpoints, offline(folder, "grown")), (ObjectCheckpoints, stored(folder))):

        def save_and_stop(self: Any, done: int, *rest: Any, save: Any = kind.save) -> None:
            save(self, done, *rest)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(kind, "save", save_and_stop)
            main(arguments)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path, alone: Path) -> list[str]:
    """Two processes of 2 devices; parameters split over both, and in the continued run the work on every row. One job
    for all runs: what a process costs is its imports."""
    both = ("--mesh.data", 2, "--mesh.fsdp", 2)
    runs = [
        ["fit", *offline(folder, "disagreeing", "--seed", "{process}")],
        ["build_cache", *caching(folder, "cache-2x2")],
        ["fit", *online(folder, "online-2x2", "--mesh.data", 1, "--mesh.fsdp", 4, *evaluated(folder))],
        ["fit", *offline(folder, "grown", "--mesh.data", 1, "--mesh.fsdp", 1, "--mesh.tensor", 4)],
        ["fit", *stored(folder, *both)],
        ["fit", *hybrid(folder, "hybrid-2x2", *both)],
        ["tests.terminated", "{process}", *unsaved(folder, *both)],
        ["tests.fetched_rows", str(folder)],
    ]
    return jobs.run(folder, "two", runs, processes=2, devices=2)


@pytest.mark.multiprocess
def test_two_processes_learn_what_one_does(folder: Path, two: list[str]):
    """With the target split over both, from the first step on; below from a checkpoint on. One process: test_fit."""
    np.testing.assert_allclose(losses(folder, "online-2x2"), losses(folder, "online-1"), rtol=1e-5)


@pytest.mark.multiprocess
def test_what_two_processes_leave(folder: Path, two: list[str]):
    one, both = folder / "online-1", folder / "online-2x2"
    assert sorted(path.name for path in both.iterdir()) == sorted(path.name for path in one.iterdir())
    assert len(list((both / "tensorboard").iterdir())) == 1
    assert json.loads((both / "metrics.json").read_text())["steps"] == STEPS
    target = load_target(folder / "target")
    theirs, ours = (load_drafter(run / "drafter", target).params for run in (both, one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), theirs, ours)


@pytest.mark.multiprocess
def test_evaluations_agree(folder: Path, two: list[str]):
    one, both = (read_records(folder / run / "metrics.jsonl")[-1] for run in ("online-1", "online-2x2"))
    assert both["eval_tau"] == one["eval_tau"] >= 1
    assert (folder / "online-2x2" / "drafter_best" / "model.safetensors").exists()


@pytest.mark.multiprocess
def test_a_run_of_one_continues_on_two(folder: Path, two: list[str]):
    np.testing.assert_allclose(losses(folder, "grown"), losses(folder, "offline-1"), rtol=1e-5)


@pytest.mark.multiprocess
def test_a_run_in_a_store_continues_on_two_machines(folder: Path, two: list[str]):
    """Neither has the other's files, nor those of the machine that began the run."""
    place = Place("s3", "pod", "stored")
    (folder / "stored").mkdir(exist_ok=True)
    (folder / "stored" / "metrics.jsonl").write_bytes(objects.read(place / "metrics.jsonl"))
    np.testing.assert_allclose(losses(folder, "stored"), losses(folder, "offline-1"), rtol=1e-5)
    # Step 4 is of one process, the last one of two.
    parts = {name: found.bytes for name, found in objects.listing(place).items() if name.endswith(".bin")}
    assert sorted(name.split("/")[1] for name in parts) == ["4", "8", "8"]
    # Both hold all of the state, and each writes half of it.
    one, two_of_them = [size for name, size in parts.items() if name.split("/")[1] == "8"]
    assert abs(one - two_of_them) < 0.02 * (one + two_of_them)
    assert json.loads(objects.read(place / "metrics.json"))["steps"] == STEPS


@pytest.mark.multiprocess
def test_two_processes_fill_one_cache(folder: Path, two: list[str]):
    one, both = TargetCache(folder / "cache"), TargetCache(folder / "cache-2x2")
    both.verify()
    for index in range(len(one)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both[index].arrays(), one[index].arrays()
        )


@pytest.mark.multiprocess
def test_a_hybrid_job_learns_as_online_and_leaves_a_cache(folder: Path, two: list[str]):
    np.testing.assert_allclose(losses(folder, "hybrid-2x2"), losses(folder, "online-1"), rtol=1e-5)
    one, both = TargetCache(folder / "cache"), TargetCache(folder / "hybrid-2x2" / "cache")
    both.verify()
    expected = {one[index].input_ids.tobytes(): one[index] for index in range(len(one))}
    assert len(both) == len(one) == len(expected)
    for index in range(len(both)):
        found = both[index]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            found.arrays(),
            expected[found.input_ids.tobytes()].arrays(),
        )


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", ["rows", "both"])
def test_rows_of_all_come_to_the_first(folder: Path, two: list[str], layout: str):
    with np.load(folder / f"fetched-{layout}.npz") as found:
        for dtype in fetched_rows.DTYPES:
            expected = np.arange(72).reshape(24, 3).astype(jnp.dtype(dtype)).astype(np.float32)
            np.testing.assert_array_equal(found[dtype], expected, err_msg=dtype)


@pytest.mark.multiprocess
def test_processes_that_were_started_differently_are_told(folder: Path, two: list[str]):
    for process, errors in enumerate(two):
        assert jobs.exit_codes(folder, "two", process) == [2, 0, 0, 0, 0, 0, 128 + signal.SIGTERM, 0]
        assert "Process 1 of 2 and process 0 disagree: they were given different configurations." in errors
    assert not (folder / "disagreeing").exists()


@pytest.mark.multiprocess
def test_sigterm_to_one_stops_both_and_one_continues(folder: Path, two: list[str]):
    """In a hybrid run, whose cache one process then goes on with."""
    for errors in two:
        assert "Stopped by SIGTERM after step" in errors, errors[-2000:]
    saved = [path.name for path in (folder / "shrunk" / "checkpoints").iterdir()]
    assert len(saved) == 1 and 2 <= int(saved[0]) < STEPS
    main(unsaved(folder))
    np.testing.assert_allclose(losses(folder, "shrunk"), losses(folder, "online-1"), rtol=1e-5)


def test_rows_of_this_process():
    assert ShardingRules().local_rows(make_mesh(), 6) == tuple(range(6))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (ADDRESS, "JAX_COORDINATOR_ADDRESS is set without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "are set without JAX_COORDINATOR_ADDRESS"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "of 2 processes the last is number 1"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is 'two'"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "host:port was expected",
        ),
        ({"DSPARK_CLUSTER": "slurm"}, "DSPARK_CLUSTER is 'slurm'; auto was expected"),
        (ADDRESS | {"DSPARK_CLUSTER": "auto"}, "are both set"),
        ({"DSPARK_CLUSTER": "auto", "DSPARK_PEER_SECONDS": "0"}, "DSPARK_PEER_SECONDS is '0'"),
    ],
)
def test_variables_that_do_not_go_together(environment: dict[str, str], said: str):
    with pytest.raises(UserError, match=said):
        Job.of(environment)


def test_what_the_variables_say():
    assert Job.of({}) is None and Job.of({"DSPARK_PEER_SECONDS": "5"}) is None
    by_hand = ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3", "DSPARK_PEER_SECONDS": "7"}
    assert Job.of(by_hand) == Job("host:1234", 4, 3, 7, 300)
    assert Job.of({"DSPARK_CLUSTER": "auto"}) == Job(None, None, None, 100, 300)


def test_the_program_refuses_half_a_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(SystemExit) as stop:
        main(offline(folder, "half"))
    assert stop.value.code == 2 and "JAX_NUM_PROCESSES is set without" in capsys.readouterr().err
    assert not (folder / "half").exists()
