"""Kinds of targets by the `model_type` of their text config, one line each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from dspark_jax.errors import UserError
from dspark_jax.targets.config import TargetConfig, text_config
from dspark_jax.targets.decoder import DecoderModel
from dspark_jax.targets.deepseek_v4.block import V4Block
from dspark_jax.targets.deepseek_v4.config import refuse_later_versions, v4_config
from dspark_jax.targets.deepseek_v4.model import FLOAT32 as V4_FLOAT32
from dspark_jax.targets.deepseek_v4.model import V4Model
from dspark_jax.targets.fields import check_target_fields, refuse_quantisation
from dspark_jax.targets.gemma4 import Gemma4Layer, gemma4_config
from dspark_jax.targets.layers import DecoderLayer
from dspark_jax.targets.llama import llama_config
from dspark_jax.targets.qwen3 import qwen3_config, qwen3_moe_config


@dataclass(frozen=True)
class TargetKind:
    """One family of targets.

    read_fields: makes the architecture of a text config.
    layer: the decoder block, called as `layer(config, index, rngs=...)`.
    multimodal: the `model_type` of files that hold such a model under `text_config`.
    quantised: whether its quantised checkpoints can be read.
    model: the whole module, `model(config, rngs=...)`, of a family that is not a `DecoderModel` over `layer`.
    float32: names of parameters that stay float32 whatever the others' dtype is.
    """

    read_fields: Callable[[Mapping[str, Any]], TargetConfig]
    layer: type
    multimodal: str | None = None
    quantised: bool = False
    model: Any = None
    float32: frozenset[str] = frozenset()

    def read(self, config: Mapping[str, Any], where: str) -> TargetConfig:
        """As `read_target_config`, for a file already known to be of this kind."""
        # A copy: the outer fields merged below must not leak into the caller's object.
        fields = dict(text_config(config))

        # Quantised weights are refused by the config, before any tensor of unknown type is met.
        if not self.quantised:
            refuse_quantisation(config, where)
            refuse_quantisation(fields, where)

        # A multimodal file's outer fields take precedence: the head belongs to the outer model, the dtype to all parts.
        fields |= {name: config[name] for name in ("dtype", "tie_word_embeddings") if config.get(name) is not None}
        check_target_fields(fields, where)

        try:
            # Families index required fields directly, so that a missing one surfaces here by its name.
            made = self.read_fields(fields)
        except KeyError as missing:
            raise UserError(
                f"{where} has no field {missing}, which a {fields['model_type']} target needs; add it."
            ) from None

        # On the result, where every family's defaults are filled in.
        _check_heads(made, where)
        return made


TARGETS: dict[str, TargetKind] = {
    "qwen3": TargetKind(qwen3_config, DecoderLayer),
    "qwen3_moe": TargetKind(qwen3_moe_config, DecoderLayer),
    "llama": TargetKind(llama_config, DecoderLayer),
    "deepseek_v4": TargetKind(v4_config, V4Block, quantised=True, model=V4Model, float32=V4_FLOAT32),
    "gemma4_text": TargetKind(gemma4_config, Gemma4Layer, multimodal="gemma4"),
    "gemma4_unified_text": TargetKind(gemma4_config, Gemma4Layer, multimodal="gemma4_unified"),
}


def read_target_config(config: Mapping[str, Any], where: str = "config.json") -> TargetConfig:
    """The architecture that a Hugging Face `config.json` of any family here describes, multimodal or text-only.

    Args:
        config: the file's object.
        where: the file's name in error messages.

    Raises:
        UserError: a field is missing, is of another type or range, contradicts another, or asks for what the family
            does not implement here; names it.
    """
    return target_kind(config, where).read(config, where)


def target_kind(config: Mapping[str, Any], where: str = "config.json") -> TargetKind:
    """The kind that a config.json names, multimodal or text-only; UserError if no family here has it."""
    refuse_later_versions(config, where)
    outer, named = config.get("model_type"), text_config(config).get("model_type")

    # `str`, since the field may be missing or of another type in a file that is no target's.
    kind = TARGETS.get(str(named))

    # A text model may stand alone (then outer and named agree), but not inside another family's multimodal file.
    if kind is None or outer not in (named, kind.multimodal):
        known = sorted([*TARGETS, *(kind.multimodal for kind in TARGETS.values() if kind.multimodal)])
        raise UserError(
            f"{where} has model_type {outer!r}; targets that load here are {', '.join(known)}. Give one of them."
        )

    return kind


def _check_heads(config: TargetConfig, where: str) -> None:
    """UserError where heads cannot be grouped, or a head cannot be rotated by halves."""
    for layer in config.layers:
        # Attention stacks the Q/G query heads of each kv head.
        if config.num_heads % layer.num_kv_heads:
            raise UserError(
                f"{where} has {config.num_heads} attention heads for {layer.num_kv_heads} key/value heads; expected a "
                "multiple of them; correct the file or copy it again."
            )
        if layer.head_dim < 2 or layer.head_dim % 2:
            raise UserError(
                f"{where} gives heads of size {layer.head_dim}; expected an even number of at least 2, whose halves "
                "the rotary embedding turns; correct the file or copy it again."
            )


def layer_class(config: TargetConfig) -> Any:
    """The decoder block of the config's family, for targets and for drafters of the same blocks."""
    return TARGETS[config.model_type].layer


def target_module(config: TargetConfig, *, rngs: nnx.Rngs) -> Any:
    """The target's module, with fresh weights; under `nnx.eval_shape` with shapes alone."""
    kind = TARGETS[config.model_type]
    return DecoderModel(config, kind.layer, rngs=rngs) if kind.model is None else kind.model(config, rngs=rngs)
