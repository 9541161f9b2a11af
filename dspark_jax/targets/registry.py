"""Kinds of targets by the `model_type` of their text config: one line a kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from dspark_jax.errors import UserError
from dspark_jax.targets.config import TargetConfig, text_config
from dspark_jax.targets.decoder import DecoderModel
from dspark_jax.targets.gemma4 import Gemma4Layer, gemma4_config
from dspark_jax.targets.layers import DecoderLayer
from dspark_jax.targets.llama import llama_config
from dspark_jax.targets.qwen3 import qwen3_config, qwen3_moe_config


@dataclass(frozen=True)
class TargetKind:
    """`read_fields` makes the architecture of a text config; `layer(config, index, rngs=...)` is its decoder block.

    `multimodal`: the `model_type` of the files that hold such a model under `text_config`.
    """

    read_fields: Callable[[Mapping[str, Any]], TargetConfig]
    layer: type
    multimodal: str | None = None

    def read(self, config: Mapping[str, Any]) -> TargetConfig:
        """UserError naming the field when one is missing or asks for what is not implemented."""
        fields = dict(text_config(config))
        # What multimodal files state outside counts: the head belongs to the outer model, the dtype to all parts.
        fields |= {name: config[name] for name in ("dtype", "tie_word_embeddings") if config.get(name) is not None}
        try:
            return self.read_fields(fields)
        except KeyError as missing:
            raise UserError(
                f"config.json has no field {missing}, which a {fields['model_type']} target needs; add it."
            ) from None


TARGETS: dict[str, TargetKind] = {
    "qwen3": TargetKind(qwen3_config, DecoderLayer),
    "qwen3_moe": TargetKind(qwen3_moe_config, DecoderLayer),
    "llama": TargetKind(llama_config, DecoderLayer),
    "gemma4_text": TargetKind(gemma4_config, Gemma4Layer, multimodal="gemma4"),
    "gemma4_unified_text": TargetKind(gemma4_config, Gemma4Layer, multimodal="gemma4_unified"),
}


def target_kind(config: Mapping[str, Any]) -> TargetKind:
    """The kind of a config.json, multimodal or text-only."""
    outer, named = config.get("model_type"), text_config(config).get("model_type")
    kind = TARGETS.get(str(named))
    if kind is None or outer not in (named, kind.multimodal):
        known = sorted([*TARGETS, *(kind.multimodal for kind in TARGETS.values() if kind.multimodal)])
        raise UserError(f"config.json has model_type {outer!r}; targets that load here are {', '.join(known)}.")
    return kind


def layer_class(config: TargetConfig) -> Any:
    """The decoder block of the config's family, for targets and for drafters of the same blocks."""
    return TARGETS[config.model_type].layer


def target_module(config: TargetConfig, *, rngs: nnx.Rngs) -> DecoderModel:
    """The target's module, with fresh weights; under `nnx.eval_shape` with shapes alone."""
    return DecoderModel(config, layer_class(config), rngs=rngs)
