"""Stored tensors that no parameter is read from: the harmless ones by name, all others refused.

A model whose config calls for fewer tensors than its folder holds is another model: its depth was edited, scales belong
to a quantisation that is not read, or heads or experts are not implemented. It would load and compute something else.
"""

import re
from collections.abc import Iterable, Mapping

from dspark_jax.checkpoints.tensors import TensorFolder
from dspark_jax.errors import UserError

HARMLESS: Mapping[str, tuple[str, ...]] = {
    # Buffers that older libraries stored; the config implies them.
    "any": (r"(.*\.)?rotary_emb\.inv_freq",),
    # The other parts of a multimodal model.
    "multimodal": (r"model\.\w*(vision|visual|audio|multi_?modal)\w*\..*",),
    # A V4 repository's drafter, which is loaded separately, and for that drafter the target beside it.
    "deepseek_v4": (r"mtp\..*",),
    "deepseek_v4_drafter": (r"(?!mtp\.).*",),
    # The target's own tables, compared with it, and the maps between draft and target ids, which are read separately.
    "drafter": (r"embed_tokens\.weight", r"lm_head\.weight", r"d2t", r"t2d"),
    # The verifier's tensors, which the speculators library keeps beside a drafter and reads from the verifier.
    "speculators": (r"verifier_norm\.weight", r"verifier_lm_head\.weight"),
}
"""Kind of folder -> patterns of whole names."""


def refuse_leftovers(tensors: TensorFolder, needed: Iterable[str], kinds: Iterable[str]) -> None:
    """Checks that a folder holds only tensors that its model reads.

    Args:
        tensors: the folder.
        needed: stored names of all the model's parameters.
        kinds: keys of `HARMLESS`, in addition to "any", whose tensors are allowed as well.

    Raises:
        UserError: names the first tensor left over, and says how many there are.
    """
    # Whole names are matched: a pattern that matched a part would let unknown parameters pass.
    patterns = [re.compile(pattern) for kind in ("any", *kinds) for pattern in HARMLESS[kind]]

    left = [
        name for name in sorted(tensors.names - set(needed)) if not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(
            f"{tensors.folder} holds the tensor {left[0]}{more} that its config.json does not call for: the weights "
            "and the config are not of one model, or the weights are quantised in a form that is not read. Give the "
            "config.json that the weights were saved with."
        )
