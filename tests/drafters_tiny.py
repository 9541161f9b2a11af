"""A tiny target's config, drafters over it and batches of made-up features: what drafter and training tests run on."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, new_drafter
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target
from tests.tiny import write_tiny_target

VOCAB, HIDDEN, TAPS = 61, 24, (-1, 1, 2)


def target_hf_config(**overrides: Any) -> dict[str, Any]:
    """Non-default theta, eps, head_dim and grouping, so that a field that is not read shows."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "max_position_embeddings": 128,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "dtype": "float32",
    } | overrides


@cache
def tiny_drafter(**fields: Any) -> Drafter:
    given = {
        "num_layers": 2, "target_layer_ids": TAPS, "mask_token_id": VOCAB - 1, "block_size": 4, "markov_rank": 6,
        "num_anchors": 7, "dtype": "float32",
    } | fields  # fmt: skip
    return new_drafter("tiny", drafter_hf_config(target_hf_config(), **given), jax.random.key(3))


def tiny_tables() -> SharedTables:
    embed, head = (jax.random.normal(jax.random.key(seed), (VOCAB, HIDDEN)) for seed in (1, 2))
    return SharedTables(embed, head)


def tiny_batch(rows: int = 4, length: int = 20, seed: int = 0) -> dict[str, jax.Array]:
    """Rows of several lengths, whose masks have gaps."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, rows)
    real = np.arange(length) < lengths[:, None]
    mask = real & (np.arange(length) >= 3) & (rng.random((rows, length)) > 0.15)
    return {
        "input_ids": jnp.asarray(rng.integers(0, VOCAB, (rows, length)) * real, jnp.int32),
        "loss_mask": jnp.asarray(mask, jnp.uint8),
        "features": jnp.asarray(rng.standard_normal((rows, length, len(TAPS) * HIDDEN)) * real[..., None], jnp.float32),
        "last_hidden": jnp.asarray(rng.standard_normal((rows, length, HIDDEN)) * real[..., None], jnp.float32),
    }


def write_pair(folder: Path, seed: int = 0, **fields: Any) -> tuple[Target, Drafter]:
    """A target on disk, loaded, and a fresh drafter for it."""
    config = target_hf_config(num_hidden_layers=4)
    target = load_target(write_tiny_target(folder, seed=seed, **config), tokenizer=False)
    given = {"num_layers": 2, "target_layer_ids": TAPS, "mask_token_id": 5, "block_size": 4, "markov_rank": 6} | fields
    assert read_target_config(config) == target.config
    return target, new_drafter("fresh", drafter_hf_config(target.hf_config, **given), jax.random.key(7))


def config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder."""
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **fields: Any) -> None:
    """Fields of config.json replaced; None takes one out."""
    changed = {name: value for name, value in (config(folder) | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))
