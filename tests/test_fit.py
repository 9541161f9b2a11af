"""The trainer as a program: stops and continuations, refusals, micro-batches, devices, and what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.config.cli import load_config, parse
from dspark_jax.data.deepspec_cache import DeepSpecCacheWriter
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import drafter_hf_config, read_config, skeleton
from dspark_jax.roofline.hardware import peak_flops
from dspark_jax.roofline.training import training_flops
from dspark_jax.sharding import split
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.objective import BlockObjective
from dspark_jax.training.run import Run
from dspark_jax.training.run_folder import MetricsLog, read_records
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.step import TrainState, abstract_train_state, make_train_step
from dspark_jax.training.synthetic_cache import write_synthetic_cache
from dspark_jax.training.terms import LossOptions
from tests.tiny import write_tiny_target
from tests.untimed import untimed
from tests.xla import xla_flags
from train import export
from train.fit import main

pytestmark = pytest.mark.usefixtures("shared_steps")

ROOT = Path(__file__).parent.parent
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target") / "tiny", num_hidden_layers=4)


@pytest.fixture(scope="module")
def cache(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 records of 24 tokens: two epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    write_synthetic_cache(folder, describe_target(target), LAYERS, records=16, length=24, seed=0)
    return folder


def command(target: Path, run: Path, *more: object, cache: Path | str = "") -> list[str]:
    """The debug configuration on a smaller drafter; a window of 3 steps reaches over the checkpoint of step 2."""
    small = "--drafter.target-layer-ids 0 2 --drafter.block-size 3 --drafter.num-anchors 4 --data.max-length 24"
    recipe = "--data.global-batch 8 --data.accumulation-steps 2 --epochs 2 --log-every 3"
    places = ["--target", str(target), "--run-dir", str(run), "--data.cache", str(cache)]
    return ["--config", "debug", *places, *small.split(), *recipe.split(), *(str(word) for word in more)]


@pytest.fixture(scope="module")
def undisturbed(target: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    main(command(target, run, cache=cache))
    return run


def final_state(arguments: list[str], step: int = 4) -> TrainState:
    config = parse(load_config("debug"), arguments[2:])
    with Checkpoints(Path(config.run_dir) / "checkpoints", 9) as checkpoints:
        return checkpoints.restore(step, Run.of(config).step.abstract)[0]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_records(run / "metrics.jsonl")]


def stop_after_saving(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state: Any, extra: Any, score: float | None = None) -> None:
        save(self, done, state, extra, score)
        if done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)


def test_two_steps_and_two_more_are_four(
    target: Path, cache: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = command(target, tmp_path / "run", cache=cache)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_after_saving(patch, 2)
        main(arguments)
    assert stop.value.code == 130
    assert not (tmp_path / "run" / "metrics.json").exists()
    main(arguments)
    one, other = final_state(command(target, undisturbed, cache=cache)), final_state(arguments)
    assert int(one.step) == 4
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), one, other)
    assert untimed(tmp_path / "run") == untimed(undisturbed)
    assert [record["step"] for record in untimed(undisturbed)] == [3, 4]
    assert drafter_bytes(tmp_path / "run") == drafter_bytes(undisturbed)


def raw(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def drafter_bytes(run: Path) -> bytes:
    return (run / "drafter" / "model.safetensors").read_bytes()


def test_a_finished_run_is_left_alone(target: Path, cache: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]):
    before = content(undisturbed)
    main(command(target, undisturbed, cache=cache))
    assert "is finished" in capsys.readouterr().out
    assert content(undisturbed) == before


def test_what_a_run_leaves(target: Path, cache: Path, undisturbed: Path):
    summary = json.loads((undisturbed / "metrics.json").read_text())
    assert summary["steps"] == 4 and len(summary["accept_rate"]) == 3
    assert summary["loss"] == losses(undisturbed)[-1] and summary["tokens_per_s"] > 0
    assert json.loads((undisturbed / "config.json").read_text())["drafter"]["block_size"] == 3
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["2", "4"]
    assert list((undisturbed / "tensorboard").iterdir())


def test_the_exported_drafter_loads_back(target: Path, cache: Path, undisturbed: Path, tmp_path: Path):
    loaded = load_drafter(undisturbed / "drafter", load_target(target))
    trained = final_state(command(target, undisturbed, cache=cache)).params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained)
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "drafter")
    export.main(command(target, run, cache=cache))
    assert drafter_bytes(run) == drafter_bytes(undisturbed)


def test_debug_makes_its_own_records(target: Path, cache: Path, tmp_path: Path):
    planned = Run.of(parse(load_config("debug"), command(target, tmp_path / "run")[2:]))
    made = TargetCache(tmp_path / "run" / "cache")
    assert made.spec.target_sha256 == describe_target(target).config_sha256
    assert planned.batches.steps_per_epoch == 4 and len(made) == 32
    np.testing.assert_array_equal(made[0].input_ids[:5], TargetCache(cache)[0].input_ids[:5])


@pytest.fixture(scope="module")
def unsplit(target: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without micro-batches."""
    run = tmp_path_factory.mktemp("unsplit") / "run"
    main(command(target, run, "--data.accumulation-steps", 1, cache=cache))
    return run


