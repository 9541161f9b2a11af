"""Types and ranges of the fields of a `config.json`, and the fields that ask for an unimplemented rotation."""

from collections.abc import Iterator, Mapping
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.readers import (
    Check,
    Schema,
    check_fields,
    either,
    flag,
    integer,
    list_of,
    number,
    object_of,
    optional,
    shown,
    text,
)

# Beyond any published model, and small enough that a wrong file cannot make its reader run for hours.
_LAYERS, _WIDTH, _HEADS = 1024, 1 << 24, 1 << 16
_COUNT = optional(integer(0, 1 << 20))
_SIZE = optional(integer(1, _WIDTH))
_FLAG = optional(flag())
TOKEN_IDS: Check = optional(either(integer(), list_of(integer(), most=4096)))

TARGET_FIELDS: Schema = {
    "model_type": text(empty=False),
    "text_config": optional(object_of()),
    "architectures": optional(list_of(text(), most=64)),
    "dtype": optional(text()),
    "torch_dtype": optional(text()),
    "vocab_size": integer(1),
    "hidden_size": integer(1, _WIDTH),
    "intermediate_size": integer(1, _WIDTH),
    "num_hidden_layers": integer(1, _LAYERS),
    "layer_types": optional(list_of(text(), most=_LAYERS)),
    "num_attention_heads": integer(1, _HEADS),
    "num_key_value_heads": optional(integer(1, _HEADS)),
    "num_global_key_value_heads": optional(integer(1, _HEADS)),
    "head_dim": optional(integer(1, _HEADS)),
    "global_head_dim": optional(integer(1, _HEADS)),
    "hidden_act": optional(text()),
    "hidden_activation": optional(text()),
    "rms_norm_eps": number(0, 1),
    "initializer_range": number(0, 1e3),
    "max_position_embeddings": integer(1),
    "sliding_window": optional(integer(1)),
    "use_sliding_window": _FLAG,
    "max_window_layers": _COUNT,
    "rope_theta": optional(number(above=1)),
    "rope_parameters": optional(object_of()),
    "rope_scaling": optional(object_of()),
    "partial_rotary_factor": optional(number(above=0, high=1)),
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "attention_k_eq_v": _FLAG,
    "enable_moe_block": _FLAG,
    "tie_word_embeddings": flag(),
    "final_logit_softcapping": optional(number(above=0)),
    "hidden_size_per_layer_input": _COUNT,
    "num_kv_shared_layers": _COUNT,
    "pretraining_tp": optional(integer(1, _HEADS)),
    "num_experts": _COUNT,
    "num_local_experts": _COUNT,
    "num_experts_per_tok": _COUNT,
    "moe_intermediate_size": _SIZE,
    "decoder_sparse_step": optional(integer(1, _LAYERS)),
    "mlp_only_layers": optional(list_of(integer(0, _LAYERS))),
    "norm_topk_prob": _FLAG,
    "eos_token_id": TOKEN_IDS,
}

# Entries of `rope_parameters` or `rope_scaling`; `RopeConfig` decides which of them its kind uses.
ROPE_FIELDS: Schema = {
    "rope_type": optional(text()),
    "type": optional(text()),
    "rope_theta": optional(number(above=1)),
    "factor": optional(number(above=0)),
    "original_max_position_embeddings": optional(integer(1)),
    "partial_rotary_factor": optional(number(above=0, high=1)),
    "beta_fast": optional(number(above=0)),
    "beta_slow": optional(number(above=0)),
    "attention_factor": optional(number(above=0)),
    "mscale": optional(number(0)),
    "mscale_all_dim": optional(number(0)),
    "truncate": _FLAG,
    "low_freq_factor": optional(number(above=0)),
    "high_freq_factor": optional(number(above=0)),
}

# The first half of a head turns with the second here. Field -> the values under which that is so, the first explicit.
_ROTATIONS: Mapping[str, tuple[Any, ...]] = {
    "rope_interleave": (False, None),
    "rope_interleaved": (False, None),
    "rotary_interleaved": (False, None),
    "interleaved_rope": (False, None),
    "rope_traditional": (False, None),
    "is_neox_style": (True, None),
    "rope_is_neox_style": (True, None),
    "rotary_pct": (1.0, None),
    "rotary_percentage": (1.0, None),
    "rotary_dim": (None,),
}


def check_target_fields(config: Mapping[str, Any], where: str) -> None:
    """UserError naming the first field whose type or range no target has."""
    check_fields(config, TARGET_FIELDS, where)


def refuse_quantisation(config: Mapping[str, Any], where: str) -> None:
    """UserError where a config says that the weights are quantised, by any of the fields in use for that."""
    # `quant_method` is transformers' name, `format` that of compressed-tensors; mlx writes bits and a group size alone.
    for name in ("quantization_config", "quantization", "compression_config"):
        if found := config.get(name):
            method = found.get("quant_method") or found.get("format") if isinstance(found, Mapping) else found
            raise UserError(
                f"{where} has a {name} ({shown(method)}): the weights are quantised in a form that is not read. Give "
                "the model's unquantised weights."
            )


def refuse_rotations(config: Mapping[str, Any], where: str) -> None:
    """UserError where a field, at any depth, asks for interleaved pairs or for rotating a part of each head.

    Such a model's weights load without a fault and compute something else. `partial_rotary_factor` is `RopeConfig`'s.
    """
    # At any depth, because multimodal files nest the text config and Gemma's ropes lie a level further down.

    for values in _objects(config):
        for name, harmless in _ROTATIONS.items():
            if name in values and values[name] not in harmless:
                raise UserError(
                    f"{where} has {name} = {values[name]!r}, a layout of the rotary embedding that is not implemented "
                    f"(only {name} = {harmless[0]!r} is); choose a model without it."
                )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object within a JSON value, outermost first; the reader has bounded its depth."""
    if isinstance(value, Mapping):
        yield value
        # Lists are not searched: no published field for rotation lies in one.
        for item in value.values():
            yield from _objects(item)
