"""The numbers in a target cache: the target's own, whatever batch or interruption they were computed in."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.chat import encode_conversation
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.datagen import cache_builder
from dspark_jax.targets.attention import CausalRows
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


def test_a_run_that_stops_anywhere_continues_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped inside a shard, inside a window: the samples after it are those of the whole run, bit for bit."""
    small = ("--max-shard-mb", "0.1")
    build(folder, "small", *small)
    compute = cache_builder.compute_samples

    def broken_off(*arguments):
        for index, sample in compute(*arguments):
            if index == 21:
                raise KeyboardInterrupt
            yield index, sample

    monkeypatch.setattr(cache_builder, "compute_samples", broken_off)
    with pytest.raises(SystemExit):
        build(folder, "continued", *small)
    monkeypatch.setattr(cache_builder, "compute_samples", compute)
    first = json.loads((folder / "continued" / "manifest.json").read_text())["shards"][-1]["last_source"] + 1
    assert 0 < first < 21 and first % (3 * cache_builder.WINDOW_BATCHES)
    build(folder, "continued", *small)
    names = sorted(p.name for p in (folder / "small").iterdir() if p.name != "metrics.json")
    assert len(names) > 4
    for name in names:
        assert (folder / "small" / name).read_bytes() == (folder / "continued" / name).read_bytes()
