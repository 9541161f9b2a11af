"""The interface of a layout of drafter folders: its config.json and tensor names, translated to DeepSpec's and back.

DeepSpec's own layout is the common form: `DrafterConfig` reads its config, and parameters map to its tensors.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from dspark_jax.drafters.config import drafter_family, extended
from dspark_jax.drafters.registry import DRAFTERS, kind_name
from dspark_jax.errors import UserError
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.target import Target

Config = Mapping[str, Any]
CONFIG_FILE = "config.json"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
DRAFT_HEAD = "draft_head.weight"  # the target's rows for a pruned draft vocabulary
ANCHORS = 512  # DeepSpec's value in training, which the other layouts need not state


class FolderLayout(Protocol):
    """`to_native(from_native(config))` is `config` again, for every drafter that the layout can hold."""

    @property
    def name(self) -> str:
        """The layout's name in `checkpoints.layouts` and in manifests."""
        ...

    @property
    def layer_id_base(self) -> int:
        """Added to a 0-based layer id when it is stored."""
        ...

    @property
    def vocabulary_maps(self) -> bool:
        """Whether its readers know `d2t` and `t2d`, tables between draft and target ids."""
        ...

    def detects(self, stored: Config) -> bool:
        """Whether this config.json is in this layout."""
        ...

    def to_native(self, stored: Config, target: TargetConfig) -> dict[str, Any]:
        """DeepSpec's config.json; UserError for a drafter that cannot exist here. `target` fills in absent fields."""
        ...

    def from_native(self, native: Config, target: Target) -> dict[str, Any]:
        """This layout's config.json; UserError for a drafter that its readers would misread."""
        ...

    def tensor(self, name: str, native: Config) -> str:
        """The stored name of DeepSpec's tensor `name`."""
        ...

    def frozen(self, native: Config) -> tuple[str, ...]:
        """The copies of the target's tables that its readers expect, by DeepSpec's names."""
        ...


def require_kind(native: Config, layout: str) -> str:
    """The kind, if the layout can hold it; UserError otherwise."""
    kind = kind_name(native)
    if kind not in ("dspark", "dflash", "eagle3"):
        raise UserError(
            f"The {layout} layout has no place for a drafter of kind {kind}; it holds DSpark, DFlash and Eagle3. "
            "Write it in the deepspec layout."
        )
    return kind


def native_architecture(fields: Config, kind: str) -> str:
    """DeepSpec's name of a kind whose draft layers have this model_type; UserError for layers without such a name."""
    model_type = str(fields.get("model_type"))

    # Layers of another family have other norms or biases, even where all shapes agree.
    if model_type != "qwen3" and not model_type.startswith("gemma4"):
        raise UserError(
            f"The drafter's layers are of model_type {model_type!r}; drafters here are made of 'qwen3' or Gemma 4 "
            "layers. Give a drafter that was trained with those."
        )

    described = DRAFTERS[kind]
    return drafter_family(fields) + (described.extension if extended(fields) else described.architecture)


def refuse_fields(fields: Config, refused: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """UserError where a field is present with a value other than `refused`'s, under which it has no effect."""
    for name, harmless in refused.items():
        if name in fields and fields[name] not in harmless:
            raise UserError(
                f"The drafter's {where} has {name} = {fields[name]!r}, which drafters here do not compute (only "
                f"{' or '.join(repr(value) for value in harmless)}); give a drafter without it."
            )
