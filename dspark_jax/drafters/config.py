"""A drafter's architecture, read once from its `config.json`: the target's text config with some fields replaced."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.errors import UserError
from dspark_jax.readers import Schema, check_fields, flag, integer, list_of, number, optional, text
from dspark_jax.targets.config import TargetConfig, text_config
from dspark_jax.targets.fields import check_target_fields, refuse_rotations
from dspark_jax.targets.low_bit import CODES, SCALES
from dspark_jax.targets.registry import read_target_config

TARGET_SHA_FIELD = "target_config_sha256"
WHERE = "The drafter's config.json"

# The fields that a drafter's config.json has in addition to a target's, in DeepSpec's layout.
DRAFTER_FIELDS: Schema = {
    "architectures": optional(list_of(text(), most=64)),
    "num_hidden_layers": integer(1, 1024),
    "block_size": integer(1, 1 << 16),
    "target_layer_ids": list_of(integer(-1, 1024), least=1),
    "num_target_layers": integer(1, 1024),
    TARGET_SHA_FIELD: optional(text()),
    "num_anchors": integer(1),
    "mask_token_id": integer(),
    "markov_rank": optional(integer(0, 1 << 20)),
    "markov_head_type": optional(text()),
    "enable_confidence_head": optional(flag()),
    "confidence_head_with_markov": optional(flag()),
    "sample_from_anchor": optional(flag()),
    "conv_kernel_size": optional(integer(0, 64)),
    "conv_group_size": optional(integer(1)),
    "selector_rank": optional(integer(1, 1 << 20)),
    "selector_top_k": optional(integer(1)),
    "context_window": optional(integer(1)),
    "ttt_length": optional(integer(1, 1 << 16)),
    "step_loss_decay": optional(number(above=0, high=1)),
    "draft_vocab_size": optional(integer(1)),
}


def check_drafter_fields(config: Mapping[str, Any], where: str = WHERE) -> None:
    """UserError naming the first field whose type or range no drafter or target has."""
    check_fields(config, DRAFTER_FIELDS, where)
    check_target_fields(config, where)


# Last names of parameters in V4's residual streams (fn, base, scale), compressor, sinks and router.
_FLOAT32 = frozenset({"fn", "base", "scale", "ape", "sink", "bias"})


def float32_parameter(path: tuple[Any, ...]) -> bool:
    """Whether a drafter's parameter at `path` stays float32 whatever the others' dtype: those of the confidence head,
    whose outputs are compared with thresholds and multiplied, and those of V4's streams, sinks and routers."""
    return path[0] == "confidence_head" or path[-1] in _FLOAT32


def held_dtype(path: tuple[Any, ...], own: Any, storage: Any) -> Any:
    """The dtype in which decoding holds a drafter's parameter: its `own` where it keeps stored codes, float32 as above,
    else `storage`."""
    if path[-1] in (CODES, SCALES):
        return own
    return np.float32 if float32_parameter(path) else storage


