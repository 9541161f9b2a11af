"""DeepSpec's own layout, the default: a flat config.json and tensors without a prefix. vLLM and SGLang read it.

The other layouts are translated to it and back; `drafter_tensor_map` says where each parameter is stored.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dspark_jax.checkpoints.folder_layout import DRAFT_HEAD, EMBEDDING, HEAD, Config
from dspark_jax.checkpoints.tensor_map import Layout, ParamPath, Stored, StoredApart, is_layer_tensor, layer_tensor
from dspark_jax.drafters.config import FAMILIES, DrafterConfig
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.target import Target

# Last name of a parameter -> (tensor's last name, layout), where they differ from the parameter's own.
_LEAVES = {
    "weight": ("weight", Layout.SAME),
    "weight_io": ("weight", Layout.LINEAR),
    "bias_o": ("bias", Layout.SAME),
    "w1_vr": ("markov_w1.weight", Layout.SAME),
    "w2_vr": ("markov_w2.weight", Layout.SAME),
    "draft_head_pd": (DRAFT_HEAD, Layout.SAME),
}


@dataclass(frozen=True)
class DeepSpecLayout:
    """Published by DeepSpec: config.json as `DrafterConfig` reads it, so translation is a copy."""

    name: str = "deepspec"
    layer_id_base: int = 0
    vocabulary_maps: bool = False

    def detects(self, stored: Config) -> bool:
        """True if `architectures` names a family and a drafter model, as in `Qwen3DSparkModel`."""
        named = [str(name) for name in stored.get("architectures") or []]
        return any(name.startswith(FAMILIES) and name.endswith("Model") for name in named)

    def to_native(self, stored: Config, target: TargetConfig) -> dict[str, Any]:
        """A copy: the stored config is DeepSpec's already."""
        return dict(stored)

    def from_native(self, native: Config, target: Target) -> dict[str, Any]:
        """A copy. A drafter with parts that DeepSpec's readers don't know has another architecture's name, by which
        they refuse it (docs/algorithm.md, rule 124)."""
        return dict(native)

    def tensor(self, name: str, native: Config) -> str:
        """The name itself: tensors bear no prefix (docs/algorithm.md, rule 90)."""
        return name

    def frozen(self, native: Config) -> tuple[str, ...]:
        """Both tables, stored untied even where the target ties them (docs/algorithm.md, rule 18)."""
        return (EMBEDDING, HEAD)


def drafter_tensor_map(config: DrafterConfig, paths: Iterable[ParamPath]) -> dict[ParamPath, Stored | StoredApart]:
    """Parameter path -> DeepSpec tensor, for the parameters at `paths`.

    Draft layers have the target's names without `model.`; everything else is stored under its attributes' names, so a
    new head or a new drafter needs no entry here.
    """
    table: dict[ParamPath, Stored | StoredApart] = {}

    for path in paths:
        # The backbone is a module of ours; DeepSpec's drafter has its parts at top level.
        named = path[1:] if path[0] == "backbone" else path
        below = named[2:] if named[0] == "layers" else None

        # A draft layer is a target's block, stored under the target's names.
        if below is not None and is_layer_tensor(below):
            table[path] = layer_tensor(below, f"layers.{named[1]}", config.backbone, named[1])
        else:
            # The attribute's name is the tensor's, which is why attributes of heads must not be renamed.
            leaf, layout = _LEAVES.get(path[-1], (path[-1], Layout.SAME))
            table[path] = Stored(".".join([*map(str, named[:-1]), leaf]), layout)

    return table