def test_micro_batches_change_nothing_but_memory(undisturbed: Path, unsplit: Path):
    np.testing.assert_allclose(losses(unsplit), losses(undisturbed), rtol=1e-5)


def test_eight_devices_give_the_losses_of_one(target: Path, cache: Path, unsplit: Path, tmp_path: Path):
    mesh = ["--data.accumulation-steps", 1, "--mesh.data", 4, "--mesh.fsdp", 2]
    done = subprocess.run(
        [sys.executable, "-m", "train.fit", *command(target, tmp_path / "run", *mesh, cache=cache)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(8)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(unsplit), rtol=2e-5)


def test_a_deepspec_cache_gives_the_same_batches(target: Path, cache: Path, tmp_path: Path):
    ours = TargetCache(cache)
    writer = DeepSpecCacheWriter(tmp_path / "cache", bfloat16_spec(ours))
    for index in range(len(ours)):
        writer.add(ours[index])
    writer.finish()
    theirs, mine = (
        Run.of(parse(load_config("debug"), command(target, tmp_path / "run", cache=where)[2:])).batches.batch_at(1)
        for where in (tmp_path / "cache", cache)
    )
    np.testing.assert_array_equal(theirs["input_ids"], mine["input_ids"])
    np.testing.assert_array_equal(theirs["features"], mine["features"].astype(theirs["features"].dtype))


def bfloat16_spec(cache: TargetCache) -> Any:
    return type(cache.spec)(**{**cache.spec.__dict__, "dtype": "bfloat16"})


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


Spoil = Callable[[Path], list[object]]


def edit_manifest(cache: Path, **fields: Any) -> list[object]:
    value = json.loads((cache / "manifest.json").read_text())
    value["spec"] |= fields
    (cache / "manifest.json").write_text(json.dumps(value))
    return []


def truncate_shard(cache: Path) -> list[object]:
    shard = next(cache.glob("shard-*"))
    os.truncate(shard, shard.stat().st_size - 100)
    return []


def remove_cache(cache: Path) -> list[object]:
    shutil.rmtree(cache)
    return []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda cache: ["--config", "debgu"], "Unknown configuration debgu: did you mean debug?"),
        (lambda cache: ["--drafter.blok-size", 4], "--drafter.blok-size: did you mean --drafter.block-size"),
        (lambda cache: ["--target", cache / "nowhere"], "nowhere is not a folder"),
        (lambda cache: ["--mesh.fsdp", 3], "does not fit 1 devices"),
        (lambda cache: ["--drafter.target-layer-ids", 0, 3], "the last layer"),
        (lambda cache: ["--drafter.target-layer-ids", 0, 1], "layer_ids is [0, 2], expected [0, 1]"),
        (lambda cache: edit_manifest(cache, target_sha256="0" * 64), "target_sha256 is '0000"),
        (lambda cache: edit_manifest(cache, tokenizer_hash="1" * 64), "tokenizer_hash is '1111"),
        (remove_cache, "has no manifest.json"),
        (truncate_shard, "expected"),
    ],
)
def test_refusals_write_nothing(
    spoil: Spoil, said: str, target: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine = tmp_path / "cache"
    shutil.copytree(cache, mine)
    more = spoil(mine)
    assert said in refused(command(target, tmp_path / "run", *more, cache=mine), capsys)
    assert not (tmp_path / "run").exists()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    (sentence,) = [line for line in printed.err.splitlines() if not line.startswith("Device: ")]
    return sentence


def test_another_configuration_may_not_continue_a_run(
    target: Path, cache: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = content(undisturbed)
    said = refused(command(target, undisturbed, "--optimizer.learning-rate", 1e-3, cache=cache), capsys)
    assert "optimizer.learning_rate = 0.002, this command 0.001" in said
    assert content(undisturbed) == before
    (tmp_path / "thesis.txt").write_text("not a run")
    assert "it holds thesis.txt" in refused(command(target, tmp_path, cache=cache), capsys)


def test_a_flipped_byte_stops_the_run_and_loses_nothing(
    target: Path, cache: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine = tmp_path / "cache"
    shutil.copytree(cache, mine)
    shard = next(mine.glob("shard-*"))
    good = shard.read_bytes()
    spoiled = bytearray(good)
    spoiled[len(good) // 3] ^= 1
    shard.write_bytes(spoiled)
    arguments = command(target, tmp_path / "run", cache=mine)
    assert "is damaged" in refused(arguments, capsys)
    shard.write_bytes(good)
    main(arguments)
    assert drafter_bytes(tmp_path / "run") == drafter_bytes(undisturbed)


def test_records_after_the_restored_step_are_dropped(tmp_path: Path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": float(step), "mfu": None})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with MetricsLog(tmp_path, 2) as log:
        log.write({"step": 3, "loss": 0.5, "mfu": None})
    assert [(r["step"], r["loss"]) for r in read_records(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 0.5)]


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks_are_known_by_device_kind(kind: str, dtype: str, peak: float | None):
    assert peak_flops(kind, dtype) == peak


def test_counted_operations_are_those_of_the_program():
    """Within 8 %: the compiler also counts elementwise work, and attention to positions that the mask hides."""
    rows, length, size = 2, 256, 256
    dims = {"hidden_size": size, "intermediate_size": 512, "vocab_size": 4096, "num_hidden_layers": 4}
    dims |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6}
    hf = drafter_hf_config(
        {"model_type": "qwen3", "rope_theta": 1e4, "max_position_embeddings": 512, **dims},
        num_layers=2, target_layer_ids=(0, 1, 2), mask_token_id=3, markov_rank=64, num_anchors=32,
    )  # fmt: skip
    config, schedule = read_config(hf), learning_rate_schedule(1e-3, 10, 0.1)
    optimizer = make_optimizer(schedule, (0.9, 0.99), 1e-8, 0.0, 1.0)
    options = LossOptions(ce_alpha=0.1, l1_alpha=0.9, confidence_alpha=1.0, decay_gamma=4.0, anchor_chunk=32)
    objective = BlockObjective(split(skeleton(hf))[0], config, options)
    shapes = {"features": (rows, length, 3 * size), "last_hidden": (rows, length, size)}
    batch = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    batch |= {name: jax.ShapeDtypeStruct((rows, length), "int32") for name in ("input_ids", "loss_mask")}
    table = jax.ShapeDtypeStruct((4096, size), "float32")
    state = abstract_train_state(hf, optimizer)
    lowered = make_train_step(objective, optimizer, schedule).lower(state, SharedTables(table, table), batch)
    counted = training_flops(config, rows, length)
    assert lowered.cost_analysis()["flops"] == pytest.approx(counted, rel=0.08)