@dataclass(frozen=True)
class DrafterConfig:
    """The fields of any drafter that the loop, the trainer and checkpoints need; kinds with more of them extend it.

    `backbone` holds the sizes of the draft layers, `block_size` is the number K of tokens drafted a round.
    `target_layer_ids` are 0-based target layers, -1 the embeddings; `num_target_layers` is the target's depth.
    """

    backbone: TargetConfig
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    target_sha256: str | None

    @property
    def widened(self) -> Self:
        """The same drafter with all weights in a float dtype."""
        return replace(self, backbone=self.backbone.widened)

    @classmethod
    def from_hf_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a config.json; UserError naming a field that is missing, mistyped or contradicts another."""
        # Types and ranges first: below, fields are indexed, compared and multiplied.
        check_drafter_fields(config, WHERE)
        refuse_rotations(config, WHERE)
        try:
            made = cls(**cls.read_fields(config))
        except KeyError as missing:
            raise UserError(
                f"The drafter's config.json has no field {missing}, which a {cls.__name__.removesuffix('Config')} "
                "drafter needs; copy the file again."
            ) from None
        made.check()
        return made

    @classmethod
    def read_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments, as a dict that subclasses extend."""
        # Layer types are overridden: draft layers are of the full-attention kind, for which Gemma has sizes of its own,
        # and they never slide (docs/algorithm.md, rules 25 and 64).
        full = ["full_attention"] * (config.get("num_hidden_layers") or 0)

        return {
            "backbone": read_target_config({**config, "layer_types": full}, WHERE),
            "block_size": config["block_size"],
            "target_layer_ids": tuple(config["target_layer_ids"]),
            "num_target_layers": config["num_target_layers"],
            # Absent in files that other programs wrote; such a drafter is bound to its target by sizes and frozen
            # copies alone.
            "target_sha256": config.get(TARGET_SHA_FIELD),
        }

    @classmethod
    def hf_fields(cls, **settings: Any) -> dict[str, Any]:
        """The fields of a new drafter's config.json that belong to this kind; settings of other kinds are ignored."""
        return {"block_size": settings["block_size"]}

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config.json with this kind's architecture is of this kind, where several kinds share one."""
        return True

    @property
    def last_tap(self) -> int:
        """The deepest layer that may be tapped: in DeepSpec's caches the last layer's output is normed (rule 15)."""
        return self.num_target_layers - 2

    def check(self) -> None:
        """Raises UserError if the fields contradict one another."""
        self.check_taps()
        if self.block_size < 1:
            raise UserError(f"The drafter's block_size is {self.block_size}; expected 1 or more.")

    def check_taps(self) -> None:
        """Raises UserError for tapped layers that the target does not have, or that may not be tapped."""
        # Increasing, because features are concatenated in this order (docs/algorithm.md, rule 16).
        ids, last = self.target_layer_ids, self.last_tap
        if not ids or any(b <= a for a, b in zip(ids, ids[1:], strict=False)) or ids[0] < -1 or ids[-1] > last:
            raise UserError(
                f"The drafter's target_layer_ids are {list(ids)}; expected strictly increasing 0-based layers from -1 "
                f"(embeddings) to {last}, the last layer of the {self.num_target_layers}-layer target being forbidden."
            )

    def check_target(self, target: TargetConfig) -> None:
        """Raises UserError if this drafter cannot read that target's features or speak its vocabulary."""
        # Even a pruned draft vocabulary is a choice among the target's ids, so the two must agree.
        if self.backbone.vocab_size != target.vocab_size:
            raise UserError(
                f"Vocabulary mismatch: the drafter has {self.backbone.vocab_size} tokens, the target "
                f"{target.vocab_size}; give the target that the drafter was trained for."
            )

        for what, found, expected in (
            # Depth and width fix the taps; scale and soft-cap fix how the frozen tables are read.
            ("num_target_layers", self.num_target_layers, target.num_layers),
            ("hidden_size", self.backbone.hidden_size, target.hidden_size),
            ("embedding scale", self.backbone.embed_scale, target.embed_scale),
            ("final_logit_softcapping", self.backbone.logit_softcap, target.logit_softcap),
        ):
            if found != expected:
                raise UserError(
                    f"Target/drafter mismatch: the drafter's {what} is {found}, the target has {expected}; give the "
                    "target that the drafter was trained for."
                )


@dataclass(frozen=True)
class BlockConfig(DrafterConfig):
    """A drafter trained with the objective "blocks", on `num_anchors` blocks a sequence."""

    num_anchors: int

    @classmethod
    def read_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().read_fields(config) | {"num_anchors": config["num_anchors"]}

    @classmethod
    def hf_fields(cls, **settings: Any) -> dict[str, Any]:
        return super().hf_fields(**settings) | {"num_anchors": settings["num_anchors"]}


@dataclass(frozen=True)
class ConvolutionConfig:
    """Local convolutions of `taps` rows, whose dynamic kernels are shared by `group` neighbouring channels."""

    taps: int
    group: int


SELECTOR = "selector"


