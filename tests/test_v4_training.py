"""DeepSeek-V4's drafters in training: blocks are what decoding drafts from, and a step lowers the loss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.deepseek_v4_published import save_v4_target
from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.datagen.cache_builder import CacheSettings, check_settings, layout_of
from dspark_jax.drafters.registry import drafter_hf_config, new_drafter
from dspark_jax.errors import UserError
from dspark_jax.targets.registry import read_target_config
from dspark_jax.training.objective import BlockObjective
from dspark_jax.training.run_folder import read_records
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.states import TargetStates
from dspark_jax.training.step import init_train_state, make_train_step
from dspark_jax.training.terms import LossOptions
from tests.forced import forced_blocks
from tests.tiny import TOKENIZER_SIZE, write_tokenizer
from tests.v4_tiny import VOCAB, v4_hf_config, v4_pair, v4_target
from train import build_cache, fit

pytestmark = pytest.mark.usefixtures("shared_steps")


def greedy(logits: jax.Array, offset: int) -> tuple[jax.Array, jax.Array]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits


@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_training_blocks_are_the_blocks_of_decoding(kind: str) -> None:
    """At anchors from 1 to the end, beyond the window too, with the state prefilled whole or committed in parts."""
    target, drafter = v4_pair(kind)
    shared, rng = shared_tables(target), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (3, 16)), jnp.int32)
    width = target.config.tap_width(drafter.config.target_layer_ids)
    taps = jnp.asarray(rng.standard_normal((3, 16, width)), jnp.float32)
    anchors = jnp.asarray([2, 9, 15])

    @jax.jit
    def run(params: dict) -> Any:
        model = drafter.model(params)
        anchor = jnp.take_along_axis(tokens, anchors[:, None], axis=1)[:, 0]
        whole = model.prefill(shared, taps, tokens, anchors)
        drafts = model.draft(shared, whole, anchor, anchors, greedy)
        half = anchors // 2
        state = model.prefill(shared, taps, tokens, half)
        columns = half[:, None] + jnp.arange(8)
        rest = jnp.take_along_axis(taps, columns[..., None], axis=1), jnp.take_along_axis(tokens, columns, axis=1)
        parts = model.commit(shared, state, *rest, half, anchors - half)
        again = model.draft(shared, parts, anchor, anchors, greedy)
        previous = jnp.concatenate([anchor[:, None], drafts.tokens[:, :-1]], axis=1)
        context = model.train_context(shared, taps, tokens)
        return (
            drafts.law,
            again.law,
            forced_blocks(model, shared, context, previous[:, None], anchors[:, None]).logits,
        )

    whole, parts, trained = run(drafter.params)
    np.testing.assert_allclose(parts, whole, atol=2e-5)
    np.testing.assert_allclose(trained[:, 0], whole, atol=2e-5)


@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_a_drafter_learns_from_a_frozen_target(kind: str) -> None:
    """Online: the target runs inside the step, and only the drafter's parameters move."""
    target = v4_target(3, 0.3, compress_ratios=(0, 4, 8))
    native = drafter_hf_config(
        target.hf_config, kind=kind, num_layers=1, target_layer_ids=(1, 2), block_size=3, markov_rank=8, num_anchors=8,
        mask_token_id=5, dtype="float32",
    )  # fmt: skip
    drafter = new_drafter("fresh", native, jax.random.key(0))
    assert drafter.target_sha256 == target.config_sha256
    objective = BlockObjective(drafter.graphdef, drafter.config, LossOptions(anchor_chunk=8))
    schedule = learning_rate_schedule(2e-2, total_steps=40, warmup_ratio=0.1)
    optimizer = make_optimizer(schedule, (0.9, 0.999), 1e-8, 0.0, 1.0)
    states = TargetStates(target.graphdef, drafter.config.target_layer_ids)
    rows = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (8, 16)), jnp.int32)
    batch = {"input_ids": rows, "loss_mask": jnp.ones_like(rows, jnp.uint8), "lengths": jnp.full((8,), 16)}
    seen = dict(batch) | states.read(jax.jit(states.stored)(target.params, batch), batch)
    step, state = make_train_step(objective, optimizer, schedule), init_train_state(native, optimizer, seed=0)
    shared, found = shared_tables(target), []
    for _ in range(30):
        state, metrics = step(state, shared, seen)
        found.append(metrics)
    # Of the step's own anchors, before its update: half of all positions.
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert found[-1]["tau_probabilistic"] > found[0]["tau_probabilistic"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V4 target with a tokenizer, and conversations of one length, so that every step has one shape."""
    folder = tmp_path_factory.mktemp("v4")
    target = v4_target(3, 0.3, compress_ratios=(0, 4, 128), vocab_size=TOKENIZER_SIZE)
    save_v4_target(folder / "target", target.hf_config, target.params, "float32")
    write_tokenizer(folder / "target", 256)
    turns = [[{"role": r, "content": f"{i % 10}?"} for r in ("user", "assistant")] for i in range(8)]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    (folder / "conversations.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_cache_and_hybrid_runs_learn_what_an_online_one_does(folder: Path) -> None:
    """Two epochs of two steps: a hybrid run computes the states of the first, and the others are read from caches. For
    MTP-1, whose taps are streams; DSpark's are layers, as any target has them."""
    kind, layers = "mtp", "3 4 5 6"
    given = ["--target", folder / "target", "--conversations", folder / "conversations.jsonl", "--max-length", 32]
    given += ["--output", folder / f"cache-{kind}", "--codec", "float32", "--layers", *layers.split()]
    build_cache.main([str(word) for word in given])
    found = []
    for source in ("hybrid", "offline"):
        run = folder / f"{kind}-{source}"
        cache = ["--data.cache", folder / f"cache-{kind}"] if source == "offline" else ["--data.codec", "float32"]
        words = ["--config", "debug", "--target", folder / "target", "--run-dir", run, "--data.source", source, *cache]
        words += ["--drafter.kind", kind, "--drafter.target-layer-ids", *layers.split(), "--drafter.num-layers", 1]
        words += ["--data.conversations", folder / "conversations.jsonl", "--data.accumulation-steps", 1]
        words += ["--drafter.num-anchors", 4, "--data.max-length", 32, "--epochs", 2, "--max-steps", 4]
        fit.main([str(word) for word in words])
        found.append([record["loss"] for record in read_records(run / "metrics.jsonl")])
        target = load_target(folder / "target")
        assert len(load_drafter(run / "drafter", target).config.target_layer_ids) == len(layers.split())
    assert len(found[0]) == 4 and found[0][0] != found[0][2]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_packed_rows_are_refused_in_a_sentence() -> None:
    target, rows = v4_target(3), jnp.ones((1, 8), jnp.int32)
    states = TargetStates(target.graphdef, (1, 2))
    batch = {"input_ids": rows, "lengths": jnp.full((1,), 8), "segments": jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2]])}
    with pytest.raises(UserError, match=r"one conversation each; leave data\.packing off\.$"):
        states.stored(target.params, batch)


def test_settings_become_the_published_fields() -> None:
    target = v4_hf_config(compress_ratios=[0, 4, 8])
    how: dict[str, Any] = {"num_layers": 2, "target_layer_ids": (0, 2), "markov_rank": 4, "num_anchors": 8}
    native = drafter_hf_config(target, block_size=5, mask_token_id=1, dtype="float32", **how)
    assert native["compress_ratios"] == [0, 4, 8, 0, 0]
    assert (native["dspark_block_size"], native["dspark_markov_rank"], native["dspark_noise_token_id"]) == (5, 4, 1)
    assert native["dspark_target_layer_ids"] == [0, 2]


def test_rows_of_a_cache_hold_one_conversation_each(folder: Path) -> None:
    """What is packed would pool tokens of two conversations: refused when asked for, and not taken on any device."""
    config = read_target_config(json.loads((folder / "target" / "config.json").read_text()))
    settings = CacheSettings(str(folder / "target"), (), (1,), Path("cache"), max_length=32)
    assert layout_of(settings, config, "tpu") == "by-length"
    with pytest.raises(UserError, match="deepseek_v4 run rows of one conversation each: give --rows by-length"):
        check_settings(replace(settings, rows="packed"), config)
