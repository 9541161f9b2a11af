"""Qwen3 targets: dense, and with mixtures of experts in some layers. Their decoder block is `layers.DecoderLayer`."""

from collections.abc import Mapping
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.targets.config import (
    ExpertsConfig,
    LayerConfig,
    RopeConfig,
    TargetConfig,
    check_activation,
    common_fields,
    layer_types,
)


def qwen3_config(config: Mapping[str, Any]) -> TargetConfig:
    """A dense Qwen3 (`model_type` qwen3)."""
    check_activation(config, "hidden_act", "silu")

    rope = RopeConfig.from_hf_dict(config)
    # 128 is the family's default where a file has no head_dim.
    heads, head_dim = _heads(config, 128)

    return TargetConfig(
        **common_fields(config),
        layers=tuple(LayerConfig(heads, head_dim, rope, window) for window in _windows(config)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def qwen3_moe_config(config: Mapping[str, Any]) -> TargetConfig:
    """A Qwen3 whose MLPs are mixtures of experts in every `decoder_sparse_step`-th layer outside `mlp_only_layers`.

    Raises UserError where `num_experts_per_tok` exceeds the experts.
    """
    check_activation(config, "hidden_act", "silu")

    rope = RopeConfig.from_hf_dict(config)

    # Without a head_dim it is D / heads here, not the dense family's 128.
    heads, head_dim = _heads(config, config["hidden_size"] // config["num_attention_heads"])

    # Files use either name for the number of experts; without one, all layers are dense.
    count = config.get("num_experts", config.get("num_local_experts")) or 0
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []

    # No `max_window_layers` here: in transformers, a mixture's window holds for every layer.
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None

    layers = tuple(
        LayerConfig(heads, head_dim, rope, window, sparse=count > 0 and i not in dense and (i + 1) % step == 0)
        for i in range(config["num_hidden_layers"])
    )

    experts = None
    if any(layer.sparse for layer in layers):
        experts = ExpertsConfig(
            count=count,
            per_token=config["num_experts_per_tok"],
            intermediate_size=config["moe_intermediate_size"],
            normalise=bool(config.get("norm_topk_prob", False)),
        )
        # top_k fails on more experts than there are, and would do so inside a traced function.
        if not 1 <= experts.per_token <= count:
            raise UserError(
                f"config.json has num_experts_per_tok {experts.per_token}; expected 1 to the {count} experts there are."
            )

    return TargetConfig(
        **common_fields(config),
        layers=layers,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
    )


def _heads(config: Mapping[str, Any], head_dim: int) -> tuple[int, int]:
    """(kv heads, head dim); `head_dim` applies where the file has none."""
    return config.get("num_key_value_heads") or config["num_attention_heads"], config.get("head_dim") or head_dim


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """Per-layer window, as transformers reads it: `sliding_window` counts only under `use_sliding_window`, and the
    layer types come from `max_window_layers` when the file has none."""
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None

    # Qwen's convention: the first `max_window_layers` layers are full, those after them slide.
    first = config.get("max_window_layers", 28)
    default = [
        "sliding_attention" if window and i >= first else "full_attention" for i in range(config["num_hidden_layers"])
    ]

    return [window if kind == "sliding_attention" else None for kind in layer_types(config, default)]
