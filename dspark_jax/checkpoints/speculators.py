"""The layout of the speculators library: the decoder under `transformer_layer_config`, layer ids counted from 1.

`aux_hidden_state_layer_ids` index Hugging Face's `hidden_states`, so they are DeepSpec's ids + 1 (docs/algorithm.md,
rule 92). `sample_from_anchor` states the block's convention; without it the first row predicts nothing, and
`block_size` counts that row too.
"""

from dataclasses import dataclass
from typing import Any

from dspark_jax.checkpoints.dflash2 import FIELDS, TENSORS, from_dflash2, is_dflash2, to_dflash2
from dspark_jax.checkpoints.folder_layout import (
    ANCHORS,
    DRAFT_HEAD,
    EMBEDDING,
    HEAD,
    Config,
    native_architecture,
    refuse_fields,
    require_kind,
)
from dspark_jax.drafters.config import SELECTOR
from dspark_jax.errors import UserError
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.target import Target

_NAMES = {"dspark": "DSparkSpeculator", "dflash": "DFlashSpeculator", "dflash2": "DFlash2DraftModel",
          "eagle3": "Eagle3Speculator"}  # fmt: skip
_IDS = dict.fromkeys(_NAMES, "aux_hidden_state_layer_ids") | {"eagle3": "eagle_aux_hidden_state_layer_ids"}
# The drafter's own fields; all others describe the decoder.
_DRAFTER = (
    "block_size", "mask_token_id", "num_target_layers", "num_anchors", "markov_rank", "markov_head_type",
    "enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor", "target_config_sha256",
    "ttt_length", "step_loss_decay", "draft_num_hidden_layers", "target_model_name_or_path", "target_model_type",
    "target_text_model_type", "selector_rank", *FIELDS,
)  # fmt: skip


