"""The layout of SpecForge, z-lab and ModelOpt: a flat Qwen3 config with a nested `dflash_config` (or `eagle_config`).

Layer ids are 0-based, as DeepSpec's. Two block conventions share it: with `projector_type` "dspark" every row predicts,
the anchor's too; a plain `DFlashDraftModel` is z-lab's, whose anchor row predicts nothing (docs/algorithm.md, rule 91).
"""

from dataclasses import dataclass
from typing import Any

from dspark_jax.checkpoints.dflash2 import FIELDS, TENSORS, from_dflash2, is_dflash2, to_dflash2
from dspark_jax.checkpoints.folder_layout import (
    ANCHORS,
    HEAD,
    Config,
    native_architecture,
    refuse_fields,
    require_kind,
)
from dspark_jax.drafters.config import SELECTOR, drafter_family
from dspark_jax.errors import UserError
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.target import Target

# SpecForge's normaliser and servers look for these fields beside dflash_config as well as inside it.
_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_EAGLE3 = "ForCausalLMEagle3"
_DRAFT_MODELS = ("DSparkDraftModel", "DFlashDraftModel", "DFlash2DraftModel")


@dataclass(frozen=True)
class SpecForgeLayout:
    """Published by SpecForge, z-lab and ModelOpt; layer ids are 0-based as here."""

    name: str = "specforge"
    layer_id_base: int = 0
    vocabulary_maps: bool = False

    def detects(self, stored: Config) -> bool:
        """True if a nested config or a draft model's architecture is SpecForge's."""
        # The speculators library's Eagle3 files also have eagle fields, but always name their own type.
        if "speculators_model_type" in stored:
            return False
        named = [str(name) for name in stored.get("architectures") or []]
        nested = "dflash_config" in stored or "eagle_config" in stored
        return nested or any(name in _DRAFT_MODELS or name.endswith(_EAGLE3) for name in named)

    def to_native(self, stored: Config, target: TargetConfig) -> dict[str, Any]:
        """DeepSpec's config.json; UserError for blocks or heads that drafters here do not have."""
        architecture = str((stored.get("architectures") or ["?"])[0])
        if architecture.endswith(_EAGLE3) or "eagle_config" in stored:
            return self._eagle3_to_native(stored, architecture, target)

        if architecture == "DFlash2DraftModel":
            return self._dflash2_to_native(stored, target)

        # Heads may be named inside and outside; where both are, they must agree.
        nested = dict(stored.get("dflash_config") or {})
        _refuse_other_blocks(architecture, nested)

        native = {name: value for name, value in stored.items() if name not in ("dflash_config", "auto_map")}

        for name, value in nested.items():
            if name in native and name in _HEADS and native[name] != value:
                raise UserError(
                    f"The drafter's config.json says {name} = {native[name]!r} and, in dflash_config, {value!r}; "
                    "they must agree. Correct the one that is wrong."
                )
            if name in (*_HEADS, "target_layer_ids", "mask_token_id"):
                native[name] = value

        # Servers' defaults for absent fields; they differ from DeepSpec's, which names every field of a head it has.
        native.setdefault("markov_rank", 0)
        native.setdefault("enable_confidence_head", False)
        if native["markov_rank"]:
            native.setdefault("markov_head_type", "vanilla")
        if native["enable_confidence_head"]:
            native.setdefault("confidence_head_with_markov", native["markov_rank"] > 0)

        heads = native["markov_rank"] or native["enable_confidence_head"]

        # No field states the convention: "dspark", or any head, means that the anchor's row predicts (rule 91).
        anchor_predicts = nested.get("projector_type") == "dspark" or architecture == "DSparkDraftModel" or heads

        # z-lab's block_size counts rows, of which the anchor's predicts nothing; here it counts predictions.
        if not anchor_predicts and "block_size" in native:
            native |= {"sample_from_anchor": False, "block_size": native["block_size"] - 1}

        # DSpark and DFlash share an architecture in DeepSpec's layout (docs/algorithm.md, rule 27).
        native["architectures"] = [native_architecture(native, "dspark")]
        return {"num_target_layers": target.num_layers, "num_anchors": ANCHORS} | native

    def from_native(self, native: Config, target: Target) -> dict[str, Any]:
        """This layout's config.json; UserError for pruned vocabularies and for heads on a block that its readers would
        read as predicting from the anchor."""
        kind = require_kind(native, self.name)
        if "draft_vocabulary" in native:
            raise UserError(
                "This drafter's vocabulary is pruned, and the specforge layout has no place that says to which tokens. "
                "Write it in the speculators layout."
            )

        if kind == "eagle3":
            ids = {"eagle_aux_hidden_state_layer_ids": list(native["target_layer_ids"]), "use_aux_hidden_state": True}
            # The ids move into the nested object; everything else is DeepSpec's form already.
            kept = {name: value for name, value in native.items() if name != "target_layer_ids"}
            named = {"architectures": [drafter_family(native) + _EAGLE3], "draft_vocab_size": native["vocab_size"]}
            return kept | named | {"eagle_config": ids}

        if is_dflash2(native, self.name):
            return self._dflash2_from_native(native)

        moved = ("target_layer_ids", "mask_token_id", "sample_from_anchor")
        stored = {name: value for name, value in native.items() if name not in moved}
        nested = {name: native[name] for name in (*moved[:2], *_HEADS) if name in native}
        if native.get("sample_from_anchor", True):
            stored["architectures"] = ["DSparkDraftModel"]
            return stored | {"dflash_config": nested | {"projector_type": "dspark", "attention_mode": "gqa"}}

        if kind == "dspark":
            raise UserError(
                "This drafter's anchor row predicts nothing, and it has heads; the specforge layout reads every "
                "drafter with heads as predicting from the anchor. Write it in the speculators layout."
            )

        # z-lab counts the anchor's row in the block.
        stored |= {"architectures": ["DFlashDraftModel"], "block_size": native["block_size"] + 1}
        return stored | {"dflash_config": nested}

    def tensor(self, name: str, native: Config) -> str:
        """Eagle3's only layer is called `midlayer` here, a selector's tensors are DFlash 2's; other names are
        DeepSpec's."""
        if native.get("markov_head_type") == SELECTOR:
            return TENSORS.get(name, name)
        if require_kind(native, self.name) == "eagle3" and name.startswith("layers.0."):
            return "midlayer." + name.removeprefix("layers.0.")
        return name

    def frozen(self, native: Config) -> tuple[str, ...]:
        """The head for Eagle3; DFlash and DSpark drafters take both tables from the target."""
        return (HEAD,) if require_kind(native, self.name) == "eagle3" else ()

    def _dflash2_to_native(self, stored: Config, target: TargetConfig) -> dict[str, Any]:
        """DeepSpec's config.json of a DFlash 2 drafter."""
        nested = dict(stored.get("dflash_config") or {})
        # A cap or a factor of the base logits would change which candidates there are.
        off = {"causal": (False, None), "is_causal": (False, None), "output_multiplier": (1, 1.0, None),
               "final_logit_softcapping": (None,)}  # fmt: skip
        refuse_fields(nested, off, "dflash_config")
        refuse_fields(stored, off, "config.json")

        # Files have the block's size at top level, in the nested object, or in both.
        flat = {name: value for name, value in stored.items() if name not in ("dflash_config", "auto_map")} | nested
        native = from_dflash2(flat)
        native["architectures"] = [native_architecture(native, "dspark")]
        return {"num_target_layers": target.num_layers, "num_anchors": ANCHORS} | native

    def _dflash2_from_native(self, native: Config) -> dict[str, Any]:
        """This layout's config.json of a DFlash 2 drafter."""
        fields = to_dflash2(native)
        inner = ("block_size", "mask_token_id", "target_layer_ids", "selector_rank", *FIELDS)
        nested = {name: fields[name] for name in inner}
        # The block's size in both places, as readers look in either.
        stored = {name: value for name, value in fields.items() if name not in inner[1:]}
        return stored | {"architectures": ["DFlash2DraftModel"], "is_causal": False, "dflash_config": nested}

    def _eagle3_to_native(self, stored: Config, architecture: str, target: TargetConfig) -> dict[str, Any]:
        """DeepSpec's config.json of an Eagle3 drafter."""
        if architecture == "Llama" + _EAGLE3:
            raise UserError(
                f"The drafter's config.json names {architecture}, whose layer has no query and key norms; Eagle3 "
                f"drafters here have them (Qwen3{_EAGLE3}, Gemma4{_EAGLE3})."
            )

        _require_full_vocabulary(stored, stored.get("vocab_size"))
        nested = dict(stored.get("eagle_config") or {})
        native = {name: value for name, value in stored.items() if name not in ("eagle_config", "draft_vocab_size")}

        # Some readers default to (1, n/2 - 1, n - 4); a wrong guess would only show as short accepted lengths.
        if "eagle_aux_hidden_state_layer_ids" not in nested:
            raise UserError(
                "The drafter's config.json has no eagle_config.eagle_aux_hidden_state_layer_ids; its layers can't be "
                "guessed safely. Add the 0-based ids that it was trained with."
            )

        native["target_layer_ids"] = list(nested["eagle_aux_hidden_state_layer_ids"])
        native["architectures"] = [native_architecture(native, "eagle3")]
        return {"num_target_layers": target.num_layers} | native


def _refuse_other_blocks(architecture: str, nested: Config) -> None:
    """UserError for projectors, windows and masks that the blocks of this architecture do not have here."""
    # Values under which the fields change nothing; any other one means blocks of another form.
    harmless = {
        "projector_type": ("dspark", "dflash", None),
        "attention_mode": ("gqa", "mha", None),
        "use_swa": (False, None),
        "causal": (False, None),
        # A convolution without the architecture that has a selector too.
        "conv_kernel_size": (None,),
    }

    refuse_fields(nested, harmless, "dflash_config")


def _require_full_vocabulary(stored: Config, vocabulary: int | None) -> None:
    """UserError where `draft_vocab_size` says that the vocabulary is pruned: the layout cannot say to which ids."""
    reduced = stored.get("draft_vocab_size")
    if reduced is not None and reduced != vocabulary:
        raise UserError(
            f"The drafter's vocabulary is reduced to {reduced} of {vocabulary} tokens; drafters here speak the "
            "target's whole vocabulary. Give one that was trained with it."
        )
