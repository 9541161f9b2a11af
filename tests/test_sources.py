"""Where hidden states come from changes nothing that is learnt; a hybrid run leaves a cache, stopped or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import load_config, parse
from dspark_jax.data.manifest import Manifest
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.run import Run
from dspark_jax.training.run_folder import read_records
from tests.tiny import write_tiny_target
from train import build_cache
from train.fit import main

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with an untied head, and 20 conversations of many lengths, every seventh without an answer."""
    folder = tmp_path_factory.mktemp("sources")
    write_tiny_target(folder / "target", num_hidden_layers=3, tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    with open(folder / "conversations.jsonl", "w", encoding="utf-8") as lines:
        for index in range(20):
            messages = [{"role": "user", "content": f"{index}?"}]
            if index % 7 != 3:
                messages.append({"role": "assistant", "content": "word " * int(rng.integers(1, 12))})
            lines.write(json.dumps({"messages": messages}) + "\n")
    return folder


def train(folder: Path, run: str, *more: object, steps: int = 7) -> Path:
    main(command(folder, run, *more, steps=steps))
    return folder / run


def command(folder: Path, run: str, *more: object, steps: int = 7) -> list[str]:
    drafter = "--drafter.target-layer-ids 0 1 --drafter.block-size 3 --drafter.num-anchors 6"
    data = "--data.global-batch 4 --data.accumulation-steps 2 --data.max-length 96 --epochs 99"
    places = ["--target", folder / "target", "--run-dir", folder / run]
    reads = ["--data.conversations", folder / "conversations.jsonl", "--max-steps", steps]
    return [str(word) for word in ("--config", "debug", *places, *drafter.split(), *data.split(), *reads, *more)]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_records(run / "metrics.jsonl")]


def params(folder: Path, run: Path) -> Any:
    return load_drafter(run / "drafter", load_target(folder / "target")).params


@pytest.fixture(scope="module")
def online(folder: Path) -> Path:
    return train(folder, "online", "--data.source", "online", steps=20)


def test_online_equals_offline(folder: Path, online: Path):
    places = ["--target", folder / "target", "--conversations", folder / "conversations.jsonl"]
    options = ["--output", folder / "cache", "--layers", 0, 1, "--max-length", 96, "--codec", "float32"]
    build_cache.main([str(word) for word in (*places, *options)])
    assert len(TargetCache(folder / "cache")) == 17
    offline = train(folder, "offline", "--data.cache", folder / "cache", steps=20)
    np.testing.assert_allclose(losses(online), losses(offline), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params(folder, online), params(folder, offline)
    )
    assert not (online / "cache").exists()


HYBRID = ("--data.source", "hybrid", "--data.packing", "--data.codec", "int8", "--checkpoint.keep", 9)


@pytest.fixture(scope="module")
def hybrid(folder: Path) -> Path:
    """17 conversations in packed rows of 96: an epoch of few steps, then the cache."""
    return train(folder, "hybrid", *HYBRID)


def test_hybrid_leaves_a_cache_of_the_order_it_trained_in(folder: Path, hybrid: Path):
    cache = TargetCache(hybrid / "cache")
    cache.verify()
    assert len(cache) == 17 and cache.spec.dtype == "int8" and cache[0].scales is not None
    records = read_records(hybrid / "metrics.jsonl")
    assert records[-1]["epoch"] > 1 and 0.5 < records[0]["utilisation"] <= 1
    arguments = command(folder, "from_it", "--data.packing", "--data.cache", hybrid / "cache")
    batches = Run.of(parse(load_config("debug"), arguments[2:])).batches
    ids = [batches.batch_at(step)["sample_ids"].tolist() for step in range(batches.steps_per_epoch)]
    assert set(sum(ids, [])) == set(range(17)) and batches.batch_at(0)["features"].dtype == np.int8


def test_a_stopped_hybrid_run_ends_with_the_same_bytes(
    folder: Path, hybrid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Once in the first epoch, with more in the cache than the checkpoint has behind it, and once after it."""
    arguments = command(folder, "stopped", *HYBRID, "--checkpoint.every-steps", 1)
    cache, aside = folder / "stopped" / "cache", folder / "aside"
    stop_at(monkeypatch, 2, saved=False, arguments=arguments)
    assert 0 < Manifest.load(cache).records < 17
    shutil.move(cache, aside)
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2 and "has 0 records of the" in capsys.readouterr().err
    shutil.rmtree(cache)
    shutil.move(aside, cache)
    stop_at(monkeypatch, 5, saved=True, arguments=arguments)
    main(arguments)
    assert drafter_bytes(folder / "stopped") == drafter_bytes(hybrid)
    mine, theirs = TargetCache(cache), TargetCache(hybrid / "cache")
    for index in range(len(theirs)):
        jax.tree.map(np.testing.assert_array_equal, mine[index].arrays(), theirs[index].arrays())


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, saved: bool, arguments: list[str]) -> None:
    """Runs until a step's checkpoint is, or is about to be, saved."""
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, *rest: Any) -> None:
        if done != step or saved:
            save(self, done, *rest)
        if done == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Checkpoints, "save", save_and_stop)
        main(arguments)


def drafter_bytes(run: Path) -> bytes:
    return (run / "drafter" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.source", "online", "--data.conversations", ""], "data.conversations is ''"),
        (["--data.source", "online", "--data.max-length", 4096], "the target's context 512"),
        (["--data.source", "online", "--data.min-loss-tokens", 500], "No conversation in"),
    ],
)
def test_refusals(folder: Path, options: list[object], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(command(folder, "refused", *options))
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (folder / "refused").exists()