def extended(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has a part that DeepSpec's readers would pass over without a word: an anchor that waits,
    local convolutions, a selector or a window of the context. Such a drafter's architecture bears another name."""
    own = config.get("conv_kernel_size") or config.get("context_window") or config.get("markov_head_type") == SELECTOR
    return bool(own) or not config.get("sample_from_anchor", True)


@dataclass(frozen=True)
class DSparkConfig(BlockConfig):
    """`markov_rank` 0 means no Markov head.

    Without `sample_from_anchor` (z-lab's DFlash) the anchor's row predicts nothing, and row k >= 1 predicts token
    anchor + k; `block_size` always counts predictions, so such a block has one row more. `draft_vocabulary` None: the
    target's. `selector_top_k`: candidates of the head "selector", 0 with another. `context_window`: positions that a
    row sees back from its own; None: all before the anchor.
    """

    mask_token_id: int
    markov_rank: int
    markov_head_type: str
    enable_confidence_head: bool
    confidence_head_with_markov: bool
    sample_from_anchor: bool
    draft_vocabulary: DraftVocabulary | None
    convolution: ConvolutionConfig | None = None
    selector_top_k: int = 0
    context_window: int | None = None

    @property
    def draft_vocab_size(self) -> int:
        """The number of ids P that may be drafted."""
        return self.backbone.vocab_size if self.draft_vocabulary is None else self.draft_vocabulary.size

    @classmethod
    def read_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # `or 0`: a null rank in a file means no head, as an absent one does.
        bits = config.get("draft_vocabulary")
        rank = config.get("markov_rank") or 0
        confidence = bool(config.get("enable_confidence_head", False))
        taps = config.get("conv_kernel_size")

        return super().read_fields(config) | {
            "mask_token_id": config["mask_token_id"],
            "markov_rank": rank,
            # A head's fields are left out with the head (docs/algorithm.md, rule 90) and read only with it.
            "markov_head_type": config["markov_head_type"] if rank else "none",
            "selector_top_k": config["selector_top_k"] if rank and config["markov_head_type"] == SELECTOR else 0,
            "convolution": ConvolutionConfig(taps, config["conv_group_size"]) if taps else None,
            "context_window": config.get("context_window"),
            "enable_confidence_head": confidence,
            "confidence_head_with_markov": confidence and bool(config["confidence_head_with_markov"]),
            "sample_from_anchor": bool(config.get("sample_from_anchor", True)),
            "draft_vocabulary": None if bits is None else DraftVocabulary(bits, config["vocab_size"]),
        }

    @classmethod
    def hf_fields(cls, **settings: Any) -> dict[str, Any]:
        """The fields that DeepSpec writes; a head's own fields are left out with the head, as DeepSpec does."""
        if settings.get("mask_token_id") is None:
            raise UserError(
                "The drafter has no mask token: the target's tokenizer names none. Name an unused token with "
                "--drafter.mask-token-id."
            )

        rank, vocabulary = settings["markov_rank"], settings.get("draft_vocabulary")
        fields = super().hf_fields(**settings) | {
            "mask_token_id": settings["mask_token_id"],
            "enable_confidence_head": settings["enable_confidence_head"],
            "markov_rank": rank,
        }
        if rank:
            fields["markov_head_type"] = settings["markov_head_type"]
        if settings["enable_confidence_head"]:
            # At rank 0 there is no Markov embedding to read, whatever the setting says.
            fields["confidence_head_with_markov"] = settings["confidence_head_with_markov"] and rank > 0
        if vocabulary is not None:
            fields |= {"draft_vocabulary": vocabulary.bits, "draft_vocab_size": vocabulary.size}

        return fields | _extensions(settings)

    def check(self) -> None:
        super().check()

        # The mask row is looked up in the target's embedding, whatever the draft vocabulary is.
        if not 0 <= self.mask_token_id < self.backbone.vocab_size:
            raise UserError(
                f"The drafter's mask_token_id is {self.mask_token_id}, outside its vocabulary of "
                f"{self.backbone.vocab_size} tokens; name a token of the target's embedding."
            )

        if self.confidence_head_with_markov and not self.markov_rank:
            raise UserError(
                "The drafter's config asks for confidence_head_with_markov at markov_rank 0; expected a Markov head or "
                "confidence_head_with_markov false."
            )
        self._check_extensions()

    def _check_extensions(self) -> None:
        """UserError for a selector of more candidates than ids, or convolutions that do not divide the channels."""
        if self.selector_top_k > self.draft_vocab_size:
            raise UserError(
                f"The drafter's selector_top_k is {self.selector_top_k}; it drafts {self.draft_vocab_size} tokens, and "
                "expected at most as many candidates."
            )

        if (convolution := self.convolution) is None:
            return
        if self.backbone.hidden_size % convolution.group:
            raise UserError(
                f"The drafter's conv_group_size is {convolution.group}; expected a divisor of its hidden_size, "
                f"{self.backbone.hidden_size}."
            )
        if self.backbone.model_type != "qwen3":
            raise UserError(
                f"The drafter has local convolutions in layers of model_type {self.backbone.model_type!r}; they are "
                "defined for Qwen3's layers alone. Leave drafter.conv_kernel_size at 0."
            )


def _extensions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are written only where a drafter has the part that they describe."""
    fields: dict[str, Any] = {}
    if not settings["sample_from_anchor"]:
        fields["sample_from_anchor"] = False
    if settings["conv_kernel_size"]:
        fields |= {name: settings[name] for name in ("conv_kernel_size", "conv_group_size")}
    if settings["markov_rank"] and settings["markov_head_type"] == SELECTOR:
        fields["selector_top_k"] = settings["selector_top_k"]
    return fields


@dataclass(frozen=True)
class DFlashConfig(DSparkConfig):
    """The backbone without heads, whose absence in a config.json distinguishes it from DSpark (rule 27)."""

    @classmethod
    def hf_fields(cls, **settings: Any) -> dict[str, Any]:
        return super().hf_fields(**settings | {"markov_rank": 0, "enable_confidence_head": False})

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        return not config.get("markov_rank") and not config.get("enable_confidence_head", False)

    def check(self) -> None:
        super().check()
        if self.markov_rank or self.enable_confidence_head:
            raise UserError(
                "The config of a DFlash drafter names heads; expected markov_rank 0 and no confidence head."
            )


FAMILIES = ("Qwen3", "Gemma4")


def drafter_family(config: Mapping[str, Any]) -> str:
    """The prefix of a drafter's architecture: the family whose decoder blocks it is built from."""
    return "Gemma4" if str(config["model_type"]).startswith("gemma4") else "Qwen3"


def family_fields(
    target_hf_config: Mapping[str, Any], dimensions: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """(the target's text config spelled for the draft layers' family, the sizes under that family's names)."""
    # Deep, because a config's nested objects (ropes, layer types) would be shared with the target's.
    config = deepcopy(dict(text_config(target_hf_config)))
    sizes = dict(dimensions)

    if drafter_family(config) == "Gemma4":
        # Two fields of DeepSpec's Gemma drafters: the model types of the target's text part and of its whole file.
        config["target_text_model_type"] = config["model_type"]
        config["target_model_type"] = target_hf_config["model_type"]

        # Readers ask for these two, which unified text configs don't have.
        config = {"enable_moe_block": False, "hidden_size_per_layer_input": 0} | config

        # Draft layers are of the global kind, which has its own head size and, with K = V, number of kv heads.
        if "head_dim" in sizes:
            sizes["global_head_dim"] = sizes.pop("head_dim")
        if config.get("attention_k_eq_v") and "num_key_value_heads" in sizes:
            sizes["num_global_key_value_heads"] = sizes.pop("num_key_value_heads")
        return config, sizes

    # Readers of Qwen3 drafters build dense Qwen3 blocks, whatever the target's are.
    if config["model_type"] != "qwen3":
        # Sizes that the target's family leaves to a default are written out: Qwen3's defaults may differ.
        layer = read_target_config(config).layers[0]
        config |= {"model_type": "qwen3", "head_dim": layer.head_dim, "num_key_value_heads": layer.num_kv_heads}
        for name in _OTHER_BLOCKS:
            config.pop(name, None)

    return config, sizes


# Fields of Llama's and of sparse blocks, which mean nothing to dense Qwen3 ones.
_OTHER_BLOCKS = (
    "mlp_bias", "pretraining_tp", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
    "num_experts", "num_experts_per_tok", "num_local_experts", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip
