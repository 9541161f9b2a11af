"""DFlash 2 in the layouts of z-lab and of the speculators library, which name its parts alike (docs/algorithm.md, rule
124). Here it is a DSpark drafter with local convolutions, the head "selector", and an anchor that waits.
"""

from typing import Any

from dspark_jax.checkpoints.folder_layout import Config
from dspark_jax.drafters.config import SELECTOR
from dspark_jax.errors import UserError

# DeepSpec's form of a name -> DFlash 2's, as z-lab and the speculators library store it.
TENSORS = {
    "markov_head.markov_w1.weight": "candidate_selector.predecessor_codebook",
    "markov_head.markov_w2.weight": "candidate_selector.successor_codebook",
    "markov_head.hidden_projection.weight": "candidate_selector.hidden_projection.weight",
}
FIELDS = ("conv_kernel_size", "conv_group_size", "selector_top_k")
_HEADS = ("markov_head_type", "enable_confidence_head", "confidence_head_with_markov", "markov_rank")


def is_dflash2(native: Config, layout: str) -> bool:
    """Whether a drafter is DFlash 2, which two layouts can say as a whole: convolutions, a selector and an anchor that
    waits, without other heads.

    Raises:
        UserError: a drafter with a part of it, or with more, which no reader of `layout` knows.
    """
    selects = native.get("markov_head_type") == SELECTOR
    if not (selects or native.get("conv_kernel_size") or native.get("context_window")):
        return False

    more = native.get("enable_confidence_head") or "draft_vocabulary" in native
    waits = not native.get("sample_from_anchor", True)
    if not (selects and native.get("conv_kernel_size") and waits) or more:
        raise UserError(
            f"The {layout} layout has a place for convolutions and a selector as DFlash 2 alone: both of them, an "
            "anchor that waits, the whole vocabulary and no confidence head. Write this drafter in the deepspec layout."
        )
    return True


def from_dflash2(fields: Config) -> dict[str, Any]:
    """DeepSpec's form of DFlash 2's fields at top level: the selector is a head, the layers' window the context's."""
    types = set(fields.get("layer_types") or ["full_attention"])
    if len(types) > 1:
        raise UserError(
            f"The drafter's config.json has layer_types {sorted(types)}; draft layers here are of one type. Give a "
            "drafter whose layers are."
        )

    native = {name: value for name, value in fields.items() if name not in ("selector_rank", "is_causal")}
    if types == {"sliding_attention"}:
        native["context_window"] = fields["sliding_window"]
    layers = fields["num_hidden_layers"]
    return native | {
        "markov_rank": fields["selector_rank"],
        "markov_head_type": SELECTOR,
        "enable_confidence_head": False,
        "layer_types": ["full_attention"] * layers,
        # `block_size` counts the anchor's row there.
        "sample_from_anchor": False,
        "block_size": fields["block_size"] - 1,
    }


def to_dflash2(native: Config) -> dict[str, Any]:
    """DFlash 2's fields at top level, the inverse of `from_dflash2`."""
    own = (*_HEADS, "context_window", "sample_from_anchor")
    fields = {name: value for name, value in native.items() if name not in own}
    fields |= {"selector_rank": native["markov_rank"], "block_size": native["block_size"] + 1}
    if window := native.get("context_window"):
        fields |= {"sliding_window": window, "layer_types": ["sliding_attention"] * native["num_hidden_layers"]}
    return fields
