"""Trains a tiny DeepSeek-V4 target on the arithmetic corpus, and writes conversations for its drafters to learn from.

    python -m train.embedded.v4_target --output runs/v4_tiny

A window-only, a CSA and an HCA layer, hash and routed experts, four streams, on the embedded target's tokenizer: small
enough to train in minutes on two cores, and of text with little entropy, so that drafters have something to learn.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from dspark_jax.checkpoints.deepseek_v4_published import save_v4_target
from dspark_jax.checkpoints.huggingface import TOKENIZER_FILES, read_hf_config
from dspark_jax.config.cli import parse, program
from dspark_jax.datagen.corpora import conversations, prompts
from dspark_jax.devices import announce
from dspark_jax.programs import asset
from dspark_jax.sharding import split
from dspark_jax.targets.registry import read_target_config, target_module

from .optimizer import make_loss
from .packing import Encoder, Rows, endless, single_rows

HF_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "float32",
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 4,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "compress_rope_theta": 40000.0,
    # In transformers' form, whose tokenizer loader reads this file and knows no other published ratio than 4 and 128.
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}


@dataclass(frozen=True)
class V4TargetSettings:
    """A tiny V4 target and conversations of its corpus."""

    output: Path = Path("runs/v4_tiny")
    """Folder for target/, conversations.jsonl and heldout.jsonl."""
    steps: int = 400
    """Optimizer steps."""
    rows: int = 16
    """Conversations of a step."""
    length: int = 96
    """Tokens of a row; longer conversations are left out."""
    learning_rate: float = 4e-3
    """The highest rate of a cosine after a warm-up of a twentieth."""
    conversations: int = 4000
    """Conversations written for the drafters."""
    heldout: int = 30
    """Held-out prompts written beside them."""
    seed: int = 0
    """Seed of the weights."""


def main_config() -> dict[str, Any]:
    """The target's config.json, with the embedded target's vocabulary and stop tokens."""
    embedded = read_hf_config(asset("embedded_target"))
    return HF_CONFIG | {name: embedded[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}


def fresh_params(hf_config: dict[str, Any], seed: int) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, random parameters); tables of hashed experts are drawn, and streams start with equal shares."""
    config = read_target_config(hf_config)
    assert config.experts is not None
    graphdef, params = split(target_module(config, rngs=nnx.Rngs(seed)))
    rng, flat = np.random.default_rng(seed), flatten_dict(params)

    for path, leaf in flat.items():
        if path[-1] == "table_vk":
            rows = [rng.permutation(config.experts.count)[: leaf.shape[1]] for _ in range(leaf.shape[0])]
            flat[path] = jnp.asarray(np.stack(rows), leaf.dtype)

    return graphdef, unflatten_dict(flat)


def train(graphdef: nnx.GraphDef, params: dict, batches: Iterator[Rows], settings: V4TargetSettings) -> dict:
    """The parameters after all steps of AdamW on the answers' cross-entropy."""
    # Tables of ids are no weights: they are held apart, so that nothing differentiates them.
    flat = flatten_dict(params)
    tables = {path: leaf for path, leaf in flat.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)}
    weights = {path: leaf for path, leaf in flat.items() if path not in tables}

    # AdamW for all of it: Muon's list of matrices knows none of V4's.
    steps = settings.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01))
    loss = make_loss(graphdef, packed=False)

    def step(weights: dict, state: Any, rows: Rows) -> tuple[dict, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda w: loss(unflatten_dict(w | tables), rows))(weights)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, value

    run, state, began = jax.jit(step, donate_argnums=(0, 1)), optimizer.init(weights), time.process_time()
    for number, rows in enumerate(islice(batches, steps), start=1):
        weights, state, value = run(weights, state, jax.tree.map(jnp.asarray, rows))
        if number % 50 == 0 or number == steps:
            print(f"step {number}  loss {float(value):.3f}  {time.process_time() - began:.0f} CPU seconds", flush=True)

    return unflatten_dict(weights | tables)


@program
def main(argv: list[str]) -> None:
    settings = parse(V4TargetSettings, argv, description=__doc__)
    announce("float32")
    folder, source = settings.output / "target", asset("embedded_target")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))

    stream = endless(Encoder(tokenizer, context_weight=0.3), "math", settings.length)
    hf_config = main_config()
    graphdef, params = fresh_params(hf_config, settings.seed)
    params = train(graphdef, params, single_rows(stream, settings.rows, settings.length), settings)

    # In float32 and without codes: quantised to fp4, a model of this size would be another one.
    save_v4_target(folder, hf_config, params, "float32")
    for name in (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)

    # The corpus goes on where training began: arithmetic never ends, and a drafter learns from the target's states.
    lines = [json.dumps(item) for item in conversations("math", "train", settings.conversations, seed=1)]
    (settings.output / "conversations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = [json.dumps(item) for item in prompts("math", "heldout", settings.heldout)]
    (settings.output / "heldout.jsonl").write_text("\n".join(asked) + "\n", encoding="utf-8")
    print(f"{folder}, and {len(lines)} conversations and {len(asked)} held-out prompts beside it")


if __name__ == "__main__":
    main()
