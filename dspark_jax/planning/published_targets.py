"""Shapes of the targets that configs/ names, as published, so that a plan needs no download."""

import functools
from typing import Any

from dspark_jax.checkpoints.huggingface import target_skeleton
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.sharding import split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}
_GEMMA4_12B: dict[str, Any] = {
    "architectures": ["Gemma4UnifiedForCausalLM"],
    "model_type": "gemma4_unified_text",
    "vocab_size": 262144,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
    "sliding_window": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
    },
    "max_position_embeddings": 262144,
    "attention_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return _QWEN3 | {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, False),
    "google/gemma-4-12B-it": _GEMMA4_12B,
}


@functools.cache
def planned_target(name: str) -> Target:
    """A target without parameters: a published one by its shapes here, any other by its folder or hub id."""
    if name not in PUBLISHED:
        return describe_target(name)
    hf_config = PUBLISHED[name]
    config = read_target_config(hf_config)
    graphdef, _ = split(target_skeleton(config))
    return Target(name, config, graphdef, {}, hf_config, config_sha256(hf_config))
