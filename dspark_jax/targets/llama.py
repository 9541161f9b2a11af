"""Llama-3-style dense targets: Qwen3's block without the norms of q and k, with optional MLP biases."""

from collections.abc import Mapping
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.targets.config import LayerConfig, RopeConfig, TargetConfig, check_activation, common_fields


def llama_config(config: Mapping[str, Any]) -> TargetConfig:
    """A dense Llama-3-style target; UserError for another activation or for tensor-parallel pretraining order."""
    check_activation(config, "hidden_act", "silu")

    # transformers sums such products slice by slice, and another order rounds to other values.
    if (parts := config.get("pretraining_tp") or 1) != 1:
        raise UserError(
            f"config.json has pretraining_tp {parts}, which sums products in another order; only 1 is implemented."
        )

    heads = config["num_attention_heads"]
    layer = LayerConfig(
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope=RopeConfig.from_hf_dict(config),
    )

    return TargetConfig(
        **common_fields(config),
        layers=(layer,) * config["num_hidden_layers"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        query_key_norm=False,
    )
