"""The numbers in a target cache: the target's own, whatever batch or interruption they were computed in."""

import json
from pathlib import Path
from threading import Event
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.chat import Encoded, encode_conversation
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.datagen import cache_builder, capture
from dspark_jax.datagen.cache_builder import CacheSettings, layout_of
from dspark_jax.datagen.capture import WINDOW_BATCHES, Capture, Padding, TrainingRow, windows
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.registry import read_target_config
from tests.tiny import write_tiny_target
from train import build_cache

LAYERS = (-1, 0, 2)
MAX_LENGTH = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose last layer slides, and conversations of many lengths; every seventh has no answer."""
    folder = tmp_path_factory.mktemp("cache")
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    sliding = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    write_tiny_target(folder / "target", num_hidden_layers=3, tie_word_embeddings=False, **sliding)
    rng = np.random.default_rng(0)
    with open(folder / "conversations.jsonl", "w", encoding="utf-8") as lines:
        for index in range(30):
            messages = [{"role": "user", "content": f"Question {index}?"}]
            if index % 7:
                messages.append({"role": "assistant", "content": "word " * int(rng.integers(1, 60))})
            lines.write(json.dumps({"messages": messages}) + "\n")
    return folder


def build(folder: Path, name: str, *more: str) -> None:
    places = [
        "--target",
        folder / "target",
        "--conversations",
        folder / "conversations.jsonl",
        "--output",
        folder / name,
    ]
    options = ["--layers", "-1", "0", "2", "--max-length", MAX_LENGTH, "--batch", 3, "--codec", "float32", *more]
    build_cache.main([str(word) for word in places + options])


@pytest.fixture(scope="module")
def cache(folder: Path) -> TargetCache:
    build(folder, "whole")
    return TargetCache(folder / "whole")


def test_records_hold_what_the_target_computes_alone(folder: Path, cache: TargetCache):
    target = load_target(folder / "target")
    lines = [json.loads(line) for line in (folder / "conversations.jsonl").read_text().splitlines()]
    encoded = [encode_conversation(target.tokenizer, line["messages"], MAX_LENGTH)[0] for line in lines]
    assert list(cache.sample_ids) == [i for i in range(30) if encoded[i].loss_tokens >= 2]
    assert max(cache.lengths) == MAX_LENGTH > min(cache.lengths)  # some were cut, some were padded
    for at in (0, 11, len(cache) - 1):
        sample = cache[at]
        one = encoded[sample.sample_id]
        np.testing.assert_array_equal(sample.input_ids, one.input_ids)
        np.testing.assert_array_equal(sample.loss_mask, one.loss_mask)
        tokens = jnp.asarray(one.input_ids)[None]
        out = target.model(target.params)(tokens, jnp.arange(tokens.shape[1])[None], CausalRows(), LAYERS)
        np.testing.assert_allclose(sample.features, out.taps[0], atol=2e-5)
        np.testing.assert_allclose(sample.last_hidden, out.hidden[0], atol=2e-5)


def test_packed_rows_give_the_records_of_rows_alone(folder: Path, cache: TargetCache):
    """Several conversations in most rows, over full and sliding layers."""
    settings = CacheSettings(str(folder / "target"), (), LAYERS, folder)
    config = read_target_config(json.loads((folder / "target" / "config.json").read_text()))
    assert [layout_of(settings, config, platform) for platform in ("tpu", "gpu", "cpu")] == [
        *["packed"] * 2,
        "by-length",
    ]
    build(folder, "packed", "--rows", "packed")
    packed = TargetCache(folder / "packed")
    assert list(packed.sample_ids) == list(cache.sample_ids)
    for at in range(len(cache)):
        mine, alone = packed[at], cache[at]
        np.testing.assert_array_equal(mine.input_ids, alone.input_ids)
        np.testing.assert_array_equal(mine.loss_mask, alone.loss_mask)
        np.testing.assert_allclose(mine.features, alone.features, atol=2e-5)
        np.testing.assert_allclose(mine.last_hidden, alone.last_hidden, atol=2e-5)


@pytest.mark.parametrize("rows", ["packed", "by-length"])
def test_a_run_that_stops_anywhere_continues_to_the_same_bytes(
    folder: Path, rows: str, monkeypatch: pytest.MonkeyPatch
):
    """Stopped inside a shard, inside a window: the samples after it are those of the whole run, bit for bit."""
    small = ("--max-shard-mb", "0.1", "--rows", rows, "--batch", "2" if rows == "packed" else "3")
    build(folder, f"small-{rows}", *small)

    class BrokenOff(Capture):
        def __call__(self, *arguments: Any):
            for index, sample in super().__call__(*arguments):
                if index == 21:
                    raise KeyboardInterrupt
                yield index, sample

    monkeypatch.setattr(cache_builder, "Capture", BrokenOff)
    with pytest.raises(SystemExit):
        build(folder, f"continued-{rows}", *small)
    monkeypatch.setattr(cache_builder, "Capture", Capture)
    first = json.loads((folder / f"continued-{rows}" / "manifest.json").read_text())["shards"][-1]["last_source"] + 1
    assert 0 < first < 21 and first not in borders(folder, rows, int(small[-1]))
    build(folder, f"continued-{rows}", *small)
    names = sorted(p.name for p in (folder / f"small-{rows}").iterdir() if p.name != "metrics.json")
    assert len(names) > 4
    for name in names:
        whole, continued = (folder / f"{way}-{rows}" / name for way in ("small", "continued"))
        assert whole.read_bytes() == continued.read_bytes()


def borders(folder: Path, rows: str, batch: int) -> list[int]:
    """The first training rows of all windows, of which there are several."""
    target = load_target(folder / "target")
    lines = [json.loads(line) for line in (folder / "conversations.jsonl").read_text().splitlines()]
    encoded = [encode_conversation(target.tokenizer, line["messages"], MAX_LENGTH)[0] for line in lines]
    items = [TrainingRow(at, one, one.loss_tokens >= 2) for at, one in enumerate(encoded)]
    found = [window.members[0].index for window in windows(items, batch, MAX_LENGTH, rows)]
    assert len(found) > 1
    return found


def made_up(sizes: np.ndarray, longest: int) -> list[TrainingRow]:
    one = Encoded(np.arange(1, longest + 1, dtype=np.int32), np.ones(longest, np.uint8))
    rows = [Encoded(one.input_ids[:size], one.loss_mask[:size]) for size in sizes]
    return [TrainingRow(index, row, index % 9 != 4) for index, row in enumerate(rows)]


@pytest.mark.parametrize("layout", ["packed", "by-length"])
def test_windows_hold_every_conversation_once(layout: Any):
    items = made_up(np.random.default_rng(3).integers(2, 200, 700), 200)
    made = list(windows(items, 4, 200, layout))
    assert [item.index for window in made for item in window.members] == list(range(700))
    for window in made:
        run = [item.index for batch in window.batches for _, _, item in batch.places()]
        assert sorted(run) == [item.index for item in window.members if item.kept]
        assert len(window.batches) <= WINDOW_BATCHES and all(len(batch.rows) <= 4 for batch in window.batches)
    batch = made[0].batches[0].arrays(4)
    row, at, item = list(made[0].batches[0].places())[-1]
    np.testing.assert_array_equal(batch["input_ids"][row, at : at + item.length], item.encoded.input_ids)
    if layout == "packed":
        # Of all windows but the last, every batch is there.
        assert all(len(window.batches) == WINDOW_BATCHES for window in made[:-1])
        assert Padding.of(items, 4, 200, layout).share < 0.07 < Padding.of(items, 4, 200, "by-length").share
        segments = batch["segments"][row]
        assert at > 0 and set(segments[at : at + item.length]) == {len(made[0].batches[0].rows[row])}
        assert not segments[at + item.length :].any()


def test_a_window_is_computed_while_the_one_before_is_written(monkeypatch: pytest.MonkeyPatch):
    """All of it: a writer that stops at its first row of a window does not hold up the last batch of the next."""
    run, fail_at, calls = [Event() for _ in range(13)], 12, list[int]()

    def forward(params: Any, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        if len(calls) == fail_at:
            raise OSError("the device is gone")
        run[len(calls)].set()
        calls.append(len(calls))
        shape = batch["input_ids"].shape
        return {"features": jnp.zeros((*shape, 2)), "last_hidden": jnp.zeros((*shape, 2))}

    monkeypatch.setattr(capture, "make_forward", lambda target, spec: forward)
    spec: Any = type("Spec", (), {"max_length": 64})
    target: Any = type("Target", (), {"params": None})
    items = made_up(np.full(2 * 4 * 4, 50), 50)
    samples = Capture(target, spec, 2, "by-length")(items, 0)
    next(samples)
    assert run[7].wait(30), "the second window waits until the first is written"
    with pytest.raises(OSError, match="the device is gone"):
        list(samples)