@dataclass(frozen=True)
class SpeculatorsLayout:
    """Published by the speculators library, and read by vLLM; layer ids are stored + 1."""

    name: str = "speculators"
    layer_id_base: int = 1
    vocabulary_maps: bool = True

    def detects(self, stored: Config) -> bool:
        """True if the file names its `speculators_model_type`, which no other layout has."""
        return "speculators_model_type" in stored

    def to_native(self, stored: Config, target: TargetConfig) -> dict[str, Any]:
        """DeepSpec's config.json; UserError for norms, projectors or vocabularies that drafters here do not have."""
        kind = stored["speculators_model_type"]
        if kind not in _NAMES:
            raise UserError(
                f"The drafter's config.json has speculators_model_type {kind!r}; expected one of {', '.join(_NAMES)}."
            )

        layers = dict(stored.get("transformer_layer_config") or {})
        self._refuse(stored, layers)

        # The drafter's own fields win over the decoder's of the same name.
        native = layers | {name: stored[name] for name in _DRAFTER if name in stored}

        # A size equal to the whole vocabulary is how an unpruned drafter is written.
        if stored.get("draft_vocab_size") not in (None, layers.get("vocab_size")):
            native["draft_vocab_size"] = stored["draft_vocab_size"]
        if _IDS[kind] not in stored:
            raise UserError(
                f"The drafter's config.json has no {_IDS[kind]}; the layers that it reads can't be guessed safely. Add "
                "them, counted from 1 for the first layer's output."
            )

        # Off by one here loads without an error and drafts badly (docs/algorithm.md, rule 96).
        native["target_layer_ids"] = [i - self.layer_id_base for i in stored[_IDS[kind]]]
        if kind == "dflash2":
            native = {"num_anchors": ANCHORS} | self._dflash2_to_native(native, stored)
        elif kind != "eagle3":
            self._block_to_native(native, kind)
        native["architectures"] = [native_architecture(native, "dspark" if kind == "dflash2" else kind)]

        return {"num_target_layers": target.num_layers} | native

    def from_native(self, native: Config, target: Target) -> dict[str, Any]:
        """This layout's config.json; UserError for a kind that it cannot hold."""
        kind = require_kind(native, self.name)
        if kind != "eagle3" and is_dflash2(native, self.name):
            kind, native = "dflash2", to_dflash2(native)
            # Qwen3's config forgets a window that this field does not allow.
            native |= {"use_sliding_window": True} if "sliding_attention" in native["layer_types"] else {}

        # The tensors d2t and t2d say which tokens a pruned vocabulary has.
        own = (*_DRAFTER, "architectures", "target_layer_ids", "draft_vocabulary", "draft_vocab_size")
        stored: dict[str, Any] = {name: native[name] for name in _DRAFTER if name in native}
        stored |= {
            "architectures": [_NAMES[kind]],
            "speculators_model_type": kind,
            "transformer_layer_config": {name: value for name, value in native.items() if name not in own},
            _IDS[kind]: [i + self.layer_id_base for i in native["target_layer_ids"]],
            # Always written, so that no reader's own default applies.
            "draft_vocab_size": native.get("draft_vocab_size", native["vocab_size"]),
            "target_hidden_size": target.config.hidden_size,
            "tie_word_embeddings": False,
            "dtype": native["dtype"],
        }

        if kind == "eagle3":
            # Written out: speculators and vLLM have different defaults.
            stored |= {"norm_before_residual": False, "norm_before_fc": False, "embed_requires_grad": False}
            drafts = native.get("ttt_length")
        elif kind == "dflash2":
            stored |= {"sample_from_anchor": False, "sliding_window_non_causal": True}
            drafts = native["block_size"] - 1
        else:
            stored["sample_from_anchor"] = native.get("sample_from_anchor", True)
            # Rows and not predictions: the anchor's row counts here.
            stored["block_size"] = native["block_size"] + (not stored["sample_from_anchor"])
            drafts = native["block_size"]

        stored["speculators_config"] = _proposal(kind, drafts, target)
        return stored

    def tensor(self, name: str, native: Config) -> str:
        """The draft head is `lm_head` here, whether the vocabulary is pruned or not; a selector's tensors are DFlash
        2's."""
        if native.get("markov_head_type") == SELECTOR:
            return TENSORS.get(name, name)
        return HEAD if name == DRAFT_HEAD else name

    def frozen(self, native: Config) -> tuple[str, ...]:
        """Both tables; with a pruned vocabulary the head is the drafter's own tensor, not a frozen copy."""
        return (EMBEDDING,) if "draft_vocabulary" in native else (EMBEDDING, HEAD)

    def _dflash2_to_native(self, native: Config, stored: Config) -> dict[str, Any]:
        """DeepSpec's form; UserError for a block whose anchor predicts, or a window that is causal within the block."""
        off = {"sample_from_anchor": (False, None), "sliding_window_non_causal": (True, None)}
        refuse_fields(stored, off, "config.json")
        return from_dflash2(native)

    def _block_to_native(self, native: dict[str, Any], kind: str) -> None:
        """Fills in speculators' defaults: a dspark block predicts from its anchor, a dflash one does not."""
        for name, value in (("num_anchors", ANCHORS), ("markov_rank", 256 if kind == "dspark" else 0),
                            ("enable_confidence_head", kind == "dspark")):  # fmt: skip
            native.setdefault(name, value)

        if native["markov_rank"]:
            native.setdefault("markov_head_type", "vanilla")
        if native["enable_confidence_head"]:
            native.setdefault("confidence_head_with_markov", native["markov_rank"] > 0)

        if native.pop("sample_from_anchor", kind == "dspark"):
            return

        # `block_size` counts the anchor's row here, and predictions in DeepSpec's config.
        native |= {"sample_from_anchor": False, "block_size": native["block_size"] - 1}

    def _refuse(self, stored: Config, layers: Config) -> None:
        """UserError for a file without its decoder, a pruned Eagle3 vocabulary, or layers that are not implemented."""
        if not layers:
            raise UserError("The drafter's config.json has no transformer_layer_config; copy the whole file again.")

        vocabulary = stored.get("draft_vocab_size", layers.get("vocab_size"))
        if vocabulary != layers.get("vocab_size") and stored["speculators_model_type"] == "eagle3":
            raise UserError(
                f"The drafter's vocabulary is reduced to {vocabulary} of {layers.get('vocab_size')} tokens; Eagle3 "
                "drafters here speak the target's whole vocabulary. Give one that was trained with it."
            )

        # Each of these changes the computation without adding a tensor, so leftovers alone would not reveal it.
        off = (False, None)
        harmless = {
            "norm_before_residual": off,
            "norm_before_fc": off,
            "fc_norm": off,
            "norm_output": off,
            "enable_correction_head": off,
            "projector_type": ("dflash", None),
        }
        refuse_fields(stored, harmless, "config.json")


def _proposal(kind: str, drafts: int | None, target: Target) -> dict[str, Any]:
    """`speculators_config`: the verifier and the proposal that vLLM reads from it."""
    method = {"proposal_type": "greedy", "speculative_tokens": drafts, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    verifier = {"name_or_path": target.name, "architectures": target.hf_config.get("architectures", [])}

    return {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [method],
        "verifier": verifier,
    }
