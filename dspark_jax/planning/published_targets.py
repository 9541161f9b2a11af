"""Shapes of the targets that configs/ names, as published, so that a plan needs no download."""

import functools
from typing import Any

from dspark_jax.checkpoints.huggingface import target_skeleton
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.sharding import split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target

# The fields that set shapes, and those that the readers require; other fields of the published files are left out.
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


# Fields that Flash and Pro share.
_V4: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
_V4_FLASH = _V4 | {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "index_topk": 512,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    # One entry a layer: 0 for sliding attention alone, else the ratio by which the context is compressed.
    "compress_ratios": [0, 0, *[4, 128] * 20, 4],
}
_V4_PRO = _V4 | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4],
}


def _with_stages(config: dict[str, Any], taps: list[int], rank: int) -> dict[str, Any]:
    """The configuration of a repository with a DSpark module: three blocks past the layers, and the module's fields."""
    return config | {
        # One entry for each of the module's blocks, which slide and do not compress.
        "compress_ratios": [*config["compress_ratios"], 0, 0, 0],
        "dspark_target_layer_ids": taps,
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
        "dspark_markov_rank": rank,
    }


def _with_mtp(config: dict[str, Any]) -> dict[str, Any]:
    # The published list counts the MTP block as well.
    return config | {"compress_ratios": [*config["compress_ratios"], 0]}


PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V4-Flash": _with_mtp(_V4_FLASH),
    "deepseek-ai/DeepSeek-V4-Flash-DSpark": _with_stages(_V4_FLASH, [40, 41, 42], 256),
    "deepseek-ai/DeepSeek-V4-Pro": _with_mtp(_V4_PRO),
    "deepseek-ai/DeepSeek-V4-Pro-DSpark": _with_stages(_V4_PRO, [58, 59, 60], 512),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, False),
    "google/gemma-4-12B-it": _GEMMA4_12B,
}


@functools.cache
def planned_target(name: str) -> Target:
    """A target without parameters: a published one from the shapes above, any other from its folder or hub id.

    Raises:
        UserError: the folder or repository can't be read.
    """
    # A folder of the user's own is read; a published name needs neither download nor network.
    if name not in PUBLISHED:
        return describe_target(name)

    hf_config = PUBLISHED[name]
    config = read_target_config(hf_config)
    # Shapes only: the skeleton allocates nothing.
    graphdef, _ = split(target_skeleton(config))

    return Target(name, config, graphdef, {}, hf_config, config_sha256(hf_config))


def with_layers(target: Target, count: int) -> Target:
    """The same target with its first `count` decoder layers alone, at most as many as it has; no parameters."""
    whole = target.hf_config["num_hidden_layers"]
    count = min(count, whole)

    # Lists with one entry a layer, such as layer_types, are cut as well.
    cut = {
        name: value[:count] if isinstance(value, list) and len(value) == whole else value
        for name, value in target.hf_config.items()
    }
    hf_config = cut | {"num_hidden_layers": count}
    config = read_target_config(hf_config)
    graphdef, _ = split(target_skeleton(config))
    return Target(target.name, config, graphdef, {}, hf_config, config_sha256(hf_config))
