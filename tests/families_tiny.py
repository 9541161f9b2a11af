"""Tiny configs of every target family, non-default wherever a field could go unread; and a Gemma 4 pair that accepts.

python -m tests.families_tiny: loads them split over 8 simulated devices (a program of test_target_families).
"""

import os
import sys

from tests.xla import xla_flags

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = xla_flags(8)
    os.environ["JAX_PLATFORMS"] = "cpu"

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dspark_jax.checkpoints.huggingface import abstract_target, load_target, save_target
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, read_config, skeleton
from dspark_jax.sharding import ShardingRules, make_mesh, split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target
from tests.decoding_tiny import random_leaves
from tests.drafters_tiny import target_hf_config
from tests.tiny import random_params

GEMMA: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 7.0,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
    },
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "dtype": "float32",
}
MOE = target_hf_config(
    model_type="qwen3_moe", num_hidden_layers=3, decoder_sparse_step=2, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=16, norm_topk_prob=True, hidden_size=32, vocab_size=64,
)  # fmt: skip
LLAMA = target_hf_config(model_type="llama", mlp_bias=True, attention_bias=True, hidden_size=32, vocab_size=64)
FAMILIES = {"gemma": GEMMA, "moe": MOE, "llama": LLAMA}


def write_family(folder: Path, name: str) -> Path:
    hf_config = FAMILIES[name]
    save_target(folder, hf_config, random_params(hf_config), "float32")
    return folder


def gemma_pair(context: float = 0.1) -> tuple[Target, Drafter]:
    """A Gemma target whose layers add little (`context`), so nearly a bigram model, and a drafter whose Markov head is
    that bigram: without training, some drafts are accepted and some are not."""
    hf_config = GEMMA | {"tie_word_embeddings": False}
    flat = flatten_dict(random_params(hf_config))
    for path in flat:
        if path[-2:-1] in (("post_attention_norm",), ("post_feedforward_norm",)):
            flat[path] = context * GEMMA["hidden_size"] ** 0.5 * flat[path]
        if path[-1] == "layer_scalar":
            flat[path] = 1.0 + 0.2 * flat[path]
    params = jax.tree.map(jnp.asarray, unflatten_dict(flat))
    config = read_target_config(hf_config)
    target = Target("gemma", config, abstract_target(config, "float32")[0], params, hf_config, config_sha256(hf_config))
    draft_config = drafter_hf_config(
        hf_config, num_layers=2, target_layer_ids=(-1, 1), mask_token_id=2, block_size=4, markov_rank=32,
        dtype="float32",
    )  # fmt: skip
    graphdef, abstract = split(skeleton(draft_config))
    leaves = flatten_dict(random_leaves(draft_config, abstract, 0.2, 1))
    embed = np.asarray(params["embed_weight_vd"])
    normed = embed / np.sqrt(np.mean(embed**2, axis=-1, keepdims=True))
    leaves["markov_head", "w1_vr"] = normed * np.asarray(params["final_norm"]["weight"])
    leaves["markov_head", "w2_vr"] = np.asarray(params["head_weight_vd"])
    leaves["backbone", "norm", "weight"] = 0.1 * leaves["backbone", "norm", "weight"]
    made = unflatten_dict({path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})
    return target, Drafter("bigram", read_config(draft_config), graphdef, made, draft_config)


def check_split(name: str) -> None:
    """Every device holds its part of a split parameter and no more, and the parts are the parameter."""
    mesh = make_mesh(data=2, fsdp=4)
    rules = {
        "fsdp": ShardingRules(),
        "tensor": ShardingRules(embed=None, heads="fsdp", kv_heads="data", mlp="fsdp", experts="data", vocab="fsdp"),
    }
    with tempfile.TemporaryDirectory() as made:
        folder = write_family(Path(made), name)
        target = load_target(folder)
        whole = flatten_dict(target.params)
        for rule in rules.values():
            for path, array in flatten_dict(load_target(folder, mesh=mesh, rules=rule).params).items():
                np.testing.assert_array_equal(array, whole[path])
                parts = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
                assert sum(parts.values()) == array.nbytes, (name, path)
                # Heads are not cut: the keys and values of a single one stay whole.
                keys = path[0] == "layers" and path[-1] == "kv_weight_dy"
                one_head = keys and target.config.layers[int(path[1])].num_kv_heads == 1
                assert len(parts) > 1 or one_head or "weight_" not in path[-1], (name, path)


if __name__ == "__main__":
    assert jax.device_count() == 8
    for family in sys.argv[1:]:
        check_split(family)
